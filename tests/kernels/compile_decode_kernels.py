"""Compile the decode kernels of a 7B for GPUs that are not here, and print one line of JSON for
each.

    python compile_decode_kernels.py short|full
"""

import json
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
sys.path.append(str(Path(__file__).parents[2] / "scripts/dev"))
import time_model
from benchmark_parts.sizes import config
from compile_ahead import compile_ahead, decode_kernels, instructions_per_weight
from demo.training import CONFIG as DEMO

MATRICES = ("qkv", "output", "gate_up", "down", "head")
ALL = ("embed", "attention", *MATRICES)
EARLY = (*ALL, "attention ahead")  # as dependent launches have it
# (target, dtype, batch, model, kernels)
SHORT = [
    (90, torch.bfloat16, 1, config("7b"), EARLY),
    (80, torch.bfloat16, 1, config("7b"), ("down",)),
]
FULL = [
    (90, torch.bfloat16, 1, config("7b"), EARLY),
    (80, torch.bfloat16, 1, config("7b"), ALL),
    (90, torch.float16, 16, config("7b"), EARLY),
    (80, torch.float16, 16, config("7b"), ALL),
    (90, torch.float32, 3, DEMO, ALL),
    (90, torch.bfloat16, 8, config("7b"), ("qkv", "down")),
    (120, torch.bfloat16, 1, config("7b"), ("embed", "qkv", "attention", "gate_up")),
]


def facts(name, task, dtype, target, model_dtype=None):
    """The properties of a compiled kernel that the tests look at."""
    made = compile_ahead(task, dtype, target, model_dtype)
    products = [i for i, line in enumerate(made.sass) if line.startswith("HMMA")]
    first, last = (products[0], products[-1] + 1) if products else (0, 0)
    loads = [line.split()[0] for line in made.sass[:first] if line.startswith("LDG")]
    return dict(
        name=name,
        target=target,
        dtype=str(dtype).removeprefix("torch."),
        registers=made.registers,
        spilled=made.spilled,
        spilled_in_loops=sum(
            made.count(kind, *loop) for loop in made.loops for kind in ("STL", "LDL")
        ),
        shared=made.shared,
        threads=32 * task.launch.options["num_warps"],
        chunks=task.launch.constants.get("CHUNKS"),
        wide_loads_ahead=sum(".128" in load for load in loads),
        products=len(products),
        widths=sorted(made.operand_widths),
        detours=sum(made.count(kind, first, last) for kind in ("LDS", "STS", "SHFL")),
        waits=made.count("ACQBULK"),
        wide_loads_before_wait=_before_wait(made.sass),
        a_weight=instructions_per_weight(made, task.launch),
        predicted=_predicted(made, task.launch) if (name, target) == ("output", 90) else None,
    )


def _predicted(made, launch):
    """Seconds, by the model of a multiprocessor; the loop of plain weights has two rounds here."""
    warps = launch.options["num_warps"]
    columns = 32 * warps * launch.constants["CHUNKS"]
    rounds = max(launch.constants["COLUMNS"] // columns, 1) if columns else 1
    program = time_model.program(*time_model.instructions(made.cubin), rounds=rounds)
    CTAs = time_model.resident(made.registers, warps, made.shared)
    return time_model.seconds(program, launch.grid[0], warps, CTAs)


def _before_wait(sass):
    """How many loads of 16 bytes come before the first wait for the previous kernel."""
    names = [line.split()[0] for line in sass]
    end = next((i for i, name in enumerate(names) if name.startswith("ACQBULK")), 0)
    return sum(name.startswith("LDG") and ".128" in name for name in names[:end])


def main(form):
    for target, dtype, batch, model, names in {"short": SHORT, "full": FULL}[form]:
        tasks = decode_kernels(model, dtype, batch, target)
        for name in names:
            print(
                json.dumps(facts(name, tasks[name], dtype, target) | dict(batch=batch)), flush=True
            )


if __name__ == "__main__":
    main(sys.argv[1])
