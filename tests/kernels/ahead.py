"""Ahead-of-time compilation for the tests: in a process of its own, because the interpreter of the
other tests replaces the compiler.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The short form compiles a few variants for one GPU; the full one all of them, for minutes.
FORMS = ["short", pytest.param("full", marks=pytest.mark.slow)]


def compiled_by(program, form):
    """The facts that a program of this folder prints about each kernel, a line of JSON each."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name(program), form]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]
