"""Products of packed weights with several rows of activations.

Each group of a tile is unpacked once (groups.py) and read by all rows. Two tiles, that is 16 rows
of the matrix, and four rows of activations are multiplied at a time: a vector of weights is loaded
for four products, and the sums of four rows stay in registers. 256 columns are unpacked at a time;
with the activations that they meet, they fit into the processor's first cache.
"""

from collections.abc import Callable

import numpy as np

from mistral_kernels.cpu.compiler import part
from mistral_kernels.cpu.groups import (
    FIRST,
    GROUP_BYTES,
    HALVES,
    LAST,
    LAST_MINS,
    MINS,
    TWO_MINS,
    unpacker,
)
from mistral_kernels.cpu.lanes import float_at, int_at, prefetch, store_floats
from mistral_kernels.cpu.layout import AHEAD, AT_ONCE
from mistral_kernels.cpu.rounding import rows_together
from mistral_kernels.cpu.wide import (
    as_wide_floats,
    high_floats,
    low_floats,
    store_wide_floats,
    wide_floats_at,
    wide_floats_of,
    wide_multiply_add,
    wide_pair_at,
    wide_pair_products,
    wide_sums_of,
    wide_words_at,
)

_BLOCK = 8  # groups that are unpacked at a time, and of a row that lie together
_ROW = 64 * _BLOCK  # bytes from the int16 of a row to those of the next
_SCALAR = 4 * _BLOCK  # the same for d and s
UNPACKED_BYTES = GROUP_BYTES * _BLOCK
SUMS_BYTES = 64 * AT_ONCE


@part
def _four_rows(to, first, last, x):
    """Vectors `first` to `last` of an unpacked group, times four rows of activations."""
    a = wide_sums_of(np.int32(0))
    b = wide_sums_of(np.int32(0))
    c = wide_sums_of(np.int32(0))
    d = wide_sums_of(np.int32(0))
    for j in range(first, last):
        w = wide_words_at(to + 64 * j)
        a = a + wide_pair_products(w, wide_pair_at(x + 4 * j))
        b = b + wide_pair_products(w, wide_pair_at(x + _ROW + 4 * j))
        c = c + wide_pair_products(w, wide_pair_at(x + 2 * _ROW + 4 * j))
        d = d + wide_pair_products(w, wide_pair_at(x + 3 * _ROW + 4 * j))
    return as_wide_floats(a), as_wide_floats(b), as_wide_floats(c), as_wide_floats(d)


@part
def _scaled(product, scale, d, result):
    """The result plus product * scale * d: d of the activations is at an address."""
    return wide_multiply_add(product, scale * wide_floats_of(float_at(d)), result)


@part
def _add_group(to, first, last, scale, x, d, sums):
    """Add the products of a part of a group with four rows."""
    scales = wide_floats_at(to + scale)
    products = _four_rows(to, first, last, x)
    return (
        _scaled(products[0], scales, d, sums[0]),
        _scaled(products[1], scales, d + _SCALAR, sums[1]),
        _scaled(products[2], scales, d + 2 * _SCALAR, sums[2]),
        _scaled(products[3], scales, d + 3 * _SCALAR, sums[3]),
    )


@part
def _add_mins(to, s, sums):
    """Add m times the sum of the activations."""
    m = wide_floats_at(to + MINS)
    return (
        wide_multiply_add(m, wide_floats_of(float_at(s)), sums[0]),
        wide_multiply_add(m, wide_floats_of(float_at(s + _SCALAR)), sums[1]),
        wide_multiply_add(m, wide_floats_of(float_at(s + 2 * _SCALAR)), sums[2]),
        wide_multiply_add(m, wide_floats_of(float_at(s + 3 * _SCALAR)), sums[3]),
    )


@part
def _add_mins_of_half(to, mins, sixteens, d, sums):
    """Add m times the sum of 16 activations, which is d times the int32 at `sixteens`."""
    m = wide_floats_at(to + mins)
    return (
        wide_multiply_add(m, wide_floats_of(_sum_of_half(sixteens, d, 0)), sums[0]),
        wide_multiply_add(m, wide_floats_of(_sum_of_half(sixteens, d, 1)), sums[1]),
        wide_multiply_add(m, wide_floats_of(_sum_of_half(sixteens, d, 2)), sums[2]),
        wide_multiply_add(m, wide_floats_of(_sum_of_half(sixteens, d, 3)), sums[3]),
    )


@part
def _sum_of_half(sixteens, d, row):
    """The sum of 16 activations of one of four rows; each 32 have two of them."""
    return np.float32(int_at(sixteens + 2 * _SCALAR * row)) * float_at(d + _SCALAR * row)


def several(kind: str) -> Callable:
    """The product of two tiles of a type with up to `AT_ONCE` rows of activations.

    Of the function made: left and right are the addresses of the tiles, `to` and `sums` those of
    UNPACKED_BYTES and SUMS_BYTES of memory, and the others are those of products.py; s is the
    address of the `sixteens` for TWO_MINS. It writes float32 [columns, 16] to sums.
    """
    unpack, group_bytes = unpacker(kind)
    halves = kind in HALVES
    two_mins = kind in TWO_MINS
    s_bytes = 8 if two_mins else 4  # for a group

    @part
    def four(to, count, x, d, s, sums):
        """Add the products of `count` unpacked groups with four rows."""
        kept = (
            wide_floats_at(sums),
            wide_floats_at(sums + 64),
            wide_floats_at(sums + 128),
            wide_floats_at(sums + 192),
        )
        for i in range(count):
            group = to + GROUP_BYTES * i
            if halves:
                kept = _add_group(group, 0, 8, FIRST, x + 64 * i, d + 4 * i, kept)
                kept = _add_group(group, 8, 16, LAST, x + 64 * i, d + 4 * i, kept)
            else:
                kept = _add_group(group, 0, 16, FIRST, x + 64 * i, d + 4 * i, kept)
                kept = _add_mins(group, s + 4 * i, kept)
            if two_mins:
                kept = _add_mins_of_half(group, MINS, s + 8 * i, d + 4 * i, kept)
                kept = _add_mins_of_half(group, LAST_MINS, s + 8 * i + 4, d + 4 * i, kept)
        store_wide_floats(sums, kept[0])
        store_wide_floats(sums + 64, kept[1])
        store_wide_floats(sums + 128, kept[2])
        store_wide_floats(sums + 192, kept[3])

    @part
    def product(left, right, groups, columns, x, d, s, to, sums):
        rows = rows_together(columns)
        for c in range(rows):
            store_wide_floats(sums + 64 * c, wide_floats_of(np.float32(0)))
        for g in range(0, groups, _BLOCK):
            count = min(_BLOCK, groups - g)
            for i in range(count):
                unpack(left, g + i, to + GROUP_BYTES * i)
                unpack(right, g + i, to + GROUP_BYTES * i + 32)
                for line in range(0, group_bytes, 64):
                    prefetch(left + group_bytes * (g + i) + AHEAD + line)
                    prefetch(right + group_bytes * (g + i) + AHEAD + line)
            for c in range(0, rows, 4):
                at = g * rows // _BLOCK + c  # this row's place among all blocks of all rows
                of_rows = s + s_bytes * _BLOCK * at
                four(to, count, x + _ROW * at, d + _SCALAR * at, of_rows, sums + 64 * c)

    return product


@part
def write_two(sums, columns, first, second, stride):
    """Write float32 [columns, 16] to the places of two tiles; of a single one, the two agree."""
    for c in range(columns):
        both = wide_floats_at(sums + 64 * c)
        store_floats(second + stride * c, high_floats(both))
        store_floats(first + stride * c, low_floats(both))
