"""The phases of a step, which threads share by four shared counters each.

A step is a sequence of phases (step.py), each of some items: rows of a matrix, or heads. A thread
claims the next item of a phase until there is none left. The thread that completes the last item
does what must happen once, and releases the phase; the others wait for that.

So nothing waits for a thread that is not there. A helper that sleeps, or whose core is taken by
another program, claims less or nothing, and the step is as fast as the other cores allow. A thread
may only be waited for while it has an item in hand.

The counters carry the step's number (its ticket): a helper that comes back in the middle of a later
step finds nothing to claim under its own old number. One that comes back between two steps may read
the orders of the next one, so before it claims it looks whether its own step has ended.

Between steps a helper looks for the next ticket a few thousand times, then sleeps for moments, and
after a while in Python, where it costs nothing until the next step wakes it (team.py).
"""

from mistral_kernels.cpu.compiler import part
from mistral_kernels.cpu.layout import PHASE_BYTES
from mistral_kernels.cpu.shared import (
    add_shared,
    doze,
    fence,
    relax,
    replace_shared,
    shared_at,
    store_shared,
    yield_core,
)

_SPINS = 4000  # looks before a waiting thread gives its core away
_DOZES = 200  # moments of 50 microseconds that a helper sleeps before it returns to Python
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
def is_released(phase, ticket):
    """Whether the phase is released. If not, it was not when earlier reads of this thread ran."""
    fence(0)
    return shared_at(phase + 128) >= ticket


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
