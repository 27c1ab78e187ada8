"""Functions that the page may have run, after the person allowed the call."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from mistral.chat.tools import ArgumentError, Tool, ToolError
from mistral.chat.tools.feedback import as_text
from mistral.chat.tools.functions import check_arguments
from mistral.chat.tools.results import result_text
from mistral.chat.tools.running import RunningTool
from mistral.errors import one_line, shown
from mistral.server.protocol.errors import ApiError

MOST_CHARACTERS = 100_000  # of a result
_MOST_AT_ONCE = 8
_LOOK_EVERY = 0.02  # seconds


class ServedTool(NamedTuple):
    """A tool.

    source        where it comes from: "my_tools.py", or "mcp: " with a command
    returns_text  its result is the text for the model; else a value, which is written as JSON
    """

    tool: Tool
    source: str
    returns_text: bool = False


class Toolbox:
    """Tools by their names.

    time_limit  seconds of a call
    """

    def __init__(self, tools: Sequence[ServedTool] = (), time_limit: float = 60.0):
        self.time_limit = time_limit
        self._tools = {served.tool.name: served for served in tools}
        self._running: list[RunningTool] = []

    def about(self) -> list[dict[str, Any]]:
        """What the page shows, and, but for the source, offers to the model."""
        return [
            {**tool.schema()["function"], "source": source}
            for tool, source, _ in self._tools.values()
        ]

    async def call(self, name: str, arguments: dict[str, Any]) -> dict[str, str]:
        """{"result": text for the model}, or {"error": one line}.

        ApiError for a tool that does not exist (404), one call too many (429), and a call that does
        not end in time (504).
        """
        if name not in self._tools:
            raise ApiError(404, f"there is no tool {shown(name)}", param="name", code="not_found")
        tool, _, returns_text = self._tools[name]
        # A call that was given up counts until its function returns.
        self._running = [running for running in self._running if not running.is_done]
        if len(self._running) >= _MOST_AT_ONCE:
            raise ApiError(429, f"{_MOST_AT_ONCE} calls have not ended: try again later")
        try:
            check_arguments(tool, arguments)
            running = RunningTool(tool, arguments)
        except (ArgumentError, ToolError) as error:
            return {"error": one_line(str(error))}
        self._running.append(running)
        if not await self._ends(running):
            raise ApiError(
                504,
                f"{name} did not end within {self.time_limit:g} seconds; it was started, and may "
                "have done its work, or may still do it",
                type="server_error",
                code="tool_timeout",
            )
        return _outcome(name, running, returns_text)

    async def _ends(self, running: RunningTool) -> bool:
        """Wait for a call; False: its time is up. No thread waits, and other requests continue."""
        deadline = time.monotonic() + self.time_limit
        while not running.is_done and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_EVERY)
        return running.is_done


def _outcome(name: str, running: RunningTool, returns_text: bool) -> dict[str, str]:
    """What became of a call that has ended."""
    try:
        value, problem = running.wait(None)
    except ToolError as error:
        return {"error": one_line(str(error))}
    except KeyboardInterrupt:  # raised by the function: the server does not end for it
        return {"error": f"{name} failed with KeyboardInterrupt"}
    text = value if returns_text else result_text(value)
    if problem is not None:
        text = as_text(problem, text)
    if len(text) > MOST_CHARACTERS:
        return {
            "error": f"{name} ran, but its result has {len(text):,} characters, and at most "
            f"{MOST_CHARACTERS:,} are passed on"
        }
    return {"result": text}
