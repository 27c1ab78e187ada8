"""The thread that owns the slots, and its side in asyncio."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, Self

from mistral.errors import MistralError
from mistral.server.request import Chosen, Request, Run
from mistral.server.slots import Slots

_GRACE = 5.0  # seconds that `Worker.stop` waits for the turn that is being computed


class Stopped(MistralError, RuntimeError):
    """The worker takes no more requests: it was stopped, or its engine failed."""


class Snapshot(NamedTuple):
    """The slots after the last turn.

    rows     `Slots.state`
    waiting  how many requests wait for a row
    """

    rows: list[dict[str, Any]]
    waiting: int


class Stream:
    """The tokens of one run, for one task: `async for tokens in stream`, lists of Chosen.

    accepted  a future, done when the request was queued; its exception says why it was not
    run       what became of the request; when the iteration has ended, it has a reason; None until
              the request is queued

    A slow reader gets longer lists. Leave it early by `aclose`, or use it as a context manager.
    """

    def __init__(self, worker: "Worker"):
        self.run: Run | None = None
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self.accepted = self._loop.create_future()
        self._news: list[Chosen] = []
        self._has_ended = False
        self._changed = asyncio.Event()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Chosen]:
        while not self._news and not self._has_ended:
            self._changed.clear()
            await self._changed.wait()
        if not self._news:
            raise StopAsyncIteration
        news = self._news
        self._news = []
        return news

    async def aclose(self) -> None:
        """Cancel the run, if it has not ended; its row is free before the next step."""
        if not self._has_ended:
            self._has_ended = True
            self._changed.set()
            self._worker.cancel(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    # Called by the worker's thread

    def accept(self, run: Run) -> bool:
        """The request was queued. False if its event loop is closed."""
        self.run = run
        return self._tell(lambda: self.accepted.done() or self.accepted.set_result(None))

    def refuse(self, error: Exception) -> None:
        """The request was not queued."""
        self._tell(lambda: self.accepted.done() or self.accepted.set_exception(error))

    def deliver(self, news: list[Chosen], has_ended: bool) -> bool:
        """Add tokens. False if its event loop is closed."""
        return self._tell(lambda: self._add(news, has_ended))

    def _add(self, news: list[Chosen], has_ended: bool) -> None:
        self._news += news
        self._has_ended |= has_ended
        self._changed.set()

    def _tell(self, what: Callable[[], object]) -> bool:
        try:
            self._loop.call_soon_threadsafe(what)
        except RuntimeError:  # the loop is closed
            return False
        return True


class Worker:
    """Runs slots in a thread of its own, for tasks of any event loop.

    snapshot  the slots after the last turn, for a status page
    failure   the exception that ended the thread; None: there is none

    Invariants:

    1. Only the thread touches the slots. Tasks leave orders, which are carried out in their order
       between two turns, so an order waits for at most one turn.
    2. The thread sleeps while there is neither an order nor anything for a turn to do.
    3. Every stream ends: when its run does, or when the worker stops or fails.
    """

    def __init__(self, slots: Slots):
        self.snapshot = Snapshot(slots.state(), slots.waiting)
        self.failure: BaseException | None = None
        self._slots = slots
        self._streams: dict[Run, Stream] = {}  # of the runs that have not ended
        self._orders: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()  # guards the orders, and the next two
        self._deadline: float | None = None  # when `stop` cancels what still runs; None: never
        self._has_ended = False  # no order is carried out any more
        self._thread = threading.Thread(target=self._run, name="slots", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def stream(self, request: Request) -> Stream:
        """Queue a request. Raises what `Slots.submit` raises, and Stopped."""
        stream = Stream(self)
        self._order(lambda: self._submit(request, stream))
        try:
            await stream.accepted
        except asyncio.CancelledError:
            self.cancel(stream)
            raise
        return stream

    def cancel(self, stream: Stream) -> None:
        """End the run of a stream before the next step."""
        with suppress(Stopped):
            self._order(lambda: self._cancel(stream))

    async def stop(self, seconds: float) -> bool:
        """Take no more requests; let those that are there end for so long, then cancel them.

        Returns whether the thread has ended. It has not if a turn hangs.
        """
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._changed.notify()
        if self._thread.ident is not None:  # it was started
            await asyncio.to_thread(self._thread.join, seconds + _GRACE)
        return not self._thread.is_alive()

    def _order(self, order: Callable[[], None]) -> None:
        """Leave an order to the thread. Raises Stopped if it will not be carried out."""
        with self._changed:
            if self._has_ended:
                raise Stopped(self._why_stopped())
            self._orders.append(order)
            self._changed.notify()

    def _why_stopped(self) -> str:
        if self.failure is not None:
            return f"the engine failed: {type(self.failure).__name__}: {self.failure}"
        return "the server is shutting down"

    # In the thread

    def _run(self) -> None:
        """Turn until the worker is stopped."""
        try:
            more = False
            while self._wait(more):
                self._carry_out()
                more = self._slots.turn()
                self.snapshot = Snapshot(self._slots.state(), self._slots.waiting)
                self._deliver()
        except BaseException as error:  # not even emptying the rows has worked
            self.failure = error
        with self._changed:
            self._has_ended = True
        self._carry_out_last()

    def _wait(self, more: bool) -> bool:
        """Sleep until there is something to do. False: the worker was stopped, and nothing is."""
        with self._changed:
            while not more and not self._orders and self._deadline is None:
                self._changed.wait()
            return more or bool(self._orders)

    def _carry_out(self) -> None:
        """Carry out the orders that are there, and cancel everything after the deadline."""
        while self._orders:
            self._orders.popleft()()
        if self._deadline is not None and time.monotonic() >= self._deadline:
            for run in list(self._streams):
                self._slots.cancel(run)

    def _deliver(self) -> None:
        """Give the streams their tokens. A run whose stream cannot take them is cancelled."""
        for run, stream in list(self._streams.items()):
            news = run.take()
            has_ended = run.state == "ended"
            is_told = not (news or has_ended) or stream.deliver(news, has_ended)
            if has_ended or not is_told:
                self._slots.cancel(run)
                del self._streams[run]

    def _carry_out_last(self) -> None:
        """After the last turn: end every stream, and refuse the requests that came too late."""
        for run, stream in self._streams.items():
            if run.state != "ended":
                run.end("error", Stopped(self._why_stopped()))
            stream.deliver(run.take(), has_ended=True)
        self._streams.clear()
        while self._orders:
            self._orders.popleft()()

    def _submit(self, request: Request, stream: Stream) -> None:
        try:
            if self._has_ended or self._deadline is not None:
                raise Stopped(self._why_stopped())
            run = self._slots.submit(request)
        except Exception as error:
            stream.refuse(error)
            return
        if stream.accept(run):
            self._streams[run] = stream
        else:
            self._slots.cancel(run)

    def _cancel(self, stream: Stream) -> None:
        if self._streams.pop(stream.run, None):
            self._slots.cancel(stream.run)
