"""Compile the kernels of a packed 7B for GPUs that are not here, and print one line of JSON for
each: those of a decode step, those for short chunks, and those of a step of more than 16 rows.

    python compile_packed_kernels.py short|full
"""

import json
import sys

import compile_decode_kernels  # noqa: F401  (it puts the scripts on the path)
import torch
from compile_ahead import KINDS, decode_kernels, many_rows_kernels, short_kernels
from compile_decode_kernels import DEMO, MATRICES, config, facts

from mistral_kernels.packed.planes import FAST_KINDS

FP16 = torch.float16
# (target, batch, type, larger type, kernels)
DECODE = {
    "short": [(90, 1, "Q4_K", "Q6_K", ("qkv", "gate_up", "down"))],
    "full": [
        (90, 1, "Q4_K", "Q6_K", ("embed", "attention", *MATRICES)),
        (80, 16, "Q4_K", "Q6_K", MATRICES),
        (90, 8, "Q4_K", "Q6_K", MATRICES),
        *((80, 8, kind, None, ("down",)) for kind in FAST_KINDS),
        *((90, 1, kind, None, ("gate_up", "down")) for kind in FAST_KINDS),
        *((80, 16, kind, None, ("down",)) for kind in FAST_KINDS),
    ],
}
SHORT = ("short up", "short qkv", "short gate up", "short down", "short head")
# The same for chunks of so many rows
CHUNKS = {
    "short": [(90, 9, "Q4_K", None, ("scale", "short gate up"))],
    "full": [
        *((target, 9, "Q4_K", "Q6_K", ("scale", *SHORT)) for target in (90, 80)),
        *((90, T, kind, None, ("short down", "short qkv")) for kind in FAST_KINDS for T in (2, 16)),
        (80, 9, "Q4_0", None, ("short down",)),
    ],
}
# The same for a step of so many rows
ROWS = ("rows up", "rows gate up", "rows down")
POINTWISE = ("normalise", "rotate store", "add", "silu")
MANY_ROWS = {
    "short": [(90, 24, "Q4_K", None, ("rows up", *POINTWISE))],
    "full": [
        *((target, 24, "Q4_K", None, POINTWISE) for target in (90, 80)),
        *((90, 24, kind, None, ROWS) for kind in FAST_KINDS),
        (80, 17, "Q4_K", "Q6_K", ROWS),
    ],
}


def show(name, task, dtype, target, batch):
    """Print the facts of one kernel, with the types of its matrices.

    The model is in bfloat16, as most are.
    """
    kinds = sorted(
        {task.launch.constants[constant] for constant in KINDS if constant in task.launch.constants}
    )
    model_dtype = torch.bfloat16 if dtype == FP16 else dtype
    made = facts(name, task, dtype, target, model_dtype)
    print(json.dumps(made | dict(kinds=kinds, batch=batch)), flush=True)


def main(form):
    for kernels, variants in (
        (decode_kernels, DECODE[form]),
        (short_kernels, CHUNKS[form]),
        (many_rows_kernels, MANY_ROWS[form]),
    ):
        for target, batch, kind, larger, names in variants:
            tasks = kernels(config("7b"), FP16, batch, target, kind, larger)
            for name in names:
                show(name, tasks[name], FP16, target, batch)
    if form == "full":
        task = decode_kernels(DEMO, torch.float32, 3, 90, "Q8_0")["down"]
        show("down", task, torch.float32, 90, 3)


if __name__ == "__main__":
    main(sys.argv[1])
