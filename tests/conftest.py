import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test uses the network
sys.path.append(str(Path(__file__).parents[1] / "scripts"))
sys.path.append(str(Path(__file__).parents[1] / "scripts/dev"))

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def the_same_random_numbers_in_every_run():
    torch.manual_seed(0)


WAITING_METHODS = (
    "tolist",
    "item",
    "cpu",
    "numpy",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
)


@pytest.fixture
def no_host_reads(monkeypatch):
    """Make everything fail that would make the host wait for a GPU."""

    def wait(*_, **__):
        raise AssertionError("this reads from the device")

    for name in WAITING_METHODS:
        monkeypatch.setattr(torch.Tensor, name, wait)
    with NoHostReads():
        yield


class NoHostReads(TorchDispatchMode):
    """Fails on operations that would make the host wait for a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert name not in self.WAITING, f"{name} reads from the device"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), (
                "a boolean index waits for its size"
            )
        return function(*args, **(kwargs or {}))
