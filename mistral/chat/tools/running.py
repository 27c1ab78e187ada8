"""Calls functions: in this thread, or in one of their own that has a time limit."""

import asyncio
import inspect
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mistral.chat.tools.functions import StillRunning, Tool, ToolError, keyword_arguments
from mistral.chat.tools.results import Returned, describe_error, encode_result


def run_tool(tool: Tool, arguments: Mapping[str, Any], time_limit: float | None = None) -> Returned:
    """Call the tool with checked arguments; returns its result as JSON: see `encode_result`.

    An `async def` is run to its end.

    time_limit  seconds. The function then runs in a thread of its own, which is abandoned when
                time is up: Python cannot end a thread, so it runs until the function returns or
                the process ends. None: in this thread.

    Raises StillRunning when the time is up, ToolError for every exception in the function
    (SystemExit included), and KeyboardInterrupt.
    """
    if time_limit is None:
        return _call(tool, arguments)
    return RunningTool(tool, arguments).wait(time_limit)


class RunningTool:
    """A tool that runs in a thread of its own, from its creation on. ToolError if none starts."""

    def __init__(self, tool: Tool, arguments: Mapping[str, Any]):
        self._tool = tool
        self._arguments = arguments
        self._outcome: list[Returned | BaseException] = []
        self._thread = threading.Thread(target=self._work, name=f"tool {tool.name}", daemon=True)
        self._start = time.monotonic()
        try:
            self._thread.start()
        except RuntimeError as error:  # too many threads, abandoned by tools that hang
            raise ToolError(f"{tool.name} could not be started: {error}") from error

    @property
    def is_done(self) -> bool:
        """Whether there is an outcome."""
        return bool(self._outcome)

    def wait(self, time_limit: float | None) -> Returned:
        """The result; the limit counts from the start. Raises as `run_tool`."""
        if time_limit is None:
            self._thread.join()
        else:
            left = min(time_limit, threading.TIMEOUT_MAX) - (time.monotonic() - self._start)
            self._thread.join(max(0, left))
        if not self._outcome:
            raise StillRunning(f"{self._tool.name} did not finish within {time_limit:g} seconds")
        outcome = self._outcome[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _work(self) -> None:
        try:
            self._outcome.append(_call(self._tool, self._arguments))
        except BaseException as error:
            self._outcome.append(error)


def _call(tool: Tool, arguments: Mapping[str, Any]) -> Returned:
    if tool.function is None:
        raise ToolError(f"{tool.name} has no function: it can be described, not called")
    try:
        result = tool.function(**keyword_arguments(tool, arguments))
        if inspect.isawaitable(result) or inspect.isasyncgen(result):
            result = _run_to_end(result)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ToolError(f"{tool.name} failed with {describe_error(error)}") from error
    return encode_result(result)


def _run_to_end(awaitable: Any) -> Any:
    """The result of an async function; of an async generator the list of its items."""

    async def whole() -> Any:
        if inspect.isasyncgen(awaitable):
            return [item async for item in awaitable]
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(whole())
    with ThreadPoolExecutor(1) as pool:  # this thread has a loop already
        return pool.submit(asyncio.run, whole()).result()
