"""The words of two tiles side by side, as they are unpacked (groups.py).

    WideWords   32 lanes of int16: 16 of a left tile, then 16 of a right one

A processor with AVX-512 has registers of this size; elsewhere LLVM makes two or four instructions
of one.
"""

import operator

from llvmlite import ir
from numba import types

from mistral_kernels.cpu.emit import (
    I8,
    I16,
    Vector,
    both,
    constant,
    load,
    low_bytes_of,
    operation,
    operator_of,
    pointer,
)
from mistral_kernels.cpu.lanes import Sums, Words

WideWords = Vector("WideWords", I16, 32)


@operation(WideWords, types.int64, types.int64)
def wide_words_at(b, left, right):
    """16 int16 at each address."""
    return both(b, load(b, left, Words.llvm, 2), load(b, right, Words.llvm, 2))


@operation(WideWords, types.int64, types.int64)
def wide_words_of_bytes_at(b, left, right):
    """16 signed bytes at each address, widened."""
    bytes = ir.VectorType(I8, 16)
    return b.sext(both(b, load(b, left, bytes, 1), load(b, right, bytes, 1)), WideWords.llvm)


@operation(WideWords, Sums, Sums)
def in_pairs(b, left, right):
    """Lanes 2r and 2r + 1 of each tile: the lower half of its lane r."""
    numbers = both(b, left, right)
    low = b.and_(numbers, constant(0xFFFF, numbers.type))
    return b.bitcast(b.or_(low, b.shl(low, constant(16, numbers.type))), WideWords.llvm)


@operation(types.void, types.int64, WideWords)
def store_wide_words(b, address, value):
    """Write 32 int16."""
    b.store(value, pointer(b, address, WideWords.llvm), align=2)


@operation(WideWords, WideWords)
def wide_low_bytes(b, words):
    """The lower byte of each lane, which is signed, widened."""
    return low_bytes_of(b, words)


@operation(WideWords, WideWords)
def wide_high_bytes(b, words):
    """The upper byte of each lane, which is signed, widened."""
    return b.ashr(words, constant(8, WideWords.llvm))


operator_of(operator.or_, WideWords, WideWords, ir.IRBuilder.or_)
operator_of(operator.mul, WideWords, WideWords, ir.IRBuilder.mul)
operator_of(operator.and_, WideWords, types.int64, ir.IRBuilder.and_)
operator_of(operator.lshift, WideWords, types.int64, ir.IRBuilder.shl)
operator_of(operator.rshift, WideWords, types.int64, ir.IRBuilder.lshr)
operator_of(operator.sub, WideWords, types.int64, ir.IRBuilder.sub)
