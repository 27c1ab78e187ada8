"""What is compiled ahead is what the engines launch, under the keys of Triton's own cache."""

import json
import os
import subprocess
import sys

import pytest
import small
from ahead import compiled_by


def test_the_plan_has_all_that_the_engines_launch():
    (line,) = compiled_by("warm_up_and_run.py", "Q4_K_M")
    assert line["new"] == []
    assert line["planned"] > 30


@pytest.mark.slow
def test_the_plan_of_plain_weights_has_all_too():
    (line,) = compiled_by("warm_up_and_run.py", "plain")
    assert line["new"] == []


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
