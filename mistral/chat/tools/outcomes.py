"""Runs the model's calls: each becomes events for the caller and a message for the model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mistral.chat.events import Altered, Call, Error, Event, Result, Unfinished
from mistral.chat.tools import feedback
from mistral.chat.tools.functions import (
    ArgumentError,
    StillRunning,
    Tool,
    ToolError,
    check_arguments,
)
from mistral.chat.tools.results import Returned, result_text
from mistral.chat.tools.running import RunningTool, run_tool


def call_key(call: Call) -> str:
    """The same for two calls of one function with the same arguments."""
    return json.dumps([call.name, call.arguments], sort_keys=True)


class OpenCall:
    """A call, and the message about it: what it says is true at every moment.

    previous    the same call in the previous answer, if it had no result there
    message     first that the call was not started, then that its outcome is not known, then its
                result or its error
    failed      whether there was no result
    unfinished  whether the function was started, and its outcome is not known
    """

    def __init__(self, call: Call, tools: Mapping[str, Tool], previous: "OpenCall | None" = None):
        self.key = call_key(call)
        self.message: dict[str, Any] = {"role": "tool", "name": call.name}
        if call.id is not None:
            self.message["tool_call_id"] = call.id
        self.message["error"] = feedback.not_started(call.name)
        self.failed = False
        self.unfinished = False
        self._call = call
        self._tool = tools.get(call.name)
        self._previous = previous
        self._running: RunningTool | None = None
        self._events: list[Event] = []
        self._wording = {"tags": call.id is None, "repeated": previous is not None}

    def start(self, in_thread: bool) -> None:
        """Check the call, and run it if it may run in a thread."""
        name = self._call.name
        if self._previous is not None and self._previous.unfinished:
            problem = "the previous call with these arguments has not finished"
            self._end_unfinished(f"{name} was not called: {problem}")
            return
        try:
            if self._tool is None:
                raise ArgumentError(f"No matching function signature found for function: {name}")
            check_arguments(self._tool, self._call.arguments)
            self.message["error"] = feedback.unfinished(name, "it was interrupted")
            if in_thread:
                self._running = RunningTool(self._tool, self._call.arguments)
        except ArgumentError as error:
            self._fail(error, feedback.not_valid(name, str(error), **self._wording))
        except ToolError as error:
            self._fail(error, feedback.not_executed(name, str(error), **self._wording))

    def finish(self, time_limit: float | None) -> list[Event]:
        """Run the call to its end, or wait for it; returns what the caller is told."""
        if self._events:
            return self._events
        try:
            if self._running is None:
                returned = run_tool(self._tool, self._call.arguments, time_limit)
            else:
                returned = self._running.wait(time_limit)
        except StillRunning as error:
            self._end_unfinished(str(error))
        except ToolError as error:
            told = feedback.not_executed(self._call.name, str(error), **self._wording)
            self._fail(error, told)
        else:
            self._succeed(returned)
        return self._events

    @property
    def is_done(self) -> bool:
        """Whether `finish` would not have to wait."""
        return bool(self._events) or (self._running is not None and self._running.is_done)

    def _succeed(self, returned: Returned) -> None:
        name = self._call.name
        self._events.append(Result(name, returned.value))
        text = result_text(returned.value)
        if returned.problem is not None:
            text = feedback.as_text(returned.problem, text)
            message = f"{name} ran, but JSON cannot hold its result: {returned.problem}"
            self._events.append(Altered(name, message))
        del self.message["error"]
        self.message["content"] = text

    def _fail(self, error: Exception, told: str) -> None:
        self.failed = True
        self.message["error"] = told
        self._events.append(Error(str(error)))

    def _end_unfinished(self, problem: str) -> None:
        self.failed = True
        self.unfinished = True
        self.message["error"] = feedback.unfinished(self._call.name, problem)
        self._events.append(Unfinished(self._call.name, problem))


def run_calls(
    calls: Sequence[OpenCall], time_limit: float | None, parallel: bool
) -> Iterator[Event]:
    """Run the calls; yields what the caller is told, in their order.

    parallel  at the same time, each in a thread; all have ended before the first event

    Raises KeyboardInterrupt, and SchemaError for a tool whose own schema is malformed. The messages
    say then what is known of each call.
    """
    if not parallel:
        for call in calls:
            call.start(in_thread=False)
            yield from call.finish(time_limit)
        return
    try:
        for call in calls:
            call.start(in_thread=True)
        for call in calls:
            call.finish(time_limit)
    finally:
        for call in calls:
            if call.is_done:  # others may have ended since, if this is an interrupt
                call.finish(time_limit)
    for call in calls:
        yield from call.finish(time_limit)
