"""What the compiler made of each decode kernel: registers, spills, instructions a weight. Needs no GPU."""

import argparse
import itertools

import common
import torch
from benchmark_parts.sizes import config

from mistral.config import whole_number

KINDS = ("dense", "Q4_0", "Q4_K", "Q4_K_M", "Q5_K", "Q6_K", "Q8_0")
HEADER = "kernel       CTAs threads registers spilled   shared   SASS a weight"


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__, "python scripts/inspect_kernels.py --targets 90 --kinds dense Q4_K --batch 1 8")
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90], help="GPUs: 80, 90, ... (default: 80 90)")
    parser.add_argument(
        "--kinds", choices=KINDS, nargs="+", default=["dense", "Q4_K_M"], help="of weights (default: dense Q4_K_M)"
    )
    parser.add_argument(
        "--dtypes",
        choices=("bfloat16", "float16", "float32"),
        nargs="+",
        default=["bfloat16", "float16"],
        help="of dense weights, and what packed ones are multiplied in, never bfloat16 (default: both of 16 bits)",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="rows (default: 1 16)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    for target in args.targets:
        whole_number("a target", target, least=80)
        for kind, dtype, batch in itertools.product(args.kinds, args.dtypes, args.batch):
            if kind == "dense" or dtype != "bfloat16":
                print(f"\nsm_{target}, {kind}, {dtype}, batch {batch}\n{HEADER}")
                print_table(target, kind, common.DTYPES[dtype], batch)


def print_table(target: int, kind: str, dtype: torch.dtype, batch: int) -> None:
    try:
        from mistral_kernels.compile_ahead import compile_ahead, decode_kernels, instructions_per_weight, short_kernels
    except ImportError as error:
        raise ValueError(f"the compiler is missing ({error}): pip install triton") from None
    kinds = ("Q4_K", "Q6_K") if kind == "Q4_K_M" else (kind,)  # that file keeps some matrices with more bits
    tasks = decode_kernels(config("7b"), dtype, batch, target, *kinds)
    if kind != "dense":
        tasks |= short_kernels(config("7b"), dtype, batch, target, *kinds)
    for name, task in tasks.items():
        made = compile_ahead(task, dtype, target)
        CTAs, threads = "x".join(str(n) for n in task.launch.grid), 32 * task.launch.options["num_warps"]
        rate = instructions_per_weight(made, task.launch)
        facts = f"{made.registers:>9} {made.spilled:>7} {made.shared:>8,} {len(made.sass):>6,}"
        print(f"{name:<10} {CTAs:>6} {threads:>7} {facts} {f'{rate:.2f}' if rate else '-':>8}")


if __name__ == "__main__":
    common.run(main)
