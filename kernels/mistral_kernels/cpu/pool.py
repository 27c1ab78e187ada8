"""Python threads that share work which compiled code does without the GIL."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def share(work: Callable[[int, int], object], count: int, size: int = 32) -> None:
    """Call work(first, last) for pieces of `size` items, which together are range(count).

    As many threads as PyTorch uses take one piece after the other. So a thread whose core is busy
    takes fewer, and none is waited for that has not begun.
    """
    starts = range(0, count, size)
    left = iter(starts)  # shared: each piece is taken once

    def take_all() -> None:
        for first in left:
            work(first, min(first + size, count))

    threads = torch.get_num_threads()
    helpers = [_pool(threads).submit(take_all) for _ in range(min(threads, len(starts)) - 1)]
    take_all()
    for helper in helpers:
        if not helper.cancel():
            helper.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mistral-cpu")


# A child process has none of its parent's threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
