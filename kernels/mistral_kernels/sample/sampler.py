"""The inputs of the sampling kernel besides the logits, and how they get to the device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mistral.engine.draws import Draws
from mistral.sampling import Sampling
from mistral_kernels.portable import require, row_width
from mistral_kernels.sample import kernel


@dataclass
class _Numbers:
    """The random numbers of a row, or of all rows that share a Sampling.

    seed    as in `Sampling`
    number  the seed itself, or one from PyTorch's global generator if it is None
    """

    seed: int | None
    number: int
    draws: Draws = field(default_factory=Draws)


class Sampler:
    """Settings, random numbers and seen ids of B rows. Its tensors keep their addresses, because
    CUDA graphs refer to them.

    plain  run the kernel's plain-PyTorch twin instead

    Which random numbers belong to which step is the rule of `RandomNumbers` (engine/draws.py): rows
    that share a Sampling draw together, others each by itself. Without a seed they start from a
    number of PyTorch's global generator, anew after the row was emptied (or all that draw
    together), and none are drawn again.

    counts    int64 [B]: how many ids each row has drawn, which is the position in its random
              numbers
    answers   int64 [B]: the last ids; or what was wrong with the choice, NO_NUMBERS or
              NOTHING_LEFT; or IDLE
    """

    def __init__(self, batch_size: int, V: int, device: torch.device | str, plain: bool = False):
        self._sample = kernel.sample_reference if plain else kernel.sample
        self._vocab_size = V
        rows = (batch_size, row_width(V))
        self._allowed = torch.ones(rows, dtype=torch.bool, device=device)
        self._seen = torch.zeros(rows, dtype=torch.bool, device=device)
        self._scores = torch.zeros(rows, dtype=torch.float32, device=device)
        self._floats = torch.zeros(batch_size, kernel.FLOATS, dtype=torch.float32, device=device)
        self._integers = torch.zeros(batch_size, kernel.INTEGERS, dtype=torch.int64, device=device)
        self.counts = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.answers = torch.zeros_like(self.counts)
        self._numbers: dict[int | None, _Numbers] = {}  # by row; None: of all rows together
        self._placed: list[int] | None = [0] * batch_size  # what `counts` holds; None: unknown
        self._advanced: list[int] = []  # what it holds after the next run
        self._written: list[tuple] | None = None  # what `_floats` and `_integers` were last set to
        self._knows_history = False  # whether `_seen` has all ids of the rows

    @staticmethod
    def supports(sampling: Sampling) -> bool:
        """Whether the kernel has the rules of `sampling`: all but typical_p, no_repeat_ngram_size,
        logit_bias, and the frequency and presence penalties.
        """
        typical = sampling.typical_p < 1 and sampling.temperature != 0
        is_biased = bool(sampling.logit_bias) or sampling.counts_answer
        return not typical and not is_biased and sampling.no_repeat_ngram_size == 0

    def prepare(
        self,
        sampling: Sampling | Sequence[Sampling | None],
        mask: Tensor | None,
        history: Tensor,
        counts: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Copy to the device what has changed since the last step. Outside the graph; it does not
        synchronize.

        sampling  one for all rows: they share its seed, and differ by their index. Or one for each
                  row: its random numbers depend on its own seed alone. None: the row is idle, and
                  its random numbers continue when it is active again.
        mask      bool [B, V] or [V]: True if an id is allowed; None: all are
        history   int64 [B, n]: each row's ids, -1 if there is none. Read at the first penalty, and
                  at the first after `forget`; in between `run` adds the ids that it chooses.
        counts    0 for another row that is idle; None: there is no other
        lengths   of the rows, before the ids are appended. With them the draw counts after
                  `confirm`, and until `settle` gives it back. None: every run counts.

        Raises ValueError for settings that the kernel does not have, and for another number of
        rows.
        """
        B = self._seen.shape[0]
        shared = isinstance(sampling, Sampling)
        rows = [sampling] * B if shared else list(sampling)
        require(len(rows) == B, f"{len(rows)} samplings for {B} rows")
        if counts is not None:
            rows = [row if count else None for row, count in zip(rows, counts)]
        active = [row for row in rows if row is not None]
        require(
            all(map(self.supports, active)),
            "the sampling kernel has no typical_p, no_repeat_ngram_size, logit_bias, "
            "frequency_penalty and presence_penalty",
        )
        self._begin(rows, shared)
        if lengths is not None:
            self._draw(rows, shared, lengths)
        settings = [
            self._settings(b, row, shared, masked=mask is not None) for b, row in enumerate(rows)
        ]
        if settings != self._written:
            self._written = None
            floats, integers = zip(*settings)
            self._floats.copy_(torch.tensor(floats, dtype=torch.float32), non_blocking=True)
            self._integers.copy_(torch.tensor(integers), non_blocking=True)
            self._written = settings
        if mask is not None:
            self._allowed[:, : self._vocab_size].copy_(mask, non_blocking=True)
        if not self._knows_history and any(row.repetition_penalty != 1 for row in active):
            self._mark(history)
            self._knows_history = True

    def confirm(self) -> None:
        """The ids of the last `run` were appended."""
        self._placed = self._advanced

    def settle(self, lengths: Sequence[int]) -> None:
        """Give back the random numbers of ids beyond the rows' lengths: they are drawn again.

        Must be called before a row that was rolled back grows again.
        """
        for key, numbers in list(self._numbers.items()):
            held = lengths if key is None else lengths[key : key + 1]
            if numbers.seed is not None:
                numbers.draws.settle(held)
            elif not any(held):
                del self._numbers[key]

    def restart(self, row: int) -> None:
        """Begin the random numbers of a row anew at its next draw."""
        self._numbers.pop(row, None)

    def forget(self) -> None:
        """The rows hold other ids than `run` has chosen: read their history at the next penalty."""
        self._knows_history = False

    def run(self, logits: Tensor, ids: Tensor) -> None:
        """Write each active row's next id into ids, int64 [B]; a CUDA graph can record it.

        logits  fp32 [B, `row_width(V)`], of which V columns count
        """
        tables = (self._allowed, self._seen, self._scores)
        settings = (self._floats, self._integers)
        written = (self.counts, ids, self.answers)
        self._sample(logits, *tables, *settings, *written, V=self._vocab_size)

    def _begin(self, rows: Sequence[Sampling | None], shared: bool) -> None:
        """Begin the random numbers of each active row whose seed is new."""
        begins = [False] * len(rows)
        for b, row in enumerate(rows):
            key = None if shared else b
            if row is None or (key in self._numbers and self._numbers[key].seed == row.seed):
                continue
            number = row.seed
            if number is None:
                number = int(torch.randint(2**63 - 1, ()))
            self._numbers[key] = _Numbers(row.seed, number)
            if shared:
                begins = [True] * len(rows)
            else:
                begins[b] = True
        if any(begins):
            self._placed = None
            begins = torch.tensor(begins).to(self.counts.device, non_blocking=True)
            self.counts.masked_fill_(begins, 0)

    def _draw(self, rows: Sequence[Sampling | None], shared: bool, lengths: Sequence[int]) -> None:
        """Bring each row's count to the device, and let the draws of this step count."""
        # 1. Bring the counts to the device, if they are not there.
        counts = [0] * len(rows)
        for b in range(len(rows)):
            if numbers := self._numbers.get(None if shared else b):
                counts[b] = len(numbers.draws)
        if self._placed != counts:
            self.counts.copy_(torch.tensor(counts), non_blocking=True)
        self._placed = None  # until `confirm`
        self._advanced = [count + (row is not None) for count, row in zip(counts, rows)]
        # 2. Draw.
        if shared:
            places = [math.inf if row is None else n for row, n in zip(rows, lengths)]
            self._numbers[None].draws.add(places)
            return
        for b, row in enumerate(rows):
            if row is not None:
                self._numbers[b].draws.add(lengths[b : b + 1])

    def _settings(
        self, b: int, sampling: Sampling | None, shared: bool, masked: bool
    ) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Row b of `_floats` and of `_integers`."""
        if sampling is None:
            return (0.0,) * kernel.FLOATS, (0,) * kernel.INTEGERS
        floats = (sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty)
        top_k = min(sampling.top_k, self._vocab_size)
        seed = self._numbers[None if shared else b].number
        seed = seed if seed < 2**63 else seed - 2**64  # the same bits as int64
        return floats, (top_k, seed, int(masked), _stream(b, shared), 1)

    def _mark(self, history: Tensor) -> None:
        V = self._vocab_size
        marked = torch.zeros(len(history), V + 1, dtype=torch.bool, device=self._seen.device)
        marked.scatter_(1, torch.where(history < 0, V, history), True)  # column V takes the -1s
        self._seen[:, :V].copy_(marked[:, :V])


def _stream(b: int, shared: bool) -> int:
    """The number of a row's random stream: rows that share a seed differ by their index."""
    return b if shared else 0
