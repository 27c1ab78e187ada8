"""Float32 activations rounded to the int16 of `Activations` (activations.py)."""

import numpy as np

from mistral_kernels.cpu import layout
from mistral_kernels.cpu.compiler import part
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

rows_together = part(layout.rows_together)


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
        # Of smaller numbers the inverse would be infinite: they become 0.
        if biggest > np.float32(1e-34) and biggest < np.float32(np.inf):
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


def round_rows(activations, width, rows, first, last):
    """Round some rows of a table of activations."""
    for c in range(first, last):
        round_row(activations, width, rows, c, 0, width // 32)
