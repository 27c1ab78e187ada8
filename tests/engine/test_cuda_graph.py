"""Recording CUDA graphs: what goes wrong is told, and leaves the device as it was."""

import gc
import weakref
from contextlib import contextmanager, nullcontext, suppress
from types import SimpleNamespace

import pytest
import torch

from mistral.engine import cuda_graph
from mistral.engine.cuda_graph import Recorder


@pytest.fixture
def a_device(monkeypatch):
    """Stands in for PyTorch's CUDA graphs: takes notes of what is done, and ends a broken recording
    with an error.
    """
    notes = []

    @contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        notes.append(("graph", pool, stream))
        yield
        if "broken" in notes:
            raise RuntimeError("operation failed due to a previous error during capture")

    def end_allocation(index, pool):
        if "broken" not in notes:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        notes.append(("ended", pool))

    fresh = SimpleNamespace(
        manual_seed=lambda seed: SimpleNamespace(graphsafe_get_state=lambda: ("state", seed))
    )
    generator = SimpleNamespace(initial_seed=lambda: 7, graphsafe_set_state=notes.append)
    for name, replacement in dict(
        CUDAGraph=object,
        Stream=object,
        device=lambda device: nullcontext(),
        graph=graph,
        graph_pool_handle=lambda: f"pool {len(notes)}",
        current_stream=lambda: SimpleNamespace(device_index=0, device="cuda:0"),
        set_stream=lambda stream: notes.append(("stream", stream.device_index)),
        default_generators=[generator],
    ).items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(torch, "Generator", lambda device: fresh)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocation, raising=False)
    release = lambda index, pool: notes.append(("released", pool))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
    cuda_graph._stream.cache_clear()
    yield notes
    cuda_graph._stream.cache_clear()


def test_all_graphs_of_a_recorder_share_memory_and_stream(a_device):
    recorder = Recorder(torch.device("cuda", 0))
    recorder.record(lambda: None)
    recorder.record(lambda: None)
    assert a_device[0] == a_device[1]
    assert a_device[0][:2] == ("graph", "pool 0")


def test_all_recorders_of_a_device_share_its_stream(a_device):
    for _ in range(2):
        Recorder(torch.device("cuda", 0)).record(lambda: None)
    assert a_device[0][2] is a_device[1][2]


def test_the_pool_of_a_broken_recording_is_let_go_and_the_next_one_gets_another(a_device):
    recorder = Recorder(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="previous error"):
        recorder.record(lambda: a_device.append("broken"))
    assert [note for note in a_device if note[0] in ("ended", "released")] == [
        ("ended", "pool 0"), ("released", "pool 0")
    ]  # fmt: skip
    a_device.remove("broken")
    recorder.record(lambda: None)
    assert a_device[-1][1] not in ("pool 0", None)


def test_a_recording_that_has_ended_lets_go_of_its_pool_by_itself(a_device):
    def work():
        raise ValueError("Ctrl-C, for example")

    with pytest.raises(ValueError, match="Ctrl-C"):
        Recorder(torch.device("cuda", 0)).record(work)
    assert not [note for note in a_device if note[0] in ("ended", "released")]


def test_the_error_of_the_work_is_told_and_not_that_of_the_recordings_end(a_device):
    def work():
        a_device.append("broken")
        raise ValueError("this reads from the device")

    with pytest.raises(ValueError, match="this reads"):
        Recorder(torch.device("cuda", 0)).record(work)
    assert [note for note in a_device if note[0] in ("stream", "state")] == [
        ("stream", 0),
        ("state", 7),
    ]


def test_a_recording_that_only_its_end_finds_broken_is_an_error_too(a_device):
    with pytest.raises(RuntimeError, match="previous error"):
        Recorder(torch.device("cuda", 0)).record(lambda: a_device.append("broken"))
    assert [note for note in a_device if note[0] in ("stream", "state")] == [
        ("stream", 0),
        ("state", 7),
    ]


def test_what_a_failed_recording_made_is_gone_with_its_error(a_device, monkeypatch):
    class Graph:
        pass

    made = []
    monkeypatch.setattr(
        torch.cuda, "CUDAGraph", lambda: made.append(weakref.ref(graph := Graph())) or graph
    )

    def work():
        raise ValueError("no memory")

    gc.disable()
    try:
        with suppress(ValueError):
            Recorder(torch.device("cuda", 0)).record(work)
        assert made[0]() is None
    finally:
        gc.enable()


@pytest.mark.gpu
def test_after_a_failed_recording_a_gpu_draws_and_records_as_before():
    recorder = Recorder(torch.device("cuda", 0))
    x = torch.ones(3, device="cuda")
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        recorder.record(lambda: x.sum().item())
    assert torch.cuda.current_stream() == before
    torch.rand(3, device="cuda")
    recorder.record(lambda: x.add_(1)).replay()
    assert x.tolist() == [2, 2, 2]
