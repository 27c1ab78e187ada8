"""Tools of MCP servers: programs that are started once and called through the official SDK.

Source: Model Context Protocol, https://modelcontextprotocol.io
"""

import asyncio
import atexit
import os
import re
import shlex
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from importlib.util import find_spec
from typing import Any, TextIO

from mistral.chat.tools import Tool, ToolError, tool_table
from mistral.chat.tools.results import describe_error
from mistral.errors import MistralError, one_line
from mistral.server.window.toolbox import ServedTool

_SECONDS_TO_START = 60.0
_SECONDS_TO_END = 10.0
_LONGEST_LINE = 10_000
_MOST_PAGES = 100  # of a list of tools
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_.-]+")


class McpError(MistralError, RuntimeError):
    """An MCP server cannot be used; one line says why."""


class _Server:
    """One MCP server, inside the event loop."""

    def __init__(self, command: str):
        self.command = command
        self.name = ""
        self.tools: list[Any] = []
        self.listed: Future[None] = Future()  # its exception says why the server cannot be used
        self.last_words = ""  # the last line that it wrote to its standard error
        self._reading: threading.Thread | None = None
        self._client: Any = None

    async def live(self, end: asyncio.Event) -> None:
        """Start the program, list its tools, and keep it until the end."""
        try:
            with self._standard_error() as errors:
                async with self._connect(errors) as client:
                    await self._list(client)
                    self._client = client
                    self.listed.set_result(None)
                    await end.wait()
        except Exception as error:
            if not self.listed.done():
                await asyncio.to_thread(self._reading.join, 1.0)  # for the last words
                self.listed.set_exception(error)
        finally:
            self._client = None

    def _standard_error(self) -> TextIO:
        """A file for the program's standard error, of which the last line is kept."""
        reading, writing = os.pipe()

        def keep_last() -> None:
            with os.fdopen(reading, errors="replace") as lines:
                while line := lines.readline(_LONGEST_LINE):
                    self.last_words = one_line(line) or self.last_words

        self._reading = threading.Thread(target=keep_last, name="mcp errors", daemon=True)
        self._reading.start()
        return os.fdopen(writing, "w")

    def _connect(self, errors: TextIO) -> Any:
        from mcp import Client, StdioServerParameters, stdio_client

        program, *arguments = shlex.split(self.command)
        # The SDK passes only a few variables of the environment on: PATH, HOME, ...
        parameters = StdioServerParameters(command=program, args=arguments)
        return Client(stdio_client(parameters, errlog=errors))

    async def _list(self, client: Any) -> None:
        about = client.server_info
        self.name = about.name if about is not None else shlex.split(self.command)[0]
        page = await client.list_tools()
        self.tools += page.tools
        for _ in range(_MOST_PAGES):
            if not page.next_cursor:
                return
            page = await client.list_tools(cursor=page.next_cursor)
            self.tools += page.tools
        raise McpError("its list of tools does not end")

    async def call(self, name: str, arguments: dict[str, Any], seconds: float) -> str:
        """The result of a tool as text. ToolError, one line, for everything else."""
        if self._client is None:
            raise ToolError(f"the MCP server {self.command} has ended")
        try:
            async with asyncio.timeout(seconds):
                result = await self._client.call_tool(name, arguments)
        except TimeoutError:
            raise ToolError(f"the MCP server did not answer within {seconds:g} seconds") from None
        except Exception as error:
            problem = _told(error)
            raise ToolError(f"the MCP server {self.command} has failed: {problem}") from None
        text = "\n".join(_text_of(block) for block in result.content)
        if result.is_error:
            raise ToolError(text or "the tool has failed")
        return text


class McpServers:
    """MCP servers, in an event loop in a thread of its own.

    commands    each the program with its arguments, as a shell splits them
    time_limit  seconds of a call
    """

    def __init__(self, commands: Sequence[str], time_limit: float = 60.0):
        self._servers = [_Server(command) for command in commands]
        self._time_limit = time_limit
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="mcp", daemon=True)

    def start(self, say: Callable[[str], object], taken: Sequence[Tool] = ()) -> list[ServedTool]:
        """Start all servers; returns their tools.

        say    receives a line for each tool that cannot be offered
        taken  other tools, whose names are taken

        Raises McpError, which names the command, if a server does not start; all are ended then.
        """
        if not self._servers:
            return []
        if find_spec("mcp") is None:
            raise McpError(
                "mcp is not installed; install the extra: pip install 'mistral-from-scratch[mcp]'"
            )
        atexit.register(self.stop)
        self._thread.start()
        try:
            for server in self._servers:
                self._await_start(server)
            return self._served(say, taken)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all servers."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join(_SECONDS_TO_END)

    def _run(self) -> None:
        async def live() -> None:
            tasks = [asyncio.create_task(server.live(self._end)) for server in self._servers]
            await self._end.wait()
            for server, task in zip(self._servers, tasks):
                if not server.listed.done():  # it may never answer
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._loop.run_until_complete(live())
        self._loop.close()

    def _await_start(self, server: _Server) -> None:
        try:
            server.listed.result(_SECONDS_TO_START)
        except TimeoutError:
            problem = f"it did not answer within {_SECONDS_TO_START:g} seconds"
        except Exception as error:
            said = f"; it wrote: {server.last_words}" if server.last_words else ""
            problem = f"{_told(error)}{said}"
        else:
            return
        raise McpError(f"the MCP server {server.command!r} cannot be used: {problem}") from None

    def _served(self, say: Callable[[str], object], taken: Sequence[Tool]) -> list[ServedTool]:
        """All tools, each under a name that no other has."""
        names = {tool.name for tool in taken}
        served = []
        for server in self._servers:
            for described in server.tools:
                try:
                    tool = self._tool(server, described, names)
                except ValueError as error:
                    say(f"note: a tool of {server.command} is left out: {error}")
                    continue
                names.add(tool.name)
                served.append(ServedTool(tool, f"mcp: {server.command}", returns_text=True))
        return served

    def _tool(self, server: _Server, described: Any, names: set[str]) -> Tool:
        """A tool that calls the server. ValueError if it cannot be offered."""

        def call(**arguments: Any) -> str:
            coroutine = server.call(described.name, arguments, self._time_limit)
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

        schema = {
            "name": unique_name(described.name, server.name, names),
            "description": described.description or "",
            "inputSchema": described.input_schema,
        }
        tool = Tool.from_schema(schema, call)
        tool_table([tool])
        return tool


def unique_name(name: str, server: str, names: set[str]) -> str:
    """A tool's name if no other has it, else with the server's name before it.

    Characters that chat formats do not have in names become _. ValueError if both are taken.
    """
    name = _NOT_IN_A_NAME.sub("_", name)[:64]
    if name not in names and name not in ("auto", "none", "required"):
        return name
    server = _NOT_IN_A_NAME.sub("_", server)[:30]
    longer = f"{server}.{name}"[:64]
    if longer in names:
        raise ValueError(f"two tools are named {longer!r}")
    return longer


def _text_of(block: Any) -> str:
    """A part of a result as text: the model reads nothing else."""
    if block.type == "text":
        return block.text
    if block.type == "resource" and hasattr(block.resource, "text"):
        return block.resource.text
    return f"[{block.type}, which the model cannot read]"


def _told(error: BaseException) -> str:
    """An exception in one line; of an exception group the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return describe_error(error)
