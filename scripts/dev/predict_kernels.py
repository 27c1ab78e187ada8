"""Predict what the decode kernels of a 7B take on an H200, by time_model.py. Needs no GPU."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py, benchmark_parts/

import common
import time_model
import torch
import triton
from benchmark_parts.sizes import config
from compile_ahead import compile_ahead, decode_kernels

from mistral_kernels.decode.matvec import DENSE

MATRICES = ("qkv", "output", "gate_up", "down", "head")
KINDS = ("dense", "Q4_K", "Q6_K", "Q8_0")


def main() -> None:
    parser = common.parser(__doc__, "python scripts/dev/predict_kernels.py --kinds Q4_K Q6_K")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    parser.add_argument("--kernels", nargs="+", choices=MATRICES, default=MATRICES)
    args = parser.parse_args()
    common.note(f"predicted for sm_90 with Triton {triton.__version__}; nothing is measured")
    common.show("type    kernel    warps registers spilled   shared CTAs     us")
    for kind in args.kinds:
        dtype = torch.bfloat16 if kind == "dense" else torch.float16
        tasks = decode_kernels(config("7b"), dtype, 1, 90, DENSE if kind == "dense" else kind)
        for name in args.kernels:
            common.show(f"{kind:<7} {name:<9} {prediction(tasks[name], kind, dtype)}")


def prediction(task: Any, kind: str, dtype: torch.dtype) -> str:
    """Compile a kernel: its facts, and what the model says of it."""
    made = compile_ahead(task, dtype, 90, torch.bfloat16)
    constants = task.launch.constants
    columns = 32 * constants["CHUNKS"] if kind == "dense" else 1024  # of a warp in a round
    rounds = triton.cdiv(constants["COLUMNS"] // columns, constants["WARPS"])
    warps = task.launch.options["num_warps"]
    CTAs = time_model.resident(made.registers, warps, made.shared)
    program = time_model.program(*time_model.instructions(made.cubin), rounds)
    us = 1e6 * time_model.seconds(program, task.launch.grid[0], warps, CTAs)
    return (
        f"{warps:>5} {made.registers:>9} {made.spilled:>7} {made.shared:>8,} {CTAs:>4} {us:>6.2f}"
    )


if __name__ == "__main__":
    common.run(main)
