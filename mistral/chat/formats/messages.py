"""A conversation's messages, as OpenAI's interface has them, checked before a format writes them.

    {"role": "system" or "user", "content": text}
    {"role": "assistant", "content": text, "tool_calls": [{"id": ..., "function": {"name": ...,
    "arguments": ...}}]} {"role": "tool", "name": ..., "tool_call_id": ..., "content": what the
    function gave back}

A content may also be a list of parts, {"type": "text", "text": ...} each: paragraphs, as in
mistral-common. In the place of its content a tool's message may have an "error": words for the
model to read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mistral.chat.formats.prompts import wrapped
from mistral.chat.tools import Tool
from mistral.chat.tools.json_schema import as_json

Message = Mapping[str, Any]
Tools = Sequence[Tool | Mapping[str, Any]]  # each a Tool or a schema of one
ROLES = ("system", "user", "assistant", "tool")
PARAGRAPH = "\n\n"


@dataclass(frozen=True)
class FunctionCall:
    """A call in an assistant's message.

    `arguments` holds what JSON can, or is a JSON object in text.
    """

    name: str
    arguments: dict[str, Any] | str
    id: str | None = None


@dataclass(frozen=True)
class CheckedMessage:
    """A message that can be written.

    where    names the message in errors
    content  text; of a tool anything that JSON can hold, text included. "" for calls without text,
             None with an error.
    calls    None: the message has no such key, or null
    name     the function that a tool's message is from; found by `call_id` where only that was
             given
    error    in the place of a tool's content
    """

    where: str
    role: str
    content: Any = ""
    calls: tuple[FunctionCall, ...] | None = None
    name: str | None = None
    call_id: str | None = None
    error: str | None = None

    def result(self) -> Any:
        """A tool's result, or its error; text that is JSON means its value."""
        return _value(self.content) if self.error is None else self.error


def check_messages(messages: Sequence[Message], *, answered: bool = False) -> list[CheckedMessage]:
    """The messages, checked.

    answered  something of the assistant's stands before them, so that a tool's result may come
              first

    Raises ValueError in one line that names the message.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(f"a conversation is a list of messages, not {type(messages).__name__}")
    if not messages:
        raise ValueError("the list of messages is empty: a conversation needs one at least")
    checked: list[CheckedMessage] = []
    name_by_id: dict[str | None, str] = {}  # of the functions that were called
    for i, given in enumerate(messages):
        message = _check(i, given)
        if message.role == "tool" and not answered:
            raise ValueError(
                f"{message.where} is a function's result, and no assistant's message stands before "
                f"it"
            )
        if message.role == "tool" and message.name is None:
            message = replace(message, name=name_by_id.get(message.call_id))
        answered = answered or message.role == "assistant"
        name_by_id |= {call.id: call.name for call in message.calls or () if call.id is not None}
        checked.append(message)
    return checked


def tool_schemas(tools: Tools) -> list[dict[str, Any]]:
    """Each tool as {"type": "function", "function": {...}};

    ValueError for what is none, and for two of one name.
    """
    schemas: list[dict[str, Any]] = []
    for i, tool in enumerate(tools):
        if not isinstance(tool, (Tool, Mapping)):
            raise ValueError(f"tool {i} is {type(tool).__name__}, not a Tool or a schema of one")
        try:
            schema = as_json(wrapped(tool.schema() if isinstance(tool, Tool) else tool))
        except ValueError as error:
            raise ValueError(f"tool {i} holds what JSON cannot: {error}") from None
        function = schema["function"]
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not function["name"]
        ):
            raise ValueError(f"tool {i} has no name")
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, dict) or not isinstance(
            parameters.get("properties", {}), dict
        ):
            raise ValueError(
                f"tool {i} ({function['name']}): the parameters are no JSON schema of an object"
            )
        schemas.append(schema)
    names = [schema["function"]["name"] for schema in schemas]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two tools are named {next(name for name in names if names.count(name) > 1)!r}"
        )
    return schemas


def _check(i: int, message: Any) -> CheckedMessage:
    if not isinstance(message, Mapping):
        raise ValueError(
            f"message {i} is {type(message).__name__}, not a mapping with a role and a content"
        )
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"message {i} has the role {role!r}; it must be one of {', '.join(ROLES)}")
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
    return CheckedMessage(
        where, role, text, None if calls is None or role != "assistant" else _calls(where, calls)
    )


def _check_result(where: str, message: Message) -> CheckedMessage:
    name, call_id = (_optional_text(where, message, key) for key in ("name", "tool_call_id"))
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
            raise ValueError(f"{where} holds what JSON cannot: {error}") from None
    return CheckedMessage(where, "tool", content, name=name, call_id=call_id)


def _text(where: str, content: Any) -> str:
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        if not _is_parts(content):
            part = '{"type": "text", "text": ...}'
            raise ValueError(
                f"{where}: the content has parts other than {part}, and only text can be written"
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
        return (
            isinstance(part, Mapping)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
        )

    return isinstance(content, list) and bool(content) and all(map(is_text, content))


def _optional_text(where: str, message: Message, key: str) -> str | None:
    value = message.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {key} is {type(value).__name__}, not text")
    return value if value is None else _text(where, value)


def _calls(where: str, calls: Any) -> tuple[FunctionCall, ...]:
    if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Sequence):
        raise ValueError(f"{where}: tool_calls is {type(calls).__name__}, not a list of calls")
    return tuple(_call(f"{where}: tool call {i}", call) for i, call in enumerate(calls))


def _call(where: str, call: Any) -> FunctionCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if (
        not isinstance(function, Mapping)
        or not isinstance(function.get("name"), str)
        or not function["name"]
    ):
        raise ValueError(f'{where} is not {{"function": {{"name": ..., "arguments": ...}}}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = (
            _text(where, arguments) if arguments.strip() else "{}"
        )  # OpenAI's servers write "" for none
    read = _value(arguments)
    if not isinstance(read, Mapping):
        raise ValueError(f"{where}: the arguments are not a JSON object, as a dict or as text")
    try:
        read = as_json(dict(read))
    except ValueError as error:
        raise ValueError(f"{where}: the arguments hold what JSON cannot: {error}") from None
    name = _text(where, function["name"])
    return FunctionCall(
        name, arguments if isinstance(arguments, str) else read, _optional_text(where, call, "id")
    )


def _value(content: Any) -> Any:
    """The value of text that is JSON.

    Text that only Python reads as such (NaN, too many levels) stays text.
    """
    if isinstance(content, str):
        try:
            return as_json(json.loads(content))
        except (ValueError, RecursionError):
            return content
    return content
