"""CUDA graphs: work that is recorded once, and then started again and again as a whole."""

import functools
from collections.abc import Callable
from contextlib import suppress

import torch


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where a device's work is recorded. One for all: cuBLAS keeps memory for every stream that it
    has seen.

    PyTorch's own stream for it belongs to the device that recorded first.
    """
    return torch.cuda.Stream()


class Recorder:
    """Records work of one device as CUDA graphs.

    They share their memory, so they must run one after the other, and what one returns must be
    copied before the next.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pool: tuple[int, int] | None = None

    def record(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """The work as a graph. Nothing runs on the device meanwhile; what the work raises is
        raised.
        """
        graph, failure = torch.cuda.CUDAGraph(), None
        with torch.cuda.device(self._device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            before = torch.cuda.current_stream()
            # What other threads do with the device breaks no recording of this one.
            how = dict(
                pool=self._pool, stream=_stream(self._device), capture_error_mode="thread_local"
            )
            try:
                with torch.cuda.graph(graph, **how):
                    try:
                        work()
                    except BaseException as error:
                        failure = error
            except BaseException as error:  # of the end of a recording that the work has broken
                failure = failure or error
            if failure is not None:
                self._recover(before)
                try:
                    raise failure
                finally:
                    # The error's traceback has this frame, and the frame has both: they would wait
                    # for the collector.
                    del failure, graph
        return graph

    def _recover(self, stream: torch.cuda.Stream) -> None:
        """Undo what PyTorch leaves behind where even the end of a recording failed (by reading its
        code).

        The stream of the recording is still the current one. The allocator still records into the
        pool: it would free no other memory, and take no second recording into this one. And the
        generator counts for a graph, which would make the next random number an error: it begins
        its numbers anew.
        """
        torch.cuda.set_stream(stream)
        pool, self._pool = self._pool, None
        with suppress(
            RuntimeError
        ):  # of the first where the recording has ended, and then the graph lets go of it
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
            torch._C._cuda_releasePool(stream.device_index, pool)
        generator = torch.cuda.default_generators[stream.device_index]
        fresh = torch.Generator(stream.device).manual_seed(generator.initial_seed())
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
