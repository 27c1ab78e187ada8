"""Numba's compiler, from a Python function to object code in one piece.

What is compiled here is called by its address with int64 alone: numbers and other addresses. So the
object code refers to nothing of numba or Python, and a process that only loads it (compiled.py)
needs neither.
"""

import inspect
import platform
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import config
from numba.core.codegen import get_host_cpu_features
from numba.core.compiler_lock import global_compiler_lock

ENTRY = "kernel"  # the symbol of the function in its object code

# x86 has an instruction that multiplies pairs and adds them to a sum (vpdpwssd). LLVM replaces it
# by two, which shorten the wait between two products of one sum, unless a processor has the feature
# "fast-dpwssd". Products here do not wait (microkernel.py), so one instruction is faster. Only
# processes that compile import this file (worker.py): no other numba code is affected.
if config.CPU_FEATURES is None and platform.machine().lower() in ("x86_64", "amd64"):
    config.CPU_FEATURES = f"{get_host_cpu_features()},+fast-dpwssd"

_OPTIONS = dict(
    nogil=True,
    fastmath={"contract"},  # x y + z may be one instruction; sums keep the order of the source
    error_model="numpy",  # a division by zero raises nothing: compiled code cannot raise
    no_cpython_wrapper=True,  # only compiled code calls it
    no_cfunc_wrapper=True,
)


def part(function: Callable) -> Callable:
    """Decorates a function that compiled code calls: it becomes part of its callers."""
    return numba.njit(**_OPTIONS)(function)


@global_compiler_lock
def object_code(function: Callable) -> tuple[bytes, int]:
    """Compile a function of int64 that returns an int64 or nothing.

    Returns its object code, with the symbol ENTRY, and the number of its arguments.
    """
    count = len(inspect.signature(function).parameters)
    arguments = (types.int64,) * count
    dispatcher = part(function)
    dispatcher.compile(arguments)
    result = dispatcher.overloads[arguments]
    context = result.target_context
    library = context.codegen().create_library(ENTRY)
    library.enable_object_caching()  # or numba would not keep the object code
    library.add_linking_library(result.library)
    library.add_ir_module(_entry(context, result, arguments))
    library.finalize()
    return library._get_compiled_object(), count


def _entry(context: Any, result: Any, arguments: tuple[types.Type, ...]) -> ir.Module:
    """A function with C's way of passing arguments that calls the compiled one."""
    module = context.create_module(ENTRY)
    i64 = ir.IntType(64)
    entry = ir.Function(module, ir.FunctionType(i64, [i64] * len(arguments)), ENTRY)
    builder = ir.IRBuilder(entry.append_basic_block())
    compiled = context.declare_function(module, result.fndesc)
    returned = result.signature.return_type
    _, value = context.call_conv.call_function(
        builder, compiled, returned, arguments, entry.args
    )  # the first is numba's word for an exception
    builder.ret(value if returned == types.int64 else ir.Constant(i64, 0))
    return module
