"""Observers of the forward passes of slots."""

import time
from collections.abc import Sequence

import torch

from mistral.server.request import Forward, PassKind, Run


class Watch:
    """Is told of every forward pass. Override what is needed; this one does nothing.

    A pass that raises an exception has no `end`.
    """

    def begin(self, kind: PassKind, runs: Sequence[Run], tokens: int) -> None:
        """A forward pass begins, of so many tokens of these runs together."""

    def end(self) -> None:
        """The forward pass that began last has ended."""


class Passes(Watch):
    """Records forward passes: in the runs that want details, and the last one for listeners.

    device     of the model: a GPU is waited for at the end of a recorded pass, so that its time is
               its own
    listeners  how many want to know; set by other threads
    last       the last pass; None: none was recorded
    recorded   how many were

    While there are no listeners, a pass without a run that wants details is not recorded: no clock
    is read.
    """

    def __init__(self, device: torch.device | None = None):
        self.listeners = 0
        self.last: Forward | None = None
        self.recorded = 0
        self._is_gpu = device is not None and device.type == "cuda"
        self._began: tuple[float, PassKind, Sequence[Run], int] | None = None

    def begin(self, kind: PassKind, runs: Sequence[Run], tokens: int) -> None:
        """Read the clock, if the pass is recorded."""
        self._began = None
        if self.listeners or any(run.request.alternatives is not None for run in runs):
            self._began = (time.perf_counter(), kind, runs, tokens)

    def end(self) -> None:
        """Record the pass that began."""
        if self._began is None:
            return
        if self._is_gpu:
            torch.cuda.synchronize()
        start, kind, runs, tokens = self._began
        self._began = None
        self.recorded += 1
        self.last = Forward(
            n=self.recorded,
            kind=kind,
            rows=len(runs),
            tokens=tokens,
            seconds=time.perf_counter() - start,
        )
        for run in runs:
            if run.request.alternatives is not None:
                run.forwards.append(self.last)
