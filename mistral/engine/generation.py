"""Prompt to continuation: the naive loop, and the doors to the loops in steps.py."""

import re
from collections.abc import Callable, Iterator, Sequence

import torch

from mistral.engine.constraints import Constraint, KnownTokens
from mistral.engine.decoder import Decoder, Engine
from mistral.engine.steps import Token, steps
from mistral.model import Mistral
from mistral.sampling import Sampling, next_ids, random_numbers
from mistral.tokenizer import Tokenizer


@torch.inference_mode()
def generate_naive(
    model: Mistral,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None = None,
) -> Iterator[int]:
    """Generation with nothing clever: every step reads the whole text again. The loop to learn
    from.

    `generate` gives the same tokens with a fraction of the work, and a test holds the two together.
    Arguments and result are those of `generate`; ValueError for an empty prompt.
    """
    stop_tokens = model.config.eos_token_id if stop_tokens is None else stop_tokens
    device = model.device
    generator = random_numbers(sampling, device)
    ids = torch.tensor([list(prompt_ids)], device=device)  # [1, T]
    for _ in range(max_new_tokens):
        logits = model(ids, last_only=True)  # [1, V]
        lengths = torch.tensor([ids.shape[1]], device=device)
        new = next_ids(logits, sampling, ids, lengths, None, generator)  # [1]
        ids = torch.cat((ids, new[:, None]), dim=1)
        yield new.item()
        if new.item() in stop_tokens:
            return


def generate(
    model_or_decoder: Mistral | Engine,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None = None,
    constraint: Constraint | None = None,
    logprobs: bool = False,
) -> Iterator[int] | Iterator[Token]:
    """Continue one prompt; yields each id as it is chosen, the stop token included.

    model_or_decoder  a decoder goes on behind what it has read already, and keeps what is
                      generated. A `speculation.LookupDecoder` makes several tokens from a forward
                      where a text repeats itself.
    stop_tokens       None: the checkpoint's; (): none
    constraint        a mask for every step, one host synchronisation a token
    logprobs          yield Token(id, logprob) instead of ids

    Raises ValueError for an empty prompt and for more tokens than there is room for: with a model
    at the call, with a decoder when it comes to it. ValueError, too, for ids outside the
    vocabulary, where the constraint and the penalties together allow no id, and where the logits
    are not numbers (float16 overflows in some fine-tunes). NotEnoughMemory where a model's cache
    does not fit.
    """
    constraints = None if constraint is None else [constraint]
    decoder = _decoder_for(model_or_decoder, [prompt_ids], max_new_tokens)
    rows = steps(
        decoder, [prompt_ids], sampling, max_new_tokens, stop_tokens, constraints, logprobs
    )
    return (row[0] for row in rows)


def generate_batch(
    model_or_decoder: Mistral | Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None = None,
    constraints: Sequence[Constraint] | None = None,
    logprobs: bool = False,
) -> list[list[int]] | list[list[Token]]:
    """Continue several prompts of any lengths at once; each row ends at its own stop token
    (included).

    The other arguments and errors are those of `generate`; `constraints` has one for each row.
    Their `forced` is not asked: rows are forced at different steps, and a step is one forward for
    all of them.
    """
    if constraints is not None and len(constraints) != len(prompts):
        raise ValueError(f"{len(constraints)} constraints for {len(prompts)} prompts")
    decoder = _decoder_for(model_or_decoder, prompts, max_new_tokens)
    rows: list[list] = [[] for _ in prompts]
    for step in steps(
        decoder, prompts, sampling, max_new_tokens, stop_tokens, constraints, logprobs
    ):
        for row, token in zip(rows, step):
            if token is not None:
                row.append(token)
    return rows


def generate_text(
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
    new_text: bool = False,
) -> Iterator[str]:
    """Continue `text` (or the ids of a prompt); yields the new text in pieces, each final.

    stop          strings at which the text ends, wherever the tokens' borders fall; they are not
                  part of it. The first to be complete counts. One that spells a control token means
                  that token.
    bos           begin with the begin-of-text token; False to go on behind what a decoder has read
    prefix_space  give the text the leading space of a new word; False to go on inside one
    special       parse control tokens that are spelled in `text`
    new_text      what comes is a text of its own, without the leading space of its first token, and
                  does not go on with `text`: an answer in one of Mistral's own chat formats

    Ids are taken as they are: `bos`, `prefix_space` and `special` say nothing about them. The other
    arguments and errors are those of `generate`. A decoder holds every token that was generated,
    those that spell the stop string included.
    """
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop takes a list of non-empty strings, not {stop!r}")
    stop_tokens = model_or_decoder.config.eos_token_id if stop_tokens is None else stop_tokens
    control = {tokenizer.control_id(s) for s in stop} - {None}
    if isinstance(text, str):
        text = tokenizer.encode(text, bos=bos, special=special, prefix_space=prefix_space)
    decoder = _decoder_for(model_or_decoder, [text], max_new_tokens)
    if tokenizer.vocab_size < decoder.config.vocab_size:
        constraint = KnownTokens(decoder, tokenizer.vocab_size, constraint)
    ids = generate(
        decoder,
        text,
        sampling,
        max_new_tokens=max_new_tokens,
        stop_tokens=(*stop_tokens, *control),
        constraint=constraint,
    )
    return text_until(ids, tokenizer, stop, new_text)


def _decoder_for(
    model_or_decoder: Mistral | Engine, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> Engine:
    """The decoder itself, or a new one with just enough room; raises what the callers' docstrings
    say.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    if not prompts:
        raise ValueError("there is no prompt")
    if not isinstance(model_or_decoder, Mistral):
        return model_or_decoder
    if not all(map(len, prompts)):
        raise ValueError(
            "the prompt is empty: it needs one token at least, the begin-of-text token for example"
        )
    longest, limit = max(map(len, prompts)), model_or_decoder.config.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones make "
            f"{longest + max_new_tokens}, and the "
            f"checkpoint was made for {limit} (max_position_embeddings): shorten the prompt or "
            f"lower max_new_tokens"
        )
    return Decoder(model_or_decoder, len(prompts), longest + max_new_tokens, slack=0)


def text_until(
    ids: Iterator[int],
    tokenizer: Tokenizer,
    stop: Sequence[str],
    start: bool = False,
    is_quoted: Callable[[str, int], bool] = lambda text, at: False,
) -> Iterator[str]:
    """Decode a stream of ids up to the first stop string, holding back what could be the beginning
    of one.

    start      the ids begin a text: see `Tokenizer.stream`
    is_quoted  whether what stands at a place of the text ends nothing, though it is a stop string
    """
    stream, text, given = tokenizer.stream(start), "", 0
    for id in ids:
        text += stream.feed(id)
        # The one that ends first; of two that end together, the longer.
        places = [
            (match.end(), match.start())
            for s in stop
            for match in re.compile(re.escape(s)).finditer(text, given)
        ]
        places = [(end, at) for end, at in places if not is_quoted(text, at)]
        if places:
            if text[given : min(places)[1]]:
                yield text[given : min(places)[1]]
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
