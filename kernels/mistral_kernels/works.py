"""What a decoder does again and again: from the second time on as CUDA graphs."""

from collections.abc import Callable
from typing import Any, Self

import torch

from mistral.engine.cuda_graph import Recorder


class Works:
    """Works by their names.

    recorded    False: they run as they are, each time
    unrecorded  the names of works without a CUDA graph, because it did not fit
    """

    def __init__(self, device: torch.device, recorded: bool):
        self.unrecorded: list[str] = []
        self._device = device
        self._recorder = Recorder(device)
        # name -> the CUDA graph; None: it has run once, and is recorded the next time
        self._graphs: dict[str, Callable[[], object] | None] | None = {} if recorded else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return Works(self._device, self._graphs is not None)  # graphs hold addresses

    def run(self, name: str, work: Callable[[], object]) -> None:
        """Do the work, from the second time on by a CUDA graph if there is memory for it.

        The first time compiles the kernels.
        """
        if self._graphs is None:
            work()
        elif name not in self._graphs:
            work()
            self._graphs[name] = None
        else:
            if self._graphs[name] is None:
                self._graphs[name] = self._replay_of(name, work)
            self._graphs[name]()

    def _replay_of(self, name: str, work: Callable[[], object]) -> Callable[[], object]:
        """The work as a CUDA graph, or itself if the graph does not fit: this may be mid-text."""
        try:
            return self._recorder.record(work).replay
        except torch.OutOfMemoryError:
            self.unrecorded.append(name)
            return work
