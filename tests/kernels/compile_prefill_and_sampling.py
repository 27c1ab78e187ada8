"""Compile the prefill's kernels and the sampler for GPUs that are not here, and print a line of
JSON for each.

It runs in a process of its own: the interpreter of the other tests replaces the compiler.
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

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def tasks(arch):
    """(name, task, dtype) for a 7B, and for heads of 64."""
    for V, B in itertools.product((32_000, 32_001, 32_002, 32_032, 32_768), (1, 3)):
        yield f"sample {V} {B}", sample_kernel(replace(config("7b"), vocab_size=V), B, arch), FP32
    for H, dtype in ((128, BF16), (128, FP16), (64, BF16), (64, FP32)):
        for name, task in prefill_kernels(
            replace(config("7b"), head_dim=H), dtype, 2048, arch
        ).items():
            if name != "swiglu":  # which has no heads
                yield f"{name} {H} {dtype}", task, dtype
    yield f"prefill short {BF16}", prefill_kernels(config("7b"), BF16, 64, arch)["prefill"], BF16
    for T, dtype in ((2, BF16), (9, BF16), (9, FP16)):
        yield f"few tokens {T} {dtype}", short_attention_kernel(config("7b"), dtype, T, arch), dtype
    for dtype in (BF16, FP16, FP32):
        yield f"swiglu {dtype}", prefill_kernels(config("7b"), dtype, 2048, arch)["swiglu"], dtype


def main():
    smaller_blackwell = [
        ("prefill 128", prefill_kernels(config("7b"), BF16, 2048, 120)["prefill"], BF16)
    ]
    for target, chosen in ((90, tasks(90)), (80, tasks(80)), (120, smaller_blackwell)):
        for name, task, dtype in chosen:
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
    main()
