"""Python threads that run jobs, and that a process waits for when it ends.

Python ends a thread that wants the GIL after the process has begun to end, wherever that thread is.
It may be in C++ code, which cannot be unwound, and then the process aborts: PyTorch, for instance,
takes the GIL when it frees a tensor, and a job may hold the last reference to one.

All here is done with the locks and queues that Python has in C. Those of `threading` and
`concurrent.futures` that are written in Python stay locked if Ctrl-C comes in the wrong moment.
"""

import atexit
import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], object]

_is_ending = False  # no more threads are started


class Helpers:
    """Threads that run jobs. They are started when they are needed, and end when this is dropped.

    A child process has none of its parent's threads, and starts its own.
    """

    def __init__(self, count: int, name: str):
        self._count = count
        self._name = name
        self._begin()

    def run(self, job: Job) -> bool:
        """Run a job, which must not raise, when a thread is free. False: the process is ending."""
        if self._process != os.getpid():
            self._begin()
        while len(self._threads) < self._count and not _is_ending:
            thread = _Helper(self._jobs, self._name)
            self._threads.append(thread)
            thread.start()
        self._jobs.put(job)
        return not _is_ending

    def close(self) -> None:
        """Wait for all jobs, and until the threads have ended."""
        _tell_to_end(self._threads)
        for thread in self._threads:
            thread.join()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._threads: list[_Helper] = []
        weakref.finalize(self, _tell_to_end, self._threads)


class _Helper(threading.Thread):
    """Runs jobs until it gets None."""

    def __init__(self, jobs: "SimpleQueue[Job | None]", name: str):
        super().__init__(name=name, daemon=True)
        self.jobs = jobs

    def run(self) -> None:
        while (job := self.jobs.get()) is not None:
            job()
            del job  # what it refers to may be freed here, and not while it waits for the next one


def _tell_to_end(threads: list[_Helper]) -> None:
    for thread in threads:
        thread.jobs.put(None)


@atexit.register
def _end_all() -> None:
    """End all threads, also those whose `Helpers` were dropped and that still run a job."""
    global _is_ending
    _is_ending = True
    threads = [thread for thread in threading.enumerate() if isinstance(thread, _Helper)]
    _tell_to_end(threads)
    for thread in threads:
        while thread.is_alive():
            with contextlib.suppress(KeyboardInterrupt):  # some milliseconds are left
                thread.join()
