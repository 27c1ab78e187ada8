"""Runs the model's calls: each becomes an event for the caller and a message for the model."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mistral.chat.events import Call, Error, Event, Result
from mistral.chat.tools import feedback
from mistral.chat.tools.functions import ArgumentError, Tool, ToolError, check_arguments, run_tool

_Outcome = tuple[Event, dict[str, Any]]


def outcome(call: Call, tools: Mapping[str, Tool], time_limit: float | None) -> _Outcome:
    """Check one call and run it; every failure becomes an error that the model is told.

    time_limit  seconds; None: no limit

    Raises SchemaError for a tool whose own schema is malformed.
    """
    tags = call.id is None
    message = {"role": "tool", "name": call.name}
    if call.id is not None:
        message["tool_call_id"] = call.id
    try:
        if call.name not in tools:
            raise ArgumentError(f"No matching function signature found for function: {call.name}")
        check_arguments(tools[call.name], call.arguments)
    except ArgumentError as error:
        told = feedback.not_valid(call.name, str(error), tags)
        return Error(str(error)), message | {"error": told}
    try:
        content = run_tool(tools[call.name], call.arguments, time_limit)
    except ToolError as error:
        told = feedback.not_executed(call.name, str(error), tags)
        return Error(str(error)), message | {"error": told}
    return Result(call.name, content), message | {"content": json.dumps(content)}


def outcomes_together(
    calls: Sequence[Call], tools: Mapping[str, Tool], time_limit: float | None
) -> list[_Outcome]:
    """The outcomes of all calls, in their order; they run at the same time, in threads."""
    pool = ThreadPoolExecutor(max(len(calls), 1))
    try:
        return list(pool.map(lambda call: outcome(call, tools, time_limit), calls))
    finally:  # do not wait for them after Ctrl-C
        pool.shutdown(wait=False, cancel_futures=True)
