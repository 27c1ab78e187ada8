"""Compile the CPU's kernels for other processors: LLVM has them all, whatever this machine is.

As a program: python cpu_targets.py {native,narrow,integers} NAME...: the IR for this machine, that
with the products of processors without AVX-512, and that which also reads float16 by integers.
"""

import inspect
import re
import struct
import sys
from unittest import mock

from llvmlite import binding as llvm
from numba import types
from numba.core import codegen
from numba.core.compiler_lock import global_compiler_lock

from mistral_kernels.cpu import compiler, halves, microkernel
from mistral_kernels.cpu.catalog import kernel

X86 = "x86_64-unknown-linux-gnu"
ARM = "aarch64-unknown-linux-gnu"
# (triple, processor): without and with instructions for float16; fused products; wide vectors
WITHOUT_HALVES = [(X86, "x86-64"), (X86, "nehalem")]
TARGETS = [
    *((X86, name) for name in ("ivybridge", "haswell", "cascadelake", "znver4")),
    *((ARM, name) for name in ("generic", "cortex-a72", "neoverse-n1", "neoverse-v1")),
    *(("arm64-apple-macosx", "apple-m1"), ("x86_64-pc-windows-msvc", "x86-64-v3")),
]
# What every process on Linux has: C's library
KNOWN = {"expf", "sincosf", "usleep", "sched_yield", "memset", "memcpy", "memmove"}
PAUSE = "@llvm.x86.sse2.pause()", "@llvm.aarch64.hint(i32 1)"


@global_compiler_lock
def ir_of(function):
    """What numba makes of a function of int64, before LLVM optimizes it for this processor."""
    arguments = (types.int64,) * len(inspect.signature(function).parameters)
    steps = dict(_optimize_functions=lambda *_: None, _optimize_final_module=lambda *_: None)
    with mock.patch.multiple(codegen.CPUCodeLibrary, **steps):
        dispatcher = compiler.part(function)
        dispatcher.compile(arguments)
        result = dispatcher.overloads[arguments]
        context = result.target_context
        library = context.codegen().create_library(compiler.ENTRY)
        library.add_linking_library(result.library)
        library.add_ir_module(compiler._entry(context, result, arguments))
        library.finalize()
        return library.get_llvm_str()


def compiled_for(text, triple, processor, features=""):
    """Assembly and object code of IR for a target."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=processor, features=features, opt=3, reloc="default", codemodel="jitdefault", jit=True
    )
    text = re.sub(r"(?m)^target .*$", "", text)
    if not triple.startswith("x86"):
        pause, hint = PAUSE
        text = text.replace(f"declare void {pause}", "declare void @llvm.aarch64.hint(i32)")
        text = text.replace(pause, hint)
    module = llvm.parse_assembly(text)
    module.triple = triple
    module.data_layout = str(machine.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return machine.emit_assembly(module), machine.emit_object(module)


def needed(code):
    """The symbols that object code (ELF, 64 bits) looks for outside."""
    at = struct.unpack_from("<Q", code, 40)[0]
    size, count = struct.unpack_from("<HH", code, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", code, at + size * i) for i in range(count)]
    symbols = next(section for section in sections if section[1] == 2)
    names = sections[symbols[6]][4]
    found = set()
    for entry in range(symbols[4], symbols[4] + symbols[5], 24):
        name, _, _, section = struct.unpack_from("<IBBH", code, entry)
        if name and section == 0:
            end = code.index(b"\0", names + name)
            found.add(code[names + name : end].decode())
    return found


def check(text, targets):
    """Compile for these targets; nothing may be needed that a process does not have."""
    for target in targets:
        _, code = compiled_for(text, *target)
        if target[0] in (X86, ARM):
            assert needed(code) <= KNOWN, (target, needed(code))


if __name__ == "__main__":
    _, way, *names = sys.argv
    if way == "integers":
        halves.has_instructions = lambda: False
    if way != "native":
        microkernel._has_wide_products = lambda: False
    for name in names:
        check(ir_of(kernel(name)), WITHOUT_HALVES if way == "integers" else TARGETS)
        print(name, flush=True)
