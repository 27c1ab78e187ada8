"""Vectors of 8 or 16 lanes as values of numba: with shared.py all of LLVM's language.

Numba compiles Python loops, but it has no vectors, and whether LLVM finds them in a loop is a
matter of luck. So this file adds three types and the few operations that the products need:

    Words   16 lanes of int16      packed weights, or pairs of activations
    Sums    8 lanes of int32       sums of products
    Floats  8 lanes of float32     scales and results

An operation is written in LLVM IR, which names no processor; LLVM chooses the instructions. The
central one, `pair_products`, becomes vpmaddwd on x86 (one instruction for 16 products and 8 sums),
or vpdpwssd, which also adds to a third vector; and smull + smlal + addp on ARM. Everything that is
built from these is plain numba (products.py, attention.py). wide.py has vectors of twice the size.

An address is an int64. Loads need no alignment beyond that of one value.
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

_I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
_F16 = ir.HalfType()
F32 = ir.FloatType()


class Vector(types.Type):
    """A numba type whose values are LLVM vectors."""

    def __init__(self, name: str, lane: ir.Type, count: int):
        super().__init__(name)
        self.llvm = ir.VectorType(lane, count)


Words = Vector("Words", I16, 16)
Sums = Vector("Sums", I32, 8)
Floats = Vector("Floats", F32, 8)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector):
        super().__init__(manager, vector, vector.llvm)


def operation(result: types.Type, *arguments: types.Type) -> Callable:
    """Decorates `emit(builder, *values)`, which writes the IR of one operation of numba."""
    names = ", ".join(f"a{i}" for i in range(len(arguments)))

    def decorate(emit: Callable) -> Callable:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            made = emit(builder, *values)
            return context.get_dummy_value() if result is types.void else made

        # Numba wants a function whose arguments have names.
        scope = {"typed": lambda: (result(*arguments), codegen), "__name__": __name__}
        exec(f"def {emit.__name__}(typingctx, {names}):\n    return typed()", scope)
        scope[emit.__name__].__doc__ = emit.__doc__
        return intrinsic(scope[emit.__name__])

    return decorate


# ---- Helpers that write IR ----


def _lanes(value: float, vector: ir.VectorType) -> ir.Constant:
    """A constant in all lanes."""
    return ir.Constant(vector, [value] * vector.count)


def pointer(b: ir.IRBuilder, address: ir.Value, to: ir.Type) -> ir.Value:
    """An int64 as the address of something of this type."""
    return b.inttoptr(address, to.as_pointer())


def load(b: ir.IRBuilder, address: ir.Value, of: ir.Type, align: int) -> ir.Value:
    """The value of a type at an int64 address."""
    return b.load(pointer(b, address, of), align=align)


def splat(b: ir.IRBuilder, scalar: ir.Value, count: int) -> ir.Value:
    """One value in all lanes."""
    vector = ir.VectorType(scalar.type, count)
    first = b.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    return pick(b, first, [0] * count)


def pick(b: ir.IRBuilder, vector: ir.Value, lanes: list[int]) -> ir.Value:
    """A vector of these lanes."""
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
    return b.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def _function(b: ir.IRBuilder, name: str, *arguments: ir.Value) -> ir.Value:
    """One of LLVM's functions on Floats, which every processor has in some form."""
    kind = Floats.llvm
    signature = ir.FunctionType(kind, [kind] * len(arguments))
    return b.call(
        cgutils.get_or_insert_function(b.module, signature, f"llvm.{name}.v8f32"), arguments
    )


def _fold(b: ir.IRBuilder, vector: ir.Value, combine: Callable) -> ir.Value:
    """One value from all lanes: the upper half with the lower half, until one is left."""
    count = vector.type.count
    while count > 1:
        count //= 2
        low = pick(b, vector, list(range(count)))
        high = pick(b, vector, list(range(count, 2 * count)))
        vector = combine(low, high)
    return b.extract_element(vector, ir.Constant(I32, 0))


def add_pairs(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Products of int16 lanes as int32; those of lanes 2r and 2r + 1 are added."""
    count = x.type.count
    wide = ir.VectorType(I32, count)
    products = b.mul(b.sext(x, wide), b.sext(y, wide))
    even = pick(b, products, list(range(0, count, 2)))
    odd = pick(b, products, list(range(1, count, 2)))
    return b.add(even, odd)


def add_products(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x y + z, in one rounding if the processor can."""
    return b.fadd(b.fmul(x, y, flags=["contract"]), z, flags=["contract"])


# ---- Loads and stores ----


@operation(Words, types.int64)
def words_at(b, address):
    """16 int16."""
    return load(b, address, Words.llvm, 2)


@operation(Words, types.int64)
def words_of_bytes_at(b, address):
    """16 signed bytes, widened."""
    return b.sext(load(b, address, ir.VectorType(_I8, 16), 1), Words.llvm)


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
    return b.fpext(load(b, address, ir.VectorType(_F16, 8), 2), Floats.llvm)


@operation(Floats, types.int64)
def floats_of_brains_at(b, address):
    """8 bfloat16, each the upper half of a float32."""
    upper = b.zext(load(b, address, ir.VectorType(I16, 8), 2), Sums.llvm)
    return b.bitcast(b.shl(upper, _lanes(16, Sums.llvm)), Floats.llvm)


@operation(Sums, types.int64)
def bytes_at(b, address):
    """8 unsigned bytes, widened."""
    return b.zext(load(b, address, ir.VectorType(_I8, 8), 1), Sums.llvm)


@operation(Sums, types.int64)
def signed_bytes_at(b, address):
    """8 signed bytes, widened."""
    return b.sext(load(b, address, ir.VectorType(_I8, 8), 1), Sums.llvm)


@operation(types.void, types.int64, Words)
def store_words(b, address, value):
    """Write 16 int16."""
    b.store(value, pointer(b, address, Words.llvm), align=2)


@operation(types.void, types.int64, Floats)
def store_floats(b, address, value):
    """Write 8 float32."""
    b.store(value, pointer(b, address, Floats.llvm), align=4)


@operation(types.void, types.int64, Floats)
def store_halves(b, address, value):
    """8 float16, rounded."""
    half = ir.VectorType(_F16, 8)
    b.store(b.fptrunc(value, half), pointer(b, address, half), align=2)


@operation(types.void, types.int64, Floats)
def store_brains(b, address, value):
    """8 bfloat16, rounded to nearest, ties to even; a NaN stays one."""
    bits = b.bitcast(value, Sums.llvm)
    odd = b.and_(b.lshr(bits, _lanes(16, Sums.llvm)), _lanes(1, Sums.llvm))
    up = b.add(bits, b.add(odd, _lanes(0x7FFF, Sums.llvm)))
    is_nan = b.fcmp_unordered("uno", value, value)
    kept = b.select(is_nan, b.or_(bits, _lanes(0x400000, Sums.llvm)), up)
    words = ir.VectorType(I16, 8)
    upper = b.trunc(b.lshr(kept, _lanes(16, Sums.llvm)), words)
    b.store(upper, pointer(b, address, words), align=2)


@operation(types.void, types.int64, Sums)
def store_low_words(b, address, value):
    """The lower halves of 8 int32, as int16."""
    words = ir.VectorType(I16, 8)
    b.store(b.trunc(value, words), pointer(b, address, words), align=2)


@operation(types.void, types.int64)
def prefetch(b, address):
    """Ask for the cache line at an address; it may be any address."""
    signature = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), I32, I32, I32])
    call = cgutils.get_or_insert_function(b.module, signature, "llvm.prefetch.p0")
    read, keep, data = (ir.Constant(I32, n) for n in (0, 3, 1))
    b.call(call, [pointer(b, address, _I8), read, keep, data])


@operation(types.float32, types.int64)
def float_at(b, address):
    """One float32."""
    return load(b, address, F32, 4)


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
            memory = b.alloca(ir.ArrayType(_I8, size))
        memory.align = 64
        return b.ptrtoint(memory, I64)

    return local


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
    return b.fptosi(_function(b, "rint", values), Sums.llvm)


@operation(Floats, Floats, Floats, Floats)
def multiply_add(b, x, y, z):
    """x y + z, in one rounding if the processor can."""
    return add_products(b, x, y, z)


@operation(Floats, Floats, Floats)
def larger(b, x, y):
    """The larger of each two; of a NaN and a number the number."""
    return _function(b, "maxnum", x, y)


@operation(Floats, Floats, Floats)
def smaller(b, x, y):
    """The smaller of each two; of a NaN and a number the number."""
    return _function(b, "minnum", x, y)


@operation(Floats, Floats)
def magnitude(b, x):
    """Without the signs."""
    return _function(b, "fabs", x)


@operation(Floats, Sums)
def power_of_two(b, exponents):
    """2^n from its bits, for n of -126 to 127."""
    biased = b.add(exponents, _lanes(127, Sums.llvm))
    return b.bitcast(b.shl(biased, _lanes(23, Sums.llvm)), Floats.llvm)


@operation(types.float32, Floats)
def total(b, values):
    """The sum of the lanes."""
    return _fold(b, values, b.fadd)


@operation(types.float32, Floats)
def largest(b, values):
    """The largest lane."""
    return _fold(b, values, lambda x, y: b.select(b.fcmp_ordered(">", x, y), x, y))


@operation(types.int32, Sums)
def sum_of_lanes(b, values):
    """The sum of the lanes."""
    return _fold(b, values, b.add)


def operator_of(symbol: Callable, left: Vector, right: types.Type, emit: Callable) -> None:
    """Make `x symbol y` of numba code what emit(builder, x, y) writes, for x a vector of this type.

    right  the same type, or an integer, which emit gets in all lanes
    """

    def matches(x: types.Type, y: types.Type) -> bool:
        return x is left and (isinstance(y, types.Integer) if right is types.int64 else y is left)

    @type_callable(symbol)
    def type_of(context):
        return lambda x, y: left if matches(x, y) else None

    @lower_builtin(symbol, left, types.Integer if right is types.int64 else left)
    def lower(context, builder, signature, values):
        x, y = values
        if right is types.int64:
            lane = left.llvm.element
            narrow = context.cast(builder, y, signature.args[1], types.int64)
            y = splat(builder, builder.trunc(narrow, lane), left.llvm.count)
        return emit(builder, x, y)


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
