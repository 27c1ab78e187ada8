"""Python threads that share work which compiled code does without the GIL."""

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import torch

from mistral_kernels.cpu.helpers import Helpers

_SHARED = 1 << 17  # values: enough for PyTorch to share an operation among its threads


def share(work: Callable[[int, int], object], count: int, size: int = 32) -> None:
    """Call work(first, last) for pieces of `size` items, which together are range(count).

    As many threads as PyTorch uses take one piece after the other. So a thread whose core is busy
    takes fewer, and none is waited for that has not begun.
    """
    threads = torch.get_num_threads()
    work_left = _Pieces(work, count, size)
    helpers = _helpers(threads)
    try:
        for _ in range(min(threads, work_left.total) - 1):
            helpers.run(work_left.help)
        work_left.do()
    finally:
        # After an error or Ctrl-C, too: the caller frees the memory into which helpers write.
        work_left.finish()


class _Pieces:
    """Pieces of some work, of which each is taken once, without a GIL, too."""

    def __init__(self, work: Callable[[int, int], object], count: int, size: int):
        self._work = work
        self._count = count
        self._size = size
        self._left = deque(range(0, count, size))
        self._lock = threading.Lock()
        self._helped = 0  # pieces that helpers have taken
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()  # by helpers: their errors
        self.total = len(self._left)

    def do(self) -> None:
        """Do pieces until none is left; for the thread that finishes."""
        while (first := self._take(0)) is not None:
            self._do_piece(first)

    def help(self) -> None:
        """Do pieces until none is left; for all other threads."""
        while (first := self._take(1)) is not None:
            error = None
            try:
                self._do_piece(first)
            except BaseException as raised:
                error = raised
            self._done.put(error)

    def finish(self) -> None:
        """Let no more pieces be taken, and wait for those in hand. Raises an error of one."""
        with self._lock:
            self._left.clear()
        errors = [self._done.get() for _ in range(self._helped)]
        for error in filter(None, errors):
            raise error

    def _take(self, helps: int) -> int | None:
        with self._lock:
            if not self._left:
                return None
            self._helped += helps
            return self._left.popleft()

    def _do_piece(self, first: int) -> None:
        self._work(first, min(first + self._size, self._count))


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
    holder = Helpers(1, "mistral-short-waits")
    is_ready: SimpleQueue[None] = SimpleQueue()

    def hold_threads() -> None:  # and then the helper waits for another job
        try:
            torch.zeros(_SHARED).neg_()
        finally:
            is_ready.put(None)

    try:
        if holder.run(hold_threads):
            is_ready.get()
        yield
    finally:
        holder.close()


@functools.cache
def _helpers(threads: int) -> Helpers:
    return Helpers(threads - 1, "mistral-cpu")  # and the calling thread
