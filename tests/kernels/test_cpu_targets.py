"""The CPU's kernels compiled for processors that this machine may not be (cpu_targets.py)."""

import subprocess
import sys

import pytest
import torch

numba = pytest.importorskip("numba")

import cpu_targets  # noqa: E402
from cpu_targets import ARM, TARGETS, WITHOUT_HALVES, check, compiled_for, ir_of  # noqa: E402
from llvmlite import ir  # noqa: E402
from numba import types  # noqa: E402

from mistral_kernels.cpu import encodings, halves, lanes, phases, shared  # noqa: E402

# Each function once; of the types one of each encoding and each form of scales
NAMES = [
    *("step", "round rows", "norm rows", "gate rows", "rotate rows"),
    *(f"product of {kind}" for kind in ("Q5_1", "Q8_0", "Q2_K", "Q4_K", "Q6_K")),
    *("row of Q4_K", "tiles of Q6_K", "plain product of bfloat16", "plain product of float16"),
    *("attention of float16", "storing of float16", "storing of bfloat16"),
]


def convert(values, words, count):
    """float32 to float16 and back, in place."""
    for i in range(count):
        lanes.store_halves(words + 16 * i, lanes.floats_at(values + 32 * i))
        lanes.store_floats(values + 32 * i, lanes.floats_of_halves_at(words + 16 * i))


def counters(phase, ticket, items):
    """All that threads share (phases.py)."""
    phases.open_phases(phase, 1, ticket)
    seen = phases.await_ticket(phase, ticket - 1)
    item = phases.claim(phase, seen, items)
    if not phases.is_released(phase, ticket) and phases.completes(phase, items):
        phases.release(phase, ticket)
    phases.await_release(phase, ticket)
    return item


def byte_product(vectors, x, out):
    lanes.store_floats(out, lanes.as_floats(encodings.byte_sums(vectors, x)))


def words_of(text, *target):
    """The instructions and operands of IR compiled for a target."""
    return set(compiled_for(text, *target)[0].replace(",", " ").split())


def test_no_processor_needs_a_function_that_no_process_has(monkeypatch):
    check(ir_of(convert), TARGETS)
    monkeypatch.setattr(halves, "has_instructions", lambda: False)
    check(ir_of(convert), WITHOUT_HALVES)


@pytest.mark.parametrize("native", [True, False])
def test_float16_is_read_and_rounded_as_torch_does_with_and_without_instructions(
    native, monkeypatch
):
    if not native:
        monkeypatch.setattr(halves, "has_instructions", lambda: False)
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).float()
    nan = exact.isnan()
    # All halves, the midpoints between neighbours and their neighbours; large ones; small ones
    between = (exact[:-1].double() + exact[1:].double()) / 2
    ties = between[between.isfinite()].float().view(torch.int32)
    extremes = torch.tensor([65504, 65519.99, 65520, 65536, 1e5, 3e38, 2.0**-25, 1e-40])
    values = torch.cat(
        [exact, *((ties + n).view(torch.float32) for n in (-1, 0, 1)), extremes, -extremes]
    )
    values = torch.cat([values, values.new_zeros(-len(values) % 8)])
    want = values.half()
    words = torch.zeros_like(want)
    numba.njit(convert)(values.data_ptr(), words.data_ptr(), len(values) // 8)
    nan = want.isnan()
    assert torch.equal(words.isnan(), nan)
    assert torch.equal(words.view(torch.int16)[~nan], want.view(torch.int16)[~nan])
    assert torch.equal(values.isnan(), nan)
    assert torch.equal(values.view(torch.int32)[~nan], want.float().view(torch.int32)[~nan])


def test_arm_multiplies_pairs_of_16_bits_and_converts_float16_by_its_own_instructions():
    assert {"smull", "smlal", "smlal2", "smull2"} & words_of(ir_of(byte_product), ARM, "generic")
    assert {"fcvtl", "fcvtn"} <= words_of(ir_of(convert), ARM, "generic")


@pytest.mark.parametrize("features", ["", "+lse"])
def test_arm_keeps_what_threads_share_in_order(features):
    """ARM may reorder loads and stores, which no test on x86 can notice."""
    words = words_of(ir_of(counters), ARM, "generic", features)
    assert {"ldar", "stlr", "dmb", "ishld"} <= words
    # Compare and exchange; and add
    assert ({"casal", "ldaddal"} if features else {"ldaxr", "stlxr"}) <= words
    assert not {"ldxr", "stxr", "cas", "casa", "casl", "ldadd", "ldadda", "ldaddl"} & words


@pytest.mark.parametrize(
    "processor, word",
    [("x86_64", "llvm.x86.sse2.pause"), ("aarch64", "llvm.aarch64.hint"), ("riscv64", None)],
)
def test_a_thread_that_waits_says_so_in_the_language_of_the_processor(processor, word):
    module = ir.Module()
    module.triple = f"{processor}-unknown-linux-gnu"
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), []), "f")
    builder = ir.IRBuilder(function.append_basic_block())
    context = numba.core.registry.cpu_target.target_context
    _, emit = shared.relax._defn(None, types.int64)
    emit(context, builder, None, [None])
    assert [name for name in module.globals if name.startswith("llvm")] == ([word] if word else [])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["native", "integers", "narrow"])
def test_every_kernel_compiles_for_every_processor(way):
    command = [sys.executable, cpu_targets.__file__, way, *NAMES]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stdout.splitlines() == NAMES, ended.stderr[-2000:]
