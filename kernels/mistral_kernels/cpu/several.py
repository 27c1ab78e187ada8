"""Products of packed weights with several rows of activations.

Each group of a tile is unpacked once (groups.py) and read by all rows (microkernel.py). The
loops are ordered by what they read again: 256 columns of a few tiles, unpacked, stay in the first
cache; the same columns of all rows, and all sums, in the second.
"""

from collections.abc import Callable

import numpy as np

from mistral_kernels.cpu.compiler import part
from mistral_kernels.cpu.groups import GROUP_BYTES, Group, group_of
from mistral_kernels.cpu.lanes import (
    floats_at,
    floats_of,
    local_memory,
    prefetch,
    prefetch_near,
    store_floats,
)
from mistral_kernels.cpu.layout import AHEAD, MAX_COLUMNS, TILES_AT_ONCE
from mistral_kernels.cpu.microkernel import BLOCK, SUMS_BYTES, Shape, best_shape, microkernel
from mistral_kernels.cpu.rounding import rows_together


def several(kind: str) -> Callable:
    """The product of tiles of a type with 2 to `AT_ONCE` rows of activations.

    Of the function made: tile is the address of the first of `count` tiles, out that of its first
    result, and the others are those of products.py; s is the address of the `sixteens` for a type
    that has two mins. It multiplies up to `TILES_AT_ONCE` tiles and returns their number.
    """
    group = group_of(kind)
    group_bytes = group.bytes
    pairs = best_shape(group).pairs
    together = 2 * pairs  # tiles that are unpacked at a time
    unpack = _unpack(group, pairs)
    multiply = _multiply(group)
    sums_memory = local_memory(SUMS_BYTES * TILES_AT_ONCE // 2)
    unpacked_memory = local_memory(GROUP_BYTES * pairs * BLOCK)

    @part
    def product(tile, count, groups, columns, x, d, s, out, stride):
        # A few rows are multiplied as fast as tiles come from memory: no more tiles than are
        # unpacked together, so that each is read to its end before the next.
        tiles = min(count, TILES_AT_ONCE if columns > MAX_COLUMNS else together)
        rows = rows_together(columns)
        sums = sums_memory(0)
        unpacked = unpacked_memory(0)
        size = group_bytes * groups
        for p in range((tiles + together - 1) // together * pairs):  # with those that are missing
            for at in range(0, 64 * rows, 32):
                store_floats(sums + SUMS_BYTES * p + at, floats_of(np.float32(0)))
        for g in range(0, groups, BLOCK):
            last = min(g + BLOCK, groups)
            for t in range(0, tiles, together):
                unpack(tile + size * t, tiles - t, size, g, last, unpacked)
                multiply(unpacked, last - g, g * rows, rows, x, d, s, sums + SUMS_BYTES * (t // 2))
        for t in range(tiles):
            source = sums + SUMS_BYTES * (t // 2) + 32 * (t % 2)
            for c in range(columns):
                store_floats(out + 32 * t + stride * c, floats_at(source + 64 * c))
        return tiles

    return product


def _unpack(group: Group, pairs: int) -> Callable:
    """Groups `first` to `last` of `pairs` pairs of tiles, of which `count` exist."""
    weights = group.weights
    scales = group.scales
    group_bytes = group.bytes

    @part
    def unpack(tile, count, size, first, last, to):
        for p in range(pairs):
            # Instead of a tile that is missing, the last one is unpacked again.
            left = tile + size * min(2 * p, count - 1)
            right = tile + size * min(2 * p + 1, count - 1)
            for g in range(first, last):
                place = to + GROUP_BYTES * (pairs * (g - first) + p)
                weights(left, right, g, place)
                scales(left, g, place)
                scales(right, g, place + 32)
                for line in range(group_bytes * g, group_bytes * (g + 1), 64):
                    prefetch(left + AHEAD + line)
                    prefetch(right + AHEAD + line)

    return unpack


def _multiply(group: Group) -> Callable:
    """Add the products of unpacked groups with all rows; `place` is that of the first row's first.

    A place is that of 32 columns of a row among those of all rows, in the order of `Activations`.
    """
    shape = best_shape(group)
    pairs, most = shape
    add_most = microkernel(group, shape)
    add_four = microkernel(group, Shape(pairs, 4))
    s_bytes = 4 * max(1, group.mins)

    @part
    def multiply(unpacked, groups, place, rows, x, d, s, sums):
        c = 0
        while c < rows:
            taken = most if rows - c >= most else 4
            for i in range(groups):
                at = place + BLOCK * c + i
                for r in range(most, 2 * most):  # the rows after these
                    prefetch_near(x + 64 * (at + BLOCK * r))
                of_tiles = unpacked + GROUP_BYTES * pairs * i
                if taken == most:  # always if most is 4: LLVM drops the other branch
                    add_most(of_tiles, x + 64 * at, d + 4 * at, s + s_bytes * at, sums + 64 * c)
                else:
                    add_four(of_tiles, x + 64 * at, d + 4 * at, s + s_bytes * at, sums + 64 * c)
            c += taken

    return multiply
