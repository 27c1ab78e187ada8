"""Text to token ids and back, with the sentencepiece model that a checkpoint carries.

Control tokens (`<s>`, `</s>`, `<|im_start|>`, ...) are kept apart from text in both directions:
text that spells one stays text unless the caller asks otherwise, and decoding omits them unless
asked. Every stretch of text between control tokens gets a leading space of its own: the training
data of Mistral and Hermes were split like this (Hugging Face calls it `legacy`).
"""

import codecs
import re
from collections.abc import Iterable, Mapping

from sentencepiece import SentencePieceProcessor

from mistral.errors import CheckpointError

SPACE = "\u2581"  # sentencepiece's spelling of a space inside a piece: ▁


class Tokenizer:
    """A checkpoint's tokenizer.

    model_proto  the bytes of a `tokenizer.model`
    added        id -> text of the tokens outside of it, all of them control tokens
    stop_ids     ids at which generation ends; the first is `eos_id`. None: the sentencepiece
                 model's end token
    bos_id       the begin-of-text token. None: the sentencepiece model's own

    Raises CheckpointError for bytes that are not a sentencepiece model, for added tokens that
    contradict it, and for a `bos_id` that is not a control token.
    """

    def __init__(
        self,
        model_proto: bytes,
        added: Mapping[int, str] = {},
        stop_ids: Iterable[int] | None = None,
        bos_id: int | None = None,
    ):
        # 1. The sentencepiece model.
        self.model_proto = model_proto
        self._pieces = SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model_proto)
            pieces = [self._pieces.IdToPiece(id) for id in range(len(self._pieces))]
        except (RuntimeError, TypeError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"not a sentencepiece model ({len(model_proto)} bytes): {error}"
            ) from error
        if not pieces:
            raise CheckpointError("the sentencepiece model has no pieces")
        self.adds_space = "".join(self._pieces.encode("a", out_type=str)).startswith(SPACE)
        # A newline is always a piece of its own, so text after one is split as if it came first.
        self._newline = self._pieces.encode("\n")

        # 2. The control tokens. The unknown token is one of them: it stands for no text, and byte
        #    pieces leave nothing unknown.
        _check_added(added, pieces)
        self.added = {id: text for id, text in added.items() if id >= len(pieces)}
        self.vocab_size = max(self.added, default=len(pieces) - 1) + 1
        self._control: dict[int, str] = {}
        for id, piece in enumerate(pieces):
            if self._pieces.IsControl(id) or self._pieces.IsUnknown(id):
                self._control[id] = piece
        self._control |= self.added
        self.control_ids = frozenset(self._control)
        self._control_id = {text: id for id, text in self._control.items()}
        longest_first = sorted(self._control_id, key=len, reverse=True)
        any_control = "|".join(map(re.escape, longest_first)) or "(?!)"  # (?!) never matches
        self._special = re.compile(f"({any_control})")

        # 3. The tokens that begin and end a text.
        own_begin = self._pieces.bos_id() if self._pieces.bos_id() >= 0 else None
        self.bos_id: int | None = own_begin if bos_id is None else bos_id
        if bos_id is not None and bos_id not in self._control:
            raise CheckpointError(f"the begin token {bos_id} is not a control token")
        own_end = (self._pieces.eos_id(),) if self._pieces.eos_id() >= 0 else ()
        self.stop_ids = own_end if stop_ids is None else tuple(stop_ids)
        self.eos_id: int | None = self.stop_ids[0] if self.stop_ids else None

        # 4. The bytes that each piece stands for.
        self._bytes = [self._piece_bytes(id, piece) for id, piece in enumerate(pieces)]

    def encode(
        self, text: str, bos: bool = True, special: bool = False, prefix_space: bool = True
    ) -> list[int]:
        """Ids of `text`.

        bos           begin with exactly one begin-of-text token: if `special` finds it at the
                      beginning of the text, no other is added
        special       parse control tokens that are spelled in the text. False: they stay text, and
                      no text can produce a control id
        prefix_space  give each stretch of text the leading space that words have inside a sentence.
                      False: the text continues other text

        Raises ValueError for text that is not valid Unicode, and for `bos` if the model has no such
        token.
        """
        text.encode("utf-8")  # a lone surrogate: UnicodeEncodeError, which is a ValueError
        if bos and self.bos_id is None:
            raise ValueError("this tokenizer has no begin-of-text token; encode with bos=False")
        ids = [self.bos_id] if bos else []
        # Split at the control tokens, the odd parts are the control tokens themselves.
        for i, part in enumerate(self._special.split(text) if special else [text]):
            if i % 2:
                ids.append(self._control_id[part])
            elif part and prefix_space:
                ids += self._pieces.encode(part)
            elif part:
                ids += self._pieces.encode("\n" + part)[len(self._newline) :]
        return ids[1:] if bos and ids[1:2] == [self.bos_id] else ids

    def decode(self, ids: Iterable[int], control: bool = False) -> str:
        """Text of `ids`; the inverse of `encode`, for text without U+2581.

        Control tokens are omitted, or spelled if `control` is set. Bytes that are not valid UTF-8
        become U+FFFD, one for each longest run that could have begun a character, as Unicode
        recommends.
        """
        stream = TextStream(self, strip_leading_space=True, control=control)
        return "".join([stream.feed(id) for id in ids] + [stream.finish()])

    def stream(self, strip_leading_space: bool = False, control: bool = False) -> "TextStream":
        """A decoder that is fed one id at a time.

        strip_leading_space  the ids begin a text, whose leading space is not part of it. False:
                             the ids follow others, as those that a model generates after a prompt
        """
        return TextStream(self, strip_leading_space=strip_leading_space, control=control)

    def token_bytes(self, id: int) -> bytes | None:
        """The UTF-8 bytes of a token, perhaps part of a character; None if it has no text."""
        return self._bytes[id] if 0 <= id < len(self._bytes) else None

    def control_text(self, id: int) -> str | None:
        """The spelling of a control token; None for every other id."""
        return self._control.get(id)

    def control_id(self, text: str) -> int | None:
        """The id of the control token with this spelling; None if there is none."""
        return self._control_id.get(text)

    def vocabulary(self) -> list[tuple[str, float, int]]:
        """Text, score and type of every id, the type numbered as in sentencepiece and GGUF.

        1 ordinary, 2 unknown, 3 control, 5 unused, 6 byte. (4 is user-defined, which the library
        calls ordinary.) Added tokens are control tokens; an id between them without a token is
        unused, as [PAD<id>].
        """
        pieces = self._pieces
        types = {2: pieces.IsUnknown, 3: pieces.IsControl, 5: pieces.IsUnused, 6: pieces.IsByte}
        entries = []
        for id in range(len(pieces)):
            type = next((number for number, holds in types.items() if holds(id)), 1)
            entries.append((pieces.IdToPiece(id), pieces.GetScore(id), type))
        for id in range(len(pieces), self.vocab_size):
            if id in self.added:
                entries.append((self.added[id], -1000.0, 3))
            else:
                entries.append((f"[PAD{id}]", -1000.0, 5))
        return entries

    def _piece_bytes(self, id: int, piece: str) -> bytes | None:
        if id in self._control or self._pieces.IsUnused(id):
            return None
        if self._pieces.IsByte(id):
            return bytes([int(piece[3:-1], 16)])  # <0x0A>
        return piece.replace(SPACE, " ").encode("utf-8")

    def _begins_with_space(self, id: int) -> bool:
        return (
            self.adds_space
            and (self.token_bytes(id) or b"").startswith(b" ")
            and not self._pieces.IsByte(id)
        )


class TextStream:
    """Ids to text, piece by piece; an incomplete character is held back until it is complete."""

    def __init__(self, tokenizer: Tokenizer, strip_leading_space: bool, control: bool):
        self._tokenizer = tokenizer
        self._at_start = strip_leading_space
        self._control = control
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The text that one more id makes final; often "" inside a character of several bytes."""
        piece = self._tokenizer.token_bytes(id)
        if piece is None:  # a control token, or an id without a token: the text before it has ended
            text = self.finish()
            self._at_start = id in self._tokenizer.control_ids
            if self._control:
                text += self._tokenizer.control_text(id) or ""
            return text
        if self._at_start and self._tokenizer._begins_with_space(id):
            piece = piece[1:]
        self._at_start = False
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """The text still held back: U+FFFD for a character that was never completed."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _check_added(added: Mapping[int, str], pieces: list[str]) -> None:
    """Raises CheckpointError for two ids of one text, and for ids that are another piece's."""
    if len(set(added.values())) < len(added):
        twice = next(text for text in added.values() if list(added.values()).count(text) > 1)
        raise CheckpointError(f"added token {twice!r} has two ids")
    for id, text in added.items():
        if not text or id < 0:
            raise CheckpointError(f"added token {id} ({text!r}) needs text and an id of 0 or more")
        if id < len(pieces) and pieces[id] != text:
            raise CheckpointError(f"added token {text!r} claims id {id}, which is {pieces[id]!r}")
