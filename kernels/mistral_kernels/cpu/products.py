"""Products of packed weights with activations: out[c, r] = sum over columns of w[r, k] x[c, k].

Activations are rounded to int16, 32 of them with one scale (activations.py), so a product of a
group of 32 columns is a sum of integers, times two scales. That is 200 times finer than the 8 bits
of llama.cpp, and it costs the same: a byte is widened to 16 bits in any case, because no processor
multiplies 4-bit numbers.

For each type of weights (tiles.py) there is a product of a tile with one row of activations here,
one with several rows (several.py), and a loop over tiles around the two. Decoding reads every
weight once a token, so what limits it is memory; `AHEAD` bytes are asked for in advance, because
the processor's own prefetching stops at the end of each page of 4 kB.
"""

from collections.abc import Callable

import numpy as np

from mistral_kernels.cpu.compiler import part
from mistral_kernels.cpu.encodings import (
    byte_sums,
    five_bit_sums,
    iq4_sums,
    iq4_xs_scale,
    low_and_high,
    nibble_sums,
    scale_and_min,
    six_bit_scale,
    six_bit_sums,
    sixteen_byte_sums,
    three_bit_sums,
    two_bit_sums,
)
from mistral_kernels.cpu.groups import group_of
from mistral_kernels.cpu.lanes import (
    as_floats,
    float_at,
    floats_at,
    floats_of,
    floats_of_halves_at,
    int_at,
    long_at,
    multiply_add,
    prefetch,
    signed_bytes_at,
    store_floats,
    sums_of,
)
from mistral_kernels.cpu.layout import AHEAD
from mistral_kernels.cpu.several import several

# ---- A tile times one row of activations, by type ----
# tile, x (int16), d (float32, one for 32 columns), s (d times the sum of 32) are addresses.


def _of_small_blocks(size: int, has_m: bool, zero: float, sums: Callable) -> Callable:
    """Blocks of 32 columns: d, m if it has one, and the weights, which are w - zero."""
    weights_at = 32 if has_m else 16
    offset = np.float32(-zero)

    @part
    def one(tile, groups, x, d, s, sixteens):
        result = floats_of(np.float32(0))
        for g in range(groups):
            block = tile + size * g
            for line in range(0, size, 64):
                prefetch(block + AHEAD + line)
            scale = floats_of_halves_at(block)
            product = as_floats(sums(block + weights_at, x + 64 * g))
            scaled_sum = floats_of(float_at(s + 4 * g))
            result = multiply_add(product, scale * floats_of(float_at(d + 4 * g)), result)
            if has_m:
                result = multiply_add(floats_of_halves_at(block + 16), scaled_sum, result)
            elif zero:
                result = multiply_add(scale * floats_of(offset), scaled_sum, result)
        return result

    return one


def _of_super_blocks(size: int, sums: Callable) -> Callable:
    """Q4_K and Q5_K: 8 groups of 32 columns, each with a scale and a min of 6 bits."""
    group_size = (size - 128) // 8

    @part
    def one(tile, groups, x, d, s, sixteens):
        result = floats_of(np.float32(0))
        for b in range(groups // 8):
            block = tile + size * b
            scaled = floats_of(np.float32(0))
            lows = floats_of(np.float32(0))
            for line in range(0, 128, 64):
                prefetch(block + AHEAD + line)
            for i in range(8):
                g = 8 * b + i
                weights = block + 128 + group_size * i
                for line in range(0, group_size, 64):
                    prefetch(weights + AHEAD + line)
                scale, low = scale_and_min(block + 32, i)
                product = as_floats(sums(weights, x + 64 * g))
                scaled = multiply_add(product, scale * floats_of(float_at(d + 4 * g)), scaled)
                lows = multiply_add(low, floats_of(float_at(s + 4 * g)), lows)
            result = multiply_add(scaled, floats_of_halves_at(block), result)
            result = result - lows * floats_of_halves_at(block + 16)
        return result

    return one


@part
def _one_iq4_xs(tile, groups, x, d, s, sixteens):
    """8 groups of 32 columns, each with a scale of 6 bits."""
    result = floats_of(np.float32(0))
    for b in range(groups // 8):
        block = tile + 1088 * b
        scaled = floats_of(np.float32(0))
        prefetch(block + AHEAD)
        for i in range(8):
            g = 8 * b + i
            weights = block + 64 + 128 * i
            prefetch(weights + AHEAD)
            prefetch(weights + AHEAD + 64)
            product = as_floats(iq4_sums(weights, x + 64 * g))
            scale = iq4_xs_scale(block + 16, i) * floats_of(float_at(d + 4 * g))
            scaled = multiply_add(product, scale, scaled)
        result = multiply_add(scaled, floats_of_halves_at(block), result)
    return result


@part
def _one_q6_k(tile, groups, x, d, s, sixteens):
    """16 groups of 16 columns, whose weights are w - 32: the sum begins at -32 times that of x."""
    result = floats_of(np.float32(0))
    for b in range(groups // 8):
        block = tile + 1680 * b
        scaled = floats_of(np.float32(0))
        for i in range(16):
            h = 16 * b + i
            vectors = block + 144 + 96 * i
            prefetch(vectors + AHEAD)
            prefetch(vectors + AHEAD + 64)
            start = sums_of(np.int32(-32) * int_at(sixteens + 4 * h))
            product = as_floats(start + six_bit_sums(vectors, x + 32 * h))
            scale = as_floats(signed_bytes_at(block + 16 + 8 * i))
            scaled = multiply_add(product, scale * floats_of(float_at(d + 4 * (h // 2))), scaled)
        result = multiply_add(scaled, floats_of_halves_at(block), result)
    return result


@part
def _one_q2_k(tile, groups, x, d, s, sixteens):
    """16 groups of 16 columns, each with a scale and a min of 4 bits."""
    result = floats_of(np.float32(0))
    for b in range(groups // 8):
        block = tile + 672 * b
        scaled = floats_of(np.float32(0))
        lows = floats_of(np.float32(0))
        for line in range(0, 160, 64):
            prefetch(block + AHEAD + line)
        for i in range(16):
            h = 16 * b + i
            vector = block + 160 + 32 * i
            prefetch(vector + AHEAD)
            scale, low = low_and_high(block + 32 + 8 * i)
            d_of_x = float_at(d + 4 * (h // 2))
            product = as_floats(two_bit_sums(vector, x + 32 * h))
            scaled = multiply_add(product, as_floats(scale) * floats_of(d_of_x), scaled)
            sum_of_x = np.float32(int_at(sixteens + 4 * h)) * d_of_x
            lows = multiply_add(as_floats(low), floats_of(sum_of_x), lows)
        result = multiply_add(scaled, floats_of_halves_at(block), result)
        result = result - lows * floats_of_halves_at(block + 16)
    return result


@part
def _one_q3_k(tile, groups, x, d, s, sixteens):
    """16 groups of 16 columns, whose weights are w - 4: the sum begins at -4 times that of x."""
    result = floats_of(np.float32(0))
    for b in range(groups // 8):
        block = tile + 880 * b
        scaled = floats_of(np.float32(0))
        for i in range(16):
            h = 16 * b + i
            vectors = block + 112 + 96 * (i // 2)
            prefetch(vectors + AHEAD + 48 * (i % 2))
            start = sums_of(np.int32(-4) * int_at(sixteens + 4 * h))
            product = as_floats(start + three_bit_sums(vectors, i % 2, x + 32 * h))
            scale = as_floats(six_bit_scale(block + 16, i))
            scaled = multiply_add(product, scale * floats_of(float_at(d + 4 * (h // 2))), scaled)
        result = multiply_add(scaled, floats_of_halves_at(block), result)
    return result


@part
def _one_bytes(tile, groups, x, d, s, sixteens):
    """Groups of 32 columns: two scales of float32, each of 16 columns, and the bytes."""
    result = floats_of(np.float32(0))
    for g in range(groups):
        block = tile + 320 * g
        for line in range(0, 320, 64):
            prefetch(block + AHEAD + line)
        for half in range(2):
            vectors = block + 64 + 128 * half
            product = as_floats(sixteen_byte_sums(vectors, x + 64 * g + 32 * half))
            scale = floats_at(block + 32 * half) * floats_of(float_at(d + 4 * g))
            result = multiply_add(product, scale, result)
    return result


# ---- Loops over tiles. Their arguments are numbers and addresses: they are called by address ----
# weights      the tile with number 0
# first, last  which tiles
# groups       of 32 columns
# columns      C, rows of activations: up to AT_ONCE
# activations  the address of a table of `Activations`
# out          float32: row r of the matrix and row c of the activations are at out[c * stride + r]


def _loop(kind: str, one: Callable) -> Callable:
    """The loop for a type; one row of activations needs no unpacking."""
    many = several(kind)
    group = group_of(kind)
    group_bytes = group.bytes
    two_mins = group.mins == 2

    def loop(weights, first, last, groups, columns, activations, out, stride):
        x = long_at(activations + 8)
        d = long_at(activations + 16)
        s = long_at(activations + 24)
        sixteens = long_at(activations + 32)
        size = group_bytes * groups
        if columns == 1:
            for t in range(first, last):
                store_floats(out + 32 * t, one(weights + size * t, groups, x, d, s, sixteens))
            return
        sums_of_x = sixteens if two_mins else s
        t = first
        while t < last:
            at = out + 32 * t
            t += many(weights + size * t, last - t, groups, columns, x, d, sums_of_x, at, stride)

    return loop


def _products_of_a_row() -> dict[str, Callable]:
    return {
        "Q4_0": _of_small_blocks(144, False, 8.0, nibble_sums),
        "Q4_1": _of_small_blocks(160, True, 0.0, nibble_sums),
        "Q5_0": _of_small_blocks(176, False, 16.0, five_bit_sums),
        "Q5_1": _of_small_blocks(192, True, 0.0, five_bit_sums),
        "Q8_0": _of_small_blocks(272, False, 0.0, byte_sums),
        "Q2_K": _one_q2_k,
        "Q3_K": _one_q3_k,
        "Q4_K": _of_super_blocks(1152, nibble_sums),
        "Q5_K": _of_super_blocks(1408, five_bit_sums),
        "Q6_K": _one_q6_k,
        "IQ4_NL": _of_small_blocks(144, False, 0.0, iq4_sums),
        "IQ4_XS": _one_iq4_xs,
        "bytes": _one_bytes,
    }


def product(kind: str) -> Callable:
    """The loop over tiles for a type of packed weights."""
    return _loop(kind, _products_of_a_row()[kind])
