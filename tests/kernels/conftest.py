"""Kernels run on a GPU if there is one, else in Triton's interpreter, which must be chosen before
Triton is imported.
"""

import importlib.util
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
    """Less work around each operation: a third of the interpreter's time."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu" and importlib.util.find_spec("triton"):  # macOS and Windows have none
            import quick

            quick.apply(patch)
        yield
