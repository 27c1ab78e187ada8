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
        """One of the free rows, with the longest prefix of the prompt that any row has.

        A free row is rewound to it. If the row is not free, or would lose more than that and was
        used later than another free one, the prefix is copied to the free row that was used least
        recently. Without a prefix that row is emptied. At least one token of the prompt is left to
        read. The row's random numbers begin anew.
        """
        oldest = min(free, key=lambda b: self._used[b])
        for source, length in self._sources(prompt, LEAST_KEPT):
            stays = length == len(self.ids[source]) or source == oldest
            b = source if source in free and stays else oldest
            if self._rewind(b, length) if b == source else self._copy(source, b, length):
                break
        else:
            b = oldest
            self._rewind(b, 0)
        self._taken += 1
        self._used[b] = self._taken
        self._engine.restart_random(b)
        return b

    def share(self, b: int, prompt: Sequence[int]) -> None:
        """Copy a longer prefix of the prompt than row b has, if another row has read one since."""
        for source, length in self._sources(prompt, len(self.ids[b]) + LEAST_KEPT):
            if source != b and self._copy(source, b, length):
                return

    def will_share(self, b: int, prompt: Sequence[int], other: Sequence[int]) -> bool:
        """Whether more can be copied to row b once a row has read this other prompt."""
        most = max(common_prefix(ids, prompt[:-1]) for ids in self.ids)
        common = common_prefix(other, prompt[:-1])
        return self._reuses and common > most and common >= len(self.ids[b]) + LEAST_KEPT

    def _sources(self, prompt: Sequence[int], least: int) -> list[tuple[int, int]]:
        """The rows with at least so many first tokens of the prompt, and how many.

        The longest come first, of equals the one that was used least recently.
        """
        if not self._reuses or len(prompt) <= least:
            return []
        common = [(b, common_prefix(ids, prompt[:-1])) for b, ids in enumerate(self.ids)]
        long = [(b, length) for b, length in common if length >= least]
        return sorted(long, key=lambda pair: (-pair[1], self._used[pair[0]]))

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

    def _copy(self, source: int, b: int, length: int) -> bool:
        """Make row b the first ids of another row. False if the window has rolled too far."""
        try:
            self._engine.copy_row(source, b, length)
        except ValueError:
            return False
        self.ids[b] = self.ids[source][:length]
        return True

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


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
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
