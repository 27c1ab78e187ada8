"""Activations as the products of packed weights take them: int16, 32 of them with one scale.

    d = largest magnitude of the 32 / 32767,  q = x / d rounded,  so x = d q up to 1.5e-5 of the
    largest of the 32

With them go sums that products use for weights with an offset: s = d (q_0 + ... + q_31), and the
int32 sums of 16 (for Q6_K, which has a scale for 16 columns).

A NaN or an infinity among the 32 makes d NaN, and with it all that depends on them: no value turns
into a plausible one.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mistral_kernels.cpu.compiled import compiled, part
from mistral_kernels.cpu.lanes import (
    floats_at,
    floats_of,
    larger,
    largest,
    long_at,
    magnitude,
    rounded,
    store_float,
    store_int,
    store_low_words,
    sum_of_lanes,
    total,
)
from mistral_kernels.cpu.layout import AT_ONCE
from mistral_kernels.cpu.pool import share

_PIECE = 16  # rows that a thread takes at a time; a part of AT_ONCE


@part
def round_row(activations, width, rows, c, first, last):
    """Round groups `first` to `last` of row c, one of `rows`; see `Activations` for the places."""
    values = long_at(activations) + 4 * width * c
    q = long_at(activations + 8)
    d = long_at(activations + 16)
    s = long_at(activations + 24)
    sixteens = long_at(activations + 32)
    for g in range(first, last):
        x = values + 128 * g
        place = (g // 8 * rows + c) * 8 + g % 8
        top = magnitude(floats_at(x))
        zero = floats_of(np.float32(0))
        check = floats_at(x) * zero  # 0; of a NaN or an infinity NaN
        for i in range(1, 4):
            top = larger(top, magnitude(floats_at(x + 32 * i)))
            check = check + floats_at(x + 32 * i) * zero
        biggest = largest(top)
        scale = biggest * np.float32(1 / 32767) + total(check)
        inverse = np.float32(0)
        if biggest > 0 and biggest < np.float32(np.inf):
            inverse = np.float32(32767) / biggest
        whole = np.int32(0)
        for half in range(2):
            at = x + 64 * half
            low = rounded(floats_at(at) * floats_of(inverse))
            high = rounded(floats_at(at + 32) * floats_of(inverse))
            store_low_words(q + 64 * place + 32 * half, low)
            store_low_words(q + 64 * place + 32 * half + 16, high)
            of_half = np.int32(sum_of_lanes(low + high))
            store_int(sixteens + 8 * place + 4 * half, of_half)
            whole = np.int32(whole + of_half)
        store_float(d + 4 * place, scale)
        store_float(s + 4 * place, scale * np.float32(whole))


@part
def rows_together(columns):
    """How many rows lie together, for so many rows of activations: 1, or a multiple of 4."""
    return 1 if columns == 1 else (columns + 3) // 4 * 4


@compiled("round rows")
def _round_rows(activations, width, rows, first, last):
    for c in range(first, last):
        round_row(activations, width, rows, c, 0, width // 32)


class Activations:
    """Rows of activations, and memory for their rounded form.

    values       float32 [n, width]
    q            int16; with it the float32 d and s of each 32, and the int32 sums of each 16
    tables       int64 [5] for each AT_ONCE rows: the addresses of their values, q, d, s, sixteens

    AT_ONCE rows lie together, in the order in which several.py reads them: the first 256 columns of
    all of them, then the next. Fewer rows are padded to a multiple of 4; one row is not.
    """

    def __init__(self, values: Tensor):
        n, width = values.shape
        room = rows_together.py_func(n)
        padded = -(-width // 256) * 256
        self.values = values
        self.q = torch.zeros(room, padded, dtype=torch.int16)
        self.d = torch.zeros(room, padded // 32)
        self.s = torch.zeros(room, padded // 32)
        self.sixteens = torch.zeros(room, padded // 16, dtype=torch.int32)
        parts = (values, self.q, self.d, self.s, self.sixteens)
        self.tables = [
            torch.tensor([part[start:].data_ptr() for part in parts])
            for start in range(0, n, AT_ONCE)
        ]

    def share_rows(self, work: Callable[[int, int, int, int, int], object]) -> None:
        """Call work(table, start, rows, first, last) for all rows; several threads share them.

        table        address of the table of AT_ONCE rows, the first of which is row `start`
        rows         how many of them lie together
        first, last  which of them
        """
        n = len(self.values)

        def some(first: int, last: int) -> None:
            chunk = first // AT_ONCE
            start = chunk * AT_ONCE
            rows = rows_together.py_func(min(AT_ONCE, n - start))
            work(self.tables[chunk].data_ptr(), start, rows, first - start, last - start)

        share(some, n, _PIECE)

    def round(self) -> None:
        """Compute the rounded form of `values`."""
        width = self.values.shape[1]
        self.share_rows(
            lambda table, start, rows, first, last: _round_rows(table, width, rows, first, last)
        )
