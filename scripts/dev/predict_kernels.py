"""Predict what the decode kernels of a 7B take on an H200, by time_model.py. Needs no GPU.

With --staged the matrices of packed types are also predicted with weights that pass through shared
memory (staged_tile.py), all by the staged form of the projection, whatever follows the product.
"""

import sys
from collections.abc import Iterator
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
_PIECES = {"Q4_K": 8, "Q6_K": 12, "Q8_0": 16}  # of a group, of low and high bits


def main() -> None:
    parser = common.parser(
        __doc__, "python scripts/dev/predict_kernels.py --kinds Q4_K Q6_K --staged"
    )
    kinds = ("dense", *_PIECES)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="default: all")
    parser.add_argument("--kernels", nargs="+", choices=MATRICES, default=MATRICES)
    parser.add_argument("--staged", action="store_true", help="and the other way to load")
    args = parser.parse_args()
    common.note(f"predicted for sm_90 with Triton {triton.__version__}; nothing is measured")
    common.show("type    kernel    loads             warps registers spilled   shared CTAs     us")
    for kind in args.kinds:
        dtype = torch.bfloat16 if kind == "dense" else torch.float16
        tasks = decode_kernels(config("7b"), dtype, 1, 90, DENSE if kind == "dense" else kind)
        for name in args.kernels:
            for how, task, options in versions(kind, name, tasks, args.staged):
                row(kind, name, how, task, dtype, options)


def versions(kind: str, name: str, tasks: dict, staged: bool) -> Iterator[tuple[str, Any, dict]]:
    """What is compared: in words, the kernel, and the arguments of `time_model.program`."""
    import staged_tile

    constants = tasks[name].launch.constants
    columns = constants["COLUMNS"]
    step = 32 * constants["CHUNKS"] if kind == "dense" else 1024
    yield "registers", tasks[name], dict(rounds=triton.cdiv(columns // step, constants["WARPS"]))
    if not staged or kind not in staged_tile.KINDS:
        return
    base = tasks["down" if columns > 4096 else "output"]
    # A round copies the head again, the second time from L2.
    share = (_PIECES[kind] + 0.5) / (_PIECES[kind] + 1)
    for warps in (4, 8) if columns > 4096 else (4,):
        for stages in (2, 3):
            made = staged_tile.launch(base.launch, warps, stages)
            task = type(base)(
                staged_tile.staged_kernel, made._replace(grid=tasks[name].launch.grid)
            )
            options = dict(rounds=staged_tile.rounds(made), ahead=stages - 1, share=share)
            yield f"copies, {stages} stages", task, options


def row(kind: str, name: str, how: str, task: Any, dtype: torch.dtype, options: dict) -> None:
    """Compile one version, and print what the model says of it."""
    made = compile_ahead(task, dtype, 90, torch.bfloat16)
    warps = task.launch.options["num_warps"]
    CTAs = time_model.resident(made.registers, warps, made.shared)
    program = time_model.program(*time_model.instructions(made.cubin), **options)
    us = 1e6 * time_model.seconds(program, task.launch.grid[0], warps, CTAs)
    facts = (
        f"{warps:>5} {made.registers:>9} {made.spilled:>7} {made.shared:>8,} {CTAs:>4} {us:>6.2f}"
    )
    common.show(f"{kind:<7} {name:<9} {how:<17} {facts}")


if __name__ == "__main__":
    common.run(main)
