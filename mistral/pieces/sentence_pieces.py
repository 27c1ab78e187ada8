"""A sentencepiece model: the `tokenizer.model` of a checkpoint."""

from collections.abc import Collection

from sentencepiece import SentencePieceProcessor

from mistral.errors import CheckpointError
from mistral.pieces.added import AddedToken, is_control_spelling
from mistral.pieces.base import SPACE, Pieces, Place
from mistral.pieces.model_proto import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    as_control,
    user_defined_ids,
)

LARGEST_MODEL = 64 << 20  # bytes of a tokenizer.model; the largest in use take 5 MB


class SentencePieces(Pieces):
    """The pieces of a sentencepiece model.

    User-defined pieces are searched for like tokens that were added to the model, as Hugging Face
    does. The library alone would find them first, control tokens among them.

    Raises CheckpointError for bytes that are not a sentencepiece model.
    """

    def __init__(self, model_proto: bytes, hidden: Collection[int] = ()):
        self.model_proto = model_proto  # as given
        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model_proto)
            self.size = len(self._model)
            self._pieces = [self._model.IdToPiece(id) for id in range(self.size)]
            self._types = self._read_types()
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"not a sentencepiece model ({len(model_proto)} bytes): {error}"
            ) from error
        if not self._pieces:
            raise CheckpointError("the sentencepiece model has no pieces")

        # 1. Control tokens. The unknown token is one of them: it stands for no text, and byte
        #    pieces leave nothing unknown.
        self.control = {}
        self.words = {}
        for id, piece in enumerate(self._pieces):
            defined = self._types[id] == USER_DEFINED and SPACE not in piece
            if self._types[id] in (CONTROL, UNKNOWN) or (defined and is_control_spelling(piece)):
                self.control[id] = piece
            elif defined:
                self.words[id] = AddedToken(piece, special=False)
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.eos_id = self._model.eos_id() if self._model.eos_id() >= 0 else None

        # 2. The library must not find them, or what the caller hides, in a text.
        searched = {*self.control, *self.words}
        found = {id for id in searched if self._types[id] == USER_DEFINED} | set(hidden)
        if found:
            self._model.LoadFromSerializedProto(as_control(model_proto, found))
        begins = "".join(self._model.encode("a", out_type=str)).startswith(SPACE)
        self.space_at = frozenset((Place.START, Place.AFTER_TOKEN) if begins else ())
        # A newline is always a piece of its own, so text after one is split as if it came first.
        self._newline = self._model.encode("\n")

    def without(self, ids: Collection[int]) -> "SentencePieces":
        hidden = {id for id in ids if id < self.size and self._types[id] == NORMAL}
        return SentencePieces(self.model_proto, hidden) if hidden else self

    def _read_types(self) -> list[int]:
        model = self._model
        user_defined = user_defined_ids(self.model_proto)
        tests = {
            UNKNOWN: model.IsUnknown,
            CONTROL: model.IsControl,
            UNUSED: model.IsUnused,
            BYTE: model.IsByte,
            USER_DEFINED: user_defined.__contains__,
        }
        types = []
        for id in range(self.size):
            types.append(next((type for type, holds in tests.items() if holds(id)), NORMAL))
        return types

    def encode(self, text: str, place: Place) -> list[int]:
        if place == Place.INSIDE:
            return self.encode_normalized(text, place)
        return self._model.encode(text)

    def normalize(self, text: str, place: Place) -> str:
        prefix = SPACE if place in self.space_at else ""
        return prefix + text.replace(" ", SPACE)

    def encode_normalized(self, text: str, place: Place) -> list[int]:
        return self._model.encode("\n" + text)[len(self._newline) :]

    def spelling(self, id: int) -> str | None:
        return self._pieces[id] if 0 <= id < self.size else None

    def id_of(self, spelling: str) -> int | None:
        id = self._model.PieceToId(spelling)
        return id if self.spelling(id) == spelling else None

    def token_bytes(self, id: int) -> bytes | None:
        piece = self.spelling(id)
        if piece is None or id in self.control or self._types[id] == UNUSED:
            return None
        if self.is_byte(id):
            return bytes([int(piece[3:-1], 16)])  # <0x0A>
        return self.text_bytes(piece)

    def text_bytes(self, normalized: str) -> bytes:
        return normalized.replace(SPACE, " ").encode("utf-8")

    def is_byte(self, id: int) -> bool:
        return 0 <= id < self.size and self._types[id] == BYTE

    def entries(self) -> list[tuple[str, float, int]]:
        return [
            (piece, self._model.GetScore(id), self._types[id])
            for id, piece in enumerate(self._pieces)
        ]
