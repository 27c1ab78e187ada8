"""Which ids may come next: the interface to grammars and the like, and the constraints that need
none.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Protocol

import torch
from torch import Tensor

from mistral.engine.decoder import Engine


class Constraint(Protocol):
    """Says which ids may come next; a grammar, for example.

    It may have two things more. `forced() -> list[int]` gives ids of which each is the only one
    that may come, no stop token among them; `generate` appends them without asking the model, so
    they cost one forward together instead of one each. `fixed`, if it is True, says that the mask
    is the same at every step, so that an engine may run ahead.
    """

    def mask(self) -> Tensor | None:
        """bool [V], True where an id is allowed; None: all are."""

    def accept(self, id: int) -> None:
        """Take note of the id that was chosen."""


class FixedMask:
    """A constraint to the same ids at every step; they are copied to the decoder's device once."""

    fixed = True

    def __init__(self, decoder: Engine, allowed: Sequence[bool]):
        self._decoder, self._mask, self._placed = decoder, torch.tensor(allowed), False  # [V]

    def mask(self) -> Tensor:
        """bool [V] on the device of the decoder, which has read something."""
        if not self._placed:
            self._mask, self._placed = self._mask.to(self._decoder.logits.device), True
        return self._mask

    def accept(self, id: int) -> None:
        """Nothing to remember."""


class KnownTokens(FixedMask):
    """Keeps rows of the embedding that have no token from being drawn, on top of another constraint
    if there is one.
    """

    def __init__(self, decoder: Engine, num_tokens: int, inner: Constraint | None):
        super().__init__(decoder, [id < num_tokens for id in range(decoder.config.vocab_size)])
        self._num_tokens, self._inner = num_tokens, inner

    @property
    def fixed(self) -> bool:
        """Whether the mask is the same at every step."""
        return self._inner is None or is_fixed(self._inner)

    def mask(self) -> Tensor:
        """bool [V] on the decoder's device."""
        known, inner = super().mask(), None if self._inner is None else self._inner.mask()
        return known if inner is None else known & inner.to(known.device, non_blocking=True)

    def accept(self, id: int) -> None:
        """Tell the other constraint."""
        if self._inner is not None:
            self._inner.accept(id)

    def forced(self) -> list[int]:
        """What the other constraint leaves no choice about, up to an id without a token."""
        return list(takewhile(lambda id: id < self._num_tokens, forced_ids(self._inner)))


class CountsForced:
    """Another constraint, and how many of the ids that it forced were taken (`taken`).

    Those that were not reached do not count: a text may end among them, at its last token for
    example.
    """

    def __init__(self, inner: Constraint):
        self.taken, self._inner, self._due = 0, inner, 0

    @property
    def fixed(self) -> bool:
        """Whether the mask is the same at every step."""
        return is_fixed(self._inner)

    def mask(self) -> Tensor | None:
        """The other's."""
        return self._inner.mask()

    def accept(self, id: int) -> None:
        """Tell the other; count the id if it was due."""
        self._inner.accept(id)
        if self._due:
            self._due, self.taken = self._due - 1, self.taken + 1

    def forced(self) -> list[int]:
        """The other's; they are due now."""
        ids = forced_ids(self._inner)
        self._due = len(ids)
        return ids


def is_fixed(constraint: Constraint) -> bool:
    """Whether its mask is the same at every step, so that a step can begin before the last one's id
    is known.
    """
    return getattr(constraint, "fixed", False)


def forced_ids(constraint: Constraint | None) -> list[int]:
    """The ids that a constraint leaves no choice about, if it says so."""
    return constraint.forced() if hasattr(constraint, "forced") else []


def stack_masks(
    constraints: Sequence[Constraint], running: Sequence[bool], logits: Tensor
) -> Tensor | None:
    """The rows' masks as one bool [B, V] beside the logits; None where every row allows everything.

    running  False for rows that have ended, whose constraints are not asked
    """
    masks = [
        constraint.mask() if alive else None for constraint, alive in zip(constraints, running)
    ]
    if all(mask is None for mask in masks):
        return None
    everything = torch.ones(logits.shape[-1], dtype=torch.bool)
    rows = [everything if mask is None else mask for mask in masks]
    return torch.stack([row.to(logits.device, non_blocking=True) for row in rows])
