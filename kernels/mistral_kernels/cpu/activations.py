"""Activations as the products of packed weights take them: int16, 32 of them with one scale.

    d = largest magnitude of the 32 / 32767,  q = x / d rounded,  so x = d q up to 1.5e-5 of the
    largest of the 32

With them go sums that products use for weights with an offset: s = d (q_0 + ... + q_31), and the
int32 sums of 16 (for Q6_K, which has a scale for 16 columns).

A NaN or an infinity among the 32 makes d NaN, and with it all that depends on them: no value turns
into a plausible one.
"""

import numpy as np

from mistral_kernels.cpu.compiled import part
from mistral_kernels.cpu.lanes import (
    floats_at,
    floats_of,
    larger,
    largest,
    magnitude,
    rounded,
    store_float,
    store_int,
    store_low_words,
    sum_of_lanes,
    total,
)


@part
def round_groups(values, first, last, q, d, s, sixteens):
    """Groups `first` to `last` of 32 float32; all arguments but those two are addresses."""
    for g in range(first, last):
        x = values + 128 * g
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
            store_low_words(q + 64 * g + 32 * half, low)
            store_low_words(q + 64 * g + 32 * half + 16, high)
            of_half = np.int32(sum_of_lanes(low + high))
            store_int(sixteens + 8 * g + 4 * half, of_half)
            whole = np.int32(whole + of_half)
        store_float(d + 4 * g, scale)
        store_float(s + 4 * g, scale * np.float32(whole))
