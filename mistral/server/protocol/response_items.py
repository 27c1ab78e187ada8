"""The items of OpenAI's responses: messages, calls and their results, as messages of a chat."""

from collections.abc import Sequence
from typing import Any

from mistral.errors import shown
from mistral.server.protocol.errors import invalid

_MESSAGE = {"type", "role", "content", "id", "status", "phase"}
_CALL = {"type", "call_id", "name", "arguments", "id", "status", "caller", "namespace"}
_OUTPUT = {"type", "call_id", "output", "id", "status", "caller", "name", "namespace"}


def messages_of(given: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages that an input is. ApiError, which names the item, if one is not text."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(given):
        where = f"input[{i}]"
        kind = item.get("type", "message")
        if kind == "message":
            _require(where, item, _MESSAGE, "role", "content")
            messages.append({"role": item["role"], "content": item["content"]})
        elif kind == "function_call":
            _require(where, item, _CALL, "call_id", "name", "arguments")
            _add_call(messages, item)
        elif kind == "function_call_output":
            _require(where, item, _OUTPUT, "call_id", "output")
            result = {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}
            messages.append(result)
        elif kind != "reasoning":  # which clients send back as they received it
            raise invalid(f"{where}: an item of the type {shown(kind)} is not supported", "input")
    return messages


def _add_call(messages: list[dict[str, Any]], item: dict[str, Any]) -> None:
    """Add a call to the assistant's message before it, or to one of its own."""
    function = {"name": item["name"], "arguments": item["arguments"]}
    call = {"id": item["call_id"], "type": "function", "function": function}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})


def _require(where: str, item: dict[str, Any], known: set[str], *names: str) -> None:
    """ApiError for fields that are unknown or missing."""
    if unknown := sorted(item.keys() - known):
        raise invalid(f"unknown field: {where}.{unknown[0]}", "input", "unknown_parameter")
    for name in names:
        if name not in item:
            raise invalid(f"missing field: {where}.{name}", "input", "missing_required_parameter")
