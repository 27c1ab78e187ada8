"""Python threads that share work which compiled code does without the GIL."""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

_SHARED = 1 << 17  # values: enough for PyTorch to share an operation among its threads


def share(work: Callable[[int, int], object], count: int, size: int = 32) -> None:
    """Call work(first, last) for pieces of `size` items, which together are range(count).

    As many threads as PyTorch uses take one piece after the other. So a thread whose core is busy
    takes fewer, and none is waited for that has not begun.
    """
    starts = range(0, count, size)
    left = iter(starts)  # shared
    lock = threading.Lock()  # each piece is taken once, without a GIL, too

    def take() -> int | None:
        with lock:
            return next(left, None)

    def take_all() -> None:
        for first in iter(take, None):
            work(first, min(first + size, count))

    threads = torch.get_num_threads()
    helpers = [_pool(threads).submit(take_all) for _ in range(min(threads, len(starts)) - 1)]
    take_all()
    for helper in helpers:
        if not helper.cancel():
            helper.result()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch uses so many threads inside.

    The threads of PyTorch wait for the next operation by spinning, for milliseconds (libgomp), on
    the cores that the helpers of a step need. So what it does between steps one thread does alone.
    """
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def short_waits() -> Iterator[None]:
    """PyTorch's threads give their cores away soon after each operation inside.

    For a prompt, which alternates between PyTorch's threads and `share`. libgomp shortens the
    spinning by a factor of 300 while a process has more OpenMP threads than the machine has cores
    (GOMP_SPINCOUNT in its manual): here, those of a thread that only waits.
    """
    ready, done = threading.Event(), threading.Event()

    def hold_threads() -> None:
        torch.zeros(_SHARED).neg_()
        ready.set()
        done.wait()

    holder = threading.Thread(target=hold_threads, name="mistral-short-waits", daemon=True)
    holder.start()
    ready.wait()
    try:
        yield
    finally:
        done.set()
        holder.join()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mistral-cpu")


# A child process has none of its parent's threads. Windows has no such child processes.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
