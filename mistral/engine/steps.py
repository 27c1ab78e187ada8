"""The loops that drive an engine: one step gives every row its next id."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mistral.engine.constraints import Constraint, forced_ids, is_fixed, stack_masks
from mistral.engine.decoder import NO_NUMBERS, NOTHING_LEFT, Engine
from mistral.sampling import Sampling


class Token(NamedTuple):
    """A generated id, with the log-probability that the model itself gave it (before penalties and
    warpers).
    """

    id: int
    logprob: float


def steps(
    decoder: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None,
    constraints: Sequence[Constraint] | None,
    logprobs: bool,
) -> Iterator[list]:
    """One list a step: each row's id (or Token), None for a row that has ended.

    The arguments are `generate`'s.
    """
    stop = frozenset(decoder.config.eos_token_id if stop_tokens is None else stop_tokens)
    decoder.read(prompts)
    if getattr(decoder, "ahead", 0) and not logprobs and all(map(is_fixed, constraints or ())):
        yield from _steps_ahead(decoder, sampling, max_new_tokens, stop, constraints)
        return
    running, left = [True] * len(prompts), max_new_tokens
    while left > 0 and any(running):
        if (
            len(prompts) == 1
            and constraints
            and not logprobs
            and (forced := forced_ids(constraints[0])[:left])
        ):
            decoder.read(
                [forced]
            )  # together with the last id that was chosen: one forward for all of them
            for id in forced:
                constraints[0].accept(id)
                yield [id]
            left -= len(forced)
            continue
        tokens, chosen = _step(decoder, sampling, constraints, running, logprobs)
        tokens = [token if alive else None for token, alive in zip(tokens, running)]
        running = [alive and id not in stop for id, alive in zip(chosen, running)]
        _accept(constraints, chosen, running)
        yield tokens
        left -= 1


def _step(
    decoder: Engine,
    sampling: Sampling,
    constraints: Sequence[Constraint] | None,
    running: Sequence[bool],
    logprobs: bool,
) -> tuple[list, list[int]]:
    """One step of every row, looked at: (ids or Tokens, ids)."""
    logits = decoder.logits  # [B, V]
    mask = None if constraints is None else stack_masks(constraints, running, logits)
    log_p = logits.float().log_softmax(dim=-1) if logprobs else None  # [B, V]
    broken = logits.isnan().any(dim=-1)  # [B]
    ids = decoder.step(sampling, mask)  # [B]
    ids_or_0 = ids.clamp(min=0)[:, None]  # [B, 1]
    forbidden = torch.zeros_like(broken) if mask is None else ~mask.gather(1, ids_or_0)[:, 0]
    # One look at the device for everything that the host must know.
    chosen, *wrong = torch.stack((ids, broken.long(), forbidden.long())).tolist()
    _check_step(*wrong, running)
    if log_p is None:
        return chosen, chosen
    return [Token(id, p) for id, p in zip(chosen, log_p.gather(1, ids_or_0)[:, 0].tolist())], chosen


def _steps_ahead(
    decoder: Engine,
    sampling: Sampling,
    max_new_tokens: int,
    stop: frozenset[int],
    constraints: Sequence[Constraint] | None,
) -> Iterator[list]:
    """As `steps`, where no step needs the ids of the one before it on the host: the device never
    waits for the host.

    Up to `decoder.ahead` more steps are under way when ids are looked at; what was too much is
    taken back at the end.
    """
    running = [True] * decoder.batch_size
    mask = None if constraints is None else stack_masks(constraints, running, decoder.logits)
    under_way: deque[Arriving] = deque()
    try:
        for left in range(max_new_tokens, 0, -1):
            while len(under_way) < min(decoder.ahead + 1, left):
                if under_way and max(decoder.lengths) >= decoder.limit:
                    break  # the step that there is no room for says so when it comes to it
                under_way.append(Arriving(decoder.step(sampling, mask)))
            chosen = under_way.popleft().ids()
            _check_step(
                [id == NO_NUMBERS for id in chosen], [id == NOTHING_LEFT for id in chosen], running
            )
            ids = [id if alive else None for id, alive in zip(chosen, running)]
            running = [alive and id not in stop for id, alive in zip(chosen, running)]
            _accept(constraints, chosen, running)
            yield ids
            if not any(running):
                return
    finally:
        decoder.rewind(len(under_way))


def _accept(
    constraints: Sequence[Constraint] | None, chosen: Sequence[int], running: Sequence[bool]
) -> None:
    """Tell the constraints of the rows that go on."""
    for constraint, id, alive in zip(constraints or (), chosen, running):
        if alive:
            constraint.accept(id)


class Arriving:
    """Ids [B] on their way from the device to the host; what is started after them is not waited
    for.
    """

    def __init__(self, ids: Tensor):
        self._ids = ids.to("cpu", non_blocking=True)
        self._here = None
        if ids.is_cuda:
            self._here = torch.cuda.Event()
            self._here.record(torch.cuda.current_stream(ids.device))

    def ids(self) -> list[int]:
        """Wait for them."""
        if self._here is not None:
            self._here.synchronize()
        return self._ids.tolist()


def _check_step(broken: Sequence[int], forbidden: Sequence[int], running: Sequence[bool]) -> None:
    for b, alive in enumerate(running):
        if alive and broken[b]:
            raise ValueError(
                f"the logits of row {b} are not numbers; try float32 or bfloat16 instead of float16"
            )
        if alive and forbidden[b]:
            raise ValueError(
                f"nothing is left to choose from in row {b}: constraint and penalties forbid every "
                f"token"
            )
