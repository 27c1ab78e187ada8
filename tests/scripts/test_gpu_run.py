"""The stages of a run on a GPU, with programs in their place; and the tables made of their lines."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import types

import gpu_run
import gpu_tables
import pytest
import torch
from benchmark_parts.turns import TimeLimit
from gpu_run import Run, Stage
from gpu_stages import compiling, sweep, trial

from mistral_kernels.decode.step import KERNELS
from mistral_kernels.portable import Launch
from mistral_kernels.sample.sampler import Sampler


def python(code):
    return (sys.executable, "-c", code)


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path):
    run = Run(tmp_path, "first", 60, rehearse=False)
    run.do(Stage("good", python("print('hello'); print('{\"us\": 1}')"), 20, 1))
    run.do(Stage("bad", python("print('a word'); raise SystemExit('no GPU here')"), 20, 1))
    run.do(Stage("endless", python("print('{\"us\": 2}', flush=True)\nwhile True: pass"), 1, 1))
    run.do(Stage("absent", ("no-such-program",), 20, 1))
    run.do(Stage("long", python("print('never')"), 100, least=90))
    good, bad, endless, absent, long = lines(tmp_path)
    assert good["results"] == [{"us": 1}]
    assert "failed" not in good
    assert bad["failed"] == "exit code 1: no GPU here"
    assert endless["failed"] == "ended after 1 s, its limit"
    assert endless["results"] == [{"us": 2}]  # what it had printed before
    assert absent["skipped"] == "no-such-program is not installed"
    assert "s are left for it, and it needs 90" in long["skipped"]
    assert (run.done, run.failed) == (3, 2)
    log = (tmp_path / "log.txt").read_text()
    assert "hello" in log
    assert "no GPU here" in log
    assert "never" not in log.replace("print('never')", "")


def test_a_run_that_is_interrupted_leaves_no_stage_behind(tmp_path, monkeypatch):
    started = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is not None:
                started.append(self)
                raise KeyboardInterrupt
            return super().wait()

    monkeypatch.setattr(gpu_run.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path, "first", 60, rehearse=False).do(Stage("x", python("while True: pass"), 20, 1))
    assert started[0].poll() == -signal.SIGKILL


def test_a_rehearsal_says_so_in_every_line_and_becomes_no_table(tmp_path):
    run = Run(tmp_path, "first", 60, rehearse=True)
    run.do(Stage("counters", ("ncu", "x"), 20, 1))
    run.do(Stage("facts", python("print('{\"read_bytes_per_s\": 1}')"), 20, 1))
    assert [line["rehearsal"] for line in lines(tmp_path)] == [True, True]
    assert "nothing to look at in a rehearsal" in lines(tmp_path)[0]["skipped"]
    with pytest.raises(ValueError, match="line 1 is of a rehearsal: nothing ran"):
        gpu_tables.read([tmp_path / "results.jsonl"])


def test_a_stage_leaves_the_next_ones_what_they_need(tmp_path):
    run = Run(tmp_path, "first", 60, rehearse=False)
    began = time.monotonic()
    run.do(Stage("endless", python("while True: pass"), 60, 0.1), later=59)
    assert time.monotonic() - began < 30
    run.do(Stage("long", python("print('never')"), 60, 10), later=58)
    endless, long = lines(tmp_path)
    assert endless["failed"] == "ended after 1 s, its limit"
    assert "it needs 10" in long["skipped"]


@pytest.mark.parametrize("part", gpu_run.PARTS)
def test_no_stage_of_a_part_is_left_out_whatever_the_others_take(part):
    stages = gpu_run.PARTS[part](rehearse=False)
    assert sum(stage.least for stage in stages) < 560 - 30  # 30: what the processes' ends take
    assert all(stage.least <= stage.seconds for stage in stages)
    assert len({stage.name for stage in stages}) == len(stages)
    for stage in stages:
        program = stage.command[0]
        assert isinstance(program, str) or program.is_file(), stage


@pytest.mark.parametrize("rehearse", [False, True])
def test_a_stage_ends_itself_before_it_is_ended(rehearse):
    """And in a rehearsal, which is slower, no later than it would on a GPU."""
    limits = {}
    for part, stages in gpu_run.PARTS.items():
        for stage in stages(rehearse):
            command = list(stage.command)
            for name in {"--seconds", "--time-limit"} & set(map(str, command)):
                given = command[command.index(name) + 1]
                limits[part, stage.name] = given
                assert given < gpu_run.limit(stage.seconds, rehearse)
                assert given >= 0.6 * gpu_run.limit(stage.seconds, rehearse)
    assert len(limits) >= 15
    assert limits["tune", "compile"] == (2000 if rehearse else 200)


def test_the_operation_that_is_to_blame_is_named(monkeypatch):
    asked = []

    def attempt(model, expected, batch, *, pdl, together=True, graph=None, operations=None):
        asked.append((pdl, graph))
        twin = operations is not None and operations.attend is not KERNELS.attend
        return (0.01, "") if twin else (float("nan"), "WrongLogits: 140% away")

    monkeypatch.setattr(trial, "attempt", attempt)
    found = trial.one_trial(None, None, 1, "plain")
    assert found == {
        "failed": "WrongLogits: 140% away",
        "works": "with the plain twin of attend",
    }
    assert asked[:2] == [(False, None), (False, False)]


def test_a_launch_that_may_not_be_dependent_is_named(monkeypatch):
    def attempt(model, expected, batch, *, pdl, together=True, graph=None, operations=None):
        plain = operations is not None and operations.project is not KERNELS.project
        return (0.01, "") if plain or not pdl else (float("nan"), "WrongLogits")

    monkeypatch.setattr(trial, "attempt", attempt)
    assert trial.one_trial(None, None, 1, "plain") == {"distance": 0.01}
    found = trial.one_trial(None, None, 1, "dependent")
    assert found["works"] == "with a plain launch of project"


def test_a_fault_of_the_graphs_alone_or_of_no_operation_is_told(monkeypatch):
    def attempt(model, expected, batch, *, pdl, together=True, graph=None, operations=None):
        return (0.01, "") if graph is False and works else (float("nan"), "RuntimeError")

    monkeypatch.setattr(trial, "attempt", attempt)
    works = True
    assert trial.one_trial(None, None, 1, "dependent")["works"] == "without CUDA graphs"
    works = False
    assert "chunks or of sampling" in trial.one_trial(None, None, 1, "dependent")["works"]


def test_a_twin_takes_no_pdl():
    called = []
    trial.without_pdl(lambda *given, **options: called.append((given, options)))(1, pdl=True, eps=2)
    assert called == [((1,), {"eps": 2})]


class Kernel:
    """In the place of one of Triton: it writes a product over `outputs`, and adds to `residual`."""

    __name__ = "projection_kernel"
    arg_names = ("y", "weight", "norm", "residual", "x", "sums")

    def __init__(self, wrong=None):
        self.wrong = wrong

    def __getitem__(self, grid):
        def run(y, weight, norm, residual, x, sums, WARPS, **options):
            if self.wrong == WARPS:
                return
            residual += y * weight
            x.copy_(residual * norm)
            sums.fill_(residual.square().sum())

        return run


def call_of(kernel):
    arguments = [torch.rand(4) + 1 for _ in kernel.arg_names]
    constants = dict(COLUMNS=2048, WARPS=1, CHUNKS=0, KIND="Q4_K")
    return sweep.Call(kernel, Launch((1,), constants, dict(num_warps=1)), tuple(arguments))


def measured(call, monkeypatch, seconds=lambda call: 1e-6):
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(sweep, "seconds_a_launch", lambda call, *_: seconds(call))
    return list(sweep.lines(call, TimeLimit(None)))


def test_every_variant_begins_with_what_the_first_one_found(monkeypatch):
    def used(call):  # as its launches in a graph leave it
        call.arguments[3].add_(100)
        return 1e-6

    found = measured(call_of(Kernel()), monkeypatch, used)
    assert len(found) == 2 * (
        1 + 3 + 0
    )  # launched plainly and early; 2,048 columns: 2 warps at most
    assert [line["distance"] for line in found] == [0.0] * len(found)


def test_a_variant_that_writes_nothing_is_not_called_right(monkeypatch):
    found = measured(call_of(Kernel(wrong=2)), monkeypatch)
    for line in found:
        assert ("failed" in line) == (line["constants"].get("WARPS") == 2)
    assert math.isnan(found[-1]["distance"])


class Draws:
    """In the place of the sampling kernel: what it draws depends on how many ids were drawn."""

    __name__ = "sample_kernel"
    arg_names = ("logits", "seen", "counts", "ids", "answers")

    def __getitem__(self, grid):
        def run(logits, seen, counts, ids, answers, GROUPS, BLOCK, num_warps):
            assert 128 * num_warps == BLOCK
            ids.copy_(counts % len(seen))
            answers.copy_(ids)
            seen[ids] = True
            counts += 1

        return run


def test_every_shape_of_the_sampler_draws_by_the_same_random_numbers(monkeypatch):
    logits = torch.zeros(8)
    seen = torch.zeros(8, dtype=torch.bool)
    arguments = (logits, seen, *(torch.zeros(1, dtype=torch.int64) for _ in range(3)))
    launch = Launch((1,), dict(GROUPS=512, BLOCK=2048), dict(num_warps=16))
    call = sweep.Call(Draws(), launch, arguments)

    def used(call):  # as its launches in a graph leave it
        call.launch.run(call.kernel, *call.arguments)
        return 1e-6

    found = measured(call, monkeypatch, used)
    assert [line["options"].get("num_warps") for line in found] == [None, 4, 8, 32]
    assert [line["distance"] for line in found] == [0.0] * 4
    assert len(sweep.copies(call, [])) > 1  # one launch alone would time the graph's start


def test_the_sampling_kernel_has_every_rule_that_is_measured():
    (work,) = sweep.WORKS["sampling"]
    rules = [sweep._RULES[name] for name in work.rules]
    assert all(map(Sampler.supports, rules))
    assert {"top_k", "top_p", "min_p"} <= {
        name for rule in rules for name in vars(rule) if vars(rule)[name] != getattr(rules[1], name)
    }
    assert len(set(map(repr, rules))) == len(rules) == 6


def test_the_types_of_a_mixture_are_two_calls():
    assert call_of(Kernel()).name == "projection_kernel, 2048 columns, Q4_K"


def test_another_number_of_parts_has_buffers_and_a_grid_of_its_own():
    names = ("q", "keys", "values", "positions", "y", "partial_outputs", "stats", "counters")
    kernel = types.SimpleNamespace(__name__="decode_attention_kernel", arg_names=names)
    shapes = {"partial_outputs": (8, 16, 4, 32), "stats": (8, 16, 2, 4)}
    tensors = tuple(torch.zeros(shapes.get(name, (1,))) for name in names)
    constants = dict(SPLITS=16, BLOCK=64, STAGES=3, AHEAD=False, H=32)
    call = sweep.Call(kernel, Launch((8, 16), constants, dict(num_warps=4)), tensors)
    for changes, _ in sweep.variants(call):
        made = sweep.changed(call, changes, {}, pdl=True)
        splits = changes.get("SPLITS", 16)
        assert made.launch.grid == (8, splits)
        assert made.launch.constants["AHEAD"]
        assert made.arguments[5].shape == (8, splits, 4, 32)
        assert made.arguments[6].shape == (8, splits, 2, 4)
        assert made.arguments[0] is tensors[0]


def test_each_format_and_kind_of_launch_has_a_process_of_its_own(monkeypatch):
    commands = []

    def start(command):
        commands.append(command[command.index("--formats") + 1 : command.index("--batches")])
        return types.SimpleNamespace(wait=lambda: 1 if "dependent" in command else 0)

    monkeypatch.setattr(trial.subprocess, "Popen", start)
    monkeypatch.setattr(sys, "argv", ["trial.py", "--formats", "plain", "Q6_K"])
    assert trial.main() == 1
    hows = ("plain", "dependent")  # 1 and 8 rows keep their bits in any case
    assert commands == [[format, "--how", how] for format in ("plain", "Q6_K") for how in hows]
    commands.clear()
    monkeypatch.setattr(sys, "argv", ["trial.py", "--formats", "plain", "--batches", "64"])
    assert trial.main() == 0
    assert commands == [["plain", "--how", how] for how in ("plain", "same bits")]


LOST = """
import pytest
lost = []
@pytest.mark.parametrize("i", range(4))
def test_a(i):
    assert not lost, "no test runs in a process that has lost the GPU"
    if i == 1:
        lost.append(i)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


@pytest.mark.slow
def test_a_lost_gpu_ends_a_worker_and_not_the_tests_after_it(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_lost.py").write_text(LOST)
    script = gpu_run.ROOT / "scripts/dev/gpu_stages/testing.py"
    ours = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    command = [sys.executable, script, "not gpu", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=ours)
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert run.returncode == 1
    assert {line["test"].split("::")[1] for line in found[:-1]} == {"test_a[1]"}
    assert "CUDA error: an illegal" in found[0]["failed"]
    assert found[-1]["passed"] == 3


def test_a_stage_that_does_not_exist_is_refused(tmp_path, monkeypatch):
    out = tmp_path / "results"
    command = ["gpu_run.py", "first", "--out", str(out), "--only", "soak", "benchmark"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(ValueError, match="first has no stage benchmark; it has facts, compile"):
        gpu_run.main()
    assert not out.exists()


SPEED = {
    **dict(
        engine="kernels", decode_tokens_per_s=123.456, decode_median=120.0, decode_of_roof=0.876
    ),
    **dict(prefill_tokens_per_s=4567.8, prefill_of_roof=0.5, sm_mhz=1980.0, watts=541.2),
}
SHAPE = dict(format="plain", batch=1, context=512, chunk=1, kernel="head_kernel", dependent=False)
STAGES = [
    {"stage": "facts", "results": [{"machine": "a GPU", "read_bytes_per_s": 2_500_000_000}]},
    {"stage": "benchmark Q8_0", "skipped": "5 s are left, and it needs 45"},
    {
        "stage": "benchmark plain",
        "results": [
            {"case": "batch 1", "results": [SPEED, {"engine": "eager", "failed": "no time"}]},
            {"machine": "a GPU", "results": []},
        ],
    },
    {
        "stage": "trial",
        "results": [
            dict(format="plain", batch=1, how="dependent", distance=0.0123),
            dict(format="plain", batch=8, how="plain", failed="nan", works="without x"),
        ],
    },
    {
        "stage": "trial of many rows",
        "results": [dict(format="plain", batch=64, how="same bits", distance=0.01)],
    },
    {"stage": "rows plain", "results": [{"case": "batch 64", "results": [SPEED]}]},
    {
        "stage": "crossover",
        "results": [
            dict(format="Q6_K", rows=16, packed_us=1234.4, unpacked_us=2000.0),
            dict(format="Q6_K", rows=64, packed_us=10.0, failed="unpacked: no"),
        ],
    },
    {
        "stage": "GPU tests",
        "failed": "exit code 1",
        "results": [{"test": "a.py::x", "failed": "no"}, dict(passed=8, failed=1, skipped=2)],
    },
    {
        "stage": "soak",
        "results": [
            dict(format="plain", dependent=False, steps=9, same_bits=True, counters_are_zero=True),
            dict(format="plain", dependent=True, steps=9, failed="RuntimeError: CUDA error"),
        ],
    },
    {
        "stage": "sweep",
        "results": [
            SHAPE | dict(constants={}, options={}, us=5.0, distance=0.0),
            SHAPE | dict(constants=dict(WARPS=4), options={}, us=4.0, distance=0.0),
            SHAPE | dict(constants=dict(WARPS=2), options={}, us=1.0, failed="something else"),
        ],
    },
]


def test_lines_become_tables_and_the_rest_of_the_page_stays(tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(stage | {"part": "first"}) + "\n" for stage in STAGES))
    stages = gpu_tables.read([results])
    assert "| a GPU |" in gpu_tables.machine_table(stages)
    assert "| reading | 2.50 GB/s |" in gpu_tables.machine_table(stages)
    speed = gpu_tables.speed_table(stages)
    row = "| plain | kernels | batch 1 | 123.5 | 120.0 | 88% | 4,568 | 50% | 1980 | 541 |"
    assert row in speed.splitlines()
    assert "| plain | eager | batch 1 | not measured: no time |" in speed
    distances = gpu_tables.distance_table(stages)
    assert "| plain | 1 | dependent | 1.23% |" in distances
    assert "| plain | 8 | plain | nan; without x |" in distances
    # The quickest variant computes something else.
    shapes = gpu_tables.shape_table(stages)
    assert "| plain | 1 | 512 | head_kernel | 5.00 | 4.00 | WARPS 4 |" in shapes
    assert "| plain | 64 | same bits | 1.00% |" in distances
    assert "| plain | kernels | batch 64 | 123.5 |" in speed
    crossover = gpu_tables.crossover_table(stages)
    assert "| Q6_K | 16 | 1,234 | 2,000 |  |" in crossover
    assert "| Q6_K | 64 | 10 |  | unpacked: no |" in crossover
    tests = gpu_tables.test_table(stages)
    assert "| GPU tests | 8 | 1 | 2 | a.py::x: no |" in tests
    assert "| soak, plain, plain launches, 9 steps | 1 | 0 | 0 |  |" in tests
    assert "| soak, plain, dependent launches, 9 steps | 0 | 1 | 0 | RuntimeError: CUDA" in tests
    assert gpu_tables.profile_table(stages) == ""


def test_the_page_is_written_section_by_section(tmp_path, monkeypatch):
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(STAGES[0]) + "\n")
    page = tmp_path / "gpu.md"
    page.write_text(
        "# On a GPU\n\nHow.\n\n## The machine\n\nNot measured.\n\n## Launch shapes\n\nNot.\n"
    )
    monkeypatch.setattr(sys, "argv", ["gpu_tables.py", str(results), "--page", str(page)])
    gpu_tables.main()
    text = page.read_text()
    assert "| machine | a GPU |" in text
    assert text.startswith("# On a GPU\n\nHow.\n")
    assert text.endswith("## Launch shapes\n\nNot.\n")


@pytest.mark.parametrize(
    ("out", "code", "expected"),
    [
        ('{"kernels": 3, "not_compiled": []}\n', 0, {"variants": 3, "not": []}),
        ("", 1, {"failed": "the sweep's variants were not noted: see the lines above"}),
    ],
)
def test_what_became_of_the_sweeps_variants_is_a_line(out, code, expected, monkeypatch, capsys):
    ended = types.SimpleNamespace(stdout=out, returncode=code)
    monkeypatch.setattr(compiling.subprocess, "run", lambda *_, **__: ended)
    assert compiling.sweep(["plain"], "7b", 90, 5.0) == code
    line = json.loads(capsys.readouterr().out)
    line.pop("seconds", None)
    assert line == expected
