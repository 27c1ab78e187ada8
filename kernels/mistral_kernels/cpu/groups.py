"""Groups of 32 columns of tiles, unpacked: to be multiplied with several rows, or read as float32.

A group that many rows of activations meet is unpacked once, to int16 and its scales. Two tiles lie
side by side, so that a vector of 32 int16 holds a pair of columns of 16 rows:

    16 vectors   the pairs of columns: lanes 2r and 2r + 1 are row r
    scales       float32 [4, 16]: d of the first and of the last 16 columns, and m of both; a weight
                 is d q + m
"""

import functools
from collections.abc import Callable

import numpy as np

from mistral_kernels.cpu.compiler import part
from mistral_kernels.cpu.encodings import (
    iq4_xs_scale,
    low_and_high,
    scale_and_min,
    six_bit_scale,
    unpack_bytes,
    unpack_five_bits,
    unpack_iq4,
    unpack_nibbles,
    unpack_six_bits,
    unpack_three_bits,
    unpack_two_bits,
)
from mistral_kernels.cpu.lanes import (
    as_floats,
    float_at,
    floats_at,
    floats_of,
    floats_of_halves_at,
    local_memory,
    short_at,
    signed_bytes_at,
    store_float,
    store_floats,
)

SCALES = 1024  # bytes: where the scales begin
FIRST, LAST, MINS, LAST_MINS = SCALES, SCALES + 64, SCALES + 128, SCALES + 192
GROUP_BYTES = SCALES + 256
# Types whose 16 columns have a scale of their own; and those that have a min of their own as well.
# The groups of other types have no LAST_MINS.
HALVES = ("Q2_K", "Q3_K", "Q6_K", "bytes")
TWO_MINS = ("Q2_K",)


# Each takes the address of a tile, the number of a group, and where to write; the second of two
# tiles is written 32 bytes further.


def _small_blocks(size: int, has_m: bool, zero: float, unpack: Callable) -> Callable:
    """Blocks of 32 columns: d, m if it has one, and the weights, which are w - zero."""
    weights_at = 32 if has_m else 16
    offset = np.float32(-zero)

    @part
    def group(tile, g, to):
        block = tile + size * g
        unpack(block + weights_at, to)
        d = floats_of_halves_at(block)
        m = floats_of_halves_at(block + 16) if has_m else d * floats_of(offset)
        store_floats(to + FIRST, d)
        store_floats(to + LAST, d)
        store_floats(to + MINS, m)

    return group


def _super_blocks(size: int, unpack: Callable) -> Callable:
    """Q4_K and Q5_K: 8 groups of 32 columns, each with a scale and a min of 6 bits."""
    group_size = (size - 128) // 8

    @part
    def group(tile, g, to):
        block = tile + size * (g // 8)
        unpack(block + 128 + group_size * (g % 8), to)
        scale, low = scale_and_min(block + 32, g % 8)
        d = floats_of_halves_at(block) * scale
        m = floats_of(np.float32(0)) - floats_of_halves_at(block + 16) * low
        store_floats(to + FIRST, d)
        store_floats(to + LAST, d)
        store_floats(to + MINS, m)

    return group


@part
def _iq4_xs(tile, g, to):
    """8 groups of 32 columns, each with a scale of 6 bits."""
    block = tile + 1088 * (g // 8)
    unpack_iq4(block + 64 + 128 * (g % 8), to)
    d = floats_of_halves_at(block) * iq4_xs_scale(block + 16, g % 8)
    store_floats(to + FIRST, d)
    store_floats(to + LAST, d)
    store_floats(to + MINS, floats_of(np.float32(0)))


@part
def _q6_k(tile, g, to):
    """16 columns have a scale of their own; the weights are stored less 32."""
    block = tile + 1680 * (g // 8)
    i = 2 * (g % 8)
    for half in range(2):
        unpack_six_bits(block + 144 + 96 * (i + half), to + 512 * half)
        scale = as_floats(signed_bytes_at(block + 16 + 8 * (i + half)))
        store_floats(to + FIRST + 64 * half, floats_of_halves_at(block) * scale)
    store_floats(to + MINS, floats_of(np.float32(0)))


@part
def _q3_k(tile, g, to):
    """The same with scales of 6 bits; the weights are stored less 4."""
    block = tile + 880 * (g // 8)
    i = g % 8
    for half in range(2):
        unpack_three_bits(block + 112 + 96 * i, half, to + 512 * half)
        scale = six_bit_scale(block + 16, 2 * i + half)
        store_floats(to + FIRST + 64 * half, floats_of_halves_at(block) * scale)
    store_floats(to + MINS, floats_of(np.float32(0)))


@part
def _q2_k(tile, g, to):
    """16 columns have a scale and a min of their own."""
    block = tile + 672 * (g // 8)
    i = 2 * (g % 8)
    for half in range(2):
        unpack_two_bits(block + 160 + 32 * (i + half), to + 512 * half)
        scale, low = low_and_high(block + 32 + 8 * (i + half))
        m = floats_of(np.float32(0)) - floats_of_halves_at(block + 16) * low
        store_floats(to + FIRST + 64 * half, floats_of_halves_at(block) * scale)
        store_floats(to + MINS + 64 * half, m)


@part
def _bytes(tile, g, to):
    """What other types are widened to (widening.py): 16 columns have a scale of float32."""
    block = tile + 320 * g
    unpack_bytes(block + 64, to)
    store_floats(to + FIRST, floats_at(block))
    store_floats(to + LAST, floats_at(block + 32))
    store_floats(to + MINS, floats_of(np.float32(0)))


@functools.cache
def unpacker(kind: str) -> tuple[Callable, int]:
    """The function (tile, group, to) of a type, and the bytes of a group of a tile."""
    return {
        "Q4_0": (_small_blocks(144, False, 8.0, unpack_nibbles), 144),
        "Q4_1": (_small_blocks(160, True, 0.0, unpack_nibbles), 160),
        "Q5_0": (_small_blocks(176, False, 16.0, unpack_five_bits), 176),
        "Q5_1": (_small_blocks(192, True, 0.0, unpack_five_bits), 192),
        "Q8_0": (_small_blocks(272, False, 0.0, unpack_bytes), 272),
        "Q2_K": (_q2_k, 84),
        "Q3_K": (_q3_k, 110),
        "Q4_K": (_super_blocks(1152, unpack_nibbles), 144),
        "Q5_K": (_super_blocks(1408, unpack_five_bits), 176),
        "Q6_K": (_q6_k, 210),
        "IQ4_NL": (_small_blocks(144, False, 0.0, unpack_iq4), 144),
        "IQ4_XS": (_iq4_xs, 136),
        "bytes": (_bytes, 320),
    }[kind]


def row_of_tiles(kind: str) -> Callable:
    """A function that unpacks one row: (weights, row, groups, address of the float32)."""
    unpack, group_bytes = unpacker(kind)
    to_next_min = 64 if kind in TWO_MINS else 0
    scratch = local_memory(GROUP_BYTES)

    def row(weights, r, groups, out):
        to = scratch(0)
        tile = weights + group_bytes * groups * (r // 8)
        lane = r % 8
        for g in range(groups):
            unpack(tile, g, to)
            for j in range(16):
                m = float_at(to + MINS + to_next_min * (j // 8) + 4 * lane)
                d = float_at(to + FIRST + 64 * (j // 8) + 4 * lane)
                for i in range(2):
                    q = np.float32(short_at(to + 64 * j + 4 * lane + 2 * i))
                    store_float(out + 128 * g + 8 * j + 4 * i, d * q + m)

    return row
