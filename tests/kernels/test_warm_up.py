"""What is compiled ahead is what the engines launch, under the keys of Triton's own cache."""

import json
import math
import os
import subprocess
import sys

import pytest
import small
import torch
from ahead import compiled_by
from benchmark_parts import warm_up


@pytest.mark.parametrize(
    "form", ["short", *(pytest.param(one, marks=pytest.mark.slow) for one in ("Q4_K_M", "plain"))]
)
def test_the_plan_has_all_that_the_engines_launch(form):
    (line,) = compiled_by("warm_up_and_run.py", form)
    assert line["new"] == []
    assert line["planned"] > (0 if form == "plain" else 30)
    passes, fails = line["auto"]["True"], line["auto"]["False"]
    assert "dependent launch, which another process has tried first, logits" in passes["line"]
    assert passes["early"]
    assert passes["launched_early"] > 0
    assert "; not kernels with dependent launch: the kernels compute something" in fails["line"]
    assert not fails["early"]
    assert fails["launched_early"] == 0


def test_without_a_time_limit_it_is_waited_for(monkeypatch):
    program = [sys.executable, "-c", 'print(\'{"compiled": 3, "failed": []}\')']
    start = subprocess.Popen
    monkeypatch.setattr(warm_up.subprocess, "Popen", lambda _, **options: start(program, **options))
    ahead = warm_up.WarmUp("tiny", torch.bfloat16, ["plain"], [], ["kernels"], (9, 0))
    assert ahead.wait(math.inf).startswith("compiled 3 kernels ahead in ")


@pytest.mark.slow
def test_nothing_is_left_to_compile_when_the_engines_run(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(small.ROOT), str(small.ROOT / "kernels")]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    options = "--size tiny --engines kernels kernels-pdl --repeats 1 --new-tokens 2"
    command = [sys.executable, "scripts/dev/rehearse.py", "scripts/benchmark.py", *options.split()]
    run = subprocess.run(
        command, cwd=small.ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert "kernels ahead in" in run.stderr
    rehearsal = json.loads(run.stdout.splitlines()[-1])
    assert rehearsal["compiled"] == ["read_kernel"]  # of the roof: no engine launches it
    assert rehearsal["kernels"] > 20
    assert rehearsal["launched_early"] > 0
    assert rehearsal["faults"] == []
