"""The stages of a run on a GPU, with programs in their place; and the tables made of their lines."""

import itertools
import json
import math
import signal
import subprocess
import sys
import types

import gpu_run
import gpu_tables
import pytest
import torch
from benchmark_parts.turns import TimeLimit
from gpu_run import Run, Stage
from gpu_stages import sweep, trial

from mistral_kernels.decode.step import KERNELS
from mistral_kernels.portable import Launch


def python(code):
    return (sys.executable, "-c", code)


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path):
    run = Run(tmp_path, "first", 60, rehearse=False)
    run.do(Stage("good", python("print('hello'); print('{\"us\": 1}')"), 20))
    run.do(Stage("bad", python("print('a word'); raise SystemExit('no GPU here')"), 20))
    run.do(Stage("endless", python("print('{\"us\": 2}', flush=True)\nwhile True: pass"), 1))
    run.do(Stage("absent", ("no-such-program",), 20))
    run.do(Stage("long", python("print('never')"), 100, least=90))
    good, bad, endless, absent, long = lines(tmp_path)
    assert good["results"] == [{"us": 1}]
    assert "failed" not in good
    assert bad["failed"] == "exit code 1: no GPU here"
    assert endless["failed"] == "ended after 1 s, its limit"
    assert endless["results"] == [{"us": 2}]  # what it had printed before
    assert absent["skipped"] == "no-such-program is not installed"
    assert "s are left, and it needs 90" in long["skipped"]
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
        Run(tmp_path, "first", 60, rehearse=False).do(Stage("x", python("while True: pass"), 20))
    assert started[0].poll() == -signal.SIGKILL


def test_a_rehearsal_says_so_in_every_line_and_becomes_no_table(tmp_path):
    run = Run(tmp_path, "first", 60, rehearse=True)
    run.do(Stage("counters", ("ncu", "x"), 20))
    run.do(Stage("facts", python("print('{\"read_bytes_per_s\": 1}')"), 20))
    assert [line["rehearsal"] for line in lines(tmp_path)] == [True, True]
    assert "nothing to look at in a rehearsal" in lines(tmp_path)[0]["skipped"]
    with pytest.raises(ValueError, match="line 1 is of a rehearsal: nothing ran"):
        gpu_tables.read([tmp_path / "results.jsonl"])


@pytest.mark.parametrize("part", gpu_run.PARTS)
def test_a_part_fits_into_one_command_if_its_stages_take_half_of_their_limits(part, tmp_path):
    stages = gpu_run.PARTS[part](tmp_path, rehearse=False)
    assert sum(stage.seconds for stage in stages) / 2 < 560
    assert len({stage.name for stage in stages}) == len(stages)
    for stage in stages:
        program = stage.command[0]
        assert isinstance(program, str) or program.is_file(), stage


def test_the_operation_that_is_to_blame_is_named(monkeypatch):
    asked = []

    def attempt(model, expected, batch, *, pdl, graph=None, operations=None):
        asked.append((pdl, graph))
        twin = operations is not None and operations.attend is not KERNELS.attend
        return (0.01, "") if twin else (float("nan"), "WrongLogits: 140% away")

    monkeypatch.setattr(trial, "attempt", attempt)
    found = trial.one_trial(None, None, 1, pdl=False)
    assert found == {
        "failed": "WrongLogits: 140% away",
        "works": "with the plain twin of attend",
    }
    assert asked[:2] == [(False, None), (False, False)]


def test_a_launch_that_may_not_be_dependent_is_named(monkeypatch):
    def attempt(model, expected, batch, *, pdl, graph=None, operations=None):
        plain = operations is not None and operations.project is not KERNELS.project
        return (0.01, "") if plain or not pdl else (float("nan"), "WrongLogits")

    monkeypatch.setattr(trial, "attempt", attempt)
    assert trial.one_trial(None, None, 1, pdl=False) == {"distance": 0.01}
    found = trial.one_trial(None, None, 1, pdl=True)
    assert found["works"] == "with a plain launch of project"


def test_a_fault_of_the_graphs_alone_or_of_no_operation_is_told(monkeypatch):
    def attempt(model, expected, batch, *, pdl, graph=None, operations=None):
        return (0.01, "") if graph is False and works else (float("nan"), "RuntimeError")

    monkeypatch.setattr(trial, "attempt", attempt)
    works = True
    assert trial.one_trial(None, None, 1, pdl=True)["works"] == "without CUDA graphs"
    works = False
    assert "chunks or of sampling" in trial.one_trial(None, None, 1, pdl=True)["works"]


def test_a_twin_takes_no_pdl():
    called = []
    trial.without_pdl(lambda *given, **options: called.append((given, options)))(1, pdl=True, eps=2)
    assert called == [((1,), {"eps": 2})]


def test_a_variant_that_computes_nan_is_not_called_right(monkeypatch):
    right = [torch.ones(2), torch.ones(2)]  # its input, which no variant changes, and its output
    answers = iter([right, [torch.ones(2), torch.tensor([1.0, math.nan])]])
    monkeypatch.setattr(sweep, "results", lambda *_: next(answers))
    monkeypatch.setattr(sweep, "seconds_a_launch", lambda *_: 1e-6)
    kernel = types.SimpleNamespace(arg_names=(), __name__="head_kernel")
    call = sweep.Call(kernel, Launch((1,), {}, {}), ())
    first, second = itertools.islice(sweep.lines(call, TimeLimit(None)), 2)
    assert first["distance"] == 0 and "failed" not in first
    assert second["failed"] == "it computes something else"


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
SHAPE = dict(format="plain", batch=1, context=512, kernel="head_kernel", dependent=False)
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
            dict(format="plain", batch=1, dependent=True, distance=0.0123),
            dict(format="plain", batch=8, dependent=False, failed="nan", works="without x"),
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
