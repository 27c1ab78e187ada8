"""Run a script as on a GPU, on a machine without one, to find what would fail there.

Nothing is computed: tensors have no values, and kernels are compiled and counted, not run. So every
figure that the script prints is meaningless. The last line is JSON about what it asked of the GPU;
the exit code is 1 if a CUDA graph would have held what it cannot hold.
"""

import runpy
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py, benchmark_parts/

import common
from benchmark_parts import pretended_gpu, warm_up


def main() -> int:
    parser = common.parser(
        __doc__, "python scripts/dev/rehearse.py scripts/benchmark.py --engines kernels"
    )
    parser.add_argument("--note", action="store_true", help="note the kernels, compile none")
    parser.add_argument("script", type=common.path)
    args, rest = parser.parse_known_args()
    common.note("rehearsal: nothing runs on a GPU, and no figure below means anything")
    warnings.simplefilter("ignore")  # PyTorch's own, about fake tensors
    recording = pretended_gpu.install(compiles=not args.note)
    if args.note:
        warm_up.WarmUp = NoWarmUp  # before the script imports it
    code = run(args.script, rest)
    common.show_json(
        {
            "rehearsal": str(args.script),
            "exit_code": code,
            "kernels": len(recording.variants),
            "compiled": sorted(recording.compiled),
            "launches": len(recording.launches),
            "launched_early": sum(early for _, early in recording.launches),
            "graphs": len(recording.graphs),
            "faults": recording.faults,
        }
    )
    return 1 if code or recording.faults else 0


class NoWarmUp:
    """In the place of `WarmUp`, which would compile."""

    def __init__(self, *_: object):
        pass

    def wait(self, seconds: float) -> str:
        """The line about it."""
        return "nothing is compiled ahead: this rehearsal compiles nothing"


def run(script: Path, arguments: list[str]) -> int | str | None:
    """The script as a program of its own; returns its exit code."""
    before = sys.argv
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        return ended.code
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    common.run(main)
