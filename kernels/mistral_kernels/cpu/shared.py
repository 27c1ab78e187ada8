"""What threads and separately compiled functions need of each other, in LLVM IR.

Counters that several threads change (phases.py), waiting, the records of layout.py, and calls by
address.
"""

import platform
from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils

from mistral_kernels.cpu.emit import I32, I64, load, operation, pointer
from mistral_kernels.cpu.layout import Addresses, Matrix, Orders, Sizes


@operation(types.int64, types.int64)
def shared_at(b, address):
    """An int64 that other threads write: what they wrote before it is visible after this."""
    return b.load_atomic(pointer(b, address, I64), "acquire", 8)


@operation(types.void, types.int64, types.int64)
def store_shared(b, address, value):
    """Write an int64 that other threads read: what this thread wrote before it is visible then."""
    b.store_atomic(value, pointer(b, address, I64), "release", 8)


@operation(types.int64, types.int64, types.int64)
def add_shared(b, address, value):
    """Add to an int64 that other threads add to; returns the sum."""
    before = b.atomic_rmw("add", pointer(b, address, I64), value, "acq_rel")
    return b.add(before, value)


@operation(types.int64, types.int64, types.int64, types.int64)
def replace_shared(b, address, old, new):
    """Write `new` if the int64 is still `old`; returns 1 if so, else 0."""
    pair = b.cmpxchg(pointer(b, address, I64), old, new, "acq_rel", "acquire")
    return b.zext(b.extract_value(pair, 1), I64)


@operation(types.void, types.int64)
def relax(b, unused):
    """Tell the core that this loop only waits. Some processors have no word for it."""
    # What the code is for: the machine may be an ARM one that emulates x86 for this process.
    processor = b.module.triple.partition("-")[0]
    if processor == "x86_64":
        signature = ir.FunctionType(ir.VoidType(), [])
        call = cgutils.get_or_insert_function(b.module, signature, "llvm.x86.sse2.pause")
        b.call(call, [])
    elif processor in ("aarch64", "arm64"):
        signature = ir.FunctionType(ir.VoidType(), [I32])
        call = cgutils.get_or_insert_function(b.module, signature, "llvm.aarch64.hint")
        b.call(call, [ir.Constant(I32, 1)])


@operation(types.void, types.int64)
def fence(b, unused):
    """What this thread has read stays before what it reads after this."""
    b.fence("acquire")


@operation(types.void, types.int64)
def doze(b, microseconds):
    """Sleep for some microseconds; on Windows, which has no such call, only yield."""
    if platform.system() == "Windows":
        signature = ir.FunctionType(I32, [])
        b.call(cgutils.get_or_insert_function(b.module, signature, "SwitchToThread"), [])
        return
    signature = ir.FunctionType(I32, [I32])
    call = cgutils.get_or_insert_function(b.module, signature, "usleep")
    b.call(call, [b.trunc(microseconds, I32)])


@operation(types.void, types.int64)
def yield_core(b, unused):
    """Let another thread have the core, if one waits for it."""
    if platform.system() == "Windows":
        signature = ir.FunctionType(I32, [])
        b.call(cgutils.get_or_insert_function(b.module, signature, "SwitchToThread"), [])
        return
    signature = ir.FunctionType(I32, [])
    b.call(cgutils.get_or_insert_function(b.module, signature, "sched_yield"), [])


def _reader(record: type) -> Callable:
    """A function of numba code that reads a NamedTuple of int64 at an address."""
    count = len(record._fields)

    def read(b, address):
        return load(b, address, ir.ArrayType(I64, count), 8)

    read.__name__ = f"{record.__name__.lower()}_at"
    return operation(types.NamedUniTuple(types.int64, count, record), types.int64)(read)


sizes_at = _reader(Sizes)
addresses_at = _reader(Addresses)
orders_at = _reader(Orders)
matrix_at = _reader(Matrix)


def _caller(name: str, count: int) -> Callable:
    """A function of numba code that calls compiled code at an address, with `count` int64."""

    def call(b, function, *arguments):
        signature = ir.FunctionType(I64, [I64] * count)
        b.call(b.inttoptr(function, signature.as_pointer()), arguments)

    call.__name__ = name
    return operation(types.void, *[types.int64] * (count + 1))(call)


call_product = _caller("call_product", 8)  # products.py
call_attend = _caller("call_attend", 9)  # attention.py
call_store = _caller("call_store", 3)
