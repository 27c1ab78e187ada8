"""The evaluation of `paper_rules` with its mistakes corrected.

- Calls are parsed as in a chat (`parse_tool_calls`), not as XML.
- Every expected call needs a call of its own, in any order; calls of one function are matched by
  their arguments.
- All arguments count. An unexpected one is wrong, unless leaving it out means the same: null or the
  default.
- Values are compared as JSON: 1 is 1.0, but true is not 1. In JSON mode the answer may be in a code
  block.

An answer that equals the expected one passes, even if it is invalid for the JSON schema; the schema
only explains why others fail.
"""

import re
from collections import Counter
from typing import Any

from mistral.chat.events import Call
from mistral.chat.formats.literals import read_literals
from mistral.chat.formats.tool_calls import parse_tool_calls
from mistral.chat.tools.json_schema import SchemaError, compile_schema, problem
from mistral.errors import one_line
from mistral.evaluation.rows import Row
from mistral.evaluation.verdict import Verdict, key_problem

_FENCE = re.compile(r"```(?:json)?\s(.*)```", re.DOTALL)


def score_calls(row: Row, answer: str) -> Verdict:
    """Whether the answer makes the expected calls, and no others."""
    # 1. As many calls as expected, all of them readable.
    reply = parse_tool_calls(answer)
    if row.expected and not reply.calls:
        return Verdict("no call", one_line(reply.errors[0].message) if reply.errors else "")
    if reply.errors or len(reply.calls) != len(row.expected):
        unreadable = f" and {len(reply.errors)} that cannot be parsed" if reply.errors else ""
        return Verdict(
            "wrong count", f"expected {len(row.expected)}, got {len(reply.calls)}{unreadable}"
        )
    # 2. Match each call with an expected one.
    functions = {tool["function"]["name"]: tool["function"].get("parameters") for tool in row.tools}
    missing = list(row.expected)
    wrong = []
    for call in reply.calls:
        parameters = functions.get(call.name)
        arguments = _without_defaults(call.arguments, parameters)
        for i, expected in enumerate(missing):
            if expected["name"] != call.name:
                continue
            if _equal(arguments, _without_defaults(expected["arguments"], parameters)):
                del missing[i]
                break
        else:
            wrong.append(call)
    return _why(wrong, missing, functions) if wrong else Verdict("passed")


def score_json(row: Row, answer: str) -> Verdict:
    """Whether the answer is the expected JSON."""
    text = answer.strip()
    fenced = _FENCE.fullmatch(text)
    try:
        values = read_literals(fenced[1] if fenced else text)
    except ValueError as error:
        return Verdict("not JSON", one_line(str(error)))
    if len(values) > 1:
        return Verdict("not JSON", f"{len(values)} values")
    value = values[0]
    expected = row.expected
    if _equal(value, expected):
        return Verdict("passed")
    if wrong := _schema_problem(row.schema, value):
        return Verdict("schema failure", wrong)
    if wrong := key_problem(expected, value):
        return Verdict("wrong keys", wrong)
    key = next(key for key in expected if not _equal(value[key], expected[key]))
    return Verdict(
        "wrong values", one_line(f"{key}: expected {expected[key]!r}, got {value[key]!r}")
    )


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are equal in JSON: booleans are not numbers, objects have no order."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def _without_defaults(arguments: dict[str, Any], parameters: Any) -> dict[str, Any]:
    """The arguments without those that mean the same if left out: optional, null or the default."""
    parameters = parameters if isinstance(parameters, dict) else {}
    properties = parameters.get("properties")
    required = parameters.get("required")

    def may_be_left_out(name: str, value: Any) -> bool:
        schema = properties.get(name) if isinstance(properties, dict) else None
        default = schema.get("default") if isinstance(schema, dict) else None
        return _equal(value, default) and not (isinstance(required, list) and name in required)

    return {name: value for name, value in arguments.items() if not may_be_left_out(name, value)}


def _why(wrong: list[Call], missing: list[dict[str, Any]], functions: dict[str, Any]) -> Verdict:
    """The verdict on wrong calls; `missing` are the expected calls without a match, as many."""
    for call in wrong:
        if call.name not in functions:
            return Verdict("unknown function", one_line(call.name))
    for call in wrong:
        if failure := _schema_problem(functions[call.name] or {}, call.arguments):
            return Verdict("schema failure", one_line(f"{call.name}: {failure}"))
    names_differ = Counter(call.name for call in wrong) != Counter(call["name"] for call in missing)
    got = [{"name": call.name, "arguments": call.arguments} for call in wrong]
    reason = "wrong function" if names_differ else "wrong argument"
    return Verdict(reason, one_line(f"expected {missing}, got {got}"))


def _schema_problem(schema: Any, value: Any) -> str | None:
    try:
        return problem(compile_schema(schema), value)
    except SchemaError:  # a malformed schema says nothing about the value
        return None
