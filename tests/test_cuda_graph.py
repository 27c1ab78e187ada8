"""Recording CUDA graphs: what goes wrong is told, and leaves the device as it was."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from mistral.cuda_graph import Recorder


@pytest.fixture
def a_device(monkeypatch):
    """Stands in for PyTorch's CUDA graphs: takes notes of what is done, and ends a broken recording with an error."""
    notes = []

    @contextmanager
    def graph(graph, pool, stream):
        notes.append(("graph", pool, stream))
        yield
        if "broken" in notes:
            raise RuntimeError("operation failed due to a previous error during capture")

    fresh = SimpleNamespace(manual_seed=lambda seed: SimpleNamespace(graphsafe_get_state=lambda: ("state", seed)))
    generator = SimpleNamespace(initial_seed=lambda: 7, graphsafe_set_state=notes.append)
    for name, replacement in dict(
        CUDAGraph=object,
        Stream=object,
        device=lambda device: nullcontext(),
        graph=graph,
        graph_pool_handle=lambda: "pool",
        current_stream=lambda: SimpleNamespace(device_index=0, device="cuda:0"),
        set_stream=lambda stream: notes.append(("stream", stream.device_index)),
        default_generators=[generator],
    ).items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(torch, "Generator", lambda device: fresh)
    return notes


def test_all_graphs_of_a_recorder_share_memory_and_stream(a_device):
    recorder = Recorder(torch.device("cuda", 0))
    recorder.record(lambda: None)
    recorder.record(lambda: None)
    assert a_device[0] == a_device[1]
    assert a_device[0][:2] == ("graph", "pool")


def test_the_error_of_the_work_is_told_and_not_that_of_the_recordings_end(a_device):
    def work():
        a_device.append("broken")
        raise ValueError("this reads from the device")

    with pytest.raises(ValueError, match="this reads"):
        Recorder(torch.device("cuda", 0)).record(work)
    assert a_device[-2:] == [("stream", 0), ("state", 7)]


def test_a_recording_that_only_its_end_finds_broken_is_an_error_too(a_device):
    with pytest.raises(RuntimeError, match="previous error"):
        Recorder(torch.device("cuda", 0)).record(lambda: a_device.append("broken"))
    assert a_device[-2:] == [("stream", 0), ("state", 7)]


@pytest.mark.gpu
def test_after_a_failed_recording_a_gpu_draws_and_records_as_before():
    recorder, x, before = Recorder(torch.device("cuda", 0)), torch.ones(3, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        recorder.record(lambda: x.sum().item())
    assert torch.cuda.current_stream() == before
    torch.rand(3, device="cuda")
    recorder.record(lambda: x.add_(1)).replay()
    assert x.tolist() == [2, 2, 2]
