"""The interface of a trained vocabulary; sentence_pieces.py and json_pieces.py implement it."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from enum import Enum

from mistral.pieces.added import AddedToken

SPACE = "\u2581"  # sentencepiece's spelling of a space inside a piece: ▁


class Place(Enum):
    """Where a stretch of text is. It decides about the leading space that is added to it."""

    START = "at the beginning"
    AFTER_TOKEN = "after a token that was added"
    INSIDE = "after other text, which it continues"


class Pieces(ABC):
    """Text to ids and back, without control tokens: the vocabulary that was trained.

    size              1 + the largest id
    control           id -> text of the control tokens in it, the unknown token among them
    words             added tokens in it that are text
    bos_id, eos_id    its own begin and end tokens; None: it names none
    space_at          the places at which text gets a leading space that is not part of it
    """

    size: int
    control: Mapping[int, str]
    words: Mapping[int, AddedToken]
    bos_id: int | None
    eos_id: int | None
    space_at: frozenset[Place]

    @abstractmethod
    def without(self, ids: Collection[int]) -> "Pieces":
        """The same vocabulary, of which `encode` never returns these ids."""

    @abstractmethod
    def encode(self, text: str, place: Place) -> list[int]:
        """Ids of a stretch of text without added tokens.

        Raises ValueError if the vocabulary cannot spell the text.
        """

    @abstractmethod
    def normalize(self, text: str, place: Place) -> str:
        """The text in the form in which it is split into pieces."""

    @abstractmethod
    def encode_normalized(self, text: str, place: Place) -> list[int]:
        """Ids of a part of a normalized text; `encode` is both steps at once."""

    @abstractmethod
    def spelling(self, id: int) -> str | None:
        """A piece as the vocabulary spells it; None for an id without a piece."""

    @abstractmethod
    def id_of(self, spelling: str) -> int | None:
        """The id of the piece with this spelling; None if there is none."""

    @abstractmethod
    def token_bytes(self, id: int) -> bytes | None:
        """The UTF-8 bytes of a piece; None for control tokens and ids without text."""

    @abstractmethod
    def text_bytes(self, normalized: str) -> bytes:
        """The UTF-8 bytes of the text whose normalized form this is."""

    @abstractmethod
    def is_byte(self, id: int) -> bool:
        """Whether a piece is a single byte of a character that the vocabulary lacks."""

    @abstractmethod
    def entries(self) -> list[tuple[str, float, int]]:
        """Text, score and type of every id below `size`, as `Tokenizer.vocabulary` has them."""
