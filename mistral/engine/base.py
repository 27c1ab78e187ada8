"""The two interfaces of generation: an engine computes, a constraint restricts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mistral.config import Config
from mistral.sampling import IDLE, NO_NUMBERS, NOTHING_LEFT, Sampling

__all__ = ["IDLE", "NOTHING_LEFT", "NO_NUMBERS", "Constraint", "Engine"]


class Engine(ABC):
    """Holds B rows of ids and samples the next id of each. `Decoder` is the reference engine.

    config       of the model
    batch_size   B
    slack        how many tokens `rewind` can roll back once the window has begun to roll
    steps_in_flight  how many more steps `generate` may launch before it reads the ids of one back;
                 `step` must not synchronize if it is above 0
    unpacked_kinds  the types of packed matrices that a step unpacks, which is slow
    holder       whose tokens the engine holds: a conversation stores itself here, to notice
                 whether another one used the engine in between
    """

    config: Config
    batch_size: int = 1
    slack: int = 0
    steps_in_flight: int = 0
    unpacked_kinds: Sequence[str] = ()
    holder: object = None

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
        self, sampling: Sampling | Sequence[Sampling | None], mask: Tensor | None = None
    ) -> Tensor:
        """Sample an id for each row and append it: int64 [B] on the device.

        sampling  one for all rows, or one per row; None: the row is idle and keeps its length
        mask      bool [B, V] or [V]: True for an id that is allowed
        """

    @abstractmethod
    def rewind(self, n: int | Sequence[int]) -> None:
        """Forget the last n tokens of every row (or n[b] of row b); all can always be forgotten.

        Raises ValueError for more than can be rolled back; nothing is forgotten then.
        """

    def verify(self, ids: Sequence[int]) -> Tensor:
        """`prefill` for one row that also returns the logits after each of the ids: [T, V].

        They are used to check a guess; `rewind` drops the wrong tokens. This default
        takes a forward pass for each id; an engine that guesses overrides it.
        """
        self._check_verify(ids)
        rows = []
        for id in ids:
            self.prefill([[id]])
            rows.append(self.logits[0].clone())
        return torch.stack(rows)

    def _check_verify(self, ids: Sequence[int]) -> None:
        """Raises ValueError for no ids, and for a decoder of several rows."""
        if self.batch_size > 1 or not ids:
            raise ValueError(
                f"verify takes ids, and a decoder of one row; here are {len(ids)} and "
                f"{self.batch_size}"
            )

    def _check_ids(self, rows: Sequence[Sequence[int]]) -> None:
        """Raises ValueError for another number of rows and for ids outside the vocabulary."""
        if len(rows) != self.batch_size:
            raise ValueError(f"{len(rows)} rows for a decoder of {self.batch_size}")
        for id in set().union(*rows):
            if not 0 <= id < self.config.vocab_size:
                raise ValueError(
                    f"token id {id} lies outside the vocabulary of {self.config.vocab_size}"
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
        """`given` itself; an object of another class is asked for `mask` and `accept` alone."""
        return given if isinstance(given, Constraint) else _Adapted(given)


class _Adapted(Constraint):
    """A constraint made of an object that only has `mask` and `accept`."""

    def __init__(self, given: Any):
        self.mask = given.mask
        self.accept = given.accept
