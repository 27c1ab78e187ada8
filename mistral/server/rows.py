"""The ids that each row of an engine holds, so that a new prompt can reuse a common prefix."""

from collections.abc import Sequence

from torch import Tensor

from mistral.engine.base import Engine

# A shorter prefix, a begin-of-text token for example, is not worth the rest of a row.
LEAST_KEPT = 16


class Rows:
    """The rows of an engine, with a copy of their ids on the host.

    ids  of each row: exactly those that the engine holds, between any two calls that do not raise

    reuses  False: a row that is taken is emptied

    Everything that changes what a row holds is done here, except a step, after which `append`
    notes the ids. Exceptions are those of the engine; after one, `empty` makes the two agree.
    """

    def __init__(self, engine: Engine, reuses: bool = True):
        self._reuses = reuses
        self.ids: list[list[int]] = [[] for _ in range(engine.batch_size)]
        self._engine = engine
        self._used = [0] * engine.batch_size  # when each row was taken last
        self._taken = 0  # how often a row was taken

    def room(self, b: int) -> int:
        """How many more tokens row b can hold."""
        return self._engine.limit - len(self.ids[b])

    def take(self, free: Sequence[int], prompt: Sequence[int]) -> int:
        """One of the free rows, rewound to what it has in common with the prompt.

        That is the row with the longest common prefix to which the window still allows it to be
        rewound; without one, the row that was taken least recently, emptied. At least one token of
        the prompt is left to read. The row's random numbers begin anew.
        """
        by_age = sorted(free, key=lambda b: self._used[b])
        common = {b: _common_prefix(self.ids[b], prompt[:-1]) for b in by_age}
        worth_it = [b for b in by_age if self._reuses and common[b] >= LEAST_KEPT]
        for b in sorted(worth_it, key=lambda b: -common[b]):  # of equals, the oldest
            if self._rewind(b, common[b]):
                break
        else:
            b = by_age[0]
            self._rewind(b, 0)
        self._taken += 1
        self._used[b] = self._taken
        self._engine.restart_random(b)
        return b

    def prefill(self, ids_of: dict[int, list[int]]) -> None:
        """Append ids to some rows."""
        self._engine.prefill([ids_of.get(b, []) for b in range(len(self.ids))])
        for b, ids in ids_of.items():
            self.ids[b] += ids

    def score(self, b: int, ids: list[int]) -> Tensor:
        """Append ids to row b: the log-probabilities after each of them, [T, V]."""
        log_p = self._engine.score(b, ids).float().log_softmax(dim=-1)
        self.ids[b] += ids
        return log_p

    def append(self, chosen: dict[int, int]) -> None:
        """A step has appended an id to each of these rows; a negative one is dropped again."""
        dropped = [0] * len(self.ids)
        for b, id in chosen.items():
            if id < 0:
                dropped[b] = 1
            else:
                self.ids[b].append(id)
        if any(dropped):
            self._engine.rewind(dropped)

    def erase(self, b: int) -> None:
        """Empty a row whose keys and values may be NaN, which would spread to its next run."""
        self._engine.erase(b)
        self.ids[b].clear()

    def empty(self) -> None:
        """Empty all rows."""
        self._engine.rewind(self._engine.lengths)
        for ids in self.ids:
            ids.clear()

    def _rewind(self, b: int, length: int) -> bool:
        """Rewind row b to `length` ids. False if the window has rolled too far, except for 0."""
        counts = [0] * len(self.ids)
        counts[b] = len(self.ids[b]) - length
        try:
            self._engine.rewind(counts)
        except ValueError:
            return False
        del self.ids[b][length:]
        return True


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences have in common from the first on."""
    a = list(a)
    b = list(b)
    least = 0
    most = min(len(a), len(b))
    while least < most:  # bisection: Python compares slices fast
        middle = (least + most + 1) // 2
        if a[least:middle] == b[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least
