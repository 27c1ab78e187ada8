"""Compile the prefill's kernels and the sampler for GPUs that are not here, and print a line of JSON for each.

It runs in a process of its own: the interpreter of the other tests replaces the compiler.
"""

import json

import torch

from mistral_kernels import compile_ahead, prefill_attention, prefill_pointwise, sampling

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def tasks(arch):
    """(name, kernel, launch, dtype) for a 7B, and for a small model with heads of 64."""
    for V in (32_000, 32_032, 32_768):
        yield f"sample {V}", sampling.sample_kernel, sampling.launch(1, V, arch), FP32
    for H, dtype in ((128, BF16), (128, FP16), (64, BF16), (64, FP32)):
        launch = prefill_attention.launch(1, 2048, 32, 8, H, dtype, arch)
        yield f"prefill {H} {dtype}", prefill_attention.prefill_attention_kernel, launch, dtype
        launch = prefill_pointwise.rotate_launch(2048, 32, 8, H)
        yield f"rotate {H} {dtype}", prefill_pointwise.rotate_chunk_kernel, launch, dtype
        launch = prefill_pointwise.store_launch(2048, 8, H)
        yield f"store {H} {dtype}", prefill_pointwise.store_chunk_kernel, launch, dtype
    for dtype in (BF16, FP16, FP32):
        yield f"swiglu {dtype}", prefill_pointwise.swiglu_kernel, prefill_pointwise.swiglu_launch(2048, 14336), dtype


def main():
    for target in (90, 80):
        for name, kernel, launch, dtype in tasks(target):
            made = compile_ahead.compile_ahead(compile_ahead.Task(kernel, launch), dtype, target)
            facts = dict(
                name=name,
                target=target,
                registers=made.registers,
                spilled=made.spilled,
                shared=made.shared,
                threads=32 * launch.options["num_warps"],
                wide_loads=made.count("LDG.E.128"),
                wide_stores=made.count("STG.E.128"),
                products=made.count("HMMA") + made.count("HGMMA"),
                copies_ahead=made.count("LDGSTS"),
            )
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
