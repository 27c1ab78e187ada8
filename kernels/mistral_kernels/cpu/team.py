"""Threads that share the work of one step, by Python's threads and four shared counters a phase.

A step is a sequence of phases (step.py), each of some items: rows of a matrix, or heads. A thread
claims the next item of a phase until there is none left. Who completes the last item does what
must happen once, and releases the phase; the others wait for that.

So nothing waits for a thread that is not there. A helper that sleeps, or whose core is taken by
another program, claims less or nothing, and the step is as fast as the other cores allow. A thread
may only be waited for while it has an item in hand.

The counters carry the step's number (its ticket): a helper that comes back in the middle of a later
step finds nothing to claim under its own old number.

Between steps a helper looks for the next ticket a few thousand times, then sleeps for moments, and
after a while in Python, where it costs nothing until the next step wakes it.
"""

import threading
from collections.abc import Callable

import numpy as np

from mistral_kernels.cpu.compiled import part
from mistral_kernels.cpu.shared import (
    add_shared,
    doze,
    relax,
    replace_shared,
    shared_at,
    store_shared,
    yield_core,
)

_SPINS = 4000  # looks before a waiting thread gives its core away
_DOZES = 200  # moments of 50 microseconds that a helper sleeps before it returns to Python
PHASE_BYTES = 192  # three cache lines: claimed, completed, released
_NUMBER = 0xFFFFFFFF


@part
def open_phases(phases, count, ticket):
    """Make the items of all phases of step `ticket` free; phases is an address."""
    for p in range(count):
        at = phases + PHASE_BYTES * p
        store_shared(at + 64, 0)
        store_shared(at, ticket << 32)


@part
def claim(phase, ticket, items):
    """The next item of a phase, or -1 if there is none left, or if this is another step's phase."""
    while True:
        seen = shared_at(phase)
        if seen >> 32 != ticket or seen & _NUMBER >= items:
            return -1
        if replace_shared(phase, seen, seen + 1):
            return seen & _NUMBER


@part
def completes(phase, items):
    """Count an item as completed; True for the last one: its thread must release the phase."""
    return add_shared(phase + 64, 1) == items


@part
def release(phase, ticket):
    """All is done: let the others go on to the next phase."""
    store_shared(phase + 128, ticket)


@part
def await_release(phase, ticket):
    """Wait until the phase is released."""
    looks = 0
    while shared_at(phase + 128) < ticket:
        looks += 1
        relax(0)
        if looks > _SPINS:
            yield_core(0)


@part
def await_ticket(tickets, seen):
    """Wait for a step after `seen`: its number, or -1 after a while without one."""
    for look in range(_SPINS + _DOZES):
        ticket = shared_at(tickets)
        if ticket > seen:
            return ticket
        if look < _SPINS:
            relax(0)
        else:
            doze(50)
    return -1


class Team:
    """Helper threads for the steps of one decoder; the calling thread is the first of the team.

    tickets  int64, [0]: the number of the last step
    serve    called by each helper with the last ticket that it saw: takes part in steps
             until there was none for a while, and returns the last ticket
    """

    def __init__(self, threads: int, tickets: np.ndarray, serve: Callable[[int], int]):
        self.threads = threads
        self.tickets = tickets
        self._serve = serve
        self._closed = False
        self._bells = [threading.Semaphore(0) for _ in range(threads - 1)]
        self._asleep = [True] * (threads - 1)
        self._helpers: list[threading.Thread] = []

    def wake(self) -> None:
        """Call before a step: helpers that sleep in Python will look for its ticket."""
        if len(self._helpers) < self.threads - 1 or not self._helpers_live():
            self._start()
        for i, asleep in enumerate(self._asleep):
            if asleep:
                self._asleep[i] = False
                self._bells[i].release()

    def _helpers_live(self) -> bool:
        """False in a child process, which has none of its parent's threads."""
        return all(helper.is_alive() for helper in self._helpers)

    def _start(self) -> None:
        self._bells = [threading.Semaphore(0) for _ in range(self.threads - 1)]
        self._asleep = [True] * (self.threads - 1)
        self._helpers = [
            threading.Thread(target=self._help, args=(i,), daemon=True)
            for i in range(self.threads - 1)
        ]
        for helper in self._helpers:
            helper.start()

    def close(self) -> None:
        """Let the helpers end."""
        self._closed = True
        for bell in self._bells:
            bell.release()

    def _help(self, i: int) -> None:
        seen = int(self.tickets[0])
        while True:
            self._bells[i].acquire()
            if self._closed:
                return
            seen = self._serve(seen)
            self._asleep[i] = True
