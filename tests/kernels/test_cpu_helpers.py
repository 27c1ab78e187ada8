"""Threads that help: a process ends with them, and Ctrl-C leaves none of them at work."""

import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("llvmlite")

from mistral_kernels.cpu.helpers import Helpers  # noqa: E402
from mistral_kernels.cpu.pool import share, torch_threads  # noqa: E402

# The last reference to a tensor is a helper's. PyTorch gives the GIL away while it frees the
# tensor, and Python takes half a second from its last moment to the end of the process.
ENDS_WHILE_A_TENSOR_IS_FREED = """
import ctypes, threading, time, sys
import numpy as np, torch
from mistral_kernels.cpu.team import Team

class FreedSlowly(np.ndarray):
    def __del__(self, sleep=time.sleep):
        is_freed.set()
        sleep(0.2)

class EndsSlowly:
    def __del__(self, sleep=ctypes.PyDLL(None).usleep):  # with the GIL
        sleep(500_000)

def serve(seen, kept=torch.from_numpy(np.zeros(8).view(FreedSlowly))):
    begun.set()
    time.sleep(0.05)  # without the GIL, like a step

sys.modules["the last one"] = EndsSlowly()
begun, is_freed = threading.Event(), threading.Event()
team = Team(2, torch.zeros(8, dtype=torch.int64), serve)
team.wake()
begun.wait()
del team, serve
is_freed.wait()
waiting = Team(2, torch.zeros(8, dtype=torch.int64), lambda seen: None)
waiting.wake()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs usleep")
def test_a_process_ends_after_its_helpers():
    command = [sys.executable, "-c", ENDS_WHILE_A_TENSOR_IS_FREED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


def test_dropped_helpers_end_when_their_job_is_done():
    begun, may_end = threading.Event(), threading.Event()

    def job():
        begun.set()
        may_end.wait()

    helpers = Helpers(2, "a helper")
    assert helpers.run(job)
    begun.wait()
    threads = list(helpers._threads)
    del helpers
    may_end.set()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_closed_helpers_have_done_all_jobs():
    done = []
    helpers = Helpers(1, "a helper")
    for i in range(3):
        helpers.run(lambda i=i: done.append(i))
    helpers.close()
    assert done == [0, 1, 2]
    assert "a helper" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_no_helper_works_on_after_an_error(error):
    helper_works, ended = threading.Event(), []

    def work(first, last):
        if threading.current_thread() is threading.main_thread():
            helper_works.wait()
            raise error
        helper_works.set()
        time.sleep(0.1)
        ended.append(first)

    with torch_threads(2), pytest.raises(error):
        share(work, 320)
    assert len(ended) == 1  # and the other pieces are left


def test_an_error_of_a_helper_is_raised():
    helper_failed = threading.Event()

    def work(first, last):
        if threading.current_thread() is threading.main_thread():
            helper_failed.wait()
        else:
            helper_failed.set()
            raise ValueError("in a helper")

    with torch_threads(2), pytest.raises(ValueError, match="in a helper"):
        share(work, 64)
