"""The rules of the model card's 91% (function calling) and 84% (JSON mode), mistakes included.

They are those of https://github.com/interstellarninja/function-calling-eval at commit 1c9fcb5 of
3 March 2024, ten days before the model was released; later ones differ. If that program would end
with an exception, the row fails here.
"""

import ast
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from mistral.errors import MistralError, one_line
from mistral.evaluation.rows import Row
from mistral.evaluation.verdict import Verdict, key_problem

_END = "<|im_end|>"
_PYTHON_TYPES = {
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


class _Crash(Exception):
    """Their program ends with an exception."""


CRASHES = (_Crash, TypeError, ValueError, RecursionError, MemoryError)


def score_calls(row: Row, answer: str) -> Verdict:
    """Whether the answer makes the expected calls."""
    try:
        calls = tool_calls(_assistant_text(row, answer))
        return _score_calls(row, calls) if calls else Verdict("no call")
    except ElementTree.ParseError as error:
        return Verdict("no call", f"the answer is not XML: {error}")
    except CRASHES as error:
        return Verdict("crash", one_line(str(error)))


def score_json(row: Row, answer: str) -> Verdict:
    """Whether the answer is the expected JSON."""
    try:
        text = _assistant_text(row, answer)
    except _Crash as error:
        return Verdict("crash", str(error))
    try:
        value = _read_value(text)
    except CRASHES as error:
        return Verdict("not JSON", one_line(str(error)))
    for item in value if isinstance(value, list) else [value]:
        if wrong := _schema_problem(row.schema, item):
            return Verdict("schema failure", wrong)
    if wrong := key_problem(row.expected, value):
        return Verdict("wrong keys", wrong)
    for key, expected in row.expected.items():
        if value[key] != expected:
            return Verdict(
                "wrong values", one_line(f"{key}: expected {expected!r}, got {value[key]!r}")
            )
    return Verdict("passed")


def _assistant_text(row: Row, answer: str) -> str:
    """The match of their pattern: the text after the last `>assistant` in the whole conversation.

    The pattern has one backslash too many before each bar, so it is three patterns: `<\\`,
    `im_start\\` and the intended one. If one of the first two occurs anywhere, it matches no text
    that could be returned.
    """
    conversation = ""
    for message in row.messages:
        conversation += f"<|im_start|>{message['role']}\n{message['content']}{_END}\n"
    conversation += f"<|im_start|>assistant\n{answer}"
    for text in ("<\\", "im_start\\"):
        if text in conversation:
            raise _Crash(f"the conversation has {text!r} in it")
    return re.split(r">\s*assistant", conversation)[-1].strip().replace(_END, "")


def tool_calls(text: str) -> list[Any]:
    """The values in `<tool_call>` tags, without those that are neither JSON nor Python's literals.

    Raises xml's ParseError unless the whole text is XML, and one of CRASHES for some contents of
    tags.
    """
    # Entities cannot be declared in a root element, so XML's usual bombs are harmless.
    root = ElementTree.fromstring(f"<root>{text}</root>")
    values: list[Any] = []
    last: list[Any] = []  # the previous value
    for element in root.iterfind(".//tool_call"):
        if element.text is not None:
            try:
                last = [_read_value(element.text.strip())]
            except _Unreadable:
                continue
        elif not last:
            raise _Crash("the first <tool_call> is empty")
        values += last  # an empty tag repeats the previous value
    return values


class _Unreadable(ValueError):
    """Neither JSON nor a Python literal."""


def _read_value(text: str) -> Any:
    """JSON, else a Python literal."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"neither a Python literal nor JSON: {error}"
    try:
        with warnings.catch_warnings(action="ignore"):  # about escapes in strings
            return ast.literal_eval(text)
    except (SyntaxError, ValueError):  # their messages contain addresses
        raise _Unreadable(problem) from None


def _score_calls(row: Row, calls: list[Any]) -> Verdict:
    if len(calls) != len(row.expected):
        return Verdict("wrong count", f"expected {len(row.expected)}, got {len(calls)}")
    for expected in row.expected:
        for call in calls:
            if failed := check_call(call, row.tools):
                return failed
            if call["name"] == expected["name"]:
                # The first call of that name, even if it was compared before
                if failed := _compare(call, expected):
                    return failed
                break
        else:
            return Verdict("wrong function", f"{expected['name']} is not called")
    json.dumps(calls)  # they log the calls: a Python set, for example, ends their program
    return Verdict("passed")


def _compare(call: dict[str, Any], expected: dict[str, Any]) -> Verdict | None:
    for name, value in expected["arguments"].items():
        got = call["arguments"].get(name)
        if got != value:
            detail = f"{call['name']}, {name}: expected {value!r}, got {got!r}"
            return Verdict("wrong argument", one_line(detail))
    return None


def check_call(call: Any, tools: Sequence[Any]) -> Verdict | None:
    """Why their validator rejects a call; None for one that it accepts.

    It accepts arguments that the function does not have, every value that is false in Python,
    booleans for integers, and values outside of an enum that is not one of strings. It rejects 3.0
    for an integer and every value of an argument with several types.
    """
    if not isinstance(call, dict) or not all(isinstance(key, str) for key in call):
        raise _Crash("a call is not an object")
    if not isinstance(call.get("name"), str) or not isinstance(call.get("arguments"), dict):
        return Verdict("schema failure", "a call without a name or without an object of arguments")
    for tool in tools:
        if not _is_tool(tool):  # it does not look at the other tools
            return Verdict("schema failure", "one of the tools is malformed")
        function = tool["function"]
        if function["name"] == call["name"]:
            try:
                wrong = _arguments_problem(call["arguments"], function.get("parameters"))
            except (AttributeError, TypeError, LookupError) as error:
                wrong = str(error)  # from schemas that they do not support
            if not wrong:
                return None
            return Verdict("schema failure", one_line(f"{call['name']}: {wrong}"))
    detail = f"No matching function signature found for function: {call['name']}"
    return Verdict("unknown function", one_line(detail))


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return (
        isinstance(function, dict)
        and tool.get("type") == "function"
        and isinstance(function.get("name"), str)
        and isinstance(function.get("description"), str | None)
        and isinstance(function.get("parameters"), dict | None)
    )


def _arguments_problem(arguments: dict[str, Any], parameters: Any) -> str | None:
    for name, schema in parameters.get("properties", {}).items():
        value = arguments.get(name)
        if value and (wrong := _value_problem(name, value, schema)):
            return wrong
    missing = [name for name in parameters.get("required", []) if name not in arguments]
    return f"Missing required arguments: {missing}" if missing else None


def _value_problem(name: str, value: Any, schema: Any) -> str | None:
    type_name = schema.get("type")
    if not type_name:
        return None
    if type_name == "string" and "enum" in schema:
        choices = schema["enum"]
        if None not in choices and choices != [] and value not in choices:
            return (
                f"Invalid value '{value}' for parameter {name}. Expected one of "
                f"{', '.join(map(str, choices))}"
            )
    if not isinstance(value, _PYTHON_TYPES[type_name]):
        return f"Type mismatch for parameter {name}. Expected: {type_name}, Got: {type(value)}"
    return None


def _schema_problem(schema: dict[str, Any], value: Any) -> str | None:
    """As they do, by the draft that the schema names; but no `$ref` is fetched."""
    try:
        from jsonschema import Draft202012Validator, validators
        from referencing import Registry
    except ImportError:
        raise MistralError(
            'jsonschema is not installed; install the extra: pip install -e ".[eval]"'
        ) from None
    try:
        validator = validators.validator_for(schema, default=Draft202012Validator)
        validator.check_schema(schema)
        error = next(validator(schema, registry=Registry()).iter_errors(value), None)
    except Exception as error:  # they, too, count every exception as a failure
        return one_line(str(error))
    return one_line(error.message) if error else None
