"""Products of packed weights with activations: out[c, r] = sum over columns of w[r, k] x[c, k].

Activations are rounded to int16, 32 of them with one scale (activations.py), so a product of a
group of 32 columns is a sum of integers, times two scales. That is 200 times finer than the 8 bits
of llama.cpp, and it costs the same: a byte is widened to 16 bits in any case, because no processor
multiplies 4-bit numbers.

For each type of weights (tiles.py) there are two functions:

    one     a tile times one row of activations
    unpack  32 columns of a tile as int16 with their scales, to be multiplied with several rows of
            activations (`_many`), or written as float32 (`unpack_tiles`)

and a loop over tiles around them. Decoding reads every weight once a token, so what limits it is
memory; `AHEAD` bytes are asked for in advance, because the processor's own prefetching stops at
the end of each page of 4 kB.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import types

from mistral_kernels.cpu.compiled import address_of, compiled, part
from mistral_kernels.cpu.encodings import (
    byte_sums,
    five_bit_sums,
    nibble_sums,
    scale_and_min,
    six_bit_sums,
    unpack_bytes,
    unpack_five_bits,
    unpack_nibbles,
    unpack_six_bits,
)
from mistral_kernels.cpu.lanes import (
    as_floats,
    float_at,
    floats_at,
    floats_of,
    floats_of_halves_at,
    floats_of_words_at,
    int_at,
    local_memory,
    long_at,
    multiply_add,
    pair_at,
    pair_products,
    prefetch,
    short_at,
    signed_bytes_at,
    store_float,
    store_floats,
    sums_of,
    words_at,
)

AHEAD = 4096  # bytes


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


# ---- A group of a tile unpacked, by type: 16 Words, then d of each half, and m: 3 Floats ----

_SCALES = 512  # where the Floats begin
_GROUP_BYTES = 512 + 96


def _unpack_small_blocks(size: int, has_m: bool, zero: float, unpack: Callable) -> Callable:
    weights_at = 32 if has_m else 16
    offset = np.float32(-zero)

    @part
    def group(tile, g, to):
        block = tile + size * g
        unpack(block + weights_at, to)
        d = floats_of_halves_at(block)
        m = floats_of_halves_at(block + 16) if has_m else d * floats_of(offset)
        store_floats(to + _SCALES, d)
        store_floats(to + _SCALES + 32, d)
        store_floats(to + _SCALES + 64, m)

    return group


def _unpack_super_blocks(size: int, unpack: Callable) -> Callable:
    group_size = (size - 128) // 8

    @part
    def group(tile, g, to):
        block = tile + size * (g // 8)
        unpack(block + 128 + group_size * (g % 8), to)
        scale, low = scale_and_min(block + 32, g % 8)
        d = floats_of_halves_at(block) * scale
        m = floats_of(np.float32(0)) - floats_of_halves_at(block + 16) * low
        store_floats(to + _SCALES, d)
        store_floats(to + _SCALES + 32, d)
        store_floats(to + _SCALES + 64, m)

    return group


@part
def _unpack_q6_k(tile, g, to):
    block = tile + 1680 * (g // 8)
    i = 2 * (g % 8)
    for half in range(2):
        unpack_six_bits(block + 144 + 96 * (i + half), to + 256 * half)
        scale = as_floats(signed_bytes_at(block + 16 + 8 * (i + half)))
        store_floats(to + _SCALES + 32 * half, floats_of_halves_at(block) * scale)
    store_floats(to + _SCALES + 64, floats_of(np.float32(0)))


# ---- Loops over tiles. Their arguments are numbers and addresses: they are called by address ----
# weights      the tile with number 0
# first, last  which tiles
# groups       of 32 columns
# columns      C, rows of activations: 1, or any number, with memory for the next multiple of 4
# activations  5 addresses: float32 [C, k]; int16 [C, k]; d and s, float32 [C, k / 32]; sums of 16
#              int16, int32 [C, k / 16] (activations.py)
# out          float32: row r of the matrix and row c of the activations are at out[c * stride + r]

SIGNATURE = types.void(*[types.int64] * 8)


@part
def _four_rows(to, first, last, x, row):
    """Vectors `first` to `last` of the unpacked ones, times four rows of activations."""
    a = sums_of(np.int32(0))
    b = sums_of(np.int32(0))
    c = sums_of(np.int32(0))
    d = sums_of(np.int32(0))
    for j in range(first, last):
        w = words_at(to + 32 * j)
        a = a + pair_products(w, pair_at(x + 4 * j))
        b = b + pair_products(w, pair_at(x + row + 4 * j))
        c = c + pair_products(w, pair_at(x + 2 * row + 4 * j))
        d = d + pair_products(w, pair_at(x + 3 * row + 4 * j))
    return as_floats(a), as_floats(b), as_floats(c), as_floats(d)


def _add_of(halves: bool) -> Callable:
    @part
    def add(left, right, to, d, s, out):
        """out += (left * its scale + right * its scale) * d + m * s."""
        scaled = left * floats_at(to + _SCALES)
        if halves:
            scaled = multiply_add(right, floats_at(to + _SCALES + 32), scaled)
        result = multiply_add(scaled, floats_of(float_at(d)), floats_at(out))
        m = floats_at(to + _SCALES + 64)
        store_floats(out, multiply_add(m, floats_of(float_at(s)), result))

    return add


def _many_of(unpack: Callable, group_bytes: int, halves: bool) -> Callable:
    scratch = local_memory(_GROUP_BYTES)
    add = _add_of(halves)

    @part
    def many(tile, groups, columns, x, d, s, out, stride):
        """Several rows of activations: each group is unpacked once, and read by all of them."""
        to = scratch(0)
        for c in range(columns):
            store_floats(out + stride * c, floats_of(np.float32(0)))
        for g in range(groups):
            unpack(tile, g, to)
            prefetch(tile + group_bytes * g + AHEAD)
            prefetch(tile + group_bytes * g + AHEAD + 64)
            for c in range(0, columns, 4):
                at = c * groups + g
                left = _four_rows(to, 0, 8 if halves else 16, x + 64 * at, 64 * groups)
                right = _four_rows(to, 8, 16, x + 64 * at, 64 * groups) if halves else left
                first = out + c * stride
                next = 4 * groups  # bytes from a row's scalar to the next row's
                d_c = d + 4 * at
                s_c = s + 4 * at
                add(left[0], right[0], to, d_c, s_c, first)
                add(left[1], right[1], to, d_c + next, s_c + next, first + stride)
                add(left[2], right[2], to, d_c + 2 * next, s_c + 2 * next, first + 2 * stride)
                add(left[3], right[3], to, d_c + 3 * next, s_c + 3 * next, first + 3 * stride)

    return many


def _loop(one: Callable, unpack: Callable, group_bytes: int, halves: bool) -> Callable:
    """The loop for a type; halves: 16 columns have a scale of their own."""
    many = _many_of(unpack, group_bytes, halves)

    def loop(weights, first, last, groups, columns, activations, out, stride):
        x = long_at(activations + 8)
        d = long_at(activations + 16)
        s = long_at(activations + 24)
        sixteens = long_at(activations + 32)
        for t in range(first, last):
            tile = weights + group_bytes * groups * t
            if columns == 1:
                store_floats(out + 32 * t, one(tile, groups, x, d, s, sixteens))
            else:
                many(tile, groups, columns, x, d, s, out + 32 * t, stride)

    return loop


class _Kind(NamedTuple):
    """A type of weights."""

    group_bytes: int  # of 32 columns of a tile
    one: Callable
    unpack: Callable
    halves: bool = False


def _small(size: int, has_m: bool, zero: float, sums: Callable, unpack: Callable) -> _Kind:
    return _Kind(
        group_bytes=size,
        one=_of_small_blocks(size, has_m, zero, sums),
        unpack=_unpack_small_blocks(size, has_m, zero, unpack),
    )


def _super(size: int, sums: Callable, unpack: Callable) -> _Kind:
    return _Kind(
        group_bytes=size // 8,
        one=_of_super_blocks(size, sums),
        unpack=_unpack_super_blocks(size, unpack),
    )


@functools.cache
def _kinds() -> dict[str, _Kind]:
    return {
        "Q4_0": _small(144, False, 8.0, nibble_sums, unpack_nibbles),
        "Q4_1": _small(160, True, 0.0, nibble_sums, unpack_nibbles),
        "Q5_0": _small(176, False, 16.0, five_bit_sums, unpack_five_bits),
        "Q5_1": _small(192, True, 0.0, five_bit_sums, unpack_five_bits),
        "Q8_0": _small(272, False, 0.0, byte_sums, unpack_bytes),
        "Q4_K": _super(1152, nibble_sums, unpack_nibbles),
        "Q5_K": _super(1408, five_bit_sums, unpack_five_bits),
        "Q6_K": _Kind(210, _one_q6_k, _unpack_q6_k, halves=True),
    }


@functools.cache
def product(kind: str) -> int:
    """The address of the compiled product for a type of packed weights."""
    of = _kinds()[kind]
    loop = _loop(of.one, of.unpack, of.group_bytes, of.halves)
    return address_of(loop, SIGNATURE, f"product of {kind}")


# ---- Unpacking to float32, for prompts and for the embedding ----


@functools.cache
def columns_of_tiles(kind: str) -> Callable:
    """A compiled function that unpacks tiles `first` to `last`, transposed.

    (weights, first, last, groups, out): address of float32 [32 * groups, 8 * (last - first)]
    """
    unpack = _kinds()[kind].unpack
    tile_bytes = _kinds()[kind].group_bytes
    scratch = local_memory(_GROUP_BYTES)

    @part
    def pairs(to, first, last, d, m, out, stride):
        """Columns 2 first to 2 last of an unpacked group: a vector of 8 rows for each."""
        for j in range(first, last):
            at = out + 2 * stride * j
            store_floats(at, multiply_add(floats_of_words_at(to + 32 * j), d, m))
            store_floats(at + stride, multiply_add(floats_of_words_at(to + 32 * j + 2), d, m))

    def columns(weights, first, last, groups, out):
        to = scratch(0)
        stride = 32 * (last - first)
        # All tiles for 32 columns, then the next 32: what is written stays in the first cache.
        for g in range(groups):
            for t in range(first, last):
                unpack(weights + tile_bytes * groups * t, g, to)
                m = floats_at(to + _SCALES + 64)
                at = out + 32 * (t - first) + 32 * g * stride
                pairs(to, 0, 8, floats_at(to + _SCALES), m, at, stride)
                pairs(to, 8, 16, floats_at(to + _SCALES + 32), m, at, stride)

    return compiled(f"columns of {kind}")(columns)


@functools.cache
def row_of_tiles(kind: str) -> Callable:
    """A compiled function that unpacks one row: (weights, row, groups, address of the float32)."""
    unpack = _kinds()[kind].unpack
    tile_bytes = _kinds()[kind].group_bytes
    scratch = local_memory(_GROUP_BYTES)

    def row(weights, r, groups, out):
        to = scratch(0)
        tile = weights + tile_bytes * groups * (r // 8)
        lane = r % 8
        for g in range(groups):
            unpack(tile, g, to)
            m = float_at(to + _SCALES + 64 + 4 * lane)
            for j in range(16):
                d = float_at(to + _SCALES + 32 * (j // 8) + 4 * lane)
                for i in range(2):
                    q = np.float32(short_at(to + 32 * j + 4 * lane + 2 * i))
                    store_float(out + 128 * g + 8 * j + 4 * i, d * q + m)

    return compiled(f"row of {kind}")(row)
