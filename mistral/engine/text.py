"""Text instead of ids: a prompt to pieces of text, up to a stop string."""

import re
from collections.abc import Callable, Iterator, Sequence

from mistral.engine.base import Constraint, Engine
from mistral.engine.constraints import AnyToken, KnownTokens
from mistral.engine.generation import decoder_for, generate
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
) -> Iterator[str]:
    """Continue `text` (or the ids of a prompt); yields the new text in pieces, each final.

    stop          strings at which the text ends, wherever the tokens' borders fall; they are not
                  part of it. The first to be complete counts. One that spells a control token means
                  that token.
    bos           begin with the begin-of-text token; False to continue what a decoder has read
    prefix_space  give the text the leading space of a new word; False to continue inside a word
    special       parse control tokens that are spelled in `text`
    strip_leading_space  drop the leading space of the first new token: the answer is a text of its
                  own and does not continue `text`, as in Mistral's own chat formats

    Ids are taken as they are: `bos`, `prefix_space` and `special` do not apply to them. The other
    arguments and errors are those of `generate`. A decoder holds every token that was generated,
    those that spell the stop string included.
    """
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop takes a list of non-empty strings, not {stop!r}")
    stop_tokens = model_or_decoder.config.eos_token_id if stop_tokens is None else stop_tokens
    control = {tokenizer.control_id(s) for s in stop} - {None}
    if isinstance(text, str):
        text = tokenizer.encode(text, bos=bos, special=special, prefix_space=prefix_space)
    decoder = decoder_for(model_or_decoder, [text], max_new_tokens)
    if tokenizer.vocab_size < decoder.config.vocab_size:
        inner = AnyToken() if constraint is None else Constraint.of(constraint)
        constraint = KnownTokens(decoder, tokenizer.vocab_size, inner)
    ids = generate(
        decoder,
        text,
        sampling,
        max_new_tokens=max_new_tokens,
        stop_tokens=(*stop_tokens, *control),
        constraint=constraint,
    )
    return text_until(ids, tokenizer, stop, strip_leading_space)


def text_until(
    ids: Iterator[int],
    tokenizer: Tokenizer,
    stop: Sequence[str],
    strip_leading_space: bool = False,
    is_quoted: Callable[[str, int], bool] = lambda text, at: False,
) -> Iterator[str]:
    """Decode ids up to the first stop string, holding back what could be the beginning of one.

    strip_leading_space  see `Tokenizer.stream`
    is_quoted            whether the stop string at a place of the text is quoted, and ends nothing
    """
    stream = tokenizer.stream(strip_leading_space)
    text = ""
    given = 0
    for id in ids:
        text += stream.feed(id)
        # The one that ends first; of two that end together, the longer.
        places = sorted(
            (match.end(), match.start())
            for s in stop
            for match in re.compile(re.escape(s)).finditer(text, given)
        )
        # Asked from left to right up to the one that counts, so that an answer can be parsed once.
        at = next((at for _, at in places if not is_quoted(text, at)), None)
        if at is not None:
            if text[given:at]:
                yield text[given:at]
            return
        # How much of the text's end could be the beginning of a stop string.
        open_end = max(
            (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0
        )
        if len(text) - open_end > given:
            yield text[given : len(text) - open_end]
            given = len(text) - open_end
    if rest := text[given:] + stream.finish():
        yield rest
