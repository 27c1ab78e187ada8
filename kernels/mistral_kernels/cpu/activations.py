"""Activations as the products of packed weights take them: int16, 32 of them with one scale.

    d = largest magnitude of the 32 / 32767,  q = x / d rounded,  so x = d q up to 1.5e-5 of the
    largest of the 32

With them go sums that products use for weights with an offset: s = d (q_0 + ... + q_31), and the
int32 sums of 16 (for types that have a scale for 16 columns: Q2_K, Q3_K, Q6_K).

A NaN or an infinity among the 32 makes d NaN, and with it all that depends on them: no value turns
into a plausible one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mistral_kernels.cpu import compiled
from mistral_kernels.cpu.layout import AT_ONCE, rows_together
from mistral_kernels.cpu.pool import share

_PIECE = 16  # rows that a thread takes at a time


class Activations:
    """Up to `AT_ONCE` rows of activations, and memory for their rounded form.

    values       float32 [n, width]
    q            int16; with it the float32 d and s of each 32, and the int32 sums of each 16
    table        the address of five addresses: of values, q, d, s, sixteens

    The rows lie together, in the order in which several.py reads them: the first 256 columns of all
    of them, then the next. They are padded to a multiple of 4; one row is not.
    """

    def __init__(self, values: Tensor):
        n, width = values.shape
        if n > AT_ONCE:
            raise ValueError(f"{n} rows of activations, but {AT_ONCE} are the most")
        self._rows = rows_together(n)
        padded = -(-width // 256) * 256
        self.values = values
        self.q = torch.zeros(self._rows, padded, dtype=torch.int16)
        self.d = torch.zeros(self._rows, padded // 32)
        self.s = torch.zeros(self._rows, padded // 32)
        self.sixteens = torch.zeros(self._rows, padded // 16, dtype=torch.int32)
        parts = (values, self.q, self.d, self.s, self.sixteens)
        self._addresses = torch.tensor([part.data_ptr() for part in parts])
        self.table = self._addresses.data_ptr()

    def share_rows(self, work: Callable[[int, int, int, int], object]) -> None:
        """Call work(table, rows, first, last) for all rows; several threads share them.

        rows         how many lie together, with the padding
        first, last  which of them
        """
        share(lambda a, b: work(self.table, self._rows, a, b), len(self.values), _PIECE)

    def round(self) -> None:
        """Compute the rounded form of `values`."""
        width = self.values.shape[1]
        round_rows = compiled.function("round rows")
        self.share_rows(lambda table, rows, a, b: round_rows(table, width, rows, a, b))
