"""Text to token ids and back, with the vocabulary that a checkpoint carries.

Control tokens (`<s>`, `</s>`, `<|im_start|>`, ...) are kept apart from text in both directions:
text that spells one stays text unless the caller asks otherwise, and decoding omits them unless
asked. Tokens that were added as text (`<think>`, new words) are text.

The pieces themselves are found by a library, see `mistral/pieces/`. With most tokenizers of
Mistral every stretch of text between added tokens gets a leading space of its own: the training
data of Mistral and Hermes were split like this (Hugging Face calls it `legacy`).
"""

import codecs
import operator
from collections.abc import Iterable, Mapping

from mistral.errors import CheckpointError, shown
from mistral.pieces import (
    AddedToken,
    Pieces,
    Place,
    SentencePieces,
    Splitter,
    is_control_spelling,
)
from mistral.pieces.model_proto import CONTROL, UNKNOWN, UNUSED, USER_DEFINED


class Tokenizer:
    """A checkpoint's tokenizer.

    pieces          the trained vocabulary; bytes: those of a `tokenizer.model`
    added           id -> the tokens that were added to it; a string is a control token
    stop_ids        ids at which generation ends; the first is `eos_id`. None: the vocabulary's own
                    end token
    bos_id          the begin-of-text token. None: the vocabulary's own
    adds_bos        whether the checkpoint wants the begin-of-text token before a text
    chat_templates  the chat templates of the checkpoint by name; the one to use is "default"

    An added token is a control token if it is special, begins or ends a text, or is spelled like
    one (`is_control_spelling`); all others are text.

    Raises CheckpointError for bytes that are not a sentencepiece model, for added tokens that
    contradict the vocabulary, and for a `bos_id` that is not a control token.
    """

    def __init__(
        self,
        pieces: bytes | Pieces,
        added: Mapping[int, str | AddedToken] = {},
        stop_ids: Iterable[int] | None = None,
        bos_id: int | None = None,
        *,
        adds_bos: bool = True,
        chat_templates: Mapping[str, str] = {},
    ):
        # 1. The tokens that begin and end a text.
        pieces = SentencePieces(pieces) if isinstance(pieces, bytes) else pieces
        self.bos_id: int | None = pieces.bos_id if bos_id is None else bos_id
        own_end = () if pieces.eos_id is None else (pieces.eos_id,)
        self.stop_ids = own_end if stop_ids is None else tuple(stop_ids)
        self.eos_id: int | None = self.stop_ids[0] if self.stop_ids else None
        self.adds_bos = adds_bos
        self.chat_templates = dict(chat_templates)

        # 2. The added tokens: control tokens and words.
        listed = {
            id: AddedToken(token) if isinstance(token, str) else token
            for id, token in added.items()
        }
        _check_added(listed, pieces)
        self.words: dict[int, AddedToken] = dict(pieces.words)
        controls = {id: AddedToken(text) for id, text in pieces.control.items()}
        for id, token in listed.items():
            marked = token.special or id == self.bos_id or id in self.stop_ids
            if marked or id in controls or is_control_spelling(token.text):
                controls[id] = token
                self.words.pop(id, None)
            else:
                self.words[id] = token
        self.added_tokens = controls | self.words
        self.added = {id: token.text for id, token in listed.items() if id >= pieces.size}
        self.vocab_size = max(pieces.size, max(self.added, default=-1) + 1)
        self.control_ids = frozenset(controls)
        self._control = {id: token.text for id, token in controls.items()}
        self._control_id = {text: id for id, text in self._control.items()}
        if bos_id is not None and bos_id not in controls:
            raise CheckpointError(f"the begin token {bos_id} is not a control token")

        # 3. The pieces, and how to split a text at the added tokens that are searched for.
        self.pieces = pieces.without(self.control_ids)
        self._splitters = {
            True: self._splitters_for(self.added_tokens),
            False: self._splitters_for(self.words),
        }
        self._space_follows = self._tokens_before_a_space()

    def encode(
        self, text: str, bos: bool = True, special: bool = False, prefix_space: bool = True
    ) -> list[int]:
        """Ids of `text`.

        bos           begin with exactly one begin-of-text token, if the checkpoint wants one
                      (`adds_bos`): if `special` finds it at the beginning of the text, no other is
                      added
        special       parse control tokens that are spelled in the text. False: they stay text, and
                      no text can produce a control id
        prefix_space  give each stretch of text the leading space that words have inside a sentence,
                      as the vocabulary wants it. False: the text continues other text

        Raises ValueError for text that is not valid Unicode or that the vocabulary cannot spell,
        and for `bos` if the checkpoint wants a begin token and has none.
        """
        if not isinstance(text, str):
            raise ValueError(f"a str is needed, not {type(text).__name__}")
        text.encode("utf-8")  # a lone surrogate: UnicodeEncodeError, which is a ValueError
        bos = bos and self.adds_bos
        if bos and self.bos_id is None:
            raise ValueError("this tokenizer has no begin-of-text token; encode with bos=False")
        ids = [self.bos_id] if bos else []
        place = Place.START if prefix_space else Place.INSIDE
        raw, normalized = self._splitters[special]
        for id, part in raw.split(text):
            if id is None:
                ids += self._encode_part(part, place, normalized)
            else:
                ids.append(id)
                if prefix_space or id in self.words:
                    place = Place.AFTER_TOKEN
        return ids[1:] if bos and ids[1:2] == [self.bos_id] else ids

    def encode_after_control(self, text: str) -> list[int]:
        """Ids of a text that follows a control token, as `encode` with `special` splits it there.

        The text itself has no control tokens. Raises ValueError as `encode` does.
        """
        prefix_space = Place.AFTER_TOKEN in self.pieces.space_at
        return self.encode(text, bos=False, prefix_space=prefix_space)

    def decode(self, ids: Iterable[int], control: bool = False) -> str:
        """Text of `ids`; the inverse of `encode`, for text without U+2581.

        Control tokens are omitted, or spelled if `control` is set. Bytes that are not valid UTF-8
        become U+FFFD, one for each longest run that could have begun a character, as Unicode
        recommends. Raises ValueError for anything but whole numbers.
        """
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
            raise ValueError(f"ids are needed, not {ids!r}")
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
        if id in self.control_ids:
            return None
        if word := self.words.get(id):
            if word.normalized:
                return self.pieces.text_bytes(self.pieces.normalize(word.text, Place.START))
            return word.text.encode("utf-8")
        return self.pieces.token_bytes(id)

    def control_text(self, id: int) -> str | None:
        """The spelling of a control token; None for every other id."""
        return self._control.get(id)

    def control_id(self, text: str) -> int | None:
        """The id of the control token with this spelling; None if there is none."""
        return self._control_id.get(text)

    @property
    def adds_space(self) -> bool:
        """Whether a text gets a leading space that is not part of it."""
        return Place.START in self.pieces.space_at

    @property
    def model_proto(self) -> bytes:
        """The bytes of the sentencepiece model. ValueError if the vocabulary is another one."""
        if not isinstance(self.pieces, SentencePieces):
            raise ValueError("this tokenizer was not made of a sentencepiece model")
        return self.pieces.model_proto

    def vocabulary(self) -> list[tuple[str, float, int]]:
        """Text, score and type of every id, the type numbered as in sentencepiece and GGUF.

        1 ordinary, 2 unknown, 3 control, 4 text that was added, 5 unused, 6 byte. An id without a
        token is unused, as [PAD<id>].
        """
        entries = self.pieces.entries()
        for id in range(len(entries), self.vocab_size):
            entries.append((f"[PAD{id}]", -1000.0, UNUSED))
        for id, token in self.added_tokens.items():
            _, score, type = entries[id]
            if type != UNKNOWN:
                entries[id] = (token.text, score, USER_DEFINED if id in self.words else CONTROL)
        return entries

    def _splitters_for(self, tokens: Mapping[int, AddedToken]) -> tuple[Splitter, Splitter]:
        """What splits a text at these tokens: the text as it is, and then its normalized parts."""
        raw = {id: token for id, token in tokens.items() if not token.normalized}
        normalized = {id: token for id, token in tokens.items() if token.normalized}
        spelled = {
            id: self.pieces.normalize(token.text, Place.START) for id, token in normalized.items()
        }
        return Splitter(raw), Splitter(normalized, spelled)

    def _encode_part(self, text: str, place: Place, normalized: Splitter) -> list[int]:
        """Ids of text between the added tokens that are searched for in the text as it is."""
        if not normalized:
            return self.pieces.encode(text, place)
        ids = []
        for id, part in normalized.split(self.pieces.normalize(text, place)):
            if id is None:
                ids += self.pieces.encode_normalized(part, place)
            else:
                ids.append(id)
                place = Place.AFTER_TOKEN
        return ids

    def _tokens_before_a_space(self) -> frozenset[int]:
        """The added tokens after which text gets a leading space that is not part of it."""
        if Place.AFTER_TOKEN not in self.pieces.space_at:
            return frozenset()
        # A normalizer adds the space before normalized tokens are found, a pre-tokenizer after it.
        from_normalizer = self.pieces.normalize("a", Place.AFTER_TOKEN) != "a"
        return frozenset(
            id
            for id, token in self.added_tokens.items()
            if not (from_normalizer and token.normalized)
        )

    def _without_added_space(self, id: int, text: bytes) -> bytes:
        """The bytes of the first token of a text, without the space that `encode` has added."""
        is_raw_word = id in self.words and not self.words[id].normalized
        if is_raw_word or self.pieces.is_byte(id):
            return text
        return text.removeprefix(b" ")


class TextStream:
    """Ids to text, piece by piece; an incomplete character is held back until it is complete."""

    def __init__(self, tokenizer: Tokenizer, strip_leading_space: bool, control: bool):
        self._tokenizer = tokenizer
        self._at_start = strip_leading_space and tokenizer.adds_space
        self._control = control
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The text that one more id makes final; often "" inside a character of several bytes."""
        tokenizer = self._tokenizer
        try:
            id = operator.index(id)  # of numpy and of PyTorch, too
        except TypeError:
            raise ValueError(f"an id is a whole number, not {id!r}") from None
        piece = tokenizer.token_bytes(id)
        if piece is None:  # a control token, or an id without a token: the text before it has ended
            text = self.finish()
            is_begin = id == tokenizer.bos_id
            self._at_start = id in tokenizer._space_follows or (is_begin and self._at_start)
            if self._control:
                text += tokenizer.control_text(id) or ""
            return text
        if self._at_start:
            piece = tokenizer._without_added_space(id, piece)
        self._at_start = id in tokenizer._space_follows
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """The text still held back: U+FFFD for a character that was never completed."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _check_added(added: Mapping[int, AddedToken], pieces: Pieces) -> None:
    """Raises CheckpointError for two ids of one text, and for ids that are another piece's."""
    ids: dict[str, int] = {}
    for id, token in added.items():
        text = token.text
        if not text or id < 0:
            raise CheckpointError(
                f"added token {id} ({shown(text)}) needs text and an id of 0 or more"
            )
        if ids.setdefault(text, id) != id:
            raise CheckpointError(f"added token {shown(text)} has two ids")
        if id < pieces.size and pieces.spelling(id) not in (text, None):
            raise CheckpointError(
                f"added token {shown(text)} claims id {id}, which is {shown(pieces.spelling(id))}"
            )
