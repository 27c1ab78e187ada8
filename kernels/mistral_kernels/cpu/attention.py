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
    totals,
)
from mistral_kernels.cpu.layout import VALUE_BYTES

_BLOCK = 32  # positions: with 128 columns in float32 their keys and values are 32 kB
_LOWEST = np.float32(-1e30)  # a score that weighs nothing

# dtype of the cache -> how to load and store 8 values
_CELLS = {
    "float32": (floats_at, store_floats),
    "float16": (floats_of_halves_at, store_halves),
    "bfloat16": (floats_of_brains_at, store_brains),
}


def _eight_scores_of(load: Callable, size: int) -> Callable:
    @part
    def eight(q, key, H):
        """With eight keys: each value of the query is loaded once for all of them."""
        row = size * H
        a = floats_of(np.float32(0))
        b = floats_of(np.float32(0))
        c = floats_of(np.float32(0))
        d = floats_of(np.float32(0))
        e = floats_of(np.float32(0))
        f = floats_of(np.float32(0))
        g = floats_of(np.float32(0))
        h = floats_of(np.float32(0))
        for i in range(0, H, 8):
            x = floats_at(q + 4 * i)
            k = key + size * i
            a = multiply_add(load(k), x, a)
            b = multiply_add(load(k + row), x, b)
            c = multiply_add(load(k + 2 * row), x, c)
            d = multiply_add(load(k + 3 * row), x, d)
            e = multiply_add(load(k + 4 * row), x, e)
            f = multiply_add(load(k + 5 * row), x, f)
            g = multiply_add(load(k + 6 * row), x, g)
            h = multiply_add(load(k + 7 * row), x, h)
        return totals(a, b, c, d, e, f, g, h)

    return eight


def _scores_of(load: Callable, size: int) -> Callable:
    eight = _eight_scores_of(load, size)

    @part
    def one(q, key, H):
        """The product of a query with a key."""
        a = floats_of(np.float32(0))
        b = floats_of(np.float32(0))
        for i in range(0, H, 16):
            a = multiply_add(load(key + size * i), floats_at(q + 4 * i), a)
            b = multiply_add(load(key + size * i + 8 * size), floats_at(q + 4 * i + 32), b)
        return total(a + b)

    @part
    def scores(q, count, keys, values, H, out, ahead, share):
        """Of `count` keys, and up to a multiple of 8 scores that weigh nothing.

        With every 8 keys it asks for `share` bytes of keys and values that lie `ahead` bytes on.
        """
        whole = count // 8 * 8
        for t in range(0, whole, 8):
            at = ahead + size * H * t
            for line in range(at, at + share, 64):
                prefetch(keys + line)
                prefetch(values + line)
            store_floats(out + 4 * t, eight(q, keys + size * H * t, H))
        if whole < count:
            store_floats(out + 4 * whole, floats_of(_LOWEST))
            for t in range(whole, count):
                store_float(out + 4 * t, one(q, keys + size * H * t, H))

    return scores


def _add_values_of(load: Callable, size: int) -> Callable:
    @part
    def sixteen(weights, count, values, H, out):
        a = floats_at(out)
        b = floats_at(out + 32)
        for t in range(count):
            w = floats_of(float_at(weights + 4 * t))
            v = values + size * H * t
            a = multiply_add(load(v), w, a)
            b = multiply_add(load(v + 8 * size), w, b)
        store_floats(out, a)
        store_floats(out + 32, b)

    @part
    def sixty_four(weights, count, values, H, out):
        """Eight sums at once: an addition to one waits until the last one to it has ended."""
        a = floats_at(out)
        b = floats_at(out + 32)
        c = floats_at(out + 64)
        d = floats_at(out + 96)
        e = floats_at(out + 128)
        f = floats_at(out + 160)
        g = floats_at(out + 192)
        h = floats_at(out + 224)
        for t in range(count):
            w = floats_of(float_at(weights + 4 * t))
            v = values + size * H * t
            a = multiply_add(load(v), w, a)
            b = multiply_add(load(v + 8 * size), w, b)
            c = multiply_add(load(v + 16 * size), w, c)
            d = multiply_add(load(v + 24 * size), w, d)
            e = multiply_add(load(v + 32 * size), w, e)
            f = multiply_add(load(v + 40 * size), w, f)
            g = multiply_add(load(v + 48 * size), w, g)
            h = multiply_add(load(v + 56 * size), w, h)
        for i, x in enumerate((a, b, c, d, e, f, g, h)):
            store_floats(out + 32 * i, x)

    @part
    def add_values(weights, count, values, H, out):
        """out [H] += sum of weights[t] * values[t]."""
        whole = H // 64 * 64
        for i in range(0, whole, 64):
            sixty_four(weights, count, values + size * i, H, out + 4 * i)
        for i in range(whole, H, 16):
            sixteen(weights, count, values + size * i, H, out + 4 * i)

    return add_values


def _block_of(load: Callable, size: int) -> Callable:
    scores = _scores_of(load, size)
    add_values = _add_values_of(load, size)
    scratch = local_memory(4 * _BLOCK)

    @part
    def block(q, count, keys, values, H, out, ahead, share):
        """Up to _BLOCK positions for one query."""
        weights = scratch(0)
        # 1. Scores.
        scores(q, count, keys, values, H, weights, ahead, share)
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
        # Each query asks for its share of the next block.
        share = 8 * size * H // heads
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
                ahead = size * _BLOCK * H + share * g
                block(q + 4 * g * H, count, keys + at, values + at, H, result, ahead, share)
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
