"""The objects in which a model says what to call: {"name": ..., "arguments": {...}}."""

import re
from typing import Any

from mistral.chat.formats.literals import read_literals

# How a message may begin that is a call without `<tool_call>`, and the other tags that may stand
# around it
BEGINNINGS = ("{", "[", "```", "<function", "<tool>", "<tools>", "<response>", "<json>", "<xml>")
HEAD = max(map(len, BEGINNINGS))  # characters that are enough to tell
OTHER_TAGS = ("function_call", "tool_call", "tool", "tools", "response", "json", "xml")
_OPENING_TAG = re.compile(r"<(\w++)>")
_FUNCTION = re.compile(r"""<function(?:=|\s+name=)(["']?)([^"'<>]++)\1>""")


def call_of(value: Any, lenient: bool = False) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a call; further keys do not matter.

    Arguments may be JSON in a string, which is decoded once; without any, with null or a blank
    string they are {}.
    lenient  "parameters" is another word for "arguments"

    Raises ValueError for anything else.
    """
    if not isinstance(value, dict):
        raise ValueError('a call is an object with "name" and "arguments"')
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError('the call has no "name"')
    key = "parameters" if lenient and "arguments" not in value else "arguments"
    arguments = value.get(key)
    if isinstance(arguments, str):
        try:
            values = read_literals(arguments) if arguments.strip() else [None]
            if len(values) > 1:
                raise ValueError(f"{len(values)} values")
            [arguments] = values
        except ValueError as error:
            raise ValueError(
                f'the "{key}" of {name!r} are a string, but not an object in JSON: {error}'
            ) from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(f'the "{key}" of {name!r} are not an object')
    return name, arguments


def flattened(values: list[Any]) -> list[Any]:
    """The values, those in lists among them one by one."""
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def could_begin_untagged(text: str) -> bool:
    """Whether a message that begins with this text may still turn out to be untagged calls."""
    head = text[:HEAD].lower()
    return any(head.startswith(beginning) or beginning.startswith(head) for beginning in BEGINNINGS)


def untagged_calls(message: str) -> list[tuple[str, dict[str, Any]]]:
    """The calls that a whole message consists of, in other tags than `<tool_call>` or in none; []
    if it does not.

    Read are objects and lists of them with "name" and "arguments" (or "parameters"), bare, in a
    code block
    (```json, ```xml or ```), in one of OTHER_TAGS, in a tag in a code block, and the arguments
    alone in `<function=NAME>` or `<function name="NAME">`: the forms that llama.cpp took for
    Hermes' calls in 2025.
    Source: https://github.com/ggml-org/llama.cpp, common/chat.cpp, common_chat_parse_hermes_2_pro
    """
    text = message.strip()
    if text.startswith("```") and text.endswith("```"):
        text = text[3:-3]
        for language in ("json", "xml"):
            text = text.removeprefix(language)
        text = text.strip()
    function = _FUNCTION.match(text)
    tag = _OPENING_TAG.match(text)
    if function and text.endswith("</function>"):
        text = text[function.end() :].removesuffix("</function>")
    elif tag and tag[1].lower() in OTHER_TAGS and text.endswith(f"</{tag[1]}>"):
        text = text[tag.end() :].removesuffix(f"</{tag[1]}>")
    try:
        values = flattened(read_literals(text))
        if function:
            values = [{"name": function[2].strip(), "arguments": value} for value in values]
        # A name alone is not enough: most objects that have one are data.
        if not all(
            isinstance(value, dict) and {"arguments", "parameters"} & value.keys()
            for value in values
        ):
            return []
        return [call_of(value, lenient=True) for value in values]
    except ValueError:
        return []
