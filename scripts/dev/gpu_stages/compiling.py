"""Compile every kernel that the other stages launch, in all cores at once."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # common.py, benchmark_parts/

import common
import torch
from benchmark_parts import sizes
from benchmark_parts.sizes import Case
from benchmark_parts.warm_up import WarmUp

# Those of benchmark.py's core and of the trial
_CASES = (Case(1, 2048, 64), Case(8, 512, 64))


def main() -> int:
    parser = common.parser(__doc__, "python scripts/dev/gpu_stages/compiling.py")
    parser.add_argument("--formats", nargs="+", default=["plain", "Q4_K_M", "Q8_0", "Q6_K"])
    parser.add_argument("--size", default="7b", choices=sizes.SIZES)
    parser.add_argument("--seconds", type=float, default=120, help="default: 120")
    args = parser.parse_args()
    capability = torch.cuda.get_device_capability()
    engines = ("kernels", "kernels-pdl")
    warm = WarmUp(args.size, torch.bfloat16, args.formats, _CASES, engines, capability)
    line = warm.wait(args.seconds)
    common.show_json({"ahead": line})
    return 0 if line.startswith("compiled") else 1


if __name__ == "__main__":
    common.run(main)
