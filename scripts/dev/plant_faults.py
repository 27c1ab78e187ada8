"""Plant the small faults of scripts/dev/faults/, one at a time, and see that the tests notice each.

A table has the faults of one room: a file of the project, its tests, and for each fault the text
that is replaced (`old`, which occurs exactly once in the file), its replacement (`new`), its own
`tests` if they are others (`::test` is in the same file of tests), and `reason` if no test can
notice it: the code computes the same.

The project is copied once. Each fault is planted in the copy, its tests run until one fails, and
the file is restored. A test that hangs counts as one that fails. The faults that no test noticed
are printed; the exit status is 1 if one of them has no reason.
"""

import argparse
import gc
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "scripts/dev/faults"
PAGE = ROOT / "docs/reference/planted-faults.md"
SECONDS = 300  # tests that take longer hang
COPIED = ("mistral", "kernels", "scripts", "tests", "docs", "pyproject.toml", "README.md")
# What most tests import, or what takes long: a forked process has it already.
PRELOADED = """
    torch torch._dynamo transformers transformers.models.mistral.modeling_mistral
    transformers.generation.logits_process transformers.models.auto triton.runtime.interpreter
    mistral_common gguf huggingface_hub sentencepiece tokenizers safetensors.torch jsonschema_rs
    jsonschema llguidance pydantic docstring_parser numpy tqdm hypothesis xdist
""".split()


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One replacement in one file."""

    room: str
    path: str  # from the project's root
    old: str  # occurs once in the file
    new: str
    tests: str  # files, or file::test
    reason: str  # why no test can notice it; empty: a test must

    def __str__(self) -> str:
        return f"{self.path}: {_one_line(self.old)}  ->  {_one_line(self.new)}"


def faults() -> list[Fault]:
    """Every fault of every table, in the order of the tables' names."""
    found = []
    for table in sorted(TABLES.glob("*.toml")):
        for path, entry in tomllib.loads(table.read_text()).items():
            for fault in entry["faults"]:
                found.append(
                    Fault(
                        room=table.stem,
                        path=path,
                        old=fault["old"],
                        new=fault["new"],
                        tests=_expanded(fault.get("tests", entry["tests"]), entry["tests"]),
                        reason=fault.get("reason", ""),
                    )
                )
    return found


def _expanded(tests: str, of_the_file: str) -> str:
    """`::test` is in the first file of tests that the table names."""
    first = of_the_file.split()[0].partition("::")[0]
    return " ".join(first + test if test.startswith("::") else test for test in tests.split())


def problem(fault: Fault, root: Path = ROOT) -> str | None:
    """What is wrong with an entry of a table; None: nothing."""
    path = root / fault.path
    if not path.is_file():
        return f"{fault.path} does not exist"
    occurrences = path.read_text().count(fault.old)
    if occurrences != 1:
        return f"{fault}: the old text occurs {occurrences} times, not once"
    if fault.old == fault.new:
        return f"{fault}: the new text is the old text"
    for test in fault.tests.split():
        file, _, name = test.partition("::")
        function = name.partition("[")[0]
        if not (root / file).is_file() or f"def {function}" not in (root / file).read_text():
            return f"{fault}: the test {test} does not exist"
    return None


def main() -> None:
    args = _arguments()
    chosen = [
        fault
        for fault in faults()
        if (not args.room or fault.room in args.room) and (args.file or "") in fault.path
    ]
    chosen = _part(chosen, args.part)
    wrong = [text for fault in chosen if (text := problem(fault))]
    if wrong:
        sys.exit("\n".join(wrong))
    if args.page:
        PAGE.write_text(page(faults()))
        return
    if args.list:
        for fault in chosen:
            print(f"{fault.room:13}{fault}")
        return
    outcomes = _plant_all(chosen, args.jobs, checked=not args.unchecked)
    survivors = [fault for fault in chosen if outcomes[fault] == 0]
    unusable = [fault for fault in chosen if outcomes[fault] and not noticed(outcomes[fault])]
    for fault in survivors:
        print(f"not noticed: {fault}\n    {fault.reason or f'by {fault.tests}'}")
    for fault in unusable:
        print(f"pytest ended with {outcomes[fault]}: {fault}\n    {fault.tests}")
    excused = sum(1 for fault in survivors if fault.reason)
    seen = len(chosen) - len(survivors) - len(unusable)
    print(f"{len(chosen)} faults: {seen} noticed, {excused} with a reason why not")
    sys.exit(len(survivors) > excused or bool(unusable))


def noticed(status: int) -> bool:
    """Whether pytest's exit status is that of a failure: 1 and 2, or a signal after a crash."""
    return status in (1, 2) or status < 0


def page(table: Sequence[Fault]) -> str:
    """The page of docs with the number of faults per room, and the reasons."""
    rows = []
    for room, count in Counter(fault.room for fault in table).items():
        excused = sum(1 for fault in table if fault.room == room and fault.reason)
        rows.append(f"| `{room}` | {count} | {count - excused} | {excused} |")
    excused = sum(1 for fault in table if fault.reason)
    rows.append(f"| all | {len(table)} | {len(table) - excused} | {excused} |")
    reasons = [
        f"- `{fault.path}`: `{_one_line(fault.new)}` for `{_one_line(fault.old)}`. {fault.reason}"
        for fault in table
        if fault.reason
    ]
    return _PAGE.format(count=len(table), rows="\n".join(rows), reasons="\n".join(reasons))


_PAGE = """\
# Planted faults

Do the tests notice a mistake? `scripts/dev/plant_faults.py` makes one, runs the tests of its file
and restores the file, then makes the next: {count} small faults in all rooms, of the kind that a
person makes. `>=` for `>` at a border, a swapped pair, a wrong constant, a dropped check, a
forgotten reset. They are in `scripts/dev/faults/`, one table per room.

```bash
.venv/bin/python scripts/dev/plant_faults.py --room kernels
.venv/bin/python scripts/dev/plant_faults.py --part 3/10
```

A fault that no test notices is an error: a test is missing, unless the fault changes nothing, and
then the table says why. `tests/test_planted_faults.py` checks that every fault still fits its file,
and that this page, which the script writes with `--page`, has the count of the tables.

| room | faults | a test fails | changes nothing |
|---|---|---|---|
{rows}

These change nothing:

{reasons}
"""


def _plant_all(chosen: Sequence[Fault], jobs: int, checked: bool) -> dict[Fault, int]:
    """Plant each fault and run its tests: pytest's exit status for each."""
    outcomes: dict[Fault, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        free = [_copy(Path(folder) / str(number)) for number in range(jobs)]
        _preload()
        if checked:
            _check_without_faults(chosen, free[0])
        waiting = list(reversed(chosen))
        running: list[_Run] = []
        while waiting or running:
            while waiting and free:
                running.append(_Run(waiting.pop(), free.pop()))
            wait([run.process.sentinel for run in running], timeout=1.0)
            for run in [run for run in running if run.has_ended()]:
                running.remove(run)
                free.append(run.copy)
                outcomes[run.fault] = outcome = run.end()
                word = "noticed" if noticed(outcome) else f"pytest: {outcome}"
                print(f"{word:10}{run.seconds:5.0f} s  {run.fault}", flush=True)
    return outcomes


class _Run:
    """One fault in a copy of the project, while its tests run."""

    def __init__(self, fault: Fault, copy: Path):
        self.fault = fault
        self.copy = copy
        self._path = copy / fault.path
        self._text = self._path.read_text()
        self._times = self._path.stat()
        self._path.write_text(self._text.replace(fault.old, fault.new))
        self._start = time.monotonic()
        self.process = _started(fault.tests, copy)

    @property
    def seconds(self) -> float:
        """How long it runs."""
        return time.monotonic() - self._start

    def has_ended(self) -> bool:
        """Whether the tests have ended, or take too long."""
        return not self.process.is_alive() or self.seconds > SECONDS

    def end(self) -> int:
        """Restore the file: pytest's exit status; 1 if the tests hang."""
        status = _status(self.process)
        self._path.write_text(self._text)
        # The old time: then the file that Python compiled from the faulty text is not used.
        os.utime(self._path, ns=(self._times.st_atime_ns, self._times.st_mtime_ns))
        return status


def _copy(target: Path) -> Path:
    """The project without what git ignores."""
    target.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target / name)
    return target


def _preload() -> None:
    """Import what nearly all tests import, none of it of this project, before the first fork."""
    if not Path("/dev/nvidia0").exists():
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # the garbage collector of a fork need not look at all that


def _check_without_faults(chosen: Sequence[Fault], copy: Path) -> None:
    """Run all tests of the faults once: one that fails without its fault would prove nothing."""
    tests = {test: None for fault in chosen for test in fault.tests.split()}
    process = _started(" ".join(tests), copy)
    process.join()
    if process.exitcode:
        sys.exit(f"without any fault pytest ends with {process.exitcode}: {' '.join(tests)}")


def _started(tests: str, copy: Path) -> BaseProcess:
    """These tests in the copy, until one fails, in a process of their own."""
    process = get_context("fork").Process(target=_run_pytest, args=(tests, copy))
    process.start()
    return process


def _status(process: BaseProcess) -> int:
    """The exit status of a process that has ended; 1 for one that has not, which is killed."""
    if not process.is_alive():
        return process.exitcode
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return 1


def _run_pytest(tests: str, copy: Path) -> None:
    os.setsid()  # so that what the tests start ends with them
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(silence, stream)
    own = [str(copy), str(copy / "kernels")]
    os.chdir(copy)
    os.environ["PYTHONPATH"] = os.pathsep.join(own)
    os.environ["NUMBA_CACHE_DIR"] = str(copy.parent / "numba")  # faulty code must not stay
    # The project's own folders go; a virtual environment in one of them stays.
    sources = {ROOT, ROOT / "kernels", ROOT / "scripts", ROOT / "scripts/dev", ROOT / "tests"}
    sys.path[:] = own + [path for path in sys.path if Path(path) not in sources]
    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests.split()])))


def _part(chosen: list[Fault], part: str) -> list[Fault]:
    """`k/n`: every n-th fault, from the k-th on."""
    k, n = (int(number) for number in part.split("/"))
    if not 1 <= k <= n:
        raise ValueError(f"--part {part}: it must be k/n with 1 <= k <= n")
    return chosen[k - 1 :: n]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--room", action="append", help="faults of this table alone; repeatable")
    parser.add_argument("--file", help="faults of files whose path has this text in it alone")
    parser.add_argument("--part", default="1/1", help="k/n: every n-th fault, from the k-th on")
    parser.add_argument("--jobs", type=int, default=1, help="copies at a time (default: 1)")
    parser.add_argument(
        "--unchecked", action="store_true", help="do not run the tests without a fault before"
    )
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.name} and end")
    return parser.parse_args()


if __name__ == "__main__":
    main()
