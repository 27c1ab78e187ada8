"""How numba gets vectors: a type for them, and helpers that write their operations in LLVM IR.

Everything else in this package is numba code, or an operation of lanes.py, wide.py, shared.py or
microkernel.py, in the language of this file: `b` is the builder, which appends instructions, and
the other values are what the operation gets. LLVM IR names no processor; LLVM chooses the
instructions.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
F16 = ir.HalfType()
F32 = ir.FloatType()


class Vector(types.Type):
    """A numba type whose values are LLVM vectors."""

    def __init__(self, name: str, lane: ir.Type, count: int):
        super().__init__(name)
        self.llvm = ir.VectorType(lane, count)


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


def assembly(module: str) -> str:
    """What LLVM makes of a module for the processor that numba compiles for."""
    return cpu_target.target_context.codegen()._tm.emit_assembly(llvm.parse_assembly(module))


# ---- Helpers that write IR ----


def constant(value: float, vector: ir.VectorType) -> ir.Constant:
    """A constant in all lanes."""
    return ir.Constant(vector, [value] * vector.count)


def pointer(b: ir.IRBuilder, address: ir.Value, to: ir.Type) -> ir.Value:
    """An int64 as the address of something of this type."""
    return b.inttoptr(address, to.as_pointer())


def load(b: ir.IRBuilder, address: ir.Value, of: ir.Type, align: int) -> ir.Value:
    """The value of a type at an int64 address."""
    return b.load(pointer(b, address, of), align=align)


def ask_for(b: ir.IRBuilder, address: ir.Value, near: int) -> None:
    """Prefetch the cache line at an int64 address, for a read: 3 into the nearest cache, then 2."""
    signature = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    call = cgutils.get_or_insert_function(b.module, signature, "llvm.prefetch.p0")
    read, data = ir.Constant(I32, 0), ir.Constant(I32, 1)
    b.call(call, [pointer(b, address, I8), read, ir.Constant(I32, near), data])


def splat(b: ir.IRBuilder, scalar: ir.Value, count: int) -> ir.Value:
    """One value in all lanes."""
    vector = ir.VectorType(scalar.type, count)
    first = b.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    return pick(b, first, [0] * count)


def pick(b: ir.IRBuilder, vector: ir.Value, lanes: list[int]) -> ir.Value:
    """A vector of these lanes."""
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
    return b.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def pick_of_two(b: ir.IRBuilder, x: ir.Value, y: ir.Value, lanes: list[int]) -> ir.Value:
    """A vector of these lanes of two: those of y are counted on from those of x."""
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def both(b: ir.IRBuilder, left: ir.Value, right: ir.Value) -> ir.Value:
    """The lanes of two vectors, one after the other."""
    return pick_of_two(b, left, right, list(range(2 * left.type.count)))


def looked_up(b: ir.IRBuilder, indices: ir.Value, values: tuple[int, ...]) -> ir.Value:
    """A vector whose bytes, which are 0 to 15, are replaced by one of 16 signed bytes.

    LLVM has no instruction for that, but it knows vectors whose elements are all taken from one
    place by the elements of another: vpshufb on x86, vpermb with AVX-512, tbl on ARM. A processor
    that has none of them loads each byte.
    """
    of_bytes = ir.VectorType(I8, 2 * indices.type.count)
    table = ir.Constant(ir.VectorType(I8, 16), list(values))
    places = b.bitcast(indices, of_bytes)
    found = ir.Constant(of_bytes, ir.Undefined)
    for i in range(of_bytes.count):
        lane = ir.Constant(I32, i)
        place = b.zext(b.extract_element(places, lane), I32)
        found = b.insert_element(found, b.extract_element(table, place), lane)
    return b.bitcast(found, indices.type)


def low_bytes_of(b: ir.IRBuilder, words: ir.Value) -> ir.Value:
    """The lower byte of each int16, which is signed, widened."""
    eight = constant(8, words.type)
    return b.ashr(b.shl(words, eight), eight)


def function_of(b: ir.IRBuilder, name: str, *arguments: ir.Value) -> ir.Value:
    """One of LLVM's functions on 8 float32, which every processor has in some form."""
    kind = ir.VectorType(F32, 8)
    signature = ir.FunctionType(kind, [kind] * len(arguments))
    return b.call(
        cgutils.get_or_insert_function(b.module, signature, f"llvm.{name}.v8f32"), arguments
    )


def fold(b: ir.IRBuilder, vector: ir.Value, combine: Callable) -> ir.Value:
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
