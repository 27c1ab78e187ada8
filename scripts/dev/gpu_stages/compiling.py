"""Compile every kernel that the other stages launch, in all cores at once.

With --sweep it is all variants of sweep.py instead: in turns they would take half an hour.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # common.py, benchmark_parts/

import common
import torch
from benchmark_parts import sizes
from benchmark_parts.sizes import Case
from benchmark_parts.warm_up import WarmUp

_DEV = Path(__file__).resolve().parents[1]
# Those of benchmark.py's core, of the trial, and of steps of many rows
_CASES = (Case(1, 2048, 64), Case(8, 512, 64), Case(32, 512, 64), Case(64, 512, 64))
_ONCE = ("steps", "attention", "sampling", "prompts", "chunks", "--once")


def main() -> int:
    parser = common.parser(__doc__, "python scripts/dev/gpu_stages/compiling.py")
    parser.add_argument("--formats", nargs="+", default=["plain", "Q4_K_M", "Q8_0", "Q6_K"])
    parser.add_argument("--size", default="7b", choices=sizes.SIZES)
    parser.add_argument("--seconds", type=float, default=120, help="default: 120")
    parser.add_argument("--sweep", action="store_true", help="the variants of sweep.py")
    args = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    if args.sweep:
        return sweep(args.formats, args.size, 10 * major + minor, args.seconds)
    began = time.monotonic()
    engines = ("kernels", "kernels-pdl")
    # A process for each format: what takes longest is to find out what is launched.
    warm = {
        format: WarmUp(args.size, torch.bfloat16, [format], _CASES, engines, (major, minor))
        for format in args.formats
    }
    failed = 0
    for format, one in warm.items():
        line = one.wait(max(args.seconds - (time.monotonic() - began), 1))
        common.show_json({"format": format, "ahead": line})
        failed += not line.startswith("compiled")
    return 1 if failed else 0


def sweep(formats: list[str], size: str, capability: int, seconds: float) -> int:
    """The variants of all works; a process on a GPU that is not there notes them."""
    began = time.monotonic()
    rehearse = [sys.executable, _DEV / "rehearse.py", "--ahead", "--capability", capability]
    command = [*rehearse, _DEV / "gpu_stages/sweep.py", *_ONCE, "--size", size]
    command = [str(part) for part in (*command, "--formats", *formats)]
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:  # what is compiled stays in the cache
        common.show_json({"failed": f"not all variants were compiled in {seconds:.0f} s"})
        return 1
    took = round(time.monotonic() - began)
    if not run.stdout.startswith("{"):
        common.show_json({"failed": "the sweep's variants were not noted: see the lines above"})
        return 1
    line = json.loads(run.stdout.splitlines()[-1])
    common.show_json({"variants": line["kernels"], "not": line["not_compiled"], "seconds": took})
    return run.returncode


if __name__ == "__main__":
    common.run(main)
