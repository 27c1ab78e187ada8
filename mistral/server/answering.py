"""The answers to one request, all of them at once, as a stream of deltas."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Self

from mistral.server.choice import Choice, Delta
from mistral.server.protocol.errors import invalid, queue_full, unavailable
from mistral.server.request import Chosen
from mistral.server.slots import QueueFull
from mistral.server.worker import Stopped, Stream, Worker


class Answering:
    """The runs of some choices. Close it: that cancels what still runs."""

    def __init__(self, choices: Sequence[Choice], streams: Sequence[Stream]):
        self.choices = choices
        self._streams = streams

    @classmethod
    async def begin(cls, worker: Worker, choices: Sequence[Choice]) -> Self:
        """Queue a run for each choice, or none. ApiError if they cannot be queued."""
        # All at once: each waits for the turn that is being computed.
        queued = [asyncio.create_task(worker.stream(choice.request)) for choice in choices]
        try:
            streams = await asyncio.gather(*queued)
        except BaseException as error:
            await _give_up(queued)
            raise _as_api_error(error) from None
        for choice, stream in zip(choices, streams):
            choice.run = stream.run
        return cls(choices, streams)

    async def deltas(self) -> AsyncIterator[Delta]:
        """What becomes known of the answers, until all have ended. ApiError if one fails."""
        pairs = zip(self.choices, self._streams)
        waiting = {_next(stream): (choice, stream) for choice, stream in pairs}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda task: waiting[task][0].index):
                    choice, stream = waiting.pop(task)
                    chosen = task.result()
                    if chosen is not None:
                        yield choice.feed(chosen)
                    if chosen is None or choice.is_complete:
                        await stream.aclose()
                        yield choice.end()
                    else:
                        waiting[_next(stream)] = (choice, stream)
        finally:
            for task in waiting:
                task.cancel()

    async def close(self) -> None:
        """Cancel what still runs."""
        for stream in self._streams:
            await stream.aclose()


async def _give_up(queued: Sequence[asyncio.Task]) -> None:
    """Cancel the runs that were queued, and those that are being queued."""
    for task in queued:
        task.cancel()
    for stream in await asyncio.gather(*queued, return_exceptions=True):
        if isinstance(stream, Stream):
            await stream.aclose()


def _as_api_error(error: BaseException) -> BaseException:
    """The ApiError for a request that could not be queued; other errors as they are."""
    if isinstance(error, QueueFull):
        return queue_full()
    if isinstance(error, Stopped):
        return unavailable(str(error))
    return invalid(str(error)) if isinstance(error, ValueError) else error


def _next(stream: Stream) -> asyncio.Task:
    """A task whose result is the stream's next tokens; None: there are none."""

    async def tokens() -> list[Chosen] | None:
        return await anext(stream, None)

    return asyncio.create_task(tokens())
