"""A call as an object in JSON: {"name": ..., "arguments": {...}}, in some formats with an "id"."""

import json
import re
from typing import Any

from mistral.chat.formats.literals import read_literals

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*+")
CALL_ID = re.compile("[A-Za-z0-9]{9}")  # the ids that Mistral's models were trained with


_ALIASES = ("args", "kwargs", "parameters", "params", "input")  # that models write for arguments


def call_of(value: Any) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a call; next to arguments, other keys do not matter.

    Arguments may be JSON in a string, which is decoded once. They are {} if there are none, or
    only null or a blank string. Raises ValueError for anything else, and if the arguments seem to
    be under another key: a call must not lose them.
    """
    if not isinstance(value, dict):
        raise ValueError('a call is an object with "name" and "arguments"')
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError('the call has no "name"')
    arguments = value.get("arguments")
    if isinstance(arguments, str):
        arguments = _decoded(name, arguments)
    if not arguments and (misplaced := _misplaced(value, arguments)):
        raise ValueError(
            f'the call of {name!r} has no "arguments", but {", ".join(map(repr, misplaced))}: '
            'write {"name": ..., "arguments": {...}}'
        )
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(f'the "arguments" of {name!r} are not an object')
    return name, arguments


def written_arguments(text: str, at: int) -> tuple[str | None, int]:
    """The arguments of the call that begins at `at`, as they are written, and its end.

    None if they are not an object. Raises ValueError for a call that is not valid JSON.
    """
    found = None
    if text[at : at + 1] != "{":
        raise ValueError("a call is an object")
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, _after_space(text, at + 1))
        start = _after_space(text, _after(text, at, ":"))
        value, at = _DECODER.raw_decode(text, start)
        if key == "arguments":
            found = text[start:at] if isinstance(value, dict) else None
        at = _after_space(text, at)
        if text[at : at + 1] not in (",", "}"):
            raise ValueError("a comma or a brace is missing")
    return found, at + 1


def written_lists(text: str) -> list[str | None]:
    """The arguments of the calls of a list, as they are written; none if it is not JSON."""
    found = []
    try:
        at = _after(text, 0, "[") - 1
        while text[at : at + 1] in ("[", ","):
            written, at = written_arguments(text, _after_space(text, at + 1))
            found.append(written)
            at = _after_space(text, at)
    except (ValueError, RecursionError):
        return []
    return found


def _after_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


def _after(text: str, at: int, symbol: str) -> int:
    """The place after a symbol that may have spaces before it."""
    at = _after_space(text, at)
    if text[at : at + 1] != symbol:
        raise ValueError(f"{symbol!r} is missing")
    return at + 1


def _misplaced(value: dict[str, Any], arguments: Any) -> list[str]:
    """The keys that may hold the arguments; next to an empty object only the usual ones."""
    keys = [key for key in value if key not in ("name", "arguments")]
    if arguments is not None:
        return [key for key in keys if key in _ALIASES and value[key]]
    about_the_call = {
        "type": value.get("type") == "function",
        "id": isinstance(value.get("id"), str),
    }
    return [key for key in keys if not about_the_call.get(key)]


def _decoded(name: str, arguments: str) -> Any:
    """The value of arguments in a string; None for a blank one."""
    if not arguments.strip():
        return None
    try:
        values = read_literals(arguments)
        if len(values) > 1:
            raise ValueError(f"{len(values)} values")
    except ValueError as error:
        raise ValueError(
            f'the "arguments" of {name!r} are a string, but not an object in JSON: {error}'
        ) from None
    return values[0]
