"""The innermost part of products with several rows: a block of sums that stays in registers.

    sums[c, r] += sum over 32 columns k of w[r, k] x[c, k],  some rows c of x, 16 or 32 rows r of w

Weights and activations are integers (groups.py, activations.py); their sums become float32 once for
each scale. For every two columns, a vector of weights for each 16 rows and a pair of activations of
each row are loaded, and each vector is multiplied with each pair. That saves loads, and no product
waits for another: AVX-512's takes five cycles, after which the next one to the same sum can begin.

This is IR (emit.py): Python loops write the products of each row, and of each pair of columns if
one instruction multiplies and adds; otherwise the pairs of columns are a loop.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils

from mistral_kernels.cpu.emit import (
    F32,
    I16,
    I32,
    I64,
    add_pairs,
    add_products,
    assembly,
    constant,
    load,
    operation,
    pointer,
    splat,
)
from mistral_kernels.cpu.groups import GROUP_BYTES, LAST_MINS, MINS, Group
from mistral_kernels.cpu.layout import AT_ONCE

BLOCK = 8  # groups of a row of activations that lie together
SUMS_BYTES = 64 * AT_ONCE  # from the sums of 16 rows of weights to those of the next 16
_STEP = 64 * BLOCK  # bytes from the int16 of a row of activations to those of the next
_SCALAR_STEP = 4 * BLOCK  # the same for d and s
_WORDS = ir.VectorType(I16, 32)
_SUMS = ir.VectorType(I32, 16)
_FLOATS = ir.VectorType(F32, 16)


class Shape(NamedTuple):
    """What is multiplied at a time."""

    pairs: int  # of tiles; a pair is 16 rows of weights
    rows: int  # of activations, at most; 4 if fewer are left


def best_shape(group: Group) -> Shape:
    """The most whose sums leave enough registers for the rest.

    A processor that has AVX-512's products of pairs has 32 registers of 16 lanes. The sums take
    half of them: those of all parts of a group, since LLVM may interleave the parts. Others have
    at least 16 registers of 8 lanes or 32 of 4.
    """
    return Shape(2, 8 // len(group.parts)) if _has_wide_products() else Shape(1, 4)


def microkernel(group: Group, shape: Shape) -> Callable:
    """An operation that adds the products of 32 columns to the sums of some rows.

    Its arguments are addresses: unpacked groups, one for each pair of tiles; x, d and s
    (products.py) of the first row, s that of the `sixteens` for two mins; and sums, float32
    [rows, 16], with those of the next pair of tiles SUMS_BYTES further.
    """
    pairs, rows = range(shape.pairs), range(shape.rows)
    each = [(p, c) for p in pairs for c in rows]

    @operation(types.void, *[types.int64] * 5)
    def add_products_of_group(b, unpacked, x, d, s, sums):
        tiles = [_at(b, unpacked, GROUP_BYTES * p) for p in pairs]
        scales = [_scalar(b, d, _SCALAR_STEP * c) for c in rows]
        places = {(p, c): _at(b, sums, SUMS_BYTES * p + 64 * c) for p, c in each}
        results = {key: load(b, place, _FLOATS, 4) for key, place in places.items()}
        for first, last, scale in group.parts:
            products = _products(b, tiles, range(first, last), x, rows)
            for p, c in each:
                factor = b.fmul(load(b, _at(b, tiles[p], scale), _FLOATS, 4), scales[c])
                product = b.sitofp(products[p, c], _FLOATS)
                results[p, c] = add_products(b, product, factor, results[p, c])
        for mins, sums_of_x in _mins(b, group, s, scales):
            for p, c in each:
                m = load(b, _at(b, tiles[p], mins), _FLOATS, 4)
                results[p, c] = add_products(b, m, sums_of_x[c], results[p, c])
        for key, place in places.items():
            b.store(results[key], pointer(b, place, _FLOATS), align=4)

    return add_products_of_group


def _products(
    b: ir.IRBuilder, tiles: list[ir.Value], columns: range, x: ir.Value, rows: range
) -> dict[tuple[int, int], ir.Value]:
    """Sums of some pairs of columns: int32 [16] for each pair of tiles and row."""
    each = [(p, c) for p in range(len(tiles)) for c in rows]
    places = {key: cgutils.alloca_once_value(b, constant(0, _SUMS)) for key in each}
    # A loop if a product and its addition are two instructions: otherwise LLVM would collect the
    # products of a whole row first, which are more than the registers. If one does both, all is
    # written out.
    steps = len(columns) if _has_wide_products() else 1
    bounds = (ir.Constant(I64, n) for n in (columns.start, columns.stop, steps))
    with cgutils.for_range_slice(b, *bounds, I64) as (j, _):
        of_x = b.add(x, b.mul(j, ir.Constant(I64, 4)))
        of_tiles = [b.add(tile, b.mul(j, ir.Constant(I64, 64))) for tile in tiles]
        sums = {key: b.load(place) for key, place in places.items()}
        for i in range(steps):
            weights = [load(b, _at(b, tile, 64 * i), _WORDS, 2) for tile in of_tiles]
            for c in rows:
                pair = load(b, _at(b, of_x, _STEP * c + 4 * i), I32, 2)
                activations = b.bitcast(splat(b, pair, 16), _WORDS)
                for p, weight in enumerate(weights):
                    sums[p, c] = b.add(sums[p, c], add_pairs(b, weight, activations))
        for key, place in places.items():
            b.store(sums[key], place)
    return {key: b.load(place) for key, place in places.items()}


def _mins(
    b: ir.IRBuilder, group: Group, s: ir.Value, scales: list[ir.Value]
) -> list[tuple[int, list[ir.Value]]]:
    """Where the mins are, and the sums of each row's activations that they are times."""
    rows = range(len(scales))
    if group.mins == 1:
        return [(MINS, [_scalar(b, s, _SCALAR_STEP * c) for c in rows])]
    if group.mins == 0:
        return []
    found = []
    for half, place in enumerate((MINS, LAST_MINS)):
        at = [_at(b, s, 2 * _SCALAR_STEP * c + 4 * half) for c in rows]
        whole = [b.sitofp(splat(b, load(b, a, I32, 4), 16), _FLOATS) for a in at]
        found.append((place, [b.fmul(n, d) for n, d in zip(whole, scales)]))
    return found


def _at(b: ir.IRBuilder, address: ir.Value, further: int) -> ir.Value:
    return b.add(address, ir.Constant(I64, further))


def _scalar(b: ir.IRBuilder, address: ir.Value, further: int) -> ir.Value:
    """A float32 in all lanes."""
    return splat(b, load(b, _at(b, address, further), F32, 4), 16)


@functools.cache
def _has_wide_products() -> bool:
    """Whether an instruction adds 32 products to 16 sums, as AVX-512 with VNNI has: ask LLVM."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(_SUMS, [_SUMS, _WORDS, _WORDS]), "probe")
    b = ir.IRBuilder(function.append_basic_block())
    sums, weights, activations = function.args
    b.ret(b.add(sums, add_pairs(b, weights, activations)))
    made = assembly(str(module))
    return "vpdpwssd" in made and "zmm" in made
