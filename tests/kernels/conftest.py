"""Kernels run on a GPU if there is one, else in Triton's interpreter, which must be chosen before
Triton is imported.
"""

import os
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    early = "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
    assert not early, (
        "Triton was imported without its interpreter: run tests/kernels in a process of its own"
    )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """Patch the language once per function, not at each call: halves the interpreter's time."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime import interpreter

    patched = set()
    original = interpreter.InterpretedFunction.__call__

    def call(function, *args, **kwargs):
        if function.fn not in patched:
            patched.add(function.fn)
            return original(function, *args, **kwargs)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    yield
    interpreter.InterpretedFunction.__call__ = original
