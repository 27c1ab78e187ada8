"""Give many hostile inputs to every reader: a value, or a documented error in one line, in time.

The generators are those of tests/fuzz/, which a short run in the suite uses, too. A case that fails
is saved, and printed with the command that runs it alone.

A long run may be made in parts, each with a seed of its own. What each part found is kept in the
folder of `--save`; `--page` writes the sums of all parts of a target that are there, and
`--cases 0 --page` runs nothing before.
"""

import argparse
import faulthandler
import json
import pickle
import re
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # small.py, scripted.py
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/fuzz"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py

import common
from fuzz_case import Target, run_case
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, Phase, given, seed, settings

from mistral.files import write_text

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/reference/fuzzing.md"
BEGIN = "<!-- the table begins: scripts/dev/fuzz.py --page writes it -->"
END = "<!-- the table ends -->"
HUNG = 120  # seconds of a single case after which the process ends, with its stack
_SHOWN = 5  # failures of one target that are printed


@dataclass
class Run:
    """What became of the cases of one target."""

    cases: int = 0
    cpu_seconds: float = 0.0
    slowest: float = 0.0
    megabytes: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    failures: dict[str, Path] = field(default_factory=dict)  # reason -> the saved case


def main() -> int:
    parser = common.parser(__doc__, "python scripts/dev/fuzz.py gguf safetensors --cases 10000")
    parser.add_argument("target", nargs="*", help=f"none: all of {', '.join(TARGETS)}")
    parser.add_argument("--cases", type=int, default=1000, help="of each target (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of this part (default: 0)")
    parser.add_argument("--save", type=common.path, default=Path("fuzz-failures"), help="folder")
    parser.add_argument("--case", type=common.path, help="run this saved case of the target, alone")
    parser.add_argument("--page", action="store_true", help=f"write the table of {PAGE.name}")
    args = parser.parse_args()
    if unknown := [name for name in args.target if name not in TARGETS]:
        raise ValueError(f"there is no target {unknown[0]}; there are {', '.join(TARGETS)}")
    targets = [TARGETS[name] for name in args.target or TARGETS]
    if args.case is not None:
        common.show(str(run_case(targets[0], pickle.loads(args.case.read_bytes()))))
        return 0
    failed = 0
    for target in targets:
        if args.cases:
            run = fuzz(target, args)
            failed += len(run.failures)
            common.show(line(target, run))
            _keep(target, run, args)
        if args.page:
            write_row(target, all_parts(target, args.save))
    return 1 if failed else 0


def fuzz(target: Target, args: argparse.Namespace) -> Run:
    """Run the cases of one target."""
    run = Run()
    args.save.mkdir(exist_ok=True)
    current = args.save / f"{target.name}-current.pickle"  # stays if the process dies

    @seed(args.seed)
    @settings(
        max_examples=args.cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.cases)
    def run_one(case: Any) -> None:
        current.write_bytes(_pickled(case))
        faulthandler.dump_traceback_later(HUNG, exit=True, file=sys.__stderr__)
        start = time.process_time()
        try:
            outcome = run_case(target, case)
            run.outcomes[outcome.what] += 1
            run.errors.update([outcome.error] if outcome.error else [])
            run.megabytes = max(run.megabytes, outcome.megabytes)
        except Exception as error:
            _note_failure(target, run, error, current)
        finally:
            faulthandler.cancel_dump_traceback_later()
        seconds = time.process_time() - start
        run.cases += 1
        run.cpu_seconds += seconds
        run.slowest = max(run.slowest, seconds)

    run_one()
    current.unlink()
    return run


def _keep(target: Target, run: Run, args: argparse.Namespace) -> None:
    """Write down what a part found; one that is run again replaces itself."""
    values = vars(run) | {"failures": [str(path) for path in run.failures.values()]}
    write_text(args.save / f"{target.name}-seed-{args.seed}.json", json.dumps(values))


def all_parts(target: Target, folder: Path) -> Run:
    """The sum of a target's parts."""
    whole = Run()
    for path in sorted(folder.glob(f"{target.name}-seed-*.json")):
        part = json.loads(path.read_text())
        whole.cases += part["cases"]
        whole.cpu_seconds += part["cpu_seconds"]
        whole.slowest = max(whole.slowest, part["slowest"])
        whole.megabytes = max(whole.megabytes, part["megabytes"])
        whole.errors.update(part["errors"])
    if not whole.cases:
        raise ValueError(f"{folder} has no run of {target.name}: run it first, with --cases")
    return whole


def _pickled(case: Any) -> bytes:
    try:
        return pickle.dumps(case)
    except Exception:  # an object that cannot be copied: its text tells what it was
        return pickle.dumps(repr(case))


def _note_failure(target: Target, run: Run, error: Exception, current: Path) -> None:
    """Save the case, and print it, if no other case has failed in the same way."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    reason = f"{type(error).__name__} at {place}: " + re.sub(r"\d+", "0", str(error))[:40]
    if reason in run.failures:
        return
    saved = current.with_name(f"{target.name}-{len(run.failures)}.pickle")
    saved.write_bytes(current.read_bytes())
    run.failures[reason] = saved
    if len(run.failures) <= _SHOWN:
        common.show(
            f"{target.name}, case {run.cases}: {type(error).__name__} at {place}: {error!s:.400}"
        )
        common.show(f"  python scripts/dev/fuzz.py {target.name} --case {saved}")


def line(target: Target, run: Run) -> str:
    """The result for a person."""
    words = ", ".join(f"{what} {count:,}" for what, count in run.outcomes.most_common(6))
    return (
        f"{target.name}: {run.cases:,} cases in {run.cpu_seconds:.0f} s ({words}); "
        f"{len(run.errors)} distinct errors; slowest {run.slowest:.2f} s; "
        f"peak memory +{run.megabytes:.0f} MB; {len(run.failures)} failures"
    )


def write_row(target: Target, run: Run) -> None:
    """Put a target's row into the table of the page; what was found, the last cell, stays."""
    before, _, rest = PAGE.read_text().partition(f"{BEGIN}\n")
    table, _, after = rest.partition(END)
    head, rows = table.splitlines()[:2], table.splitlines()[2:]
    cells = {row.split("|")[1].strip(): row for row in rows}
    found = cells[target.name].split("|")[-2].strip() if target.name in cells else "nothing"
    numbers = (
        f"{run.cases:,}",
        f"{len(run.errors)}",
        f"{1000 * run.cpu_seconds / max(run.cases, 1):.0f} ms",
        f"{run.slowest:.1f} s",
        f"{run.megabytes:.0f} MB",
    )
    row = (target.name, target.what, target.holds or "none", *numbers, found)
    cells[target.name] = f"| {' | '.join(row)} |"
    lines = [*head, *(cells[name] for name in TARGETS if name in cells)]
    write_text(PAGE, "\n".join([f"{before}{BEGIN}", *lines, END]) + after)


if __name__ == "__main__":
    common.run(main)
