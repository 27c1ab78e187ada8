"""Python threads that help with the steps of one decoder (phases.py says how they share them)."""

import atexit
import threading
import weakref
from collections.abc import Callable

from torch import Tensor

_teams: "weakref.WeakSet[Team]" = weakref.WeakSet()


class Team:
    """Helper threads for the steps of one decoder; the calling thread is the first of the team.

    tickets  int64, [0]: the number of the last step
    serve    called by each helper with the last ticket that it saw: takes part in steps
             until there was none for a while, and returns the last ticket
    """

    def __init__(self, threads: int, tickets: Tensor, serve: Callable[[int], int]):
        self.threads = threads
        self.tickets = tickets
        self._serve = serve
        self._closed = False
        self._bells = [threading.Semaphore(0) for _ in range(threads - 1)]
        self._asleep = [True] * (threads - 1)
        self._helpers: list[threading.Thread] = []
        _teams.add(self)

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

    def join(self) -> None:
        """Wait until the helpers of a closed team have ended: some 20 milliseconds."""
        for helper in self._helpers:
            helper.join()

    def _help(self, i: int) -> None:
        seen = int(self.tickets[0])
        while True:
            self._bells[i].acquire()
            if self._closed:
                return
            seen = self._serve(seen)
            self._asleep[i] = True


@atexit.register
def end_all() -> None:
    """Let the helpers of all teams end, and wait for them.

    Python ends a thread that comes back from compiled code after its last moment. That unwinds a
    stack that C++ cannot unwind, and the process would abort.
    """
    teams = list(_teams)
    for team in teams:
        team.close()
    for team in teams:
        team.join()
