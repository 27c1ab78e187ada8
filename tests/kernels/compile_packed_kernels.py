"""Compile the kernels of a packed 7B for GPUs that are not here, and print one line of JSON for
each.

Those of a decode step, and those for short chunks.

It runs in a process of its own: the interpreter of the other tests replaces the compiler.
"""

import json

import compile_decode_kernels  # noqa: F401  (it puts the scripts on the path)
import torch
from compile_ahead import KINDS, decode_kernels, short_kernels
from compile_decode_kernels import DEMO, MATRICES, config, facts

from mistral_kernels.packed.planes import FAST_KINDS

FP16 = torch.float16
# (target, batch, kind, larger kind, kernels)
VARIANTS = [
    (90, 1, "Q4_K", "Q6_K", ("embed", "attention", *MATRICES)),
    (80, 16, "Q4_K", "Q6_K", MATRICES),
]
VARIANTS += [(90, 8, "Q4_K", "Q6_K", MATRICES)] + [
    (80, 8, kind, None, ("down",)) for kind in FAST_KINDS
]
VARIANTS += [(90, 1, kind, None, ("gate_up", "down")) for kind in FAST_KINDS]
VARIANTS += [(80, 16, kind, None, ("down",)) for kind in FAST_KINDS]
# The same for chunks of so many rows
SHORT = [
    (target, 9, "Q4_K", "Q6_K", ("scale", "short up", "short down", "short head"))
    for target in (90, 80)
]
SHORT += [(90, 2, kind, None, ("short down",)) for kind in FAST_KINDS] + [
    (80, 9, "Q4_0", None, ("short down",))
]


def show(name, task, dtype, target, batch):
    """Print the facts of one kernel, with the kinds of its matrices.

    The model is in bfloat16, as most are.
    """
    kinds = sorted(
        {task.launch.constants[constant] for constant in KINDS if constant in task.launch.constants}
    )
    model_dtype = torch.bfloat16 if dtype == FP16 else dtype
    print(
        json.dumps(facts(name, task, dtype, target, model_dtype) | dict(kinds=kinds, batch=batch)),
        flush=True,
    )


def main():
    for kernels, variants in ((decode_kernels, VARIANTS), (short_kernels, SHORT)):
        for target, batch, kind, larger, names in variants:
            tasks = kernels(config("7b"), FP16, batch, target, kind, larger)
            for name in names:
                show(name, tasks[name], FP16, target, batch)
    show("down", decode_kernels(DEMO, torch.float32, 3, 90, "Q8_0")["down"], torch.float32, 90, 3)


if __name__ == "__main__":
    main()
