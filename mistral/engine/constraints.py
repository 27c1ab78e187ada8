"""Constraints that need no grammar."""

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from mistral.engine.base import Constraint, Engine


class FixedMask(Constraint):
    """Allows the same ids at every step; the mask is copied to the engine's device once."""

    is_static = True

    def __init__(self, decoder: Engine, allowed: Sequence[bool]):
        self._decoder = decoder
        self._mask = torch.tensor(allowed)  # [V]
        self._placed = False  # True: the mask is on the engine's device

    def mask(self) -> Tensor:
        """bool [V] on the device of the engine, which must hold tokens already."""
        if not self._placed:
            self._mask = self._mask.to(self._decoder.logits.device)
            self._placed = True
        return self._mask


class AnyToken(Constraint):
    """Allows every id."""

    is_static = True


class KnownTokens(FixedMask):
    """Forbids rows of the embedding that have no token, on top of another constraint."""

    def __init__(self, decoder: Engine, num_tokens: int, inner: Constraint):
        super().__init__(decoder, [id < num_tokens for id in range(decoder.config.vocab_size)])
        self._num_tokens = num_tokens
        self._inner = inner

    @property
    def is_static(self) -> bool:
        """Whether the mask is the same at every step."""
        return self._inner.is_static

    def mask(self) -> Tensor:
        """bool [V] on the engine's device."""
        known = super().mask()
        inner = self._inner.mask()
        if inner is None:
            return known
        require_mask(inner, len(known))
        return known & inner.to(known.device, non_blocking=True)

    def accept(self, id: int) -> None:
        """Pass the id on."""
        self._inner.accept(id)

    def forced(self) -> list[int]:
        """The inner constraint's forced ids, up to the first without a token."""
        return list(takewhile(lambda id: id < self._num_tokens, self._inner.forced()))


class CountsForced(Constraint):
    """Wraps a constraint and counts how many of its forced ids were appended (`taken`).

    Ids that were not reached do not count: a text may end among them, at its last token for
    example.
    """

    def __init__(self, inner: Constraint):
        self.taken = 0
        self._inner = inner
        self._due = 0  # forced ids that `accept` has not seen yet

    @property
    def is_static(self) -> bool:
        """Whether the mask is the same at every step."""
        return self._inner.is_static

    def mask(self) -> Tensor | None:
        """The inner constraint's mask."""
        return self._inner.mask()

    def accept(self, id: int) -> None:
        """Pass the id on, and count it if it was forced."""
        self._inner.accept(id)
        if self._due:
            self._due -= 1
            self.taken += 1

    def forced(self) -> list[int]:
        """The inner constraint's forced ids; they are due from now on."""
        ids = self._inner.forced()
        self._due = len(ids)
        return ids


def require_mask(mask: Tensor, V: int) -> None:
    """Raises ValueError for a constraint's mask that is not bool [V]."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (V,):
        shape = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)[:40]
        raise ValueError(f"a constraint's mask must be bool [{V}], not {shape}")


def stack_masks(
    constraints: Sequence[Constraint], running: Sequence[bool], logits: Tensor
) -> Tensor | None:
    """The rows' masks as one bool [B, V] on the logits' device; None if every row allows all ids.

    running  False for rows that have ended: their constraints are not asked
    """
    masks = [
        constraint.mask() if alive else None for constraint, alive in zip(constraints, running)
    ]
    if all(mask is None for mask in masks):
        return None
    for mask in masks:
        if mask is not None:
            require_mask(mask, logits.shape[-1])
    everything = torch.ones(logits.shape[-1], dtype=torch.bool)
    rows = [everything if mask is None else mask for mask in masks]
    return torch.stack([row.to(logits.device, non_blocking=True) for row in rows])
