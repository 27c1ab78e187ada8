"""A conversation's messages, in the form of OpenAI's interface, checked before they are encoded.

    {"role": "system" or "user", "content": text}
    {"role": "assistant", "content": text,
     "tool_calls": [{"id": ..., "function": {"name": ..., "arguments": ...}}]}
    {"role": "tool", "name": ..., "tool_call_id": ..., "content": the function's result}

A content may also be a list of parts, {"type": "text", "text": ...} each: paragraphs, as in
mistral-common. Instead of a content a tool's message may have an "error": text for the model.

The variants that OpenAI's clients send are read, too: their message objects (pydantic models), the
role developer (system), an answer without content, ids of any form, a call whose arguments were cut
off (they stay text), and the function_call and the role function of 2023.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mistral.chat.formats.prompts import to_json
from mistral.chat.tools import Tool, wrapped
from mistral.chat.tools.json_schema import as_json

Message = Mapping[str, Any]
Tools = Sequence[Tool | Mapping[str, Any]]  # each a Tool or a schema of one
_ROLES = ("system", "user", "assistant", "tool")
_OLD_ROLES = {"developer": "system", "function": "tool"}
_TEXT_PARTS = {  # type -> key
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
PARAGRAPH = "\n\n"
_ESCAPES = re.compile(r"(?:\\u[0-9a-fA-F]{4})+|\\.")


@dataclass(frozen=True)
class FunctionCall:
    """A call in an assistant's message.

    arguments  an object, or JSON as text: an object or, if a call was cut off, a string
    """

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

    def result_json(self) -> str:
        """A tool's result as JSON. Text that is JSON stays as it is: its numbers keep all digits.

        Only letters that it has as escapes are written as letters.
        """
        if not isinstance(self.content, str) or not _is_json(self.content):
            return to_json(self.content)
        return _ESCAPES.sub(_unescaped, self.content.strip())


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


def as_mapping(message: Any) -> Any:
    """A message object of a client as a dict; any other value as it is."""
    dump = getattr(message, "model_dump", None)  # pydantic's; the library need not be installed
    return dump() if callable(dump) and not isinstance(message, Mapping) else message


def _check(i: int, message: Any) -> CheckedMessage:
    message = as_mapping(message)
    if not isinstance(message, Mapping):
        raise ValueError(
            f"message {i} is {type(message).__name__}, not a mapping with a role and a content"
        )
    given = message.get("role")
    role = _OLD_ROLES.get(given, given) if isinstance(given, str) else None
    if role not in _ROLES:
        raise ValueError(f"message {i} has the role {given!r}, not one of {', '.join(_ROLES)}")
    where = f"message {i} ({role})"
    calls = message.get("tool_calls")
    if (calls or message.get("function_call")) and role != "assistant":
        raise ValueError(f"{where} has tool_calls; only an assistant's message may")
    if role == "tool":
        return _check_result(where, message)
    content = message.get("content")
    if role == "assistant":
        # An answer may have only calls, a refusal, or nothing (only reasoning).
        content = message.get("refusal") or "" if content in (None, []) else content
        called = None if calls is None else _calls(where, calls)
        if message.get("function_call"):
            called = (*(called or ()), _old_call(where, message["function_call"]))
        return CheckedMessage(where, role, _text(where, content), called)
    if content is None:
        raise ValueError(f"{where} has no content")
    return CheckedMessage(where, role, _text(where, content))


def _check_result(where: str, message: Message) -> CheckedMessage:
    name = _optional_text(where, message, "name")
    call_id = _optional_text(where, message, "tool_call_id")
    if message["role"] == "function" and call_id is None:
        call_id = name  # see `_old_call`
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
        content = [as_mapping(part) for part in content]
        if not _is_parts(content):
            raise ValueError(
                f'{where}: the content has parts other than {{"type": "text", "text": ...}}, '
                "and this model reads only text"
            )
        content = PARAGRAPH.join(filter(None, map(_part_text, content)))
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
    is_list = isinstance(content, list) and bool(content)
    return is_list and all(isinstance(_part_text(part), str) for part in content)


def _part_text(part: Any) -> Any:
    """The text of a part; None for a part of another kind."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        return None
    return part.get(_TEXT_PARTS[kind])


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
    call = as_mapping(call)
    function = as_mapping(call.get("function", call)) if isinstance(call, Mapping) else None
    if not _has_name(function):
        raise ValueError(f'{where} is not {{"function": {{"name": ..., "arguments": ...}}}}')
    return FunctionCall(
        name=_text(where, function["name"]),
        arguments=_arguments(where, function.get("arguments")),
        id=_optional_text(where, call, "id"),
    )


def _old_call(where: str, call: Any) -> FunctionCall:
    """OpenAI's form of 2023, without ids: a result belongs to the last call of its function."""
    made = _call(f"{where}: function_call", call)
    return replace(made, id=made.name)


def _arguments(where: str, arguments: Any) -> dict[str, Any] | str:
    """The arguments; as text they stay text, and a string in JSON if they are not an object."""
    if arguments is None:
        return {}
    if isinstance(arguments, str):
        # OpenAI's servers write "" if there are none
        arguments = _text(where, arguments) if arguments.strip() else "{}"
        return arguments if isinstance(_value(arguments), dict) else to_json(arguments)
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}: the arguments are not a JSON object, as a dict or as text")
    try:
        return as_json(dict(arguments))
    except ValueError as error:
        raise ValueError(
            f"{where}: the arguments have a value that JSON cannot hold: {error}"
        ) from None


def _value(content: Any) -> Any:
    """The value of text that is JSON; text that only Python accepts (NaN, too deep) stays text."""
    return as_json(json.loads(content)) if _is_json(content) else content


def _is_json(content: Any) -> bool:
    try:
        as_json(json.loads(content))
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _unescaped(escape: re.Match[str]) -> str:
    """The letters of JSON's escapes; those that JSON or a terminal needs stay escapes."""
    if not escape[0].startswith("\\u"):
        return escape[0]
    letters = json.loads(f'"{escape[0]}"')
    return letters if letters.isprintable() and not set(letters) & set('"\\<') else escape[0]
