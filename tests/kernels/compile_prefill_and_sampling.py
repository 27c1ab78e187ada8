"""Compile the prefill's kernels and the sampler for GPUs that are not here, and print a line of
JSON for each.

    python compile_prefill_and_sampling.py short|full
"""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
sys.path.append(str(Path(__file__).parents[2] / "scripts/dev"))
from benchmark_parts.sizes import config
from compile_ahead import compile_ahead, prefill_kernels, sample_kernel, short_attention_kernel

BF16 = torch.bfloat16
FP16 = torch.float16
FP32 = torch.float32
BASE = config("7b")


def all_tasks(arch):
    """(name, task, dtype) for a 7B, and for heads of 64."""
    for V, B in itertools.product((32_000, 32_001, 32_002, 32_032, 32_768), (1, 3)):
        yield f"sample {V} {B}", sample_kernel(replace(BASE, vocab_size=V), B, arch), FP32
    for H, dtype in ((128, BF16), (128, FP16), (64, BF16), (64, FP32)):
        tasks = prefill_kernels(replace(BASE, head_dim=H), dtype, 2048, arch)
        for name, task in tasks.items():
            if name != "swiglu":  # which has no heads
                yield f"{name} {H} {dtype}", task, dtype
    yield f"prefill short {BF16}", prefill_kernels(BASE, BF16, 64, arch)["prefill"], BF16
    for T, dtype in ((2, BF16), (9, BF16), (9, FP16)):
        yield f"few tokens {T} {dtype}", short_attention_kernel(BASE, dtype, T, arch), dtype
    for dtype in (BF16, FP16, FP32):
        yield f"swiglu {dtype}", prefill_kernels(BASE, dtype, 2048, arch)["swiglu"], dtype


def variants(form):
    """(target, name, task, dtype) of a form."""
    if form == "short":
        for V in (32_000, 32_001):
            yield 90, f"sample {V} 1", sample_kernel(replace(BASE, vocab_size=V), 1, 90), FP32
        for name, task in prefill_kernels(BASE, BF16, 2048, 90).items():
            yield 90, f"{name} {BF16}" if name == "swiglu" else f"{name} 128 {BF16}", task, BF16
        yield 90, f"few tokens 9 {BF16}", short_attention_kernel(BASE, BF16, 9, 90), BF16
        return
    for target in (90, 80):
        for name, task, dtype in all_tasks(target):
            yield target, name, task, dtype
    # a smaller Blackwell
    yield 120, "prefill 128", prefill_kernels(BASE, BF16, 2048, 120)["prefill"], BF16


def main(form):
    for target, name, task, dtype in variants(form):
        made = compile_ahead(task, dtype, target)
        facts = dict(
            name=name,
            target=target,
            registers=made.registers,
            spilled=made.spilled,
            shared=made.shared,
            threads=32 * task.launch.options["num_warps"],
            wide_loads=made.count("LDG.E.128"),
            wide_stores=made.count("STG.E.128"),
            products=made.count("HMMA") + made.count("HGMMA"),
            copies_ahead=made.count("LDGSTS"),
        )
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
