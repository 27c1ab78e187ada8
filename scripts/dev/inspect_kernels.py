"""Registers, spills and instructions per weight of each compiled kernel. Needs no GPU."""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py, demo/

import common
import torch
from benchmark_parts.sizes import config

from mistral.config import whole_number

KINDS = ("dense", "Q4_0", "Q4_K", "Q4_K_M", "Q5_K", "Q6_K", "Q8_0")
PROMPT = 2048  # tokens
HEADER = "kernel       CTAs threads registers spilled   shared   SASS / weight"


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__, "python scripts/dev/inspect_kernels.py --targets 90 --kinds dense Q4_K --batch 1 8"
    )
    targets = dict(type=int, nargs="+", default=[80, 90])
    parser.add_argument("--targets", help="GPUs: 80, 90, ... (default: 80 90)", **targets)
    parser.add_argument(
        "--kinds",
        choices=KINDS,
        nargs="+",
        default=["dense", "Q4_K_M"],
        help="types of weights (default: dense Q4_K_M)",
    )
    parser.add_argument(
        "--dtypes",
        choices=("bfloat16", "float16", "float32"),
        nargs="+",
        default=["bfloat16", "float16"],
        help=(
            "of dense weights, and of the products of packed ones, never bfloat16 (default: "
            "bfloat16 float16)"
        ),
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 16], help="rows (default: 1 16)"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    model = config("7b")
    try:
        import compile_ahead
    except ImportError as error:
        raise ValueError(f"the compiler is missing ({error}): pip install triton") from None
    for target in args.targets:
        whole_number("a target", target, least=80)
        for kind, dtype, batch in itertools.product(args.kinds, args.dtypes, args.batch):
            if kind == "dense" or dtype != "bfloat16":
                # Q4_K_M keeps some matrices with more bits.
                kinds = ("Q4_K", "Q6_K") if kind == "Q4_K_M" else (kind,)
                how = (common.DTYPES[dtype], batch, target, *kinds)
                tasks = compile_ahead.decode_kernels(model, *how)
                if kind != "dense":
                    tasks |= compile_ahead.short_kernels(model, *how)
                tasks["sample"] = compile_ahead.sample_kernel(model, batch, target)
                title = f"sm_{target}, {kind}, {dtype}, batch {batch}"
                print_table(title, tasks, target, common.DTYPES[dtype])
        for dtype in args.dtypes:
            tasks = compile_ahead.prefill_kernels(model, common.DTYPES[dtype], PROMPT, target)
            unpacked = dict.fromkeys(
                kind.removesuffix("_M") for kind in args.kinds if kind != "dense"
            )
            tasks |= {f"from {kind}": compile_ahead.unpack_kernel(model, kind) for kind in unpacked}
            title = f"sm_{target}, {dtype}, a prompt of {PROMPT} tokens"
            print_table(title, tasks, target, common.DTYPES[dtype])


def print_table(title: str, tasks: dict, target: int, dtype: torch.dtype) -> None:
    from compile_ahead import compile_ahead, instructions_per_weight

    common.show(f"\n{title}\n{HEADER}")
    for name, task in tasks.items():
        made = compile_ahead(task, dtype, target)
        CTAs = "x".join(str(n) for n in task.launch.grid)
        threads = 32 * task.launch.options["num_warps"]
        rate = instructions_per_weight(made, task.launch)
        facts = f"{made.registers:>9} {made.spilled:>7} {made.shared:>8,} {len(made.sass):>6,}"
        common.show(
            f"{name:<10} {CTAs:>6} {threads:>7} {facts} {f'{rate:.2f}' if rate else '-':>8}"
        )


if __name__ == "__main__":
    common.run(main)
