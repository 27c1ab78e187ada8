"""Text to token ids and back, with the sentencepiece model that a checkpoint carries.

Control tokens (`<s>`, `</s>`, `<|im_start|>`, ...) are kept apart from text in both directions:
text that spells one stays text unless the caller asks otherwise, and decoding leaves them out
unless asked. Every stretch of text between control tokens gets sentencepiece's leading space of its
own; Mistral's own and Hermes' training data were split so (Hugging Face calls it `legacy`).
"""

import codecs
import re
from collections.abc import Iterable, Mapping

from sentencepiece import SentencePieceProcessor

from mistral.errors import CheckpointError

SPACE = "\u2581"  # how sentencepiece writes a space inside a piece: ▁


class Tokenizer:
    """A checkpoint's tokenizer.

    model_proto  the bytes of a `tokenizer.model`
    added        id -> text of the tokens that stand outside of it. All of them are control tokens.
    stop_ids     ids at which generation ends; the first is `eos_id`. None: the sentencepiece
                 model's end token.
    bos_id       the token that begins a text. None: the sentencepiece model's own.

    Raises CheckpointError for bytes that are no sentencepiece model, for added tokens that
    contradict it, and for a `bos_id` that is no control token.
    """

    def __init__(
        self,
        model_proto: bytes,
        added: Mapping[int, str] = {},
        stop_ids: Iterable[int] | None = None,
        bos_id: int | None = None,
    ):
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
        _check_added(added, pieces)
        self.added = {id: text for id, text in added.items() if id >= len(pieces)}

        # The unknown token is one of the control tokens: it stands for no text, and byte pieces
        # leave nothing unknown.
        silent = [
            id
            for id in range(len(pieces))
            if self._pieces.IsControl(id) or self._pieces.IsUnknown(id)
        ]
        self._control = {id: pieces[id] for id in silent} | self.added
        self.control_ids = frozenset(self._control)
        self.vocab_size = (
            max(len(pieces), *(id + 1 for id in self.added)) if self.added else len(pieces)
        )
        own_begin = self._pieces.bos_id() if self._pieces.bos_id() >= 0 else None
        self.bos_id: int | None = own_begin if bos_id is None else bos_id
        if bos_id is not None and bos_id not in self._control:
            raise CheckpointError(f"the begin token {bos_id} is not a control token")
        own_end = (self._pieces.eos_id(),) if self._pieces.eos_id() >= 0 else ()
        self.stop_ids = own_end if stop_ids is None else tuple(stop_ids)
        self.eos_id: int | None = self.stop_ids[0] if self.stop_ids else None

        self._bytes = [self._piece_bytes(id, piece) for id, piece in enumerate(pieces)]
        self._control_id = {text: id for id, text in self._control.items()}
        longest_first = sorted(self._control_id, key=len, reverse=True)
        any_control = "|".join(map(re.escape, longest_first)) or "(?!)"  # which never matches
        self._special = re.compile(f"({any_control})")
        self.adds_space = "".join(self._pieces.encode("a", out_type=str)).startswith(SPACE)
        # A newline belongs to no piece but its own, so text behind one is split as if nothing stood
        # before it.
        self._newline = self._pieces.encode("\n")

    def encode(
        self, text: str, bos: bool = True, special: bool = False, prefix_space: bool = True
    ) -> list[int]:
        """Ids of `text`.

        bos           begin with the begin-of-text token, exactly one of them: where `special` finds
                      it spelled at the beginning of the text, no other is added
        special       parse control tokens that are spelled in the text. False: they stay text, and
                      no text can produce a control id.
        prefix_space  give each stretch of text the leading space that words have inside a sentence;
                      False where the text goes on right behind other text

        Raises ValueError for text that is not valid Unicode, and for `bos` where the model has no
        such token.
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

        Control tokens are left out, or with `control` spelled. Bytes that are no UTF-8 become
        U+FFFD, one for each longest run that could have begun a character, as Unicode recommends.
        """
        stream = TextStream(self, start=True, control=control)
        return "".join([stream.feed(id) for id in ids] + [stream.finish()])

    def stream(self, start: bool = False, control: bool = False) -> "TextStream":
        """A decoder that is fed one id at a time.

        start  the ids begin a text, so that its first leading space is not part of it; False for
               ids that a model generates behind a prompt.
        """
        return TextStream(self, start=start, control=control)

    def token_bytes(self, id: int) -> bytes | None:
        """The UTF-8 bytes (perhaps a part of a character) that a token stands for;

        None if it stands for no text.
        """
        return self._bytes[id] if 0 <= id < len(self._bytes) else None

    def control_text(self, id: int) -> str | None:
        """How a control token is spelled; None for every other id."""
        return self._control.get(id)

    def control_id(self, text: str) -> int | None:
        """The control token that is spelled so; None if none is."""
        return self._control_id.get(text)

    def vocabulary(self) -> list[tuple[str, float, int]]:
        """Text, score and kind of every id, with the numbers that sentencepiece and GGUF give the
        kinds.

        1 ordinary, 2 unknown, 3 control, 5 unused, 6 byte. (4 is user-defined, which the library
        calls ordinary.) Added tokens are control tokens; an id between them that has no token is
        unused, as [PAD<id>].
        """
        pieces = self._pieces
        kinds = {2: pieces.IsUnknown, 3: pieces.IsControl, 5: pieces.IsUnused, 6: pieces.IsByte}
        entries = []
        for id in range(len(pieces)):
            kind = next((number for number, holds in kinds.items() if holds(id)), 1)
            entries.append((pieces.IdToPiece(id), pieces.GetScore(id), kind))
        for id in range(len(pieces), self.vocab_size):
            entries.append(
                (self.added.get(id, f"[PAD{id}]"), -1000.0, 3 if id in self.added else 5)
            )
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
    """Ids to text, piece by piece: what is returned is final, and a character that is not complete
    yet is held back.
    """

    def __init__(self, tokenizer: Tokenizer, start: bool, control: bool):
        self._tokenizer, self._at_start, self._control = tokenizer, start, control
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The text that is certain after one more id; often "" inside a character of several
        bytes.
        """
        piece = self._tokenizer.token_bytes(id)
        if piece is None:  # a control token, or an id without a token: the text before it has ended
            text = self.finish()
            self._at_start = id in self._tokenizer.control_ids
            return text + ((self._tokenizer.control_text(id) or "") if self._control else "")
        if self._at_start and self._tokenizer._begins_with_space(id):
            piece = piece[1:]
        self._at_start = False
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """The text still held back: U+FFFD for the beginning of a character that never came."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _check_added(added: Mapping[int, str], pieces: list[str]) -> None:
    if len(set(added.values())) < len(added):
        twice = next(text for text in added.values() if list(added.values()).count(text) > 1)
        raise CheckpointError(f"added token {twice!r} has two ids")
    for id, text in added.items():
        if not text or id < 0:
            raise CheckpointError(
                f"added token {id} ({text!r}) needs a text and an id of 0 or more"
            )
        if id < len(pieces) and pieces[id] != text:
            raise CheckpointError(f"added token {text!r} claims id {id}, which is {pieces[id]!r}")
