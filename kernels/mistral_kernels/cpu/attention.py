"""Attention of one new token of one row to the positions in its window, for one key/value head.

Keys and values are read where the rolling cache has them (mistral/cache.py): position p is in slot
p mod S. The positions in sight are consecutive, so no mask is needed: slots are read from the first
position on, and after slot S - 1 comes slot 0.

Scores are never in memory all at once. Blocks of positions are read one after another, with a
running maximum, as in FlashAttention (https://arxiv.org/abs/2205.14135, algorithm 1): if a block
raises the maximum, what was summed before is scaled down.

Several threads share a long context: each takes some of the positions and leaves a part: maximum,
sum, and the weighted values. `merge` puts the parts together (flash decoding).
"""

from collections.abc import Callable

import numpy as np

from mistral_kernels.cpu.compiler import part
from mistral_kernels.cpu.exponential import exp
from mistral_kernels.cpu.lanes import (
    float_at,
    floats_at,
    floats_of,
    floats_of_brains_at,
    floats_of_halves_at,
    larger,
    largest,
    local_memory,
    multiply_add,
    prefetch,
    store_brains,
    store_float,
    store_floats,
    store_halves,
    total,
)
from mistral_kernels.cpu.layout import AHEAD, VALUE_BYTES

_BLOCK = 32  # positions: with 128 columns in float32 their keys and values are 32 kB
_LOWEST = np.float32(-1e30)  # a score that weighs nothing

# dtype of the cache -> how to load and store 8 values
_CELLS = {
    "float32": (floats_at, store_floats),
    "float16": (floats_of_halves_at, store_halves),
    "bfloat16": (floats_of_brains_at, store_brains),
}


def _dot_of(load: Callable, size: int) -> Callable:
    @part
    def dot(q, key, H):
        a = floats_of(np.float32(0))
        b = floats_of(np.float32(0))
        for i in range(0, H, 16):
            a = multiply_add(load(key + size * i), floats_at(q + 4 * i), a)
            b = multiply_add(load(key + size * i + 8 * size), floats_at(q + 4 * i + 32), b)
        return total(a + b)

    return dot


def _add_values_of(load: Callable, size: int) -> Callable:
    @part
    def add_values(weights, count, values, H, out):
        """out [H] += sum of weights[t] * values[t]."""
        for i in range(0, H, 16):
            a = floats_at(out + 4 * i)
            b = floats_at(out + 4 * i + 32)
            c = floats_of(np.float32(0))
            d = floats_of(np.float32(0))
            for t in range(0, count - 1, 2):
                value = values + size * (t * H + i)
                w = floats_of(float_at(weights + 4 * t))
                v = floats_of(float_at(weights + 4 * t + 4))
                a = multiply_add(load(value), w, a)
                b = multiply_add(load(value + 8 * size), w, b)
                c = multiply_add(load(value + size * H), v, c)
                d = multiply_add(load(value + size * (H + 8)), v, d)
            if count % 2:
                value = values + size * ((count - 1) * H + i)
                w = floats_of(float_at(weights + 4 * (count - 1)))
                a = multiply_add(load(value), w, a)
                b = multiply_add(load(value + 8 * size), w, b)
            store_floats(out + 4 * i, a + c)
            store_floats(out + 4 * i + 32, b + d)

    return add_values


def _block_of(load: Callable, size: int) -> Callable:
    dot = _dot_of(load, size)
    add_values = _add_values_of(load, size)
    scratch = local_memory(4 * _BLOCK)

    @part
    def block(q, count, keys, values, H, out, is_first):
        """Up to _BLOCK positions for one query, the first one that reads them or another."""
        weights = scratch(0)
        # 1. Scores; those that fill up the last vector weigh nothing.
        for t in range(count):
            if is_first:
                # The next keys, and the values, which are read when all scores are known.
                for line in range(size * t * H, size * (t + 1) * H, 64):
                    prefetch(keys + AHEAD + line)
                    prefetch(values + line)
            store_float(weights + 4 * t, dot(q, keys + size * t * H, H))
        for t in range(count, (count + 7) // 8 * 8):
            store_float(weights + 4 * t, _LOWEST)
        # 2. The running maximum; scale down what was summed before.
        top = floats_at(weights)
        for t in range(8, count, 8):
            top = larger(top, floats_at(weights + 4 * t))
        before = float_at(out)
        maximum = max(before, largest(top))
        kept = floats_of(np.float32(np.exp(before - maximum)))
        for i in range(0, H, 8):
            store_floats(out + 32 + 4 * i, floats_at(out + 32 + 4 * i) * kept)
        # 3. Weights e^(score - maximum), their sum, and the values.
        summed = floats_of(np.float32(0))
        for t in range(0, count, 8):
            e = exp(floats_at(weights + 4 * t) - floats_of(maximum))
            store_floats(weights + 4 * t, e)
            summed = summed + e
        old_sum = float_at(out + 4) * np.float32(np.exp(before - maximum))
        store_float(out, maximum)
        store_float(out + 4, old_sum + total(summed))
        add_values(weights, count, values, H, out + 32)

    return block


def attention(dtype: str) -> Callable:
    """Attention to some positions, for a cache of this dtype.

    (q, heads, H, keys, values, S, first, last, out)

    q            address of float32 [heads, H]: rotated and scaled queries of one key/value head
    keys, values addresses of [S, H] in the cache
    first, last  positions
    out          address of float32 [heads, H + 8]: maximum and sum, 6 unused, then the values
    """
    load, _ = _CELLS[dtype]
    size = VALUE_BYTES[dtype]
    block = _block_of(load, size)

    def attend(q, heads, H, keys, values, S, first, last, out):
        part_size = 4 * (H + 8)
        for g in range(heads):
            store_float(out + g * part_size, _LOWEST)
            store_float(out + g * part_size + 4, np.float32(0))
            for i in range(0, H, 8):
                store_floats(out + g * part_size + 32 + 4 * i, floats_of(np.float32(0)))
        position = first
        while position < last:
            slot = position % S
            count = min(last - position, _BLOCK, S - slot)
            at = size * slot * H
            for g in range(heads):
                result = out + g * part_size
                block(q + 4 * g * H, count, keys + at, values + at, H, result, g == 0)
            position += count

    return attend


def storing(dtype: str) -> Callable:
    """(values, H, to): H float32 to a cache of this dtype."""
    _, store = _CELLS[dtype]
    size = VALUE_BYTES[dtype]

    def store_all(values, H, to):
        for i in range(0, H, 8):
            store(to + size * i, floats_at(values + 4 * i))

    return store_all


@part
def merge(parts, count, stride, H, out):
    """The `count` parts of one head, `stride` bytes apart, to its result: float32 [H]."""
    top = float_at(parts)
    for i in range(1, count):
        top = max(top, float_at(parts + i * stride))
    whole = np.float32(0)
    for i in range(count):
        at = parts + i * stride
        whole += float_at(at + 4) * np.float32(np.exp(float_at(at) - top))
    for h in range(0, H, 8):
        store_floats(out + 4 * h, floats_of(np.float32(0)))
    for i in range(count):
        at = parts + i * stride
        share = floats_of(np.float32(np.exp(float_at(at) - top)) / whole)
        for h in range(0, H, 8):
            added = multiply_add(floats_at(at + 32 + 4 * h), share, floats_at(out + 4 * h))
            store_floats(out + 4 * h, added)
