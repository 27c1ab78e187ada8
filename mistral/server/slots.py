"""Continuous batching: requests that come and go share an engine, each on a row of its own.

One turn, with three rows and a chunk of four prompt tokens:

    row 2   reading   reads four tokens of its prompt   one chunk: of one prompt, or of short ones
    row 0   running   samples its next token            then one step of all running rows
    row 1   running   samples its next token

So a long prompt does not stop the others: between two tokens of a running row there are one step
and one chunk. The rows are the static rows of the engine's cache. There is no paging: a request
waits until a row is free, and keeps it until it ends. What a prompt has in common with any row is
not read but kept or copied: several answers to one prompt read it once.
"""

from collections import deque
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from mistral.engine.base import NO_NUMBERS, Engine
from mistral.engine.constraints import require_mask
from mistral.engine.ids import check_rows
from mistral.engine.loop import choice_problem
from mistral.engine.speculation import LookupDecoder
from mistral.errors import MistralError
from mistral.server.request import Chosen, Reason, Request, Run
from mistral.server.rows import Rows
from mistral.server.watch import Watch


class QueueFull(MistralError, RuntimeError):
    """As many requests wait as may wait; a later attempt may succeed."""


class Slots:
    """Schedules requests onto the rows of an engine. One thread at a time may use it.

    engine  of B rows, all of them empty; from now on it belongs to the slots
    chunk   how many ids are prefilled between two steps, at most
    queue   how many requests may wait for a row
    same_bits  the logits of a run are bit for bit those that it has without company in these slots.
            Each row has a forward pass of its own, which is as slow as one request after the other,
            unless the engine's steps keep bits (`Engine.steps_keep_bits`). No prefix is reused, one
            prompt is read at a time, and the model is asked for ids that a constraint forces
    watch   is told of every forward pass

    Invariants, between any two calls:

    1. `Rows.ids` are the ids that the rows of the engine hold.
    2. A run is in exactly one place: in the queue ("waiting"), on one row ("reading", "running"),
       or in neither ("ended"). An ended run never changes again, and a row without a run is free.
    3. First come, first served: of two requests the earlier one gets a row first, and its prompt
       is read to its end first. While a row is free, no request waits for longer than a turn.
    4. Between two tokens of a running row there are one step and at most `chunk` prefilled ids:
       ids that constraints force (half of them at most), and those of prompts; for each prompt that
       begins, one row may be copied. With a `LookupDecoder` the step reads its guesses, too.
    5. The ids of a run are those that its request gets alone, up to the rounding of a batch: its
       random numbers begin anew on its row, and a prefix is reused only if all its ids are equal.

    An exception of a constraint, or a row that has no choice left, ends that run alone. An
    exception of the engine ends all runs that have a row, and all rows are emptied.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        chunk: int = 128,
        queue: int = 64,
        same_bits: bool = False,
        watch: Watch | None = None,
    ):
        if any(engine.lengths):
            raise ValueError("the engine holds tokens already: slots need an empty one")
        if chunk < 2 or queue < 0:
            raise ValueError(f"slots need chunk >= 2 and queue >= 0, not {chunk} and {queue}")
        if same_bits and isinstance(engine, LookupDecoder):
            raise ValueError("same_bits excludes lookup: guesses that are read along change bits")
        self.engine = engine
        self.chunk = chunk
        self.queue = queue
        engine.answer_starts = [0] * engine.batch_size
        engine.rows_together = not same_bits
        self._same_bits = same_bits
        self._watch = watch or Watch()
        self._held = Rows(engine, reuses=not same_bits)
        self._runs: list[Run | None] = [None] * engine.batch_size  # of each row; None: it is free
        # Ids that each row must get before its next step. Dicts keep the order of insertion.
        self._forced: dict[int, list[int]] = {}
        self._reading: list[int] = []  # rows that read a prompt, in the order of admission
        self._waiting: deque[Run] = deque()

    # For callers

    @property
    def waiting(self) -> int:
        """How many requests wait for a row."""
        return len(self._waiting)

    def submit(self, request: Request) -> Run:
        """Queue a request. ValueError if it can never be served; QueueFull for one too many."""
        check_rows([request.prompt_ids], 1, self.engine.config.vocab_size)
        request.sampling.check_ids(self.engine.config.vocab_size)
        needed = len(request.prompt_ids) + min(request.max_new_tokens, 1)
        if needed > self.engine.limit:
            raise ValueError(
                f"a prompt of {len(request.prompt_ids)} tokens leaves no room for an answer: a "
                f"slot holds {self.engine.limit} tokens"
            )
        if self.waiting >= self.queue + self._runs.count(None):
            raise QueueFull(f"{self.waiting} requests are waiting already")
        run = Run(request)
        run.note("queued")
        self._waiting.append(run)
        return run

    def cancel(self, run: Run) -> None:
        """End a run; its row is free before the next step."""
        if run in self._waiting:
            self._waiting.remove(run)
            run.end("cancelled")
        elif run in self._runs:
            self._end(self._runs.index(run), "cancelled")

    def turn(self) -> bool:
        """One chunk of prompts, and one step of the running rows; whether there is more to do."""
        try:
            self._admit()
            self._read(self.chunk - self._append_forced())
            self._step_all([b for b in self._running() if b not in self._forced])
        except BaseException as error:
            self._recover(error)
            if not isinstance(error, Exception):  # Ctrl-C
                raise
        return bool(self._waiting) or any(self._runs)

    def state(self) -> list[dict[str, Any]]:
        """A dict per row: whether it is free, and how far its run has come."""
        states = []
        for b, (run, ids) in enumerate(zip(self._runs, self._held.ids)):
            progress = {"state": "free"} if run is None else run.progress()
            states.append({"id": b, "held_tokens": len(ids), **progress})
        return states

    # Rows for those that wait

    def _admit(self) -> None:
        """Give the free rows to the requests that have waited longest."""
        while self._waiting and None in self._runs:
            free = [b for b, other in enumerate(self._runs) if other is None]
            run = self._waiting.popleft()
            try:
                reusing = () if run.request.score_prompt else run.request.prompt_ids
                b = self._held.take(free, reusing)
            except BaseException as error:
                run.end("error", error)
                raise
            self._runs[b] = run
            self._reading.append(b)
            run.state = "reading"
            run.row = b
            run.cached_tokens = len(self._held.ids[b])
            run.note("admitted")

    # A step

    def _step_all(self, rows: list[int]) -> None:
        """Step these rows, and again those whose next token needs no forward pass."""
        while rows:
            self._step(rows)
            still = [b for b in self._running() if b in rows and b not in self._forced]
            rows = [b for b in still if self.engine.is_ahead(b)]

    def _step(self, rows: list[int]) -> None:
        """Sample and append a token in each of these rows."""
        mask = self._masks(rows)
        rows = [b for b in rows if self._runs[b]]  # those whose constraint raised no error
        if not rows:
            return
        # 1. Launch.
        asking = [b for b in rows if self._runs[b].request.num_reported is not None]
        self._watch.begin("step", [self._runs[b] for b in rows], len(rows))
        log_p = self._log_probabilities(asking) if asking else None
        sampling = [run.request.sampling if b in rows else None for b, run in enumerate(self._runs)]
        ids = self.engine.step(sampling, mask).tolist()
        self._watch.end()
        self._held.append({b: ids[b] for b in rows})
        # 2. Read back.
        scored = {} if log_p is None else self._scored({b: ids[b] for b in asking}, log_p)
        for b in rows:
            if problem := choice_problem(ids[b]):
                self._end(b, "error", ValueError(problem))
                if ids[b] == NO_NUMBERS:
                    self._held.erase(b)
                continue
            origin = "drafted" if self.engine.is_ahead(b) else "sampled"
            chosen = scored[b] if b in scored else Chosen(ids[b])
            self._take(b, chosen._replace(origin=origin))
            self._ask_forced(b)

    def _masks(self, rows: list[int]) -> Tensor | None:
        """The masks of the rows' constraints, bool [B, V]; None if every id is allowed.

        An exception of a constraint ends its run.
        """
        shape = (len(self._runs), self.engine.config.vocab_size)
        masks: dict[int, Tensor] = {}
        for b, request in self._constrained(rows):
            try:
                mask = request.constraint.mask()
                if mask is not None:
                    require_mask(mask, shape[1])
                    masks[b] = mask
            except Exception as error:
                self._end(b, "error", error)
        if not masks:
            return None
        # On the device that one of them is on, if any: a copy to the host would wait for it.
        device = max((mask.device for mask in masks.values()), key=lambda on: on.type != "cpu")
        together = torch.ones(shape, dtype=torch.bool, device=device)
        for b, mask in masks.items():
            together[b].copy_(mask, non_blocking=True)
        return together

    def _log_probabilities(self, rows: list[int]) -> Tensor:
        """What the model gives each id as the next of these rows: [len(rows), V]."""
        return self.engine.logits[rows].float().log_softmax(dim=-1)

    def _scored(self, ids: dict[int, int], log_p: Tensor) -> dict[int, Chosen]:
        """The tokens that a step has chosen for rows, with what each row asks for of log_p."""
        most = [self._runs[b].request.num_reported for b in ids]
        # A negative id is a problem of its row, which does not take the token.
        tokens = Chosen.scored([max(id, 0) for id in ids.values()], log_p, max(most))
        return {b: token._replace(top=token.top[:n]) for b, token, n in zip(ids, tokens, most)}

    def _take(self, b: int, chosen: Chosen) -> None:
        """Give a run its next token, tell its constraint, and see whether it has ended."""
        run = self._runs[b]
        if run is None:  # it ended at an earlier one of its forced ids
            return
        run.add(chosen)
        if chosen.id in run.request.stop_tokens:
            self._end(b, "stop")
            return
        try:
            if run.request.constraint is not None:
                run.request.constraint.accept(chosen.id)
        except Exception as error:
            self._end(b, "error", error)
            return
        self._end_if_complete(b)

    # Forced ids, and a chunk of prompts

    def _ask_forced(self, b: int) -> None:
        """Ask the constraint of a running row which ids it forces now.

        If log-probabilities are asked for, the model must be asked for every id.
        """
        run = self._runs[b]
        if run is None or run.request.constraint is None:
            return
        if self._same_bits or run.request.top_logprobs is not None:
            return
        most = min(self._held.room(b), run.request.max_new_tokens - run.generated)
        try:
            ids = run.request.constraint.forced()[:most]
        except Exception as error:
            self._end(b, "error", error)
            return
        if ids := list(takewhile(lambda id: id not in run.request.stop_tokens, ids)):
            self._forced[b] = ids

    def _append_forced(self) -> int:
        """Append forced ids, half a chunk of them at most; returns how many."""
        forced = {}
        left = self.chunk // 2
        for b, due in self._forced.items():
            if ids := due[:left]:
                forced[b] = ids
                left -= len(ids)
        if forced:
            runs = [self._runs[b] for b in forced]
            self._watch.begin("forced", runs, sum(map(len, forced.values())))
            self._held.prefill(forced)
            self._watch.end()
        for b, ids in forced.items():
            rest = self._forced.pop(b)[len(ids) :]
            for id in ids:
                self._take(b, Chosen(id, origin="forced"))
            if not rest:
                self._ask_forced(b)
            elif self._runs[b] is not None:
                self._forced[b] = rest  # at the end: in the next turn the others come first
        return self.chunk // 2 - left

    def _read(self, most: int) -> None:
        """Read up to `most` tokens of prompts, those of earlier requests first."""
        chunks = self._chunks(most)
        if not chunks:
            return
        runs = [self._runs[b] for b in chunks]
        self._watch.begin("prompt", runs, sum(map(len, chunks.values())))
        if runs[0].request.score_prompt:  # alone
            [(b, ids)] = chunks.items()
            runs[0].add_prompt(self._held.score(b, ids))
        else:
            self._held.prefill(chunks)
        self._watch.end()
        for b in chunks:
            run = self._runs[b]
            if len(self._held.ids[b]) == run.prompt_tokens:
                self._reading.remove(b)
                run.state = "running"
                self.engine.answer_starts[b] = run.prompt_tokens
                self._end_if_complete(b)
                self._ask_forced(b)

    def _chunks(self, most: int) -> dict[int, list[int]]:
        """What is read in this turn, up to `most` ids: of one prompt, or the rest of several.

        A prompt that has as much in common with one of them waits: it is copied in the next turn.
        One that is scored is read alone; with `same_bits` all are.
        """
        chunks: dict[int, list[int]] = {}
        for b in self._reading:
            request = self._runs[b].request
            prompt = request.prompt_ids
            if chunks and (self._same_bits or request.score_prompt):
                break
            if len(self._held.ids[b]) == self._runs[b].cached_tokens and not request.score_prompt:
                others = [self._runs[other].request.prompt_ids for other in chunks]
                if any(self._held.will_share(b, prompt, other) for other in others):
                    break
                self._held.share(b, prompt)
                self._runs[b].cached_tokens = len(self._held.ids[b])
            read = len(self._held.ids[b])
            chunks[b] = list(prompt[read : read + most])
            most -= len(chunks[b])
            if not most or request.score_prompt:
                break
        return chunks

    # The end of a run

    def _end_if_complete(self, b: int) -> None:
        """End a run that has all its tokens, or no room for more."""
        if self._runs[b].generated >= self._runs[b].request.max_new_tokens:
            self._end(b, "length")
        elif not self._held.room(b):
            self._end(b, "full")

    def _end(self, b: int, reason: Reason, error: BaseException | None = None) -> None:
        """End the run of row b, and free the row, which keeps its ids."""
        self._runs[b].end(reason, error)
        self._runs[b] = None
        self._forced.pop(b, None)
        if b in self._reading:
            self._reading.remove(b)

    def _recover(self, error: BaseException) -> None:
        """After an exception of the engine: end the runs that have a row, and empty all rows."""
        for b, run in enumerate(self._runs):
            if run is not None:
                self._end(b, "error", error)
        self._held.empty()

    def _running(self) -> list[int]:
        return [b for b, run in enumerate(self._runs) if run and run.state == "running"]

    def _constrained(self, rows: Sequence[int]) -> list[tuple[int, Request]]:
        """Those of the rows that have a constraint, with their requests."""
        requests = [(b, self._runs[b].request) for b in rows]
        return [(b, request) for b, request in requests if request.constraint is not None]
