"""CUDA graphs: work that is recorded once, and then started again and again as a whole."""

from collections.abc import Callable

import torch


class Recorder:
    """Records work of one device as CUDA graphs.

    They share their memory, so they must run one after the other, and what one returns must be copied before the next.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: tuple[int, int] | None = None

    def record(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """The work as a graph. Nothing runs on the device meanwhile; what the work raises is raised."""
        graph, failure = torch.cuda.CUDAGraph(), None
        with torch.cuda.device(self._device):
            # PyTorch's own stream for recording belongs to the device that recorded first.
            self._stream = self._stream or torch.cuda.Stream()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            before = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    try:
                        work()
                    except BaseException as error:
                        failure = error
            except BaseException as error:  # of the end of a recording that the work has broken
                failure = failure or error
            if failure is not None:
                self._recover(before)
                raise failure
        return graph

    @staticmethod
    def _recover(stream: torch.cuda.Stream) -> None:
        """Undo what PyTorch leaves behind where even the end of a recording failed (by reading its code, 2.13).

        The stream of the recording is still the current one, and the generator counts for a graph, which would make
        the next random number an error: it begins its numbers anew.
        """
        torch.cuda.set_stream(stream)
        generator = torch.cuda.default_generators[stream.device_index]
        fresh = torch.Generator(stream.device).manual_seed(generator.initial_seed())
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
