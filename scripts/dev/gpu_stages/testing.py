"""Tests of the kernels on this GPU, in several processes: each failure is a line of JSON."""

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # common.py

import common
import pytest

ROOT = Path(__file__).resolve().parents[3]
_FOLDERS = ("tests/kernels", "tests/engine/test_cuda_graph.py")
# These ask nothing of a GPU: the CPU's engine, and what is compiled for a GPU that is not there.
_ELSEWHERE = ("cpu", "compile", "captures", "warm_up", "bare_machine", "races", "quick", "import")
_MOST_WORKERS = 12


class Lines:
    """A plugin of pytest that prints the lines and counts."""

    def __init__(self):
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Of the setup, the call and the end of each test."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            text = str(report.longrepr)
            causes = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
            why = causes[0] if causes else " ".join(text.split())
            common.show("")  # ends the line of pytest's dots
            common.show_json({"test": report.nodeid, "failed": why[:300]})


def main() -> int:
    parser = common.parser(__doc__, "python scripts/dev/gpu_stages/testing.py gpu")
    parser.add_argument("marker", help='of the tests: gpu, or "not gpu and not slow"')
    parser.add_argument("paths", nargs="*", default=_FOLDERS, help="default: those of the kernels")
    parser.add_argument("--collect-only", action="store_true", help="run none")
    args = parser.parse_args()
    began = time.monotonic()
    lines = Lines()
    code = pytest.main(options(args), plugins=[lines])
    common.show("")
    common.show_json(lines.counts | {"seconds": round(time.monotonic() - began)})
    return int(code)


def options(args: argparse.Namespace) -> list[str]:
    """The arguments of pytest."""
    made = ["-q", "-m", args.marker, "-p", "no:cacheprovider", "--tb=short", *args.paths]
    made += [f"--ignore-glob=*test_{name}*" for name in _ELSEWHERE]
    if args.collect_only:
        return [*made, "--collect-only"]
    if importlib.util.find_spec("xdist"):
        # Its workers import the plugin by its name.
        paths = [str(ROOT / "scripts/dev"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        sys.path.insert(0, paths[0])
        workers = min(_MOST_WORKERS, os.cpu_count() or 1)
        made += ["-n", str(workers), "-p", "gpu_stages.lost_gpu"]
    return made


if __name__ == "__main__":
    os.chdir(ROOT)
    common.run(main)
