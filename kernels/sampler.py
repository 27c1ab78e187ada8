"""What the sampling kernel reads besides the logits, and how it gets to the device."""

import torch
from torch import Tensor

from mistral.sampling import Sampling
from mistral_kernels import sampling as kernel
from mistral_kernels.portable import require


class Sampler:
    """Settings, random numbers and seen ids of B rows. Its tensors stay in place: CUDA graphs hold on to them.

    plain  run the kernel's plain-PyTorch twin instead

    A seed starts the random numbers at the first step that brings it, and they go on as long as it stays the same.
    Without one they start from a number that PyTorch's global generator gives.

    `counts` int64 [B] says where a row's random numbers stand: how many ids it has drawn. Who takes back ids that
    nobody has seen may take them off here, so that a text does not depend on how late its end was noticed.
    `problems` int64 [B]: what was wrong with the last choice, NO_NUMBERS or NOTHING_LEFT; 0: nothing.
    """

    def __init__(self, batch_size: int, V: int, device: torch.device | str, plain: bool = False):
        self._sample = kernel.sample_reference if plain else kernel.sample
        self._allowed = torch.ones(batch_size, V, dtype=torch.bool, device=device)
        self._seen = torch.zeros(batch_size, V, dtype=torch.bool, device=device)
        self._scores = torch.zeros(batch_size, V, dtype=torch.float32, device=device)
        self._reals = torch.zeros(4, dtype=torch.float32, device=device)
        self._wholes = torch.zeros(3, dtype=torch.int64, device=device)
        self.counts = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.problems = torch.zeros_like(self.counts)
        self._sampling: Sampling | None = None
        self._start = 0  # what the random numbers start from
        self._written: tuple | None = None
        self._knows_history = False

    @staticmethod
    def supports(sampling: Sampling) -> bool:
        """Whether the kernel has the rules that `sampling` asks for: all but typical_p and no_repeat_ngram_size."""
        return kernel.supports(sampling)

    def prepare(self, sampling: Sampling, mask: Tensor | None, history: Tensor) -> None:
        """Bring to the device what has changed since the last step; outside the graph, and nothing waits.

        mask     bool [B, V] or [V]: True where an id is allowed
        history  int64 [B, n]: each row's ids, -1 where there is none. It is looked at only after `forget`: `run` takes
                 note of what it chooses.

        Raises ValueError for settings that the kernel does not have.
        """
        require(self.supports(sampling), "the sampling kernel has neither typical_p nor no_repeat_ngram_size")
        if self._sampling is None or sampling.seed != self._sampling.seed:
            self._start = int(torch.randint(2**63 - 1, ())) if sampling.seed is None else sampling.seed
            self.counts.zero_()
        self._sampling = sampling
        reals = (sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty)
        seed = self._start if self._start < 2**63 else self._start - 2**64
        wholes = (min(sampling.top_k, self._seen.shape[1]), seed, int(mask is not None))
        if self._written != (reals, wholes):
            self._written = (reals, wholes)
            self._reals.copy_(torch.tensor(reals, dtype=torch.float32), non_blocking=True)
            self._wholes.copy_(torch.tensor(wholes), non_blocking=True)
        if mask is not None:
            self._allowed.copy_(mask, non_blocking=True)
        if not self._knows_history and sampling.repetition_penalty != 1:
            self._mark(history)
            self._knows_history = True

    def forget(self) -> None:
        """The rows hold other ids than `run` has chosen: look at their history when it matters again."""
        self._knows_history = False

    def run(self, logits: Tensor, ids: Tensor) -> None:
        """Choose each row's next id from logits fp32 [B, V] into ids int64 [B]; a CUDA graph can hold it."""
        settings = (self._allowed, self._seen, self._scores, self._reals, self._wholes, self.counts)
        self._sample(logits, *settings, ids, self.problems)

    def _mark(self, history: Tensor) -> None:
        (B, V), device = self._seen.shape, self._seen.device
        marked = torch.zeros(B, V + 1, dtype=torch.bool, device=device)
        self._seen.copy_(marked.scatter_(1, torch.where(history < 0, V, history), True)[:, :V])
