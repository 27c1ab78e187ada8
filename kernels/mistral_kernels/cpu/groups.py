"""Groups of 32 columns of tiles, unpacked: to be multiplied with several rows, or read as float32.

A group that many rows of activations meet is unpacked once, to int16 and its scales. Two tiles lie
side by side, so that a vector of 32 int16 holds a pair of columns of 16 rows:

    16 vectors   the pairs of columns: lanes 2r and 2r + 1 are row r
    scales       float32 [4, 16]: d of the first and of the last 16 columns, and m of both; a weight
                 is d q + m. Scales that a type does not have, and the second one if 32 columns
                 share the first, are not written.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

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
from mistral_kernels.cpu.wide import in_pairs

SCALES = 1024  # bytes: where the scales begin
FIRST, LAST, MINS, LAST_MINS = SCALES, SCALES + 64, SCALES + 128, SCALES + 192
GROUP_BYTES = SCALES + 256


class Group(NamedTuple):
    """How the groups of a type are unpacked; g is a group's number, `to` where it is written."""

    weights: Callable  # (left tile, right tile, g, to)
    scales: Callable  # (tile, g, to): of one tile; the second of two are written 32 bytes further
    bytes: int  # of a group of a tile
    # The pairs of columns whose products are added as integers, and where their scale is
    parts: tuple[tuple[int, int, int], ...] = ((0, 16, FIRST),)
    mins: int = 0  # one for 32 columns, or two


def _small_blocks(size: int, has_m: bool, unpack: Callable, zero: int | None = None) -> Group:
    """Blocks of 32 columns: d, m if it has one, and the weights, which are w - zero."""
    at = 32 if has_m else 16

    @part
    def weights(left, right, g, to):
        block = size * g + at
        if zero is None:
            unpack(left + block, right + block, to)
        else:
            unpack(left + block, right + block, zero, to)

    @part
    def scales(tile, g, to):
        block = tile + size * g
        store_floats(to + FIRST, floats_of_halves_at(block))
        if has_m:
            store_floats(to + MINS, floats_of_halves_at(block + 16))

    return Group(weights, scales, size, mins=1 if has_m else 0)


def _super_blocks(size: int, unpack: Callable) -> Group:
    """Q4_K and Q5_K: 8 groups of 32 columns, each with a scale and a min of 6 bits."""
    group_size = (size - 128) // 8

    @part
    def weights(left, right, g, to):
        at = size * (g // 8) + 128 + group_size * (g % 8)
        unpack(left + at, right + at, 0, to)

    @part
    def scales(tile, g, to):
        block = tile + size * (g // 8)
        scale, low = scale_and_min(block + 32, g % 8)
        m = floats_of(np.float32(0)) - floats_of_halves_at(block + 16) * low
        store_floats(to + FIRST, floats_of_halves_at(block) * scale)
        store_floats(to + MINS, m)

    return Group(weights, scales, size // 8, mins=1)


@part
def _iq4_xs_weights(left, right, g, to):
    """8 groups of 32 columns, each with a scale of 6 bits."""
    at = 1088 * (g // 8) + 64 + 128 * (g % 8)
    unpack_iq4(left + at, right + at, to)


@part
def _iq4_xs_scales(tile, g, to):
    block = tile + 1088 * (g // 8)
    scale = iq4_xs_scale(block + 16, g % 8)
    store_floats(to + FIRST, floats_of_halves_at(block) * scale)


# 16 columns of the next three types have a scale of their own. It is an integer, and the weights
# are multiplied by it, so that one scale for 32 columns is left.


def _d_of(size: int) -> Callable:
    """The float16 with which a block of 256 columns begins."""

    @part
    def scales(tile, g, to):
        store_floats(to + FIRST, floats_of_halves_at(tile + size * (g // 8)))

    return scales


@part
def _q6_k_weights(left, right, g, to):
    """Scales of 8 bits; the weights are stored less 32."""
    block = 1680 * (g // 8)
    for i in range(2):
        half = 2 * (g % 8) + i
        at = block + 16 + 8 * half
        scale = in_pairs(signed_bytes_at(left + at), signed_bytes_at(right + at))
        vectors = block + 144 + 96 * half
        unpack_six_bits(left + vectors, right + vectors, scale, to + 512 * i)


@part
def _q3_k_weights(left, right, g, to):
    """Scales of 6 bits; the weights are stored less 4."""
    block = 880 * (g // 8)
    vectors = block + 112 + 96 * (g % 8)
    for i in range(2):
        half = 2 * (g % 8) + i
        of_left = six_bit_scale(left + block + 16, half)
        of_right = six_bit_scale(right + block + 16, half)
        scale = in_pairs(of_left, of_right)
        unpack_three_bits(left + vectors, right + vectors, i, scale, to + 512 * i)


@part
def _q2_k_weights(left, right, g, to):
    """Scales and mins of 4 bits."""
    block = 672 * (g // 8)
    for i in range(2):
        half = 2 * (g % 8) + i
        of_left, _ = low_and_high(left + block + 32 + 8 * half)
        of_right, _ = low_and_high(right + block + 32 + 8 * half)
        vectors = block + 160 + 32 * half
        scale = in_pairs(of_left, of_right)
        unpack_two_bits(left + vectors, right + vectors, scale, to + 512 * i)


@part
def _q2_k_scales(tile, g, to):
    block = tile + 672 * (g // 8)
    store_floats(to + FIRST, floats_of_halves_at(block))
    for i in range(2):
        _, low = low_and_high(block + 32 + 8 * (2 * (g % 8) + i))
        m = floats_of(np.float32(0)) - floats_of_halves_at(block + 16) * as_floats(low)
        store_floats(to + MINS + 64 * i, m)


@part
def _weights_of_bytes(left, right, g, to):
    """What other types are widened to (widening.py): 16 columns have a scale of float32."""
    at = 320 * g + 64
    unpack_bytes(left + at, right + at, to)


@part
def _scales_of_bytes(tile, g, to):
    store_floats(to + FIRST, floats_at(tile + 320 * g))
    store_floats(to + LAST, floats_at(tile + 320 * g + 32))


@functools.cache
def group_of(kind: str) -> Group:
    """How the groups of a type are unpacked."""
    # With its scale a weight of Q6_K is up to 32 * 128, and an int32 has room for the products of
    # 16 of them with activations up to 32767.
    halves = (0, 8, FIRST), (8, 16, FIRST)
    return {
        "Q4_0": _small_blocks(144, False, unpack_nibbles, 8),
        "Q4_1": _small_blocks(160, True, unpack_nibbles, 0),
        "Q5_0": _small_blocks(176, False, unpack_five_bits, 16),
        "Q5_1": _small_blocks(192, True, unpack_five_bits, 0),
        "Q8_0": _small_blocks(272, False, unpack_bytes),
        "Q2_K": Group(_q2_k_weights, _q2_k_scales, 84, mins=2),
        "Q3_K": Group(_q3_k_weights, _d_of(880), 110),
        "Q4_K": _super_blocks(1152, unpack_nibbles),
        "Q5_K": _super_blocks(1408, unpack_five_bits),
        "Q6_K": Group(_q6_k_weights, _d_of(1680), 210, parts=halves),
        "IQ4_NL": _small_blocks(144, False, unpack_iq4),
        "IQ4_XS": Group(_iq4_xs_weights, _iq4_xs_scales, 136),
        "bytes": Group(
            _weights_of_bytes, _scales_of_bytes, 320, parts=((0, 8, FIRST), (8, 16, LAST))
        ),
    }[kind]


def row_of_tiles(kind: str) -> Callable:
    """A function that unpacks one row: (weights, row, groups, address of the float32)."""
    weights_of, scales_of, group_bytes, parts, mins = group_of(kind)
    last_scale = parts[-1][2]
    last_min = LAST_MINS if mins == 2 else MINS
    scratch = local_memory(GROUP_BYTES)

    def row(weights, r, groups, out):
        to = scratch(0)
        tile = weights + group_bytes * groups * (r // 8)
        lane = r % 8
        for g in range(groups):
            weights_of(tile, tile, g, to)
            scales_of(tile, g, to)
            for j in range(16):
                d = float_at(to + (FIRST if j < 8 else last_scale) + 4 * lane)
                m = np.float32(0)
                if mins > 0:
                    m = float_at(to + (MINS if j < 8 else last_min) + 4 * lane)
                for i in range(2):
                    q = np.float32(short_at(to + 64 * j + 4 * lane + 2 * i))
                    store_float(out + 128 * g + 8 * j + 4 * i, d * q + m)

    return row
