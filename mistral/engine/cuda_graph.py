"""CUDA graphs: work that is recorded once and then launched as a whole, any number of times."""

import functools
from collections.abc import Callable
from contextlib import suppress

import torch


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device's work is recorded.

    One for all recorders, because cuBLAS keeps memory for every stream that it has seen. PyTorch's
    own capture stream belongs to the device that recorded first.
    """
    return torch.cuda.Stream()


class Recorder:
    """Records work of one device as CUDA graphs.

    The graphs share their memory, so they must run one after the other, and the results of one must
    be copied before the next runs.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pool: tuple[int, int] | None = None

    def record(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """The work as a graph; nothing runs on the device. Raises what the work raises."""
        graph = torch.cuda.CUDAGraph()
        failure = None
        with torch.cuda.device(self._device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            before = torch.cuda.current_stream()
            # thread_local: another thread's use of the device does not break this recording
            how = dict(
                pool=self._pool, stream=_stream(self._device), capture_error_mode="thread_local"
            )
            try:
                with torch.cuda.graph(graph, **how):
                    try:
                        work()
                    except BaseException as error:
                        failure = error
            except BaseException as error:  # from the end of a recording that the work has broken
                failure = failure or error
            if failure is not None:
                self._recover(before)
                try:
                    raise failure
                finally:
                    # The traceback holds this frame, and the frame holds both: without this they
                    # would live until the garbage collector runs.
                    del failure, graph
        return graph

    def _recover(self, stream: torch.cuda.Stream) -> None:
        """Reset the state that PyTorch leaves if even the end of a recording failed.

        Found by reading PyTorch's code. The recording's stream is still the current one. The
        allocator still records into the pool: it would free no other memory, and accept no second
        recording. And the generator still counts for a graph, so the next random number would be an
        error: it starts anew.
        """
        torch.cuda.set_stream(stream)
        pool = self._pool
        self._pool = None
        with suppress(RuntimeError):  # if the recording has ended, and the graph frees the pool
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
            torch._C._cuda_releasePool(stream.device_index, pool)
        generator = torch.cuda.default_generators[stream.device_index]
        fresh = torch.Generator(stream.device).manual_seed(generator.initial_seed())
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
