"""Prompt to continuation: the naive loop, and the loop that drives an engine."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from mistral.engine.base import NO_NUMBERS, NOTHING_LEFT, Constraint, Engine
from mistral.engine.constraints import stack_masks
from mistral.engine.decoder import Decoder
from mistral.model import Mistral
from mistral.sampling import RandomNumbers, Sampling, next_ids


class Token(NamedTuple):
    """A generated id, with the log-probability that the model gave it, before penalties."""

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
    """Generation with nothing clever: every step reads the whole sequence again.

    The loop to learn from. `generate` yields the same tokens with a fraction of the work, and a
    test holds the two together. Arguments and result are those of `generate`; raises ValueError for
    an empty prompt.
    """
    stop_tokens = model.config.eos_token_id if stop_tokens is None else stop_tokens
    generator = RandomNumbers(model.device).generator(sampling.seed)
    ids = torch.tensor([list(prompt_ids)], device=model.device)  # [1, T]
    for _ in range(max_new_tokens):
        logits = model(ids, last_only=True)  # [1, V]
        new = next_ids(logits, sampling, ids, [ids.shape[1]], None, generator)  # [1]
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

    model_or_decoder  a decoder continues after what it has read already, and keeps what is
                      generated. A `speculation.LookupDecoder` produces several tokens from one
                      forward pass when a sequence repeats itself.
    stop_tokens       None: the checkpoint's; (): none
    constraint        a mask for every step, one host synchronization a token: a `Constraint`, or an
                      object with its `mask` and `accept`
    logprobs          yield Token(id, logprob) instead of ids

    Raises ValueError for an empty prompt and for more tokens than there is room for: with a model
    at the call, with a decoder when the room is used up. Also raises ValueError for ids outside the
    vocabulary, if the constraint and the penalties together allow no id, and if the logits are NaN
    (float16 overflows in some fine-tunes); NotEnoughMemory if a model's cache does not fit.
    """
    constraints = None if constraint is None else [Constraint.of(constraint)]
    decoder = decoder_for(model_or_decoder, [prompt_ids], max_new_tokens)
    rows = _steps(
        decoder, [prompt_ids], sampling, max_new_tokens, stop_tokens, constraints, logprobs
    )
    return (row[0] for row in rows)


def generate_batch(
    model_or_decoder: Mistral | Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None = None,
    constraints: Sequence[Constraint] | None = None,
    logprobs: bool = False,
) -> list[list[int]] | list[list[Token]]:
    """Continue several prompts of any lengths at once; each row ends at its own stop token.

    sampling     one for all rows: random numbers as in Hugging Face's `generate`, where a row's
                 text depends on its company. Or one per row: each row gets the text that it gets
                 alone, up to the rounding of a larger batch.
    constraints  one per row. Their `forced` is not asked: rows are forced at different steps, and a
                 step is one forward pass for all of them.

    The stop token is included. The other arguments and errors are those of `generate`.
    """
    if constraints is not None and len(constraints) != len(prompts):
        raise ValueError(f"{len(constraints)} constraints for {len(prompts)} prompts")
    if not isinstance(sampling, Sampling) and len(sampling) != len(prompts):
        raise ValueError(f"{len(sampling)} samplings for {len(prompts)} prompts")
    if constraints is not None:
        constraints = list(map(Constraint.of, constraints))
    decoder = decoder_for(model_or_decoder, prompts, max_new_tokens)
    rows: list[list] = [[] for _ in prompts]
    for step in _steps(
        decoder, prompts, sampling, max_new_tokens, stop_tokens, constraints, logprobs
    ):
        for row, token in zip(rows, step):
            if token is not None:
                row.append(token)
    return rows


def decoder_for(
    model_or_decoder: Mistral | Engine, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> Engine:
    """The decoder itself, or a new one with just enough room. Raises what the callers document."""
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
    longest = max(map(len, prompts))
    limit = model_or_decoder.config.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones make "
            f"{longest + max_new_tokens}, and the checkpoint was made for {limit} "
            "(max_position_embeddings): shorten the prompt or lower max_new_tokens"
        )
    return Decoder(model_or_decoder, len(prompts), longest + max_new_tokens, slack=0)


def _steps(
    decoder: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None,
    constraints: Sequence[Constraint] | None,
    logprobs: bool,
) -> Iterator[list]:
    """Yields one list a step: each row's id (or Token), None for a row that has ended.

    The arguments are those of `generate_batch`.
    """
    stop = frozenset(decoder.config.eos_token_id if stop_tokens is None else stop_tokens)
    decoder.prefill(prompts)
    is_static = all(constraint.is_static for constraint in constraints or ())
    if decoder.steps_in_flight and is_static and not logprobs:
        yield from _steps_in_flight(decoder, sampling, max_new_tokens, stop, constraints)
        return
    running = [True] * len(prompts)
    may_force = len(prompts) == 1 and constraints and not logprobs
    left = max_new_tokens
    while left > 0 and any(running):
        if may_force and (forced := constraints[0].forced()[:left]):
            decoder.prefill([forced])  # together with the last id: one forward pass for all of them
            for id in forced:
                constraints[0].accept(id)
                yield [id]
            left -= len(forced)
            continue
        ids, tokens = _step(decoder, sampling, constraints, running, logprobs)
        yielded = [token if alive else None for token, alive in zip(tokens, running)]
        running = [alive and id not in stop for id, alive in zip(ids, running)]
        _accept(constraints, ids, running)
        yield yielded
        left -= 1


def _step(
    decoder: Engine,
    sampling: Sampling | Sequence[Sampling],
    constraints: Sequence[Constraint] | None,
    running: Sequence[bool],
    logprobs: bool,
) -> tuple[list[int], list]:
    """One step of every row, read back: (ids, ids or Tokens)."""
    logits = decoder.logits  # [B, V]
    mask = None if constraints is None else stack_masks(constraints, running, logits)
    log_p = logits.float().log_softmax(dim=-1) if logprobs else None  # [B, V]
    broken = logits.isnan().any(dim=-1)  # [B]
    ids = decoder.step(_of_running(sampling, running), mask)  # [B]
    ids_or_0 = ids.clamp(min=0)[:, None]  # [B, 1]
    forbidden = torch.zeros_like(broken) if mask is None else ~mask.gather(1, ids_or_0)[:, 0]
    # One synchronization for everything that the host must know.
    chosen, *wrong = torch.stack((ids, broken.long(), forbidden.long())).tolist()
    _check_step(*wrong, running)
    if log_p is None:
        return chosen, chosen
    return chosen, list(map(Token, chosen, log_p.gather(1, ids_or_0)[:, 0].tolist()))


def _steps_in_flight(
    decoder: Engine,
    sampling: Sampling | Sequence[Sampling],
    max_new_tokens: int,
    stop: frozenset[int],
    constraints: Sequence[Constraint] | None,
) -> Iterator[list]:
    """`_steps` when no step needs the ids of the previous one on the host.

    Keeps up to `decoder.steps_in_flight` steps in flight, so that the GPU never waits for the host.
    Steps launched past a stop token are rolled back at the end. (Rows that share a Sampling step
    until the last of them ends, and keep those ids.)
    """
    running = [True] * decoder.batch_size
    surplus = [0] * decoder.batch_size  # ids of a row beyond its end
    mask = None if constraints is None else stack_masks(constraints, running, decoder.logits)
    in_flight: deque[tuple[IdsInFlight, list[bool]]] = deque()  # with the rows that take part
    try:
        for left in range(max_new_tokens, 0, -1):
            # 1. Launch.
            while len(in_flight) < min(decoder.steps_in_flight + 1, left):
                own = _of_running(sampling, running)
                active = _active_rows(own, decoder.batch_size)
                if in_flight and not _has_room(decoder, active):
                    break  # a later step, for which there is no room, raises the error
                in_flight.append((IdsInFlight(decoder.step(own, mask)), active))
            # 2. Read the oldest step back.
            arriving, active = in_flight.popleft()
            chosen = arriving.ids()
            no_numbers = [id == NO_NUMBERS for id in chosen]
            nothing_left = [id == NOTHING_LEFT for id in chosen]
            _check_step(no_numbers, nothing_left, running)
            # 3. Yield.
            ids = [id if alive else None for id, alive in zip(chosen, running)]
            if not isinstance(sampling, Sampling):
                ended = [took_part and not alive for took_part, alive in zip(active, running)]
                surplus = [n + int(late) for n, late in zip(surplus, ended)]
            running = [alive and id not in stop for id, alive in zip(chosen, running)]
            _accept(constraints, chosen, running)
            yield ids
            if not any(running):
                break
    except BaseException:
        # An interrupt may have cost the cache what the rewind needs; the next call says so.
        with suppress(ValueError):
            _roll_back(decoder, surplus, in_flight)
        raise
    else:
        _roll_back(decoder, surplus, in_flight)


def _active_rows(sampling: Sampling | Sequence[Sampling | None], batch_size: int) -> list[bool]:
    """Which rows take part in a step."""
    if isinstance(sampling, Sampling):
        return [True] * batch_size
    return [own is not None for own in sampling]


def _has_room(decoder: Engine, active: Sequence[bool]) -> bool:
    """Whether one more id fits into every row that takes part."""
    lengths = [length for length, takes_part in zip(decoder.lengths, active) if takes_part]
    return max(lengths, default=0) < decoder.limit


def _roll_back(
    decoder: Engine, surplus: list[int], in_flight: Iterable[tuple["IdsInFlight", list[bool]]]
) -> None:
    """Forget the ids of each row beyond its end, and those of the steps in flight."""
    counts = list(surplus)
    for _, active in in_flight:
        counts = [n + int(takes_part) for n, takes_part in zip(counts, active)]
    decoder.rewind(counts)


def _of_running(
    sampling: Sampling | Sequence[Sampling], running: Sequence[bool]
) -> Sampling | list[Sampling | None]:
    """The sampling of a step: rows with a sampling of their own are idle once they have ended.

    With one Sampling for all, rows that have ended still take part: they share the random numbers.
    """
    if isinstance(sampling, Sampling):
        return sampling
    return [own if alive else None for own, alive in zip(sampling, running)]


def _accept(
    constraints: Sequence[Constraint] | None, chosen: Sequence[int], running: Sequence[bool]
) -> None:
    """Tell the ids to the constraints of the rows that continue."""
    for constraint, id, alive in zip(constraints or (), chosen, running):
        if alive:
            constraint.accept(id)


class IdsInFlight:
    """Ids [B] on their way to the host; work that is launched after them is not waited for."""

    def __init__(self, ids: Tensor):
        self._ids = ids.to("cpu", non_blocking=True)
        self._arrived = None
        if ids.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(ids.device))

    def ids(self) -> list[int]:
        """Wait for the ids."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._ids.tolist()


def _check_step(broken: Sequence[int], forbidden: Sequence[int], running: Sequence[bool]) -> None:
    for b, alive in enumerate(running):
        if alive and broken[b]:
            raise ValueError(
                f"row {b}: the logits are NaN (float16 overflows in some fine-tunes); load the "
                "model in bfloat16 or float32"
            )
        if alive and forbidden[b]:
            raise ValueError(
                f"row {b}: constraint and penalties forbid every token, so none can be chosen"
            )
