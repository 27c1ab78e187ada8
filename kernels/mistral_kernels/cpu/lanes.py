"""Vectors of 8 or 16 lanes as values of numba, and their operations.

Numba compiles Python loops, but it has no vectors, and whether LLVM finds them in a loop is a
matter of luck. So this file adds three types and the few operations that the products need:

    Words   16 lanes of int16      packed weights, or pairs of activations
    Sums    8 lanes of int32       sums of products
    Floats  8 lanes of float32     scales and results

An operation is written in LLVM IR (emit.py). The central one, `pair_products`, becomes vpmaddwd on
x86 (one instruction for 16 products and 8 sums), or vpdpwssd, which also adds to a third vector;
and smull + uzp1 + uzp2 + add on ARM. Everything that is built from these is plain numba
(products.py, attention.py). wide.py has words of two tiles.

An address is an int64. Loads need no alignment beyond that of one value.
"""

import operator
from collections.abc import Callable

from llvmlite import ir
from numba import types

from mistral_kernels.cpu import halves
from mistral_kernels.cpu.emit import (
    F32,
    I8,
    I16,
    I32,
    I64,
    Vector,
    add_pairs,
    add_products,
    ask_for,
    constant,
    fold,
    function_of,
    load,
    looked_up,
    low_bytes_of,
    operation,
    operator_of,
    pick_of_two,
    pointer,
    splat,
)

Words = Vector("Words", I16, 16)
Sums = Vector("Sums", I32, 8)
Floats = Vector("Floats", F32, 8)


# ---- Loads and stores ----


@operation(Words, types.int64)
def words_at(b, address):
    """16 int16."""
    return load(b, address, Words.llvm, 2)


@operation(Words, types.int64)
def words_of_bytes_at(b, address):
    """16 signed bytes, widened."""
    return b.sext(load(b, address, ir.VectorType(I8, 16), 1), Words.llvm)


@operation(Words, types.int64)
def pair_at(b, address):
    """Two int16 in all 8 pairs of lanes."""
    return b.bitcast(splat(b, load(b, address, I32, 2), 8), Words.llvm)


@operation(Floats, types.int64)
def floats_at(b, address):
    """8 float32."""
    return load(b, address, Floats.llvm, 4)


@operation(Floats, types.int64)
def floats_of_halves_at(b, address):
    """8 float16, widened."""
    return halves.widened(b, load(b, address, ir.VectorType(I16, 8), 2))


@operation(Floats, types.int64)
def floats_of_brains_at(b, address):
    """8 bfloat16, each the upper half of a float32."""
    upper = b.zext(load(b, address, ir.VectorType(I16, 8), 2), Sums.llvm)
    return b.bitcast(b.shl(upper, constant(16, Sums.llvm)), Floats.llvm)


@operation(Sums, types.int64)
def bytes_at(b, address):
    """8 unsigned bytes, widened."""
    return b.zext(load(b, address, ir.VectorType(I8, 8), 1), Sums.llvm)


@operation(Sums, types.int64)
def signed_bytes_at(b, address):
    """8 signed bytes, widened."""
    return b.sext(load(b, address, ir.VectorType(I8, 8), 1), Sums.llvm)


@operation(types.void, types.int64, Floats)
def store_floats(b, address, value):
    """Write 8 float32."""
    b.store(value, pointer(b, address, Floats.llvm), align=4)


@operation(types.void, types.int64, Floats)
def store_halves(b, address, value):
    """8 float16, rounded."""
    words = ir.VectorType(I16, 8)
    b.store(halves.narrowed(b, value), pointer(b, address, words), align=2)


@operation(types.void, types.int64, Floats)
def store_brains(b, address, value):
    """8 bfloat16, rounded to nearest, ties to even; a NaN stays one."""
    bits = b.bitcast(value, Sums.llvm)
    odd = b.and_(b.lshr(bits, constant(16, Sums.llvm)), constant(1, Sums.llvm))
    up = b.add(bits, b.add(odd, constant(0x7FFF, Sums.llvm)))
    is_nan = b.fcmp_unordered("uno", value, value)
    kept = b.select(is_nan, b.or_(bits, constant(0x400000, Sums.llvm)), up)
    words = ir.VectorType(I16, 8)
    upper = b.trunc(b.lshr(kept, constant(16, Sums.llvm)), words)
    b.store(upper, pointer(b, address, words), align=2)


@operation(types.void, types.int64, Sums)
def store_low_words(b, address, value):
    """The lower halves of 8 int32, as int16."""
    words = ir.VectorType(I16, 8)
    b.store(b.trunc(value, words), pointer(b, address, words), align=2)


@operation(types.void, types.int64)
def prefetch(b, address):
    """Ask for the cache line at an address, into the second cache; it may be any address."""
    ask_for(b, address, 2)


@operation(types.void, types.int64)
def prefetch_near(b, address):
    """The same, into the first cache."""
    ask_for(b, address, 3)


@operation(types.float32, types.int64)
def float_at(b, address):
    """One float32."""
    return load(b, address, F32, 4)


@operation(types.int64, types.int64)
def byte_at(b, address):
    """An unsigned byte, widened."""
    return b.zext(load(b, address, I8, 1), I64)


@operation(types.int32, types.int64)
def short_at(b, address):
    """An int16, widened."""
    return b.sext(load(b, address, I16, 2), I32)


@operation(types.int32, types.int64)
def int_at(b, address):
    """One int32."""
    return load(b, address, I32, 4)


@operation(types.int64, types.int64)
def long_at(b, address):
    """One int64."""
    return load(b, address, I64, 8)


@operation(types.int64, types.int64)
def unaligned_long_at(b, address):
    """One int64 at any address."""
    return load(b, address, I64, 1)


@operation(types.void, types.int64, types.int64)
def store_byte(b, address, value):
    """Write the lowest byte of an int64."""
    b.store(b.trunc(value, I8), pointer(b, address, I8), align=1)


@operation(types.void, types.int64, types.int32)
def store_short(b, address, value):
    """Write the lower half of an int32."""
    b.store(b.trunc(value, I16), pointer(b, address, I16), align=2)


@operation(types.void, types.int64, types.float32)
def store_float(b, address, value):
    """Write one float32."""
    b.store(value, pointer(b, address, F32), align=4)


@operation(types.void, types.int64, types.int32)
def store_int(b, address, value):
    """Write one int32."""
    b.store(value, pointer(b, address, I32), align=4)


def local_memory(size: int) -> Callable:
    """A function of numba code that returns the address of `size` bytes of the caller's stack.

    They hold what was there before.
    """

    @operation(types.int64, types.int64)
    def local(b, unused):
        # Not cgutils.alloca_once, which also stores zeros: for an array of kilobytes LLVM needs
        # ten seconds for that.
        with b.goto_entry_block():
            memory = b.alloca(ir.ArrayType(I8, size))
        memory.align = 64
        return b.ptrtoint(memory, I64)

    return local


# ---- Bytes of Words ----


def table_of(values: tuple[int, ...], words: Vector) -> Callable:
    """An operation: each byte of a vector, which is 0 to 15, becomes one of 16 signed bytes."""

    @operation(words, words)
    def replaced(b, indices):
        return looked_up(b, indices, values)

    return replaced


@operation(Words, Words)
def low_bytes(b, words):
    """The lower byte of each lane, which is signed, widened."""
    return low_bytes_of(b, words)


@operation(Words, Words)
def high_bytes(b, words):
    """The upper byte of each lane, which is signed, widened."""
    return b.ashr(words, constant(8, Words.llvm))


# ---- Arithmetic ----


@operation(Sums, Words, Words)
def pair_products(b, weights, activations):
    """Lane r: the products of lanes 2r and 2r + 1, added."""
    return add_pairs(b, weights, activations)


@operation(Sums, types.int32)
def sums_of(b, value):
    """An int32 in all lanes."""
    return splat(b, value, 8)


@operation(Floats, types.float32)
def floats_of(b, value):
    """A float32 in all lanes."""
    return splat(b, value, 8)


@operation(Floats, Sums)
def as_floats(b, sums):
    """Each int32 as a float32."""
    return b.sitofp(sums, Floats.llvm)


@operation(Sums, Floats)
def rounded(b, values):
    """The nearest int32 of each, ties to even."""
    return b.fptosi(function_of(b, "rint", values), Sums.llvm)


@operation(Floats, Floats, Floats, Floats)
def multiply_add(b, x, y, z):
    """x y + z, in one rounding if the processor can."""
    return add_products(b, x, y, z)


@operation(Floats, Floats, Floats)
def larger(b, x, y):
    """The larger of each two; of a NaN and a number the number."""
    return function_of(b, "maxnum", x, y)


@operation(Floats, Floats, Floats)
def smaller(b, x, y):
    """The smaller of each two; of a NaN and a number the number."""
    return function_of(b, "minnum", x, y)


@operation(Floats, Floats)
def magnitude(b, x):
    """Without the signs."""
    return function_of(b, "fabs", x)


@operation(Floats, Sums)
def power_of_two(b, exponents):
    """2^n from its bits, for n of -126 to 127."""
    biased = b.add(exponents, constant(127, Sums.llvm))
    return b.bitcast(b.shl(biased, constant(23, Sums.llvm)), Floats.llvm)


@operation(types.float32, Floats)
def total(b, values):
    """The sum of the lanes."""
    return fold(b, values, b.fadd)


@operation(Floats, *[Floats] * 8)
def totals(b, *values):
    """Lane i: the sum of the lanes of value i.

    Lanes of two vectors that belong together are added, three times: 21 instructions for eight
    sums, where `total` takes seven for one. Before the last time no lane leaves its 128 bits.
    """
    for low, step in (
        ([0, 8, 1, 9, 4, 12, 5, 13], 2),
        ([0, 1, 8, 9, 4, 5, 12, 13], 2),
        ([0, 1, 2, 3, 8, 9, 10, 11], 4),
    ):
        high = [lane + step for lane in low]
        pairs = zip(values[::2], values[1::2])
        values = [b.fadd(pick_of_two(b, *pair, low), pick_of_two(b, *pair, high)) for pair in pairs]
    return values[0]


@operation(types.float32, Floats)
def largest(b, values):
    """The largest lane."""
    return fold(b, values, lambda x, y: b.select(b.fcmp_ordered(">", x, y), x, y))


@operation(types.int32, Sums)
def sum_of_lanes(b, values):
    """The sum of the lanes."""
    return fold(b, values, b.add)


for _lane_type in (Words, Sums):
    operator_of(operator.or_, _lane_type, _lane_type, ir.IRBuilder.or_)
    operator_of(operator.and_, _lane_type, types.int64, ir.IRBuilder.and_)
    operator_of(operator.lshift, _lane_type, types.int64, ir.IRBuilder.shl)
    operator_of(operator.sub, _lane_type, types.int64, ir.IRBuilder.sub)
# Words are bits, so zeros come in at the top; Sums are numbers, whose sign stays.
operator_of(operator.rshift, Words, types.int64, ir.IRBuilder.lshr)
operator_of(operator.rshift, Sums, types.int64, ir.IRBuilder.ashr)
operator_of(operator.add, Sums, Sums, ir.IRBuilder.add)
operator_of(operator.add, Floats, Floats, ir.IRBuilder.fadd)
operator_of(operator.sub, Floats, Floats, ir.IRBuilder.fsub)
operator_of(operator.mul, Floats, Floats, ir.IRBuilder.fmul)
operator_of(operator.truediv, Floats, Floats, ir.IRBuilder.fdiv)
