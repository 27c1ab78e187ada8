"""A draw for each row of an engine: which random numbers belong to which row, and to which id."""

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from mistral.sampling import IDLE, Sampling, next_ids

_STATE_EVERY = 32  # draws: a state has 5 kB on a CPU, and a draw takes some 0.5 ms


class RandomNumbers:
    """The random number generators of an engine.

    One Sampling for all rows: the rows share one generator, as in Hugging Face's `generate`, so a
    row's text depends on the number of rows.
    One Sampling per row: each row has a generator of its own, so its text is the one that it gets
    alone. In a new decoder of one row the two are the same.

    A seed starts its generator at the first step that has it; the generator continues, over any
    number of calls, as long as the seed stays the same. Random numbers belong to the ids that they
    chose: those of ids that no row holds any more (rolled back, or of an interrupted step) are
    drawn again. So a row that was emptied starts anew. Without a seed, random numbers come from
    PyTorch's global generator, and none are drawn again.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._streams: dict[int | None, _Stream] = {}  # by row; None: of all rows together

    def generator(
        self,
        sampling: Sampling,
        shape: Sequence[int],
        lengths: Sequence[float],
        row: int | None = None,
    ) -> torch.Generator | None:
        """The generator for the next draw of a row, or of all rows; None is PyTorch's global one.

        shape    of the draw
        lengths  of the row, or of each row, before the id is appended; infinite for an idle row
        """
        if sampling.seed is None:
            self._streams.pop(row, None)
            return None
        stream = self._streams.get(row)
        if stream is None or stream.seed != sampling.seed:
            stream = self._streams[row] = _Stream(sampling.seed, self._device)
        if sampling.temperature != 0:
            stream.begin_draw(shape, lengths)
        return stream.generator

    def restart(self, row: int) -> None:
        """Begin the random numbers of a row anew at its next draw."""
        self._streams.pop(row, None)

    def settle(self, lengths: Sequence[int]) -> None:
        """Give back the random numbers of ids beyond the rows' lengths: they are drawn again.

        Must be called before a row that was rolled back grows again.
        """
        for row, stream in self._streams.items():
            stream.settle(lengths if row is None else lengths[row : row + 1])


class Draws:
    """The draws from one seed that count: as long as one of their rows holds the id they chose."""

    def __init__(self):
        self._draws: list[Sequence[float]] = []  # for each: the rows' lengths before it

    def __len__(self) -> int:
        return len(self._draws)

    def add(self, lengths: Sequence[float]) -> None:
        """One more; `lengths` as in `RandomNumbers.generator`."""
        self._draws.append(tuple(lengths))

    def settle(self, lengths: Sequence[int]) -> None:
        """Give back the draws of ids that no row holds."""
        while self._draws and all(map(operator.ge, self._draws[-1], lengths)):
            self._draws.pop()


class _Stream(Draws):
    """One seeded generator, and its draws."""

    def __init__(self, seed: int, device: torch.device):
        super().__init__()
        self.seed = seed
        self.generator = torch.Generator(device).manual_seed(seed)
        self._used = 0  # how many draws the generator is away from its seed; -1: unknown
        self._states: list[Tensor] = []  # of the generator: before every _STATE_EVERY-th draw

    def begin_draw(self, shape: Sequence[int], lengths: Sequence[float]) -> None:
        """Bring the generator to the next draw, which counts from now on."""
        count = len(self)
        if self._used != count:  # draws were given back
            self._go_back(count, shape)
        if count == len(self._states) * _STATE_EVERY:
            self._states.append(self.generator.get_state())
        self._used = count + 1
        self.add(lengths)

    def _go_back(self, count: int, shape: Sequence[int]) -> None:
        """Bring the generator to where it was before a draw: to the state before it, and on."""
        state = min(count // _STATE_EVERY, len(self._states) - 1)
        self._used = -1
        self.generator.set_state(self._states[state])
        for _ in range(state * _STATE_EVERY, count):
            noise = torch.empty(*shape, dtype=torch.float32, device=self.generator.device)
            noise.exponential_(1, generator=self.generator)


def sample_rows(
    logits: Tensor,
    sampling: Sampling | Sequence[Sampling | None],
    history: Tensor,
    lengths: Sequence[int],
    mask: Tensor | None,
    random: RandomNumbers,
    counts: Sequence[int],
    starts: Sequence[int] = (),
) -> Tensor:
    """`next_ids` with one Sampling for all rows, or one per row: int64 [B].

    lengths  of the rows, for the random numbers too
    counts   0 for a row that is idle, which gets IDLE. If the rows share a Sampling, it still draws
             its share of the random numbers.
    starts   where the answer of each row starts; empty: all of its ids count
    """
    random.settle(lengths)
    if isinstance(sampling, Sampling):
        places = [length if count else math.inf for length, count in zip(lengths, counts)]
        generator = random.generator(sampling, logits.shape, places)
        ids = next_ids(logits, sampling, history, lengths, mask, generator, starts)
        if all(counts):
            return ids
        takes_part = torch.tensor(counts).to(ids.device, non_blocking=True) > 0
        return torch.where(takes_part, ids, IDLE)
    ids = torch.full((len(logits),), IDLE, device=logits.device)
    for b, (own, count) in enumerate(zip(sampling, counts)):
        if count:
            row = slice(b, b + 1)
            own_mask = mask[row] if mask is not None and mask.dim() == 2 else mask
            generator = random.generator(own, logits[row].shape, lengths[row], b)
            args = (history[row], lengths[row], own_mask, generator, starts[row])
            ids[row] = next_ids(logits[row], own, *args)
    return ids
