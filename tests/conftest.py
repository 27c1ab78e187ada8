"""What all tests share: paths, seeds, the markers `gpu` and `slow`, and the line about skips."""

import gc
import os
import re
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test uses the network
# The models are tiny, and other workers run beside: a second thread only waits for the first. This
# is for the scripts that tests start; `set_num_threads` below is for the tests themselves.
os.environ["OMP_NUM_THREADS"] = "1"
# A script that a test starts finds what another one has compiled, 0.3 s of each import of mistral.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.path.append(str(Path(__file__).parents[1] / "scripts"))
sys.path.append(str(Path(__file__).parents[1] / "scripts/dev"))

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

slow_left_out = 0  # tests marked `slow` that `-m "not slow"` in pyproject.toml has deselected


# The files that take longest, so that a worker does not begin one when the others have ended.
LONGEST = (
    "test_real_weights.py",
    "test_rows_and_state.py",
    "test_scripts.py",
    "test_generation.py",
    "test_gguf.py",
    "test_docs.py",
    "test_grammar.py",
    "test_sampling_kernel.py",
    "test_compiled.py",
    "test_demo.py",
)


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist: else the files with most tests are first


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_deselected(items):
    global slow_left_out
    slow_left_out += sum(1 for item in items if item.get_closest_marker("slow"))


def pytest_sessionfinish(session):
    if "PYTEST_XDIST_WORKER" in os.environ:
        session.config.workeroutput["slow_left_out"] = slow_left_out


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """pytest-xdist: a worker has ended. Each worker collects, and deselects, all tests."""
    global slow_left_out
    output = getattr(node, "workeroutput", {})  # absent after a crash
    slow_left_out = max(slow_left_out, output.get("slow_left_out", 0))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """One line, below all that pytest lists: how many tests were skipped, and why."""
    yield
    reports = terminalreporter.stats.get("skipped", [])
    if parts := skip_reasons([report.longrepr[2] for report in reports], slow_left_out):
        terminalreporter.write_line(f"skipped: {'; '.join(parts)}")


def skip_reasons(reasons, left_out=0):
    """Each reason with its count, the most frequent first, then the tests marked `slow`.

    >>> skip_reasons(["Skipped: needs a CUDA GPU"] * 2, left_out=3)
    ['2 need a CUDA GPU', '3 slow (pytest -m slow runs them)']
    """
    counts = Counter()
    for reason in reasons:
        reason = reason.removeprefix("Skipped: ")
        counts[re.sub(r"could not import '(\w+)'.*", r"needs \1", reason)] += 1
    parts = []
    for reason, count in counts.most_common():
        words = reason if count == 1 else re.sub(r"^needs ", "need ", reason)
        parts.append(f"{count} {words}")
    if left_out:
        parts.append(f"{left_out} slow (pytest -m slow runs them)")
    return parts


@pytest.fixture(scope="module", autouse=True)
def modules_are_no_garbage():
    """What was imported so far stays: a collection of garbage need not look at it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def the_same_random_numbers_in_every_run():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a benchmark that ran in this process may have changed it


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
