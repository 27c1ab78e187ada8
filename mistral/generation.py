"""Prompt to continuation: the naive loop, and the loops over a decoder's four methods."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mistral.constraints import Constraint, KnownTokens, forced_ids, is_fixed, stack_masks
from mistral.decoder import NO_NUMBERS, NOTHING_LEFT, Decoder, Engine
from mistral.model import Mistral
from mistral.sampling import Sampling, next_ids, random_numbers
from mistral.tokenizer import Tokenizer


class Token(NamedTuple):
    """A generated id, with the log-probability that the model itself gave it (before penalties and warpers)."""

    id: int
    logprob: float


@torch.inference_mode()
def generate_naive(
    model: Mistral,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None = None,
) -> Iterator[int]:
    """Generation with nothing clever: every step reads the whole text again. The loop to learn from.

    `generate` gives the same tokens with a fraction of the work, and a test holds the two together.
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

    model_or_decoder  a decoder goes on behind what it has read already, and keeps what is generated
    stop_tokens       None: the checkpoint's; (): none
    constraint        a mask for every step, one host synchronisation a token
    logprobs          yield Token(id, logprob) instead of ids

    Raises ValueError for an empty prompt and for more tokens than there is room for: with a model at the call, with a
    decoder when it comes to it. ValueError, too, where the constraint and the penalties together allow no id, and
    where the logits are not numbers (float16 overflows in some fine-tunes).
    """
    constraints = None if constraint is None else [constraint]
    decoder = _decoder_for(model_or_decoder, [prompt_ids], max_new_tokens)
    steps = _steps(decoder, [prompt_ids], sampling, max_new_tokens, stop_tokens, constraints, logprobs)
    return (row[0] for row in steps)


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
    """Continue several prompts of any lengths at once; each row ends at its own stop token (included).

    The other arguments and errors are those of `generate`; `constraints` has one for each row. Their `forced` is not
    asked: rows are forced at different steps, and a step is one forward for all of them.
    """
    if constraints is not None and len(constraints) != len(prompts):
        raise ValueError(f"{len(constraints)} constraints for {len(prompts)} prompts")
    decoder = _decoder_for(model_or_decoder, prompts, max_new_tokens)
    rows: list[list] = [[] for _ in prompts]
    for step in _steps(decoder, prompts, sampling, max_new_tokens, stop_tokens, constraints, logprobs):
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
) -> Iterator[str]:
    """Continue `text` (or the ids of a prompt); yields the new text in pieces, each final.

    stop          strings at which the text ends, wherever the tokens' borders fall; they are not part of it. The
                  first to be complete counts. One that spells a control token means that token.
    bos           begin with the begin-of-text token; False to go on behind what a decoder has read
    prefix_space  give the text the leading space of a new word; False to go on inside one
    special       parse control tokens that are spelled in `text`

    Ids are taken as they are: the last three say nothing about them. The other arguments and errors are those of
    `generate`. A decoder holds every token that was generated, those that spell the stop string included.
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
    return text_until(ids, tokenizer, stop)


def _steps(
    decoder: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None,
    constraints: Sequence[Constraint] | None,
    logprobs: bool,
) -> Iterator[list]:
    """One list a step: each row's id (or Token), None for a row that has ended."""
    if getattr(decoder, "ahead", 0) and not logprobs and all(map(is_fixed, constraints or ())):
        yield from _steps_ahead(decoder, prompts, sampling, max_new_tokens, stop_tokens, constraints)
        return
    stop = frozenset(decoder.config.eos_token_id if stop_tokens is None else stop_tokens)
    decoder.read(prompts)
    running = [True] * len(prompts)
    left = max_new_tokens
    while left > 0:
        if len(prompts) == 1 and constraints and not logprobs and (forced := forced_ids(constraints[0])[:left]):
            decoder.read([forced])
            for id in forced:
                constraints[0].accept(id)
                yield [id]
            left -= len(forced)
            continue
        left -= 1
        logits = decoder.logits  # [B, V]
        mask = None if constraints is None else stack_masks(constraints, running, logits)
        log_p = logits.float().log_softmax(dim=-1) if logprobs else None  # [B, V]
        broken = logits.isnan().any(dim=-1)  # [B]
        ids = decoder.step(sampling, mask)  # [B]
        ids_or_0 = ids.clamp(min=0)[:, None]  # [B, 1]
        forbidden = torch.zeros_like(broken) if mask is None else ~mask.gather(1, ids_or_0)[:, 0]
        # One look at the device for everything that the host must know
        chosen, *wrong = torch.stack((ids, broken.long(), forbidden.long())).tolist()
        _check_step(*wrong, running)
        ended = [id in stop for id in chosen]
        for b, constraint in enumerate(constraints or ()):
            if running[b] and not ended[b]:
                constraint.accept(chosen[b])
        tokens: list = chosen
        if log_p is not None:
            tokens = [Token(id, p) for id, p in zip(chosen, log_p.gather(1, ids_or_0)[:, 0].tolist())]
        yield [token if alive else None for token, alive in zip(tokens, running)]
        running = [alive and not end for alive, end in zip(running, ended)]
        if not any(running):
            return


def _steps_ahead(
    decoder: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None,
    constraints: Sequence[Constraint] | None,
) -> Iterator[list]:
    """As `_steps`, where no step needs the ids of the one before it on the host: the device never waits for it.

    Up to `decoder.ahead` more steps are under way when ids are looked at; what was too much is taken back at the end.
    """
    stop = frozenset(decoder.config.eos_token_id if stop_tokens is None else stop_tokens)
    decoder.read(prompts)
    running = [True] * len(prompts)
    mask = None if constraints is None else stack_masks(constraints, running, decoder.logits)
    under_way: deque[Arriving] = deque()
    try:
        for left in range(max_new_tokens, 0, -1):
            while len(under_way) < min(decoder.ahead + 1, left):
                if under_way and max(decoder.lengths) >= decoder.limit:
                    break  # the step that there is no room for says so when it comes to it
                under_way.append(Arriving(decoder.step(sampling, mask)))
            chosen = under_way.popleft().ids()
            _check_step([id == NO_NUMBERS for id in chosen], [id == NOTHING_LEFT for id in chosen], running)
            yield [id if alive else None for id, alive in zip(chosen, running)]
            running = [alive and id not in stop for id, alive in zip(chosen, running)]
            if not any(running):
                return
    finally:
        decoder.rewind(len(under_way))


class Arriving:
    """Ids [B] on their way from the device to the host."""

    def __init__(self, ids: Tensor):
        self._ids = ids.to("cpu", non_blocking=True)
        self._here = None
        if ids.is_cuda:
            self._here = torch.cuda.Event()
            self._here.record()

    def ids(self) -> list[int]:
        """Wait for them."""
        if self._here is not None:
            self._here.synchronize()
        return self._ids.tolist()


def _check_step(broken: list[int], forbidden: list[int], running: list[bool]) -> None:
    for b, alive in enumerate(running):
        if alive and broken[b]:
            raise ValueError(f"the logits of row {b} are not numbers; try float32 or bfloat16 instead of float16")
        if alive and forbidden[b]:
            raise ValueError(f"nothing is left to choose from in row {b}: constraint and penalties forbid every token")


def _decoder_for(model_or_decoder: Mistral | Engine, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Engine:
    """The decoder itself, or a new one with just enough room; raises what the callers' docstrings say."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    if not prompts:
        raise ValueError("there is no prompt")
    if not isinstance(model_or_decoder, Mistral):
        return model_or_decoder
    if not all(map(len, prompts)):
        raise ValueError("the prompt is empty: it needs one token at least, the begin-of-text token for example")
    longest, limit = max(map(len, prompts)), model_or_decoder.config.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones make {longest + max_new_tokens}, and the "
            f"checkpoint was made for {limit} (max_position_embeddings): shorten the prompt or lower max_new_tokens"
        )
    return Decoder(model_or_decoder, len(prompts), longest + max_new_tokens, slack=0)


def text_until(ids: Iterator[int], tokenizer: Tokenizer, stop: Sequence[str], start: bool = False) -> Iterator[str]:
    """Decode a stream of ids up to the first stop string, holding back what could be the beginning of one.

    start  the ids begin a text: see `Tokenizer.stream`
    """
    stream, held = tokenizer.stream(start), ""
    for id in ids:
        held += stream.feed(id)
        # Which one ends first; of two that end together, the longer
        found = [(held.find(s) + len(s), held.find(s)) for s in stop if s in held]
        if found:
            if text := held[: min(found)[1]]:
                yield text
            return
        # The longest end of the text that a stop string could begin with
        open_end = max((n for s in stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        if len(held) > open_end:
            yield held[: len(held) - open_end]
            held = held[len(held) - open_end :]
    if held + (rest := stream.finish()):
        yield held + rest
