"""The loop that drives an engine: step by step, until every row has ended."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mistral.engine.base import NO_NUMBERS, NOTHING_LEFT, Constraint, Engine
from mistral.engine.constraints import stack_masks
from mistral.engine.decoder import Decoder
from mistral.engine.given import model_or_engine
from mistral.engine.ids import stop_ids, token_ids
from mistral.errors import shown
from mistral.model import Mistral
from mistral.sampling import Sampling

# "stop": a stop token. "stop_string": one of `stop`. "length": max_new_tokens. "full": the decoder
# has no more room.
Reason = Literal["stop", "stop_string", "length", "full"]


class Token(NamedTuple):
    """A generated id, with the log-probability that the model gave it, before penalties."""

    id: int
    logprob: float


@dataclass
class Loop:
    """Steps an engine until every row has ended.

    constraints  one per row; None: every id is allowed
    logprobs     steps yield Tokens instead of ids
    reasons      why each row ended; None: it continues
    """

    decoder: Engine
    prompts: Sequence[Sequence[int]]
    sampling: Sampling | Sequence[Sampling]
    max_new_tokens: int
    stop: frozenset[int]
    constraints: Sequence[Constraint] | None
    logprobs: bool
    reasons: list[Reason | None]
    _starts: list[int] = field(init=False)  # lengths of the rows after their prompts
    _chosen: list[int] = field(init=False)  # how many ids each row got
    _is_ours: bool = field(init=False, default=True)  # False: another one has used the decoder

    def steps(self) -> Iterator[list]:
        """Yields one list a step: each row's id (or Token), None for a row that took no part."""
        self.decoder.prefill(self.prompts)
        self._starts = self.decoder.lengths
        self.decoder.answer_starts = self._starts
        self._chosen = [0] * len(self.prompts)
        self._end_rows()
        is_static = all(constraint.is_static for constraint in self.constraints or ())
        run = self._single_steps
        if self.decoder.steps_in_flight and is_static and not self.logprobs:
            run = self._steps_in_flight
        try:
            for step in run():
                uses = self.decoder.uses
                try:
                    yield step
                finally:
                    self._is_ours = self.decoder.uses == uses
                self._resume()
        except BaseException:
            # An interrupt may have cost the cache what the rewind needs; the next call says so.
            with suppress(ValueError):
                self._roll_back()
            raise
        self._roll_back()

    def _resume(self) -> None:
        """Continue after a step was yielded. Raises ValueError if the decoder was used since."""
        if not self._is_ours:
            raise ValueError(
                "the decoder was used while this text was suspended, so the text cannot continue: "
                "finish or close it before, or give each text a decoder of its own"
            )
        self.decoder.in_flight = ()

    def _single_steps(self) -> Iterator[list]:
        """`steps`, each read back before the next."""
        may_force = len(self.reasons) == 1 and self.constraints and not self.logprobs
        left = self.max_new_tokens
        while left > 0 and any(active := self._active_rows()):
            room = min(left, self.decoder.limit - self.decoder.lengths[0])
            if may_force and (forced := self._forced(room)):
                # Together with the last id: one forward pass for all of them.
                self.decoder.prefill([forced])
                for id in forced:
                    self._take([id], active)
                    yield [id]
                left -= len(forced)
                continue
            ids, tokens = self._step(active)
            yielded = [token if takes_part else None for token, takes_part in zip(tokens, active)]
            self._take(ids, active)
            yield yielded
            left -= 1

    def _step(self, active: Sequence[bool]) -> tuple[list[int], list]:
        """One step of the active rows, read back: (ids, ids or Tokens)."""
        mask = None
        if self.constraints is not None:
            mask = stack_masks(self.constraints, active, self.decoder.logits)
        log_p = None
        if self.logprobs:
            log_p = self.decoder.logits.float().log_softmax(dim=-1)  # [B, V]
        ids = self._launch(mask, active)  # [B]
        chosen = ids.tolist()
        check_choice(chosen)
        if log_p is None:
            return chosen, chosen
        logprobs = log_p.gather(1, ids.clamp(min=0)[:, None])[:, 0]
        return chosen, list(map(Token, chosen, logprobs.tolist()))

    def _forced(self, room: int) -> list[int]:
        """The ids that the only constraint forces, up to `room` and to the first stop token."""
        forced = self.constraints[0].forced()[:room]
        return list(takewhile(lambda id: id not in self.stop, forced))

    def _steps_in_flight(self) -> Iterator[list]:
        """`steps` when no step needs the ids of the previous one on the host.

        Keeps up to `decoder.steps_in_flight` steps in flight, so that the GPU never waits for the
        host. Steps launched past a stop token are rolled back at the end.
        """
        mask = None
        if self.constraints is not None:
            everything = [True] * len(self.reasons)
            mask = stack_masks(self.constraints, everything, self.decoder.logits)
        in_flight: deque[tuple[IdsInFlight, list[bool]]] = deque()  # with the rows that take part
        for left in range(self.max_new_tokens, 0, -1):
            # 1. Launch.
            while len(in_flight) < min(self.decoder.steps_in_flight + 1, left):
                if not any(active := self._active_rows()):
                    break
                in_flight.append((IdsInFlight(self._launch(mask, active)), active))
            if not in_flight:
                break
            # 2. Read the oldest step back.
            arriving, active = in_flight.popleft()
            chosen = arriving.ids()
            active = [a and reason is None for a, reason in zip(active, self.reasons)]
            check_choice([id if a else 0 for id, a in zip(chosen, active)])
            # 3. Yield.
            self._take(chosen, active)
            yield [id if takes_part else None for id, takes_part in zip(chosen, active)]
            if None not in self.reasons:
                break

    def _active_rows(self) -> list[bool]:
        """Which rows take part in the next step: those that continue and have room."""
        limit = self.decoder.limit
        return [
            reason is None and length < limit
            for reason, length in zip(self.reasons, self.decoder.lengths)
        ]

    def _launch(self, mask: Tensor | None, active: Sequence[bool]) -> Tensor:
        """A step of the active rows: ids int64 [B] on the device."""
        if all(active):
            return self.decoder.step(self.sampling, mask)
        return self.decoder.step(self.sampling, mask, active)

    def _take(self, chosen: Sequence[int], active: Sequence[bool]) -> None:
        """Count the ids of the active rows, tell the constraints, and end rows."""
        for b, (id, takes_part) in enumerate(zip(chosen, active)):
            if not takes_part:
                continue
            if id in self.stop:
                self.reasons[b] = "stop"
            elif self.constraints is not None:
                self.constraints[b].accept(id)
            self._chosen[b] += 1
        self._end_rows()
        self.decoder.in_flight = self._surplus()

    def _end_rows(self) -> None:
        """End the rows that have all their tokens, or no room."""
        for b, (start, chosen) in enumerate(zip(self._starts, self._chosen)):
            if self.reasons[b] is None and chosen == self.max_new_tokens:
                self.reasons[b] = "length"
            elif self.reasons[b] is None and start + chosen >= self.decoder.limit:
                self.reasons[b] = "full"

    def _surplus(self) -> list[int]:
        """How many ids of each row were not taken: those beyond its end, and of steps in flight."""
        taken = [start + chosen for start, chosen in zip(self._starts, self._chosen)]
        return [held - length for held, length in zip(self.decoder.lengths, taken)]

    def _roll_back(self) -> None:
        """Forget the ids that were not taken, unless another one has used the decoder since."""
        if not self._is_ours:
            return
        self.decoder.in_flight = ()
        if any(surplus := self._surplus()):
            self.decoder.rewind(surplus)


def batch_loop(
    model_or_decoder: Mistral | Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None,
    constraints: Sequence[Constraint] | None,
    logprobs: bool = False,
) -> Loop:
    """The loop of `generate_batch`, which has its arguments and errors."""
    if isinstance(prompts, (str, bytes)):
        raise ValueError("the prompts are text, and lists of ids are needed: encode each of them")
    prompts = list_of(prompts, "prompts")
    if isinstance(sampling, (list, tuple)):
        for own in sampling:
            check_sampling(own)
        if len(sampling) != len(prompts):
            raise ValueError(f"{len(sampling)} samplings for {len(prompts)} prompts")
    else:
        check_sampling(sampling)
    if constraints is not None:
        constraints = list(map(Constraint.of, list_of(constraints, "constraints")))
        if len(constraints) != len(prompts):
            raise ValueError(f"{len(constraints)} constraints for {len(prompts)} prompts")
    prompts = [token_ids(prompt, f"prompt {b}") for b, prompt in enumerate(prompts)]
    decoder = decoder_for(model_or_decoder, prompts, max_new_tokens)
    return Loop(
        decoder=decoder,
        prompts=prompts,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop=stop_ids(stop_tokens, decoder.config.eos_token_id),
        constraints=constraints,
        logprobs=logprobs,
        reasons=[None] * len(prompts),
    )


def decoder_for(
    model_or_decoder: Mistral | Engine, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> Engine:
    """The decoder itself, or a new one with just enough room. Raises what the callers document."""
    whole = isinstance(max_new_tokens, int) and not isinstance(max_new_tokens, bool)
    if not whole or max_new_tokens < 0:
        raise ValueError(
            f"max_new_tokens must be a whole number, 0 or more, not {shown(max_new_tokens)}"
        )
    if not prompts:
        raise ValueError("there is no prompt")
    model_or_decoder = model_or_engine(model_or_decoder)
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
            "(max_position_embeddings): shorten the prompt or lower max_new_tokens. To go beyond "
            "what it was trained for, replace that number in model.config (dataclasses.replace)"
        )
    return Decoder(model_or_decoder, len(prompts), longest + max_new_tokens, slack=0)


class IdsInFlight:
    """Ids [B] that are copied to the host; work that is launched later is not waited for."""

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


def list_of(given: Iterable[Any], what: str) -> list:
    """`given` as a list. ValueError, which begins with `what`, if it has no items."""
    try:
        return list(given)
    except TypeError:
        raise ValueError(f"{what} must be a list, one for each row, not {shown(given)}") from None


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError for anything but a Sampling."""
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a mistral.Sampling, not {shown(sampling)}")


def check_choice(ids: Sequence[int]) -> None:
    """Raises ValueError if a row had no choice, see `Engine.step`."""
    for b, id in enumerate(ids):
        if problem := choice_problem(id):
            raise ValueError(f"row {b}: {problem}")


def choice_problem(id: int) -> str | None:
    """Why a step returned this instead of an id; None for an id."""
    if id == NO_NUMBERS:
        return (
            "the logits are NaN or infinite (float16 overflows in some fine-tunes); load the model "
            "in bfloat16 or float32"
        )
    if id == NOTHING_LEFT:
        return "constraint and penalties forbid every token, so none can be chosen"
    return None
