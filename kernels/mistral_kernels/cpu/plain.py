"""Products of matrices that are not packed: rows of float32, float16 or bfloat16.

Every value is widened to float32 in a register, so bfloat16 is read at the speed of memory on
processors that have no instructions for it. Arguments are those of products.py.
"""

from collections.abc import Callable

import numpy as np

from mistral_kernels.cpu.compiler import part
from mistral_kernels.cpu.lanes import (
    floats_at,
    floats_of,
    floats_of_brains_at,
    floats_of_halves_at,
    long_at,
    multiply_add,
    prefetch,
    store_float,
    total,
)
from mistral_kernels.cpu.layout import AHEAD, VALUE_BYTES


def _plain_loop(load: Callable, size: int) -> Callable:
    """A tile is 8 rows here too; the activations are the float32 ones, 32 * groups of them."""

    @part
    def dot(row, x, groups):
        a = floats_of(np.float32(0))
        b = floats_of(np.float32(0))
        c = floats_of(np.float32(0))
        d = floats_of(np.float32(0))
        for g in range(groups):
            w = row + 32 * size * g
            v = x + 128 * g
            prefetch(w + AHEAD)
            a = multiply_add(load(w), floats_at(v), a)
            b = multiply_add(load(w + 8 * size), floats_at(v + 32), b)
            c = multiply_add(load(w + 16 * size), floats_at(v + 64), c)
            d = multiply_add(load(w + 24 * size), floats_at(v + 96), d)
        return total((a + b) + (c + d))

    def loop(weights, first, last, groups, columns, activations, out, stride):
        x = long_at(activations)
        for r in range(8 * first, 8 * last):
            row = weights + 32 * size * groups * r
            for c in range(columns):
                store_float(out + stride * c + 4 * r, dot(row, x + 128 * groups * c, groups))

    return loop


_LOADS = {"float32": floats_at, "float16": floats_of_halves_at, "bfloat16": floats_of_brains_at}


def plain_product(dtype: str) -> Callable:
    """The loop for rows of float32, float16 or bfloat16."""
    return _plain_loop(_LOADS[dtype], VALUE_BYTES[dtype])
