"""The worker's thread: streams end, cancelled rows are free at once, and idleness costs nothing."""

import asyncio
import threading
import time

import pytest
import small
import torch

from mistral import Decoder, Sampling
from mistral.server import QueueFull, Request, Slots, Stopped, Worker

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model():
    return small.model(torch.float32)


class CountedSlots(Slots):
    """Slots that count their turns; `go` is cleared to hold the next turn back."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.turns = 0
        self.go = threading.Event()
        self.go.set()

    def turn(self):
        assert self.go.wait(60)
        self.turns += 1
        return super().turn()


@pytest.fixture
def make(model):
    """A started worker of so many rows; all are stopped at the end."""
    workers = []

    def started(rows=2, queue=64):
        worker = Worker(CountedSlots(Decoder(model, rows), chunk=4, queue=queue))
        worker.start()
        workers.append(worker)
        return worker

    yield started
    for worker in workers:
        assert asyncio.run(worker.stop(0))


def request(n=6, seed=0, length=9, **options):
    ids = small.tokens(length, seed=seed).tolist()
    return Request(prompt_ids=ids, sampling=GREEDY, max_new_tokens=n, **options)


async def read(worker, request):
    """The ids of a stream, and its run."""
    stream = await worker.stream(request)
    ids = [chosen.id async for tokens in stream for chosen in tokens]
    return ids, stream.run


def alone(model, request):
    slots = Slots(Decoder(model, 1))
    run = slots.submit(request)
    while slots.turn():
        pass
    return [chosen.id for chosen in run.take()]


def test_many_tasks_get_what_they_get_alone(make, model):
    worker = make()
    requests = [request(n=4 + i % 5, seed=i, length=1 + 5 * i) for i in range(8)]

    async def clients():
        return await asyncio.gather(*(read(worker, r) for r in requests))

    results = asyncio.run(clients())
    assert [ids for ids, _ in results] == [alone(model, r) for r in requests]
    assert {run.reason for _, run in results} == {"length"}


def test_the_times_of_a_run_are_in_order(make):
    _, run = asyncio.run(read(make(), request(n=9)))
    names = ["queued", "admitted", "first", "ended"]
    times = [run.times[name] for name in names]
    assert times == sorted(times)


def test_an_idle_worker_takes_no_turns(make):
    worker = make()
    asyncio.run(read(worker, request()))
    turns = worker._slots.turns
    time.sleep(0.1)
    assert worker._slots.turns <= turns + 1  # the one that finds nothing to do
    assert len(asyncio.run(read(worker, request()))[0]) == 6


def test_leaving_a_stream_frees_its_row_before_the_next_step(make):
    worker = make(rows=1)

    async def client():
        stream = await worker.stream(request(n=400))
        async for _ in stream:
            break
        worker._slots.go.clear()  # the turn that may be computed now is the last one
        await asyncio.sleep(0.05)
        before = worker._slots.turns
        await stream.aclose()
        await stream.aclose()
        second = await asyncio.gather(read(worker, request(n=1, length=3)), release(worker))
        return stream.run, second[0], worker._slots.turns - before

    async def release(worker):
        await asyncio.sleep(0.05)
        worker._slots.go.set()

    cancelled, (ids, run), turns = asyncio.run(client())
    assert cancelled.reason == "cancelled"
    assert (len(ids), run.reason) == (1, "length")
    # One that was on its way, one that reads the prompt, one that samples.
    assert turns <= 3


def test_a_task_that_is_cancelled_frees_its_row(make):
    worker = make(rows=1)

    async def client():
        async with await worker.stream(request(n=400)) as stream:
            async for _ in stream:
                pass

    async def main():
        task = asyncio.create_task(client())
        await asyncio.sleep(0.05)
        task.cancel()
        return await read(worker, request())

    assert len(asyncio.run(main())[0]) == 6
    assert worker.snapshot.rows[0]["state"] == "free"


def test_a_task_that_is_cancelled_while_its_request_is_queued_leaves_nothing(make):
    worker = make(rows=1)
    worker._slots.go.clear()

    async def main():
        first = asyncio.create_task(read(worker, request()))
        await asyncio.sleep(0.02)  # the thread is in a turn: the next order waits
        second = asyncio.create_task(worker.stream(request(n=400)))
        await asyncio.sleep(0.02)
        second.cancel()
        worker._slots.go.set()
        return await asyncio.gather(first, second, return_exceptions=True)

    (ids, _), cancelled = asyncio.run(main())
    assert len(ids) == 6
    assert isinstance(cancelled, asyncio.CancelledError)
    assert asyncio.run(worker.stop(20))
    assert worker.snapshot == ([{"id": 0, "state": "free", "held_tokens": 15}], 0)


def test_a_closed_event_loop_cancels_its_runs(make):
    worker = make(rows=1)
    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(worker.stream(request(n=400)))
    loop.close()
    assert len(asyncio.run(read(worker, request()))[0]) == 6
    assert stream.run.reason == "cancelled"


def test_refusals_reach_the_task(make):
    worker = make(rows=1, queue=1)

    async def main():
        streams = [await worker.stream(request(n=400)) for _ in range(2)]
        with pytest.raises(QueueFull, match="1 requests are waiting already"):
            await worker.stream(request())
        with pytest.raises(ValueError, match="token id 101 lies outside"):
            await worker.stream(Request(prompt_ids=[101], sampling=GREEDY, max_new_tokens=1))
        for stream in streams:
            await stream.aclose()

    asyncio.run(main())


def test_a_slow_reader_gets_longer_lists(make):
    worker = make()

    async def main():
        stream = await worker.stream(request(n=30))
        while stream.run.state != "ended":
            await asyncio.sleep(0.01)
        return [tokens async for tokens in stream]

    (tokens,) = asyncio.run(main())
    assert len(tokens) == 30


def test_stopping_finishes_what_runs_and_refuses_what_comes(make):
    worker = make(rows=1)

    async def main():
        stream = await worker.stream(request(n=50))
        waiting = await worker.stream(request(n=5, seed=1))
        stopping = asyncio.create_task(worker.stop(20))
        await asyncio.sleep(0.01)
        with pytest.raises(Stopped, match="the server is shutting down"):
            await worker.stream(request())
        assert await stopping
        assert len(sum([t async for t in stream], [])) == 50
        assert len(sum([t async for t in waiting], [])) == 5
        with pytest.raises(Stopped, match="the server is shutting down"):
            await worker.stream(request())

    asyncio.run(main())


def test_stopping_cancels_what_takes_too_long(make):
    worker = make(rows=1)

    async def main():
        streams = [await worker.stream(request(n=480)) for _ in range(2)]
        assert await worker.stop(0)
        for stream in streams:
            async for _ in stream:
                pass
        return [stream.run.reason for stream in streams]

    assert asyncio.run(main()) == ["cancelled"] * 2


def test_a_worker_that_was_never_started_stops(model):
    assert asyncio.run(Worker(Slots(Decoder(model))).stop(1))


def test_when_the_slots_fail_every_stream_ends_and_later_requests_are_refused(make, monkeypatch):
    worker = make(rows=1)

    def broken():
        raise RuntimeError("the device is gone")

    async def main():
        streams = [await worker.stream(request(n=400)) for _ in range(2)]
        monkeypatch.setattr(worker._slots, "turn", broken)
        for stream in streams:
            async for _ in stream:
                pass
        with pytest.raises(Stopped, match="the engine failed: RuntimeError: the device is gone"):
            await worker.stream(request())
        return [stream.run for stream in streams]

    runs = asyncio.run(main())
    assert [run.reason for run in runs] == ["error"] * 2
    assert "the device is gone" in str(runs[0].error)
    assert isinstance(worker.failure, RuntimeError)
