"""The two interfaces of generation: an engine computes, a constraint restricts."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from mistral.cache import rewind_counts
from mistral.config import Config
from mistral.engine.ids import token_ids, whole_numbers
from mistral.errors import shown
from mistral.sampling import IDLE, NO_NUMBERS, NOTHING_LEFT, Sampling

__all__ = ["IDLE", "NOTHING_LEFT", "NO_NUMBERS", "Constraint", "Engine"]


class Engine(ABC):
    """Holds B rows of ids and samples the next id of each. `Decoder` is the reference engine.

    config       of the model
    batch_size   B
    slack        how many tokens `rewind` can roll back once the window has begun to roll
    steps_in_flight  how many more steps `generate` may launch before it reads the ids of one back;
                 `step` must not synchronize if it is above 0
    rows_together  False: the logits of a row are bit for bit the same in any company. Every row has
                 a forward pass of its own then, so that a batch is no faster than its rows one by
                 one, unless ...
    steps_keep_bits  ... a step of several rows computes each as it would alone, bit for bit. Only
                 more than one token of a row has a forward pass of its own
    unpacked_kinds  the types of packed matrices that a step unpacks, which is slow
    holder       whose tokens the engine holds: a conversation stores itself here, to notice
                 whether another one used the engine in between
    in_flight    how many of each row's last ids were not yielded yet: `generate` stores it here
                 while it is suspended. They do not count in `lengths`, a copy is made without them,
                 and the next change of the rows rolls them back.
    uses         how often the rows were changed: `generate` compares it, to leave an engine alone
                 that another one has used since
    answer_starts  where the answer of each row starts: frequency and presence penalties count the
                 ids from there on. `generate` stores it here after each prompt; empty: all count

    An exception inside a method, Ctrl-C or out of memory, leaves the rows as they were or with the
    ids appended; `lengths` says which. The engine continues either way as one that nothing has
    interrupted.

    `copy.deepcopy` returns an independent engine of the same model, whose weights are shared.
    """

    config: Config
    batch_size: int = 1
    slack: int = 0
    steps_in_flight: int = 0
    rows_together: bool = True
    steps_keep_bits: bool = False
    unpacked_kinds: Sequence[str] = ()
    holder: object = None
    in_flight: Sequence[int] = ()
    uses: int = 0
    answer_starts: Sequence[int] = ()
    # What copies and pickles leave out: whoever uses the engine, and the thread that is inside.
    _not_copied: Sequence[str] = ("holder", "in_flight", "_thread")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo |= {id(shared): shared for shared in self._shared()}
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        for name, value in self._copied_state().items():
            setattr(copied, name, copy.deepcopy(value, memo))
        if any(self.in_flight):
            copied.rewind(self.in_flight)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return self._copied_state()

    def _copied_state(self) -> dict[str, Any]:
        return {name: v for name, v in vars(self).items() if name not in self._not_copied}

    def _shared(self) -> list[object]:
        """What a copy has in common with the original."""
        return []

    @property
    @abstractmethod
    def logits(self) -> Tensor:
        """[B, V]: the logits that the next step samples from.

        Those of an empty row are meaningless. Raises ValueError while every row is empty.
        """

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """How many tokens each row holds."""

    @property
    @abstractmethod
    def limit(self) -> int:
        """How many tokens a row can hold."""

    @abstractmethod
    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        """Append ids to each row (ragged; a row may be empty).

        Raises ValueError for ids outside the vocabulary and for rows that grow too long; nothing
        is appended then.
        """

    @abstractmethod
    def step(
        self,
        sampling: Sampling | Sequence[Sampling | None],
        mask: Tensor | None = None,
        active: Sequence[bool] | None = None,
    ) -> Tensor:
        """Sample an id for each row and append it: int64 [B] on the device.

        sampling  one for all rows, or one per row; None: the row is idle
        mask      bool [B, V] or [V]: True for an id that is allowed
        active    False for another row that is idle; None: all are active

        An idle row keeps its length, and IDLE is its id. If a row has no choice, its id is
        NO_NUMBERS or NOTHING_LEFT, and it must be rewound by one.
        """

    @abstractmethod
    def rewind(self, n: int | Sequence[int]) -> None:
        """Forget the last n tokens of every row (or n[b] of row b); all can always be forgotten.

        Raises ValueError for more than can be rolled back; nothing is forgotten then.
        """

    def restart_random(self, row: int) -> None:  # noqa: B027  (a default)
        """Begin the random numbers of a row anew: its seed starts again at the next step.

        For a new sequence on a row that keeps tokens of another one. This default is for an engine
        without random numbers.
        """

    def erase(self, row: int) -> None:
        """Empty a row, and forget what was computed for it, which may be NaN."""
        counts = [0] * self.batch_size
        counts[row] = self.lengths[row]
        self.rewind(counts)
        self.restart_random(row)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Make row `target` the first `length` tokens of row `source`, without a forward pass.

        What the target held is forgotten, and its random numbers begin anew. Keys and values are
        copied bit for bit. Raises ValueError if the window of the source has rolled too far for it,
        as for a rewind to that length, and for impossible rows and lengths; nothing changes then.
        This default is for an engine that cannot copy: it always raises.
        """
        raise ValueError(f"this engine cannot copy row {source} to row {target}")

    def verify(self, ids: Sequence[int]) -> Tensor:
        """`prefill` for one row that also returns the logits after each of the ids: [T, V].

        They are used to check a guess; `rewind` drops the wrong tokens. This default
        takes a forward pass for each id; an engine that guesses overrides it.
        """
        ids = self._to_verify(ids)
        rows = []
        for id in ids:
            self.prefill([[id]])
            rows.append(self.logits[0].clone())
        return torch.stack(rows)

    def verify_rows(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """`verify` for several rows: of each the logits after its ids, [T, V]; T may be 0.

        This default makes a forward pass for each row.
        """
        if self.batch_size == 1:
            return [self.verify(rows[0])]
        nothing = self.logits[:0]
        return [self.score(b, ids) if ids else nothing for b, ids in enumerate(rows)]

    def is_ahead(self, row: int) -> bool:
        """Whether the next step of a row needs no forward pass, because a guess was right."""
        return False

    def _begin_use(self) -> None:
        """What every method that changes the rows does before it looks at them."""
        self.uses += 1
        if any(self.in_flight):
            in_flight = self.in_flight
            self.in_flight = ()
            self.rewind(in_flight)

    def _yielded(self, lengths: Sequence[int]) -> list[int]:
        """The lengths without the ids in flight."""
        if not self.in_flight:
            return list(lengths)
        return [length - extra for length, extra in zip(lengths, self.in_flight)]

    def score(self, row: int, ids: Sequence[int]) -> Tensor:
        """Append ids to one row, and return the logits after each of them: [T, V].

        For the log-probabilities of a prompt. Raises what `prefill` raises. This default takes a
        forward pass for each id.
        """
        rows = []
        for id in ids:
            self.prefill([[id] if b == row else [] for b in range(self.batch_size)])
            rows.append(self.logits[row])
        return torch.stack(rows)

    def _to_verify(self, ids: Sequence[int]) -> list[int]:
        """The ids, checked. Raises ValueError for none, and for a decoder of several rows."""
        checked = token_ids(ids)
        if self.batch_size > 1 or not checked:
            raise ValueError(
                f"verify takes ids, and a decoder of one row; here are {len(checked)} and "
                f"{self.batch_size}"
            )
        return checked

    def _step_counts(
        self,
        sampling: Sampling | Sequence[Sampling | None],
        mask: Tensor | None,
        active: Sequence[bool] | None,
    ) -> list[int]:
        """How many ids a step appends to each row: 1, or 0 if the row is idle. Checks all of it."""
        counts = [1] * self.batch_size
        if not isinstance(sampling, Sampling):
            is_list = isinstance(sampling, (list, tuple))
            if not is_list or not all(own is None or isinstance(own, Sampling) for own in sampling):
                raise ValueError(
                    f"sampling must be a mistral.Sampling, or a list with one or None per row, not "
                    f"{shown(sampling)}"
                )
            counts = [int(own is not None) for own in sampling]
        if len(counts) != self.batch_size or len(active or counts) != self.batch_size:
            given = len(counts if active is None else active)
            raise ValueError(f"{given} samplings for a decoder of {self.batch_size} rows")
        self._check_mask(mask)
        if active is not None:
            counts = [count * bool(takes_part) for count, takes_part in zip(counts, active)]
        for b, (count, length) in enumerate(zip(counts, self.lengths)):
            if count and not length:
                raise ValueError(f"row {b} is empty: prefill a prompt first")
        self._check_room(counts)
        return counts

    def _check_copy(self, source: int, target: int, length: int) -> None:
        """Raises ValueError for other than two rows, and a length that the source has."""
        rows = range(self.batch_size)
        if source not in rows or target not in rows or source == target:
            raise ValueError(f"row {source} cannot be copied to row {target} of {self.batch_size}")
        if not 0 <= length <= self.lengths[source]:
            raise ValueError(
                f"{length} tokens cannot be copied of a row that holds {self.lengths[source]}"
            )

    def _rewind_counts(self, n: int | Sequence[int]) -> list[int]:
        """How many tokens each row forgets. ValueError for what is not such a count."""
        counts = whole_numbers(n, "the count of a rewind", repeated=self.batch_size)
        return rewind_counts(counts, self.lengths)

    def _check_mask(self, mask: Tensor | None) -> None:
        """Raises ValueError for a mask that is not bool [V] or [B, V]."""
        if mask is None:
            return
        V = self.config.vocab_size
        is_bool = isinstance(mask, Tensor) and mask.dtype == torch.bool
        if not is_bool or mask.shape not in ((V,), (self.batch_size, V)):
            shape = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else shown(mask)
            raise ValueError(
                f"the mask must be bool [{V}] or [{self.batch_size}, {V}], not {shape}"
            )

    def _check_room(self, counts: Sequence[int]) -> None:
        """Raises ValueError if counts[b] more ids do not fit into row b."""
        longest = max(length + count for length, count in zip(self.lengths, counts))
        if longest > self.limit:
            raise ValueError(f"{longest} tokens in a row, and the limit here is {self.limit}")


class Constraint:
    """Restricts which id may come next. Subclass it and override what is needed."""

    is_static = False  # True: the mask never changes, so an engine may keep steps in flight

    def mask(self) -> Tensor | None:
        """bool [V], True for an id that is allowed; None: every id is."""
        return None

    def accept(self, id: int) -> None:
        """Take note of the id that was chosen."""

    def forced(self) -> list[int]:
        """Ids that must come next, each the only one allowed, no stop token among them.

        `generate` appends them without asking the model: one forward pass for all of them.
        """
        return []

    @staticmethod
    def of(given: "Constraint | Any") -> "Constraint":
        """`given` itself; an object of another class is asked for `mask` and `accept` alone.

        Raises ValueError if it has not both.
        """
        if not all(callable(getattr(given, name, None)) for name in ("mask", "accept")):
            raise ValueError(f"a constraint has mask and accept, and {shown(given)} has not")
        return given if isinstance(given, Constraint) else _Adapted(given)


class _Adapted(Constraint):
    """A constraint made of an object that only has `mask` and `accept`."""

    def __init__(self, given: Any):
        self.mask = given.mask
        self.accept = given.accept
