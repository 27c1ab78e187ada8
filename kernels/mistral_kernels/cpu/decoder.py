"""The CPU's engine: `mistral.Decoder` with a compiled step that reads packed weights."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from mistral.cache import Growth
from mistral.engine.attached import refuse_attachments
from mistral.engine.decoder import Decoder as ReferenceDecoder
from mistral.engine.given import only_model
from mistral.model import Mistral
from mistral.sampling import Sampling
from mistral_kernels.cpu import compiled
from mistral_kernels.cpu.buffers import Buffers
from mistral_kernels.cpu.compiled import Progress
from mistral_kernels.cpu.layout import AT_ONCE, LEAD, MAX_COLUMNS
from mistral_kernels.cpu.pool import short_waits, torch_threads
from mistral_kernels.cpu.prompt import read_prompt
from mistral_kernels.cpu.team import Team
from mistral_kernels.cpu.weights import Weights, kernels_for, problem

_NAME = "the CPU engine"


class Decoder(ReferenceDecoder):
    """`mistral.Decoder` on a CPU, faster: same methods, same meaning, same errors.

    max_tokens, slack  as there
    threads            None: as many as PyTorch uses
    progress           called if kernels must be compiled first (compiled.py, `prepare`)

    Up to 32 tokens at once, of one row or of several, are read by the compiled step (step.py);
    longer chunks, a row at a time, with PyTorch's attention (prompt.py).

    Differences: activations and logits are float32. In a packed model the activations are rounded
    to 15 bits before each product (activations.py), so logits differ from the reference's by about
    1e-4 of their size; in one that is not, sums of float32 have another order.

    With `rows_together = False` a step still reads all rows at once: a product with several columns
    computes each of them in the same order, however many there are. One column alone, which has
    a faster product of another order, is computed twice then; and in how many shares a context is
    cut does not depend on the columns.

    Packed weights are regrouped: the model's layers hold tiles instead of blocks. The model works
    as before, faster, with the same rounded activations. Raises ValueError if the kernels cannot
    run the model, and for what is attached to it (hooks, adapters, biases).
    """

    steps_keep_bits = True

    def __init__(
        self,
        model: Mistral,
        batch_size: int = 1,
        max_tokens: int | None = None,
        *,
        slack: int = 16,
        threads: int | None = None,
        progress: Progress = compiled.silent,
    ):
        model = only_model(model)
        refuse_attachments(model, _NAME)
        if model.device.type != "cpu":
            raise ValueError(f"{_NAME} needs the model on the CPU, and it is on {model.device}")
        if reason := problem(model):
            raise ValueError(f"{reason}; or use the eager engine, mistral.Decoder")
        super().__init__(model, batch_size, max_tokens, slack=slack)
        compiled.prepare(kernels_for(model, self._cache.keys.dtype), progress)
        self._threads = threads or torch.get_num_threads()
        self._chunk = min(self._chunk, AT_ONCE)
        with torch.inference_mode():
            self._weights = Weights(model)
            self._prepare()

    def _prepare(self) -> None:
        """What belongs to this decoder alone: buffers, and helpers that hold no decoder."""
        buffers = Buffers(self.model, self._cache, self._threads, self._weights)
        step = compiled.function("step")
        fixed = buffers.sizes.data_ptr(), buffers.addresses.data_ptr()
        kept = (buffers, self._weights, self._cache.keys, self._cache.values)

        def work(seen: int, kept: Any = kept) -> int:
            return step(*fixed, seen)

        self._buffers = buffers
        self._work = work
        self._team = Team(self._threads, buffers.tickets, work)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        own = (self._buffers, self._team, self._work)
        memo |= {id(part): part for part in own}
        copied = super().__deepcopy__(memo)
        copied._prepare()
        return copied

    def __getstate__(self) -> None:
        raise TypeError("the CPU engine's decoder cannot be pickled; a mistral.Decoder can")

    def _shared(self) -> list[object]:
        return [self.model, self._weights]

    def _check_attached(self) -> None:
        refuse_attachments(self.model, _NAME)
        self._weights.check(self.model)

    def step(
        self,
        sampling: Sampling | Sequence[Sampling | None],
        mask: Tensor | None = None,
        active: Sequence[bool] | None = None,
    ) -> Tensor:
        """As in `mistral.Decoder`. What PyTorch does in it is too little for several threads."""
        with torch_threads(1):
            return super().step(sampling, mask, active)

    def verify_rows(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """As in `mistral.Decoder`, like `step`."""
        with torch_threads(1):
            return super().verify_rows(rows)

    def _forward(self, tokens: Tensor, counts: list[int]) -> Tensor:
        logits = torch.zeros(self.batch_size, self.config.vocab_size)
        for rows in self._passes(counts):
            if self._is_short(rows[0], counts[rows[0]]):
                growth = self._cache.grow([counts[b] * (b in rows) for b in range(self.batch_size)])
                # The last token of each row first: those have logits.
                last = [(b, counts[b] - 1) for b in rows]
                others = [(b, i) for b in rows for i in range(counts[b] - 1)]
                found = self._read(tokens, last + others, len(last), growth)
                if len(rows) == self.batch_size:  # in their order
                    return found.clone()
                logits[rows] = found
            else:
                b = rows[0]
                logits[b] = self._read_prompt(tokens[b, : counts[b]], b, last_only=True)[0]
        return logits

    def _forward_all(self, tokens: Tensor, counts: list[int]) -> Tensor:
        B, T = tokens.shape
        logits = torch.zeros(B, T, self.config.vocab_size)
        for rows in self._passes(counts):
            if self._is_short(rows[0], counts[rows[0]]):
                growth = self._cache.grow([counts[b] * (b in rows) for b in range(B)])
                columns = [(b, i) for b in rows for i in range(counts[b])]
                found = self._read(tokens, columns, len(columns), growth)
                b, i = zip(*columns)
                logits[list(b), list(i)] = found
            else:
                b = rows[0]
                found = self._read_prompt(tokens[b, : counts[b]], b, last_only=False)
                logits[b, : counts[b]] = found
        return logits

    def _passes(self, counts: list[int]) -> list[list[int]]:
        """Which rows are read together: by one step if they are short, and else alone."""
        passes: list[list[int]] = []
        columns = MAX_COLUMNS  # of the last step; no step yet
        for b, count in enumerate(counts):
            if count and not self._is_short(b, count):
                passes.insert(0, [b])
            elif count and columns + count <= MAX_COLUMNS:
                passes[-1].append(b)
                columns += count
            elif count:
                passes.append([b])
                columns = count
        return passes

    def _is_short(self, b: int, count: int) -> bool:
        """Whether a step reads these tokens: few, and none evicts what another one needs."""
        if count > MAX_COLUMNS:
            return False
        cache = self._cache
        if max(cache.lengths[b] + count, cache.peaks[b]) <= cache.num_slots:
            return True
        return cache.window is not None and count <= cache.num_slots - cache.window + 1

    def _read_prompt(self, tokens: Tensor, b: int, last_only: bool) -> Tensor:
        """Tokens [T] of row b by PyTorch's attention: float32 [T, V], or of the last one [1, V]."""
        with torch_threads(self._threads), short_waits():
            return read_prompt(self.model, self._weights, tokens, self._cache.row(b), last_only)

    def _read(
        self, tokens: Tensor, columns: list[tuple[int, int]], scored: int, growth: Growth
    ) -> Tensor:
        """One step: tokens [B, T], whose places (row, index) are `columns`.

        Returns the logits of the first `scored` columns: float32 [scored, V], memory that the next
        step overwrites.
        """
        asked = scored
        if not self.rows_together and len(columns) == 1:
            columns = 2 * columns  # both write the same bits to the same slot
            scored = 2
        rows = [b for b, _ in columns]
        positions = [growth.starts[b] + i for b, i in columns]
        flat = tokens.reshape(-1).tolist()
        ids = torch.tensor([flat[b * tokens.shape[1] + i] for b, i in columns])
        buffers = self._buffers
        self._weights.embed(ids, buffers.x)
        columns_of_shares = len(columns) if self.rows_together else self.batch_size
        buffers.give_orders(rows, positions, scored, columns_of_shares)
        self._cache.begin(growth)
        self._team.wake()
        self._work(LEAD)
        self._cache.commit(growth)
        return buffers.logits[:asked, : self.config.vocab_size]
