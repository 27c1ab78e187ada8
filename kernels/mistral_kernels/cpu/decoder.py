"""The CPU's engine: `mistral.Decoder` with a compiled step that reads packed weights."""

import weakref
from typing import Any, Self

import torch
from torch import Tensor

from mistral.cache import Growth
from mistral.engine.attached import refuse_attachments
from mistral.engine.decoder import Decoder as ReferenceDecoder
from mistral.engine.given import only_model
from mistral.model import Mistral
from mistral_kernels.cpu.buffers import Buffers
from mistral_kernels.cpu.layout import MAX_COLUMNS
from mistral_kernels.cpu.step import LEAD, take_part
from mistral_kernels.cpu.team import Team
from mistral_kernels.cpu.weights import Weights, problem

_NAME = "the CPU engine"


class Decoder(ReferenceDecoder):
    """`mistral.Decoder` on a CPU, faster: same methods, same meaning, same errors.

    max_tokens, slack  as there
    threads            None: as many as PyTorch uses

    Up to 16 tokens at once, of one row or of several, are read by the compiled step (step.py);
    longer chunks by PyTorch's products, for which packed weights are unpacked piece by piece.

    Differences: logits are float32. In a packed model the activations are rounded to 15 bits before
    each product (activations.py), so logits differ from the reference's by about 1e-4 of their
    size; in one that is not, sums of float32 have another order.

    Packed weights are regrouped: the model's layers hold tiles instead of blocks. The model works
    as before, and its products with a few rows are faster. Raises ValueError if the kernels cannot
    run the model, and for what is attached to it (hooks, adapters, biases).
    """

    def __init__(
        self,
        model: Mistral,
        batch_size: int = 1,
        max_tokens: int | None = None,
        *,
        slack: int = 16,
        threads: int | None = None,
    ):
        model = only_model(model)
        refuse_attachments(model, _NAME)
        if model.device.type != "cpu":
            raise ValueError(f"{_NAME} needs the model on the CPU, and it is on {model.device}")
        if reason := problem(model):
            raise ValueError(f"{reason}; or use the eager engine, mistral.Decoder")
        super().__init__(model, batch_size, max_tokens, slack=slack)
        self._threads = threads or torch.get_num_threads()
        with torch.inference_mode():
            self._weights = Weights(model)
            self._prepare()

    def _prepare(self) -> None:
        """What belongs to this decoder alone: buffers, and helpers that hold no decoder."""
        buffers = Buffers(self.config, self._cache, self._threads, self._weights.vocab_tiles)
        fixed = (buffers.sizes, buffers.addresses, self._weights.matrices, self._weights.norms)
        kept = (buffers, self._weights, self._cache.keys, self._cache.values)

        def work(seen: int, kept: Any = kept) -> int:
            return take_part(*fixed, seen)

        self._buffers = buffers
        self._work = work
        self._team = Team(self._threads, buffers.tickets, work)
        weakref.finalize(self, self._team.close)

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

    def _forward(self, tokens: Tensor, counts: list[int]) -> Tensor:
        growth = self._cache.grow(counts)
        if not self._is_short(growth, counts):
            return super()._forward(tokens, counts).float()
        # The last token of each row first: those have logits.
        last = [(b, count - 1) for b, count in enumerate(counts) if count]
        others = [(b, i) for b, count in enumerate(counts) for i in range(count - 1)]
        logits = self._read(tokens, last + others, len(last), growth)
        if len(last) == self.batch_size:
            return logits
        rows = torch.tensor([b for b, _ in last])
        return logits.new_zeros(self.batch_size, logits.shape[1]).index_copy_(0, rows, logits)

    def _forward_all(self, tokens: Tensor) -> Tensor:
        B, T = tokens.shape
        growth = self._cache.grow([T] * B)
        if not self._is_short(growth, [T] * B):
            return super()._forward_all(tokens).float()
        columns = [(b, i) for b in range(B) for i in range(T)]
        return self._read(tokens, columns, B * T, growth).view(B, T, -1)

    def _is_short(self, growth: Growth, counts: list[int]) -> bool:
        """Whether the step reads these tokens: few, and none evicts what another one needs."""
        if sum(counts) > MAX_COLUMNS:
            return False
        cache = self._cache
        if max(growth.peaks) <= cache.num_slots:
            return True
        return cache.window is not None and max(counts) <= cache.num_slots - cache.window + 1

    def _read(
        self, tokens: Tensor, columns: list[tuple[int, int]], scored: int, growth: Growth
    ) -> Tensor:
        """One step: tokens [B, T], whose places (row, index) are `columns`.

        Returns the logits of the first `scored` columns: float32 [scored, V].
        """
        rows = [b for b, _ in columns]
        positions = [growth.starts[b] + i for b, i in columns]
        flat = tokens.reshape(-1).tolist()
        ids = torch.tensor([flat[b * tokens.shape[1] + i] for b, i in columns])
        buffers = self._buffers
        self._weights.embed(ids, buffers.x)
        cos, sin = self.model.model.rotary(torch.tensor([positions]), torch.float32)
        half = self.config.head_dim // 2
        buffers.cos[: len(columns)] = cos[0, 0, :, :half]
        buffers.sin[: len(columns)] = sin[0, 0, :, :half]
        buffers.give_orders(rows, positions, scored)
        self._cache.begin(growth)
        self._team.wake()
        self._work(LEAD)
        self._cache.commit(growth)
        return buffers.logits[:scored, : self.config.vocab_size].clone()
