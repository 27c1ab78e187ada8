"""A plugin of pytest: a worker for which the GPU is lost ends, and pytest-xdist starts another.

After an illegal address, say, every later call of CUDA in the process fails, and with it every
later test.
"""

import os
from typing import Any

import pytest

_LOST = "CUDA error"  # in PyTorch's and in Triton's messages


class _State:
    lost = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: Any) -> Any:
    """Note it."""
    if call.excinfo is not None and _LOST in str(call.excinfo.value):
        _State.lost = True
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """Once the test is reported."""
    if _State.lost and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
