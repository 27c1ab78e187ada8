"""Text instead of ids: a prompt to pieces of text, up to a stop string."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing

from mistral.engine.base import Constraint, Engine
from mistral.engine.constraints import AnyToken, KnownTokens
from mistral.engine.generation import Generated, Rows
from mistral.engine.given import require_tokenizer
from mistral.engine.loop import Loop, batch_loop, list_of
from mistral.errors import shown
from mistral.model import Mistral
from mistral.sampling import Sampling
from mistral.tokenizer import Tokenizer


def generate_text(  # noqa: PLR0913
    model_or_decoder: Mistral | Engine,
    tokenizer: Tokenizer,
    text: str | Sequence[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    constraint: Constraint | None = None,
    bos: bool = True,
    prefix_space: bool = True,
    special: bool = False,
    strip_leading_space: bool = False,
) -> Generated[str]:
    """Continue `text` (or the ids of a prompt); yields the new text in pieces, each final.

    stop          strings at which the text ends; they may span tokens, and are not part of it. The
                  one that is complete first counts. One that spells a control token means that
                  token.
    bos           begin with the begin-of-text token; False to continue what a decoder has read
    prefix_space  give the text the leading space of a new word; False to continue inside a word
    special       parse control tokens that are spelled in `text`
    strip_leading_space  drop the leading space of the first new token: the answer is a text of its
                  own and does not continue `text`, as in Mistral's own chat formats

    The iterator's `reason` says why the text ended; a decoder without room ends it as "full". Ids
    are taken as they are: `bos`, `prefix_space` and `special` do not apply to them. The other
    arguments and errors are those of `generate`. A decoder holds every token that was generated,
    those that spell the stop string included.
    """
    require_tokenizer(tokenizer)
    if isinstance(text, str):
        text = tokenizer.encode(text, bos=bos, special=special, prefix_space=prefix_space)
    loop = _text_loop(
        model_or_decoder,
        tokenizer,
        [text],
        sampling,
        max_new_tokens,
        stop,
        stop_tokens,
        constraints=None if constraint is None else [constraint],
    )
    reader = UntilStop(tokenizer, stop, strip_leading_space)
    return Generated((piece for _, piece in _pieces(loop, [reader])), loop.reasons)


def generate_batch_text(  # noqa: PLR0913
    model_or_decoder: Mistral | Engine,
    tokenizer: Tokenizer,
    texts: Sequence[str | Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    constraints: Sequence[Constraint] | None = None,
    bos: bool = True,
    special: bool = False,
    strip_leading_space: bool = False,
) -> Rows[str]:
    """Continue several texts (or the ids of prompts) at once; returns the new text of each.

    The result's `reasons` say why each text ended. The arguments and errors are those of
    `generate_text` and `generate_batch`. To stream the texts: `stream_batch_text`.
    """
    texts = _list_of_texts(texts)
    texts_and_reasons = stream_batch_text(
        model_or_decoder,
        tokenizer,
        texts,
        sampling,
        max_new_tokens=max_new_tokens,
        stop=stop,
        stop_tokens=stop_tokens,
        constraints=constraints,
        bos=bos,
        special=special,
        strip_leading_space=strip_leading_space,
    )
    whole = ["" for _ in texts]
    for row, piece in texts_and_reasons:
        whole[row] += piece
    return Rows(whole, texts_and_reasons.reasons)


def stream_batch_text(  # noqa: PLR0913
    model_or_decoder: Mistral | Engine,
    tokenizer: Tokenizer,
    texts: Sequence[str | Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    constraints: Sequence[Constraint] | None = None,
    bos: bool = True,
    special: bool = False,
    strip_leading_space: bool = False,
) -> Generated[tuple[int, str]]:
    """`generate_batch_text` as it comes: yields (row, piece of its new text)."""
    require_tokenizer(tokenizer)
    prompts = [
        tokenizer.encode(text, bos=bos, special=special) if isinstance(text, str) else text
        for text in _list_of_texts(texts)
    ]
    loop = _text_loop(
        model_or_decoder,
        tokenizer,
        prompts,
        sampling,
        max_new_tokens,
        stop,
        stop_tokens,
        constraints,
    )
    readers = [UntilStop(tokenizer, stop, strip_leading_space) for _ in prompts]
    return Generated(_pieces(loop, readers), loop.reasons)


def _list_of_texts(texts: Iterable[str | Sequence[int]]) -> list:
    if isinstance(texts, str):
        raise ValueError("texts takes a list of texts, not one text")
    return list_of(texts, "texts")


def _text_loop(
    model_or_decoder: Mistral | Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    max_new_tokens: int,
    stop: Sequence[str],
    stop_tokens: Sequence[int] | None,
    constraints: Sequence[Constraint] | None,
) -> Loop:
    """The loop over ids, which ends at control tokens in `stop`, and draws no id without a token.

    Raises ValueError for stop strings that are not a list of non-empty strings.
    """
    strings = not isinstance(stop, str) and isinstance(stop, Sequence)
    if not strings or not all(isinstance(s, str) and s for s in stop):
        raise ValueError(f"stop takes a list of non-empty strings, not {shown(stop)}")
    loop = batch_loop(model_or_decoder, prompts, sampling, max_new_tokens, stop_tokens, constraints)
    loop.stop |= {tokenizer.control_id(s) for s in stop} - {None}
    if tokenizer.vocab_size < loop.decoder.config.vocab_size:
        inner = loop.constraints or [AnyToken() for _ in prompts]
        loop.constraints = [KnownTokens(loop.decoder, tokenizer.vocab_size, one) for one in inner]
    return loop


def _pieces(loop: Loop, readers: Sequence["UntilStop"]) -> Iterator[tuple[int, str]]:
    """Yields (row, piece); a row ends at a stop string, too."""
    finished = [False] * len(readers)
    with closing(loop.steps()) as steps:
        for step in steps:
            for b, (id, reader) in enumerate(zip(step, readers)):
                if id is not None and (piece := reader.feed(id)):
                    yield b, piece
                if reader.has_stopped:
                    loop.reasons[b] = "stop_string"
                elif loop.reasons[b] is not None and not finished[b]:
                    finished[b] = True
                    if piece := reader.finish():
                        yield b, piece


class UntilStop:
    """Ids to text up to the first stop string, holding back what could be the beginning of one.

    strip_leading_space  see `Tokenizer.stream`
    is_quoted            whether the stop string at a place of the text is quoted, and ends nothing
    stopped_at           the stop string that was complete; later ids are ignored
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        strip_leading_space: bool = False,
        is_quoted: Callable[[str, int], bool] = lambda text, at: False,
    ):
        self.stopped_at: str | None = None
        self._stop = stop
        self._is_quoted = is_quoted
        self._stream = tokenizer.stream(strip_leading_space)
        self._text = ""
        self._given = 0  # characters that were returned

    @property
    def has_stopped(self) -> bool:
        """Whether a stop string was complete."""
        return self.stopped_at is not None

    @property
    def length(self) -> int:
        """How many characters were decoded, those held back included."""
        return len(self._text)

    def feed(self, id: int) -> str:
        """The text that one more id makes final."""
        if self.has_stopped:
            return ""
        self._text += self._stream.feed(id)
        # The one that ends first; of two that end together, the longer.
        places = sorted(
            (match.end(), match.start(), s)
            for s in self._stop
            for match in re.compile(re.escape(s)).finditer(self._text, self._given)
        )
        # From left to right, up to the first that is not quoted: is_quoted parses as it goes.
        for _, at, s in places:
            if not self._is_quoted(self._text, at):
                self.stopped_at = s
                return self._until(at)
        # How much of the text's end could be the beginning of a stop string.
        open_end = max(
            (n for s in self._stop for n in range(1, len(s)) if self._text.endswith(s[:n])),
            default=0,
        )
        return self._until(len(self._text) - open_end)

    def finish(self) -> str:
        """The text still held back; "" after a stop string."""
        if self.has_stopped:
            return ""
        self._text += self._stream.finish()
        return self._until(len(self._text))

    def _until(self, end: int) -> str:
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece
