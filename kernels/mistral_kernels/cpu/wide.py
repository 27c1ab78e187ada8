"""The vectors of lanes.py with twice the lanes, for products with several rows of activations.

    WideWords   32 lanes of int16
    WideSums    16 lanes of int32
    WideFloats  16 lanes of float32

A processor with AVX-512 has registers of this size; elsewhere LLVM makes two instructions of one.
"""

import operator

from llvmlite import ir
from numba import types

from mistral_kernels.cpu.emit import (
    F32,
    I16,
    I32,
    Vector,
    add_pairs,
    add_products,
    load,
    operation,
    operator_of,
    pick,
    pointer,
    splat,
)
from mistral_kernels.cpu.lanes import Floats

WideWords = Vector("WideWords", I16, 32)
WideSums = Vector("WideSums", I32, 16)
WideFloats = Vector("WideFloats", F32, 16)


@operation(WideWords, types.int64)
def wide_words_at(b, address):
    """32 int16."""
    return load(b, address, WideWords.llvm, 2)


@operation(WideWords, types.int64)
def wide_pair_at(b, address):
    """Two int16 in all 16 pairs of lanes."""
    return b.bitcast(splat(b, load(b, address, I32, 2), 16), WideWords.llvm)


@operation(WideFloats, types.int64)
def wide_floats_at(b, address):
    """16 float32."""
    return load(b, address, WideFloats.llvm, 4)


@operation(types.void, types.int64, WideFloats)
def store_wide_floats(b, address, value):
    """Write 16 float32."""
    b.store(value, pointer(b, address, WideFloats.llvm), align=4)


@operation(Floats, WideFloats)
def low_floats(b, value):
    """Lanes 0 to 7."""
    return pick(b, value, list(range(8)))


@operation(Floats, WideFloats)
def high_floats(b, value):
    """Lanes 8 to 15."""
    return pick(b, value, list(range(8, 16)))


@operation(WideSums, WideWords, WideWords)
def wide_pair_products(b, weights, activations):
    """Lane r: the products of lanes 2r and 2r + 1, added."""
    return add_pairs(b, weights, activations)


@operation(WideSums, types.int32)
def wide_sums_of(b, value):
    """An int32 in all lanes."""
    return splat(b, value, 16)


@operation(WideFloats, types.float32)
def wide_floats_of(b, value):
    """A float32 in all lanes."""
    return splat(b, value, 16)


@operation(WideFloats, WideSums)
def as_wide_floats(b, sums):
    """Each int32 as a float32."""
    return b.sitofp(sums, WideFloats.llvm)


@operation(WideFloats, WideFloats, WideFloats, WideFloats)
def wide_multiply_add(b, x, y, z):
    """x y + z, in one rounding if the processor can."""
    return add_products(b, x, y, z)


operator_of(operator.add, WideSums, WideSums, ir.IRBuilder.add)
operator_of(operator.mul, WideFloats, WideFloats, ir.IRBuilder.fmul)
