"""Python threads that help with the steps of one decoder (phases.py says how they share them)."""

import os
from collections.abc import Callable

from torch import Tensor

from mistral_kernels.cpu.helpers import Helpers


class Team:
    """Helper threads for the steps of one decoder; the calling thread is the first of the team.

    tickets  int64, [0]: the number of the last step
    serve    called by each helper with the last ticket that it saw: takes part in steps
             until there was none for a while
    """

    def __init__(self, threads: int, tickets: Tensor, serve: Callable[[int], object]):
        self.threads = threads
        self.tickets = tickets
        self._serve = serve
        self._start()

    def wake(self) -> None:
        """Call before a step: helpers that sleep in Python will look for its ticket."""
        if self._process != os.getpid():  # a child process, whose helpers have not begun
            self._start()
        for i, is_asleep in enumerate(self._asleep):
            if is_asleep:
                self._asleep[i] = False
                self._helpers.run(self._turn(i, int(self.tickets[0])))

    def _start(self) -> None:
        self._process = os.getpid()
        self._asleep = [True] * (self.threads - 1)
        self._helpers = Helpers(self.threads - 1, "mistral-step")

    def _turn(self, i: int, seen: int) -> Callable[[], None]:
        """What helper i does until it sleeps again. It does not hold the team, which may end."""
        serve = self._serve
        asleep = self._asleep

        def turn() -> None:
            serve(seen)
            asleep[i] = True

        return turn
