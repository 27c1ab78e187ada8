"""What the sampling kernel reads besides the logits, and how it gets to the device."""

import torch
from torch import Tensor

from mistral.sampling import Sampling
from mistral_kernels.portable import require
from mistral_kernels.sample import kernel as kernel


class Sampler:
    """Settings, random numbers and seen ids of B rows. Its tensors stay in place: CUDA graphs hold
    on to them.

    plain  run the kernel's plain-PyTorch twin instead

    A seed starts the random numbers at the first step that brings it, and they go on as long as it
    stays the same. Without one they start from a number that PyTorch's global generator gives.

    counts    int64 [B]: how many ids each row has drawn, which is where its random numbers stand.
              What is taken off here is drawn again.
    problems  int64 [B]: what was wrong with the last choice, NO_NUMBERS or NOTHING_LEFT; 0: nothing
    """

    def __init__(self, batch_size: int, V: int, device: torch.device | str, plain: bool = False):
        self._sample = kernel.sample_reference if plain else kernel.sample
        self._allowed = torch.ones(batch_size, V, dtype=torch.bool, device=device)
        self._seen = torch.zeros(batch_size, V, dtype=torch.bool, device=device)
        self._scores = torch.zeros(batch_size, V, dtype=torch.float32, device=device)
        self._floats = torch.zeros(4, dtype=torch.float32, device=device)
        self._integers = torch.zeros(3, dtype=torch.int64, device=device)
        self.counts = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.problems = torch.zeros_like(self.counts)
        self._sampling: Sampling | None = None
        self._seed = 0
        self._written: tuple | None = None  # what `_floats` and `_integers` were last set to
        self._knows_history = False  # whether `_seen` has all ids of the rows

    @staticmethod
    def supports(sampling: Sampling) -> bool:
        """Whether the kernel has the rules that `sampling` asks for: all but typical_p and
        no_repeat_ngram_size.
        """
        typical = sampling.typical_p < 1 and sampling.temperature != 0
        return not typical and sampling.no_repeat_ngram_size == 0

    def prepare(self, sampling: Sampling, mask: Tensor | None, history: Tensor) -> None:
        """Bring to the device what has changed since the last step; outside the graph, and nothing
        waits.

        mask     bool [B, V] or [V]: True where an id is allowed; None: everywhere
        history  int64 [B, n]: each row's ids, -1 where there is none. It is read at the first
                 penalty, and at the first after `forget`: in between `run` takes note of what it
                 chooses.

        Raises ValueError for settings that the kernel does not have.
        """
        require(
            self.supports(sampling),
            "the sampling kernel has neither typical_p nor no_repeat_ngram_size",
        )
        if self._sampling is None or sampling.seed != self._sampling.seed:
            self._seed = (
                int(torch.randint(2**63 - 1, ())) if sampling.seed is None else sampling.seed
            )
            self.counts.zero_()
        self._sampling = sampling
        floats = (sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty)
        seed = self._seed if self._seed < 2**63 else self._seed - 2**64  # the same bits as int64
        integers = (min(sampling.top_k, self._seen.shape[1]), seed, int(mask is not None))
        if self._written != (floats, integers):
            self._written = (floats, integers)
            self._floats.copy_(torch.tensor(floats, dtype=torch.float32), non_blocking=True)
            self._integers.copy_(torch.tensor(integers), non_blocking=True)
        if mask is not None:
            self._allowed.copy_(mask, non_blocking=True)
        if not self._knows_history and sampling.repetition_penalty != 1:
            self._mark(history)
            self._knows_history = True

    def restart(self) -> None:
        """Let the next step begin the random numbers, whatever its seed is."""
        self._sampling = None

    def forget(self) -> None:
        """The rows hold other ids than `run` has chosen: look at their history when it matters
        again.
        """
        self._knows_history = False

    def run(self, logits: Tensor, ids: Tensor) -> None:
        """Choose each row's next id from logits fp32 [B, V] into ids int64 [B]; a CUDA graph can
        hold it.
        """
        settings = (
            self._allowed,
            self._seen,
            self._scores,
            self._floats,
            self._integers,
            self.counts,
        )
        self._sample(logits, *settings, ids, self.problems)

    def _mark(self, history: Tensor) -> None:
        (B, V), device = self._seen.shape, self._seen.device
        marked = torch.zeros(B, V + 1, dtype=torch.bool, device=device)
        self._seen.copy_(marked.scatter_(1, torch.where(history < 0, V, history), True)[:, :V])
