"""A conversation's messages, in the form of OpenAI's interface, checked before they are encoded.

    {"role": "system" or "user", "content": text}
    {"role": "assistant", "content": text,
     "tool_calls": [{"id": ..., "function": {"name": ..., "arguments": ...}}]}
    {"role": "tool", "name": ..., "tool_call_id": ..., "content": the function's result}

A content may also be a list of parts, {"type": "text", "text": ...} each: paragraphs, as in
mistral-common. Instead of a content a tool's message may have an "error": text for the model.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mistral.chat.tools import Tool, wrapped
from mistral.chat.tools.json_schema import as_json

Message = Mapping[str, Any]
Tools = Sequence[Tool | Mapping[str, Any]]  # each a Tool or a schema of one
_ROLES = ("system", "user", "assistant", "tool")
PARAGRAPH = "\n\n"


@dataclass(frozen=True)
class FunctionCall:
    """A call in an assistant's message; its arguments may be a JSON object as text."""

    name: str
    arguments: dict[str, Any] | str
    id: str | None = None


@dataclass(frozen=True)
class CheckedMessage:
    """A message that is well-formed.

    where    names the message in errors
    content  text; a tool's may be any value of JSON. "" for calls without text, None with an error
    calls    None: the message has no such key, or null
    name     the function of a tool's message, looked up by `call_id` if only that was given
    error    instead of a tool's content
    """

    where: str
    role: str
    content: Any = ""
    calls: tuple[FunctionCall, ...] | None = None
    name: str | None = None
    call_id: str | None = None
    error: str | None = None

    def result(self) -> Any:
        """A tool's result, or its error; text that is JSON becomes its value."""
        return _value(self.content) if self.error is None else self.error


def check_messages(messages: Sequence[Message], *, answered: bool = False) -> list[CheckedMessage]:
    """The messages, checked.

    answered  they follow an assistant's message, so a tool's result may come first

    Raises ValueError in one line that names the message.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(f"a conversation is a list of messages, not {type(messages).__name__}")
    if not messages:
        raise ValueError("the list of messages is empty: a conversation needs at least one")
    checked: list[CheckedMessage] = []
    name_by_id: dict[str | None, str] = {}  # of the called functions
    for i, given in enumerate(messages):
        message = _check(i, given)
        if message.role == "tool" and not answered:
            raise ValueError(
                f"{message.where} is a function's result, but no assistant's message is before it"
            )
        if message.role == "tool" and message.name is None:
            message = replace(message, name=name_by_id.get(message.call_id))
        answered = answered or message.role == "assistant"
        name_by_id |= {call.id: call.name for call in message.calls or () if call.id is not None}
        checked.append(message)
    return checked


def tool_schemas(tools: Tools) -> list[dict[str, Any]]:
    """Each tool as {"type": "function", "function": {...}}.

    ValueError for a value that is not a tool, and for two tools with one name.
    """
    schemas: list[dict[str, Any]] = []
    for i, tool in enumerate(tools):
        if not isinstance(tool, (Tool, Mapping)):
            raise ValueError(f"tool {i} is {type(tool).__name__}, not a Tool or a schema of one")
        try:
            schema = as_json(wrapped(tool.schema() if isinstance(tool, Tool) else tool))
        except ValueError as error:
            raise ValueError(f"tool {i} has a value that JSON cannot hold: {error}") from None
        function = schema["function"]
        if not _has_name(function):
            raise ValueError(f"tool {i} has no name")
        parameters = function.get("parameters") or {}
        is_object = isinstance(parameters, dict)
        if not is_object or not isinstance(parameters.get("properties", {}), dict):
            raise ValueError(
                f"tool {i} ({function['name']}): the parameters are not a JSON schema of an object"
            )
        schemas.append(schema)
    names = [schema["function"]["name"] for schema in schemas]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two tools are named {twice[0]!r}: rename one")
    return schemas


def _has_name(function: Any) -> bool:
    name = function.get("name") if isinstance(function, Mapping) else None
    return isinstance(name, str) and name != ""


def _check(i: int, message: Any) -> CheckedMessage:
    if not isinstance(message, Mapping):
        raise ValueError(
            f"message {i} is {type(message).__name__}, not a mapping with a role and a content"
        )
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"message {i} has the role {role!r}, not one of {', '.join(_ROLES)}")
    where = f"message {i} ({role})"
    calls = message.get("tool_calls")
    if calls and role != "assistant":
        raise ValueError(f"{where} has tool_calls; only an assistant's message may")
    if role == "tool":
        return _check_result(where, message)
    content = message.get("content")
    if content is None and not calls:
        raise ValueError(f"{where} has no content")
    text = "" if content is None else _text(where, content)
    has_calls = role == "assistant" and calls is not None
    return CheckedMessage(where, role, text, _calls(where, calls) if has_calls else None)


def _check_result(where: str, message: Message) -> CheckedMessage:
    name = _optional_text(where, message, "name")
    call_id = _optional_text(where, message, "tool_call_id")
    if message.get("error") is not None:
        error = _text(where, message["error"])
        return CheckedMessage(where, "tool", content=None, name=name, call_id=call_id, error=error)
    if "content" not in message:
        raise ValueError(f"{where} has no content")
    content = message["content"]
    if isinstance(content, str) or _is_parts(content):
        content = _text(where, content)
    else:
        try:
            content = as_json(content)
        except ValueError as error:
            raise ValueError(f"{where} has a value that JSON cannot hold: {error}") from None
    return CheckedMessage(where, "tool", content, name=name, call_id=call_id)


def _text(where: str, content: Any) -> str:
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        if not _is_parts(content):
            raise ValueError(
                f'{where}: the content has parts other than {{"type": "text", "text": ...}}, '
                "and this model reads only text"
            )
        content = PARAGRAPH.join(part["text"] for part in content if part["text"])
    if not isinstance(content, str):
        raise ValueError(f"{where}: the content is {type(content).__name__}, not text")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        lone = content[error.start]
        raise ValueError(
            f"{where} is not valid Unicode: {lone!r} at character {error.start}"
        ) from None
    return content


def _is_parts(content: Any) -> bool:
    def is_text(part: Any) -> bool:
        is_part = isinstance(part, Mapping) and part.get("type") == "text"
        return is_part and isinstance(part.get("text"), str)

    return isinstance(content, list) and bool(content) and all(map(is_text, content))


def _optional_text(where: str, message: Message, key: str) -> str | None:
    value = message.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {key} is {type(value).__name__}, not text")
    return None if value is None else _text(where, value)


def _calls(where: str, calls: Any) -> tuple[FunctionCall, ...]:
    if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Sequence):
        raise ValueError(f"{where}: tool_calls is {type(calls).__name__}, not a list of calls")
    return tuple(_call(f"{where}: tool call {i}", call) for i, call in enumerate(calls))


def _call(where: str, call: Any) -> FunctionCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not _has_name(function):
        raise ValueError(f'{where} is not {{"function": {{"name": ..., "arguments": ...}}}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # OpenAI's servers write "" if there are none
        arguments = _text(where, arguments) if arguments.strip() else "{}"
    value = _value(arguments)
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: the arguments are not a JSON object, as a dict or as text")
    try:
        value = as_json(dict(value))
    except ValueError as error:
        raise ValueError(
            f"{where}: the arguments have a value that JSON cannot hold: {error}"
        ) from None
    return FunctionCall(
        name=_text(where, function["name"]),
        arguments=arguments if isinstance(arguments, str) else value,
        id=_optional_text(where, call, "id"),
    )


def _value(content: Any) -> Any:
    """The value of text that is JSON; text that only Python accepts (NaN, too deep) stays text."""
    if isinstance(content, str):
        try:
            return as_json(json.loads(content))
        except (ValueError, RecursionError):
            return content
    return content
