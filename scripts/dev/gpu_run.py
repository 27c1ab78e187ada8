"""Everything that a GPU is asked for, in stages: the facts first, then the shapes, then the tables.

    first  facts of the machine, compilation, trial of all kernels, GPU tests, soak, benchmarks,
           profiles
    tune   launch shapes of all kernels, and the profiler's counters
    final  the tables: all engines, all formats, long contexts; the memory checker

Each stage is a process with a time limit. What it prints goes to DIR/log.txt, and a line of JSON to
DIR/results.jsonl as soon as it ends. A stage that fails does not stop the next ones; each leaves
the next ones the least that they need, and one that no longer fits into the time is left out, which
its line says. gpu_tables.py makes tables of the lines.

Nothing has to be installed besides PyTorch, Triton and pytest: PYTHONPATH=.:kernels. With
--rehearse nothing runs on a GPU, every line says so, and no table is made of it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py

import common

from mistral.files import append_line, expanded

ROOT = Path(__file__).resolve().parents[2]
_STAGES = ROOT / "scripts/dev/gpu_stages"
_BENCHMARK = ROOT / "scripts/benchmark.py"
_PROFILE = ROOT / "scripts/dev/profile_step.py"
_OURS = ("--engines", "kernels", "kernels-pdl")
_SLOWER = 10  # a rehearsal: fake tensors take longer than a GPU
_PACKED = ("Q4_K_M", "Q8_0", "Q6_K")


@dataclass(frozen=True)
class Stage:
    """One process.

    command  a script of this project with its arguments, or a program
    seconds  it is ended after so many
    least    it is left out if fewer are left; the stages before it leave it these
    """

    name: str
    command: tuple[object, ...]
    seconds: float
    least: float


def first(rehearse: bool) -> list[Stage]:
    """What a first run asks: does it work, and about how fast is it."""
    return [
        facts(),
        compilation(110, 40, rehearse),
        Stage("trial", trial(rehearse, "--batches", 1, 8), 70, 30),
        Stage("trial of many rows", trial(rehearse, "--batches", 17, 64), 50, 25),
        tests("GPU tests", "gpu", 110, rehearse),
        Stage("soak", (_STAGES / "soak.py", "--steps", 100 if rehearse else 2000), 45, 20),
        benchmark("plain", 70, rehearse, *_OURS, "eager", "transformers"),
        benchmark("Q4_K_M", 50, rehearse, *_OURS),
        many_rows("plain", 40, rehearse),
        many_rows("Q4_K_M", 40, rehearse),
        benchmark("Q8_0", 50, rehearse, *_OURS),
        benchmark("Q6_K", 50, rehearse, *_OURS),
        profile("plain"),
        profile("Q4_K_M"),
        tests("kernel tests", "not gpu and not slow", 120, rehearse),
    ]


def tune(rehearse: bool) -> list[Stage]:
    """Which launch shapes are the quickest."""
    counters = ("ncu", "--clock-control", "none", "--launch-skip", 60, "--launch-count", 14)
    one = ("--here", "--formats", "Q4_K_M", "--batches", 1, "--how", "plain")
    return [
        compilation(200, 60, rehearse, "--sweep"),
        sweep("steps", 150, rehearse),
        sweep("attention", 60, rehearse),
        sweep("sampling", 30, rehearse),
        sweep("chunks", 60, rehearse),
        sweep("prompts", 30, rehearse),
        Stage("crossover", (_STAGES / "crossover.py",), 45, 20),
        Stage("counters", (*counters, sys.executable, _STAGES / "trial.py", *one), 60, 20),
    ]


def final(rehearse: bool) -> list[Stage]:
    """The tables."""
    contexts = ("--suite", "sweep", "--batches", 1, "--contexts", 512, 4096, 32768)
    check = ("compute-sanitizer", "--tool", "memcheck", sys.executable, _STAGES / "soak.py")
    small = ("--size", "tiny", "--formats", "plain", "--steps", 100)
    return [
        facts(),
        compilation(90, 40, rehearse),
        benchmark("plain", 150, rehearse),
        *(benchmark(format, 45, rehearse, *_OURS) for format in _PACKED),
        many_rows("plain", 35, rehearse),
        many_rows("Q4_K_M", 35, rehearse),
        benchmark("plain", 50, rehearse, *contexts, *_OURS, name="contexts"),
        profile("plain"),
        profile("Q4_K_M"),
        Stage("memory checker", (*check, *small), 60, 20),
    ]


def facts() -> Stage:
    """The machine, and its rates."""
    return Stage("facts", (_STAGES / "facts.py",), 45, 15)


def compilation(seconds: float, least: float, rehearse: bool, *options: object) -> Stage:
    """All kernels at once; what is not compiled within its own limit is compiled when it runs."""
    command = (_STAGES / "compiling.py", *options, "--seconds", limit(seconds, rehearse))
    return Stage("compile", command, seconds + 10, least)


def trial(rehearse: bool, *options: object) -> tuple[object, ...]:
    """Only this process pretends to have a GPU: a rehearsal is in one."""
    return (_STAGES / "trial.py", *options, *(["--here"] if rehearse else []))


def sweep(work: str, seconds: float, rehearse: bool) -> Stage:
    """The launch shapes of one work, with a limit of its own."""
    command = (_STAGES / "sweep.py", work, "--seconds", limit(seconds, rehearse))
    return Stage(f"sweep of {work}", command, seconds + 15, seconds / 3)


def benchmark(
    format: str, seconds: float, rehearse: bool, *options: object, name: str = "benchmark"
) -> Stage:
    """benchmark.py with its own limit; ended only if that does not hold."""
    turns = ("--repeats", 1, "--new-tokens", 4) if rehearse else ("--repeats", 3)
    command = (_BENCHMARK, "--format", format, "--compiled", *turns)
    command = (*command, "--time-limit", limit(seconds, rehearse), *options)
    return Stage(f"{name} {format}", command, seconds + 20, seconds / 2)


def limit(seconds: float, rehearse: bool) -> float:
    """The time that a stage gives itself: as much longer in a rehearsal as the stage's own."""
    return seconds * (_SLOWER if rehearse else 1)


def many_rows(format: str, seconds: float, rehearse: bool) -> Stage:
    """Steps of 32 and 64 rows, which have kernels of their own."""
    cases = ("--suite", "sweep", "--batches", 32, 64, "--contexts", 512, "--engines", "kernels")
    return benchmark(format, seconds, rehearse, *cases, name="rows")


def profile(format: str) -> Stage:
    """The kernels of one step."""
    engine = ("--engine", "kernels", "--compiled", "--context", 512)
    return Stage(f"profile {format}", (_PROFILE, "--format", format, *engine), 35, 20)


def tests(name: str, marker: str, seconds: float, rehearse: bool) -> Stage:
    """pytest in several processes; a rehearsal only collects."""
    command = (_STAGES / "testing.py", marker, *(["--collect-only"] if rehearse else []))
    return Stage(name, command, seconds, 30)


PARTS = {"first": first, "tune": tune, "final": final}


def main() -> int:
    parser = common.parser(__doc__, "python scripts/dev/gpu_run.py first --seconds 560 --out DIR")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=560, help="in all (default: 560)")
    parser.add_argument("--out", type=expanded, required=True, help="a folder; files grow in it")
    parser.add_argument(
        "--rehearse", action="store_true", help="without a GPU: what would fail before it is used"
    )
    parser.add_argument(
        "--compile", action="store_true", help="a rehearsal compiles every kernel, for minutes"
    )
    parser.add_argument("--only", nargs="+", help="stages, by name")
    args = parser.parse_args()
    stages = PARTS[args.part](args.rehearse)
    names = [stage.name for stage in stages]
    if unknown := set(args.only or ()) - set(names):
        raise ValueError(
            f"--only: {args.part} has no stage {', '.join(sorted(unknown))}; it has "
            f"{', '.join(names)}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    # Whoever ends this process ends the stage that runs.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run = Run(args.out, args.part, args.seconds, args.rehearse, args.compile)
    chosen = [stage for stage in stages if not args.only or stage.name in args.only]
    for number, stage in enumerate(chosen, 1):
        run.do(stage, sum(later.least for later in chosen[number:]))
    common.note(f"{run.failed} of {run.done} stages failed; {args.out}/results.jsonl has all lines")
    return 1 if run.failed else 0


class Run:
    """Does stages until the time is up, and writes what becomes of them."""

    def __init__(
        self, out: Path, part: str, seconds: float, rehearse: bool, compiles: bool = False
    ):
        self._log = out / "log.txt"
        self._results = out / "results.jsonl"
        self._end = time.monotonic() + seconds
        self._facts = {"part": part} | ({"rehearsal": True} if rehearse else {})
        self._rehearse = rehearse
        self._compiles = compiles or not rehearse
        self.done = 0
        self.failed = 0

    def do(self, stage: Stage, later: float = 0) -> None:
        """Run a stage, or say why not; `later`: the seconds that are kept for the next ones."""
        left = self._end - time.monotonic() - later
        line = self._facts | {"stage": stage.name}
        program = stage.command[0]
        is_program = isinstance(program, str)
        if left < stage.least:
            line["skipped"] = f"{left:.0f} s are left for it, and it needs {stage.least:.0f}"
        elif stage.name == "compile" and not self._compiles:
            line["skipped"] = "a rehearsal compiles with --compile alone"
        elif is_program and program != sys.executable and self._rehearse:
            line["skipped"] = f"{program} has nothing to look at in a rehearsal"
        elif is_program and shutil.which(program) is None:
            line["skipped"] = f"{program} is not installed"
        else:
            self.done += 1
            seconds = min(limit(stage.seconds, self._rehearse), left)
            line |= self._run(self._command(stage), seconds)
            self.failed += bool(line.get("failed"))
        append_line(self._results, json.dumps(line).encode())
        outcome = line.get("skipped") or line.get("failed") or f"done in {line['seconds']} s"
        common.note(f"{stage.name}: {outcome}")

    def _command(self, stage: Stage) -> list[str]:
        command = [str(part) for part in stage.command]
        if isinstance(stage.command[0], str):
            return command
        if not self._rehearse:
            return [sys.executable, *command]
        how = [] if self._compiles else ["--note"]
        return [sys.executable, str(ROOT / "scripts/dev/rehearse.py"), *how, *command]

    def _run(self, command: Sequence[str], seconds: float) -> dict:
        """The process to its end, or to its limit; its output is appended to the log."""
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": _path()}
        environment.setdefault("TRITON_CACHE_DIR", str(ROOT / ".triton"))
        began = time.monotonic()
        with self._log.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            start = log.tell()
            options = dict(stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
            # A group of its own, which can be ended as a whole, in the same session: what ends this
            # process's session ends the stage, too.
            process = subprocess.Popen(command, process_group=0, **options)
            code = None
            try:
                code = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                pass
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        line = {"seconds": round(time.monotonic() - began, 1), "results": self._printed(start)}
        if code is None:
            line["failed"] = f"ended after {seconds:.0f} s, its limit"
        elif code:
            line["failed"] = f"exit code {code}: {self._last_line(start)}"
        return line

    def _printed(self, start: int) -> list[dict]:
        """The lines of JSON that a stage has printed."""
        found = []
        for line in self._lines(start):
            if line.startswith("{"):
                try:
                    found.append(json.loads(line))
                except ValueError:  # cut off by the limit
                    continue
        return found

    def _last_line(self, start: int) -> str:
        texts = [line for line in self._lines(start) if line.strip() and not line.startswith("{")]
        return texts[-1][:300] if texts else "it printed nothing"

    def _lines(self, start: int) -> list[str]:
        with self._log.open("rb") as log:
            log.seek(start)
            return log.read().decode(errors="replace").splitlines()


def _path() -> str:
    """Where Python finds the project, which need not be installed."""
    own = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]
    return os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH")])])


if __name__ == "__main__":
    common.run(main)
