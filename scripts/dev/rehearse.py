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
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--note", action="store_true", help="note the kernels, compile none")
    how.add_argument(
        "--ahead", action="store_true", help="note the kernels, then compile all at once"
    )
    parser.add_argument("--capability", type=int, default=90, help="of the GPU (default: 90)")
    parser.add_argument("script", type=common.path)
    args, rest = parser.parse_known_args()
    common.note("rehearsal: nothing runs on a GPU, and no figure below means anything")
    warnings.simplefilter("ignore")  # PyTorch's own, about fake tensors
    only_notes = args.note or args.ahead
    recording = pretended_gpu.install(args.capability, compiles=not only_notes)
    if only_notes:
        warm_up.WarmUp = NoWarmUp  # before the script imports it
    code = run(args.script, rest)
    line = {
        "rehearsal": str(args.script),
        "exit_code": code,
        "kernels": len(recording.variants),
        "compiled": sorted(recording.compiled),
        "launches": len(recording.launches),
        "launched_early": sum(early for _, early in recording.launches),
        "graphs": len(recording.graphs),
        "faults": recording.faults,
    }
    if args.ahead:
        line["not_compiled"] = warm_up.compile_all(list(recording.variants.values()))
    common.show_json(line)
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
