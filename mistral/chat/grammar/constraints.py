"""The grammars of JSON and of calls, as constraints for `mistral.generate`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mistral.chat.formats.call_objects import CALL_ID
from mistral.chat.grammar.bounded_schema import Limits, bounded_schema
from mistral.chat.grammar.schema_options import GrammarError, UnsupportedSchema
from mistral.chat.grammar.token_masks import GrammarConstraint, grammar_constraint
from mistral.chat.tools import wrapped
from mistral.chat.tools.json_schema import SchemaError
from mistral.tokenizer import Tokenizer

_LIMITS = Limits()

# The tag is plain text for these models: several tokens, which the model may cut anywhere.
_TOOL_GRAMMAR = r"""
start: {start}
call: "<tool_call>" rest
text_call: text_and_tag rest
text_and_tag[lazy]: ANY "<tool_call>"
rest: "\n" json "\n</tool_call>"
json: %json {schema}
ANY: /(?s:.*)/
TEXT: ANY & ~/(?s:.*)<tool_call>(?s:.*)/
"""
_TEXT_GRAMMAR = r"""
start: TEXT
TEXT: /(?s:.*)/ & ~/(?s:.*)<tool_call>(?s:.*)/
"""


def json_constraint(
    tokenizer: Tokenizer,
    vocab_size: int,
    schema: Mapping[str, Any],
    *,
    limits: Limits = _LIMITS,
    stop_tokens: Sequence[int] | None = None,
    strip_leading_space: bool = False,
) -> GrammarConstraint:
    """A constraint to JSON that is valid for `schema`, with nothing before or after it.

    vocab_size           the model's, which may be larger than the tokenizer's
    limits               for values that the schema leaves unbounded
    stop_tokens          None: the tokenizer's
    strip_leading_space  the first token may have a leading space that is not part of the text: see
                         `ChatFormat`

    Raises SchemaError for a malformed schema, UnsupportedSchema (a GrammarError) for one that the
    grammar cannot express, GrammarError for one that no value is valid for, and if the extra `chat`
    is not installed.
    """
    space = '" "? ' if strip_leading_space else ""
    schema_json = _json_for_grammar(bounded_schema(schema, limits), limits)
    grammar = f"start: {space}json\njson: %json {schema_json}"
    return grammar_constraint(grammar, tokenizer, vocab_size, stop_tokens)


def tool_call_constraint(
    tokenizer: Tokenizer,
    vocab_size: int,
    tools: Sequence[Mapping[str, Any]],
    *,
    choice: str = "auto",
    limits: Limits = _LIMITS,
    stop_tokens: Sequence[int] | None = None,
) -> GrammarConstraint:
    """A constraint to calls of these tools in Hermes-2-Pro's form.

    That is `<tool_call>`, a line of JSON with "name" and "arguments" in either order,
    `</tool_call>`.

    tools   {"type": "function", "function": {"name", "description", "parameters"}} each, or the
            inner object alone
    choice  auto      any text, but a call after each `<tool_call>`
            required  only calls, from one to limits.max_items
            none      any text without `<tool_call>`
            a name    like required, of this tool only

    The other arguments and errors are those of `json_constraint`; an error names its tool.
    GrammarError, too, for an unknown choice.
    """
    if choice == "none":
        return grammar_constraint(_TEXT_GRAMMAR, tokenizer, vocab_size, stop_tokens)
    call = _call_schema(_chosen(tools, choice), limits)
    start = "text_call* TEXT"
    if choice != "auto":
        start = f'call ("\\n"? call){{0,{max(limits.max_items, 1) - 1}}}'
    grammar = _TOOL_GRAMMAR.format(start=start, schema=_json_for_grammar(call, limits))
    return grammar_constraint(grammar, tokenizer, vocab_size, stop_tokens)


def call_list_constraint(
    tokenizer: Tokenizer,
    vocab_size: int,
    tools: Sequence[Mapping[str, Any]],
    *,
    choice: str = "auto",
    limits: Limits = _LIMITS,
    stop_tokens: Sequence[int] | None = None,
) -> GrammarConstraint:
    """A constraint to the list of calls that Mistral's models write after `[TOOL_CALLS]`.

    It is JSON, from one to limits.max_items calls, each with an optional "id" of nine letters or
    digits.

    choice  auto, required  calls of any of the tools
            a name          of this tool only

    The other arguments and errors are those of `tool_call_constraint`.
    """
    id = {"type": "string", "pattern": f"^{CALL_ID.pattern}$"}
    call = _call_schema(_chosen(tools, choice), limits, {"id": id})
    calls = {"type": "array", "items": call, "minItems": 1, "maxItems": max(limits.max_items, 1)}
    calls["$defs"] = call.pop("$defs")
    # The optional space is the leading space of the first token.
    grammar = f'start: " "? json\njson: %json {_json_for_grammar(calls, limits)}'
    return grammar_constraint(grammar, tokenizer, vocab_size, stop_tokens)


def _chosen(tools: Sequence[Mapping[str, Any]], choice: str) -> list[Mapping[str, Any]]:
    """The functions that may be called: all of them, or the one that `choice` names."""
    functions = [wrapped(tool)["function"] for tool in tools]
    names = [function.get("name") for function in functions]
    if not all(isinstance(name, str) and name for name in names):
        raise GrammarError("a tool has no name")
    if not names:
        raise GrammarError("there are no tools to call")
    if len(set(names)) < len(names):
        raise GrammarError("two tools have the same name")
    if choice not in ("auto", "required", *names):
        raise GrammarError(f"there is no tool {choice!r} to choose; there are {', '.join(names)}")
    return [function for function in functions if choice in ("auto", "required", function["name"])]


def _call_schema(
    functions: Sequence[Mapping[str, Any]],
    limits: Limits,
    optional: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The schema of a call of any function, either key first; `optional` keys may follow."""
    calls: dict[str, Any] = {"anyOf": [], "$defs": {}}
    for i, function in enumerate(functions):
        arguments = _arguments_schema(function, limits, f"{i}_")
        calls["$defs"] |= arguments.pop("$defs")
        call = {"arguments": arguments, "name": {"const": function["name"]}}
        for keys in (("arguments", "name"), ("name", "arguments")):
            properties = {key: call[key] for key in keys} | dict(optional or {})
            calls["anyOf"].append(
                {
                    "type": "object",
                    "properties": properties,
                    "required": list(keys),
                    "additionalProperties": False,
                }
            )
    return calls


def _arguments_schema(
    function: Mapping[str, Any], limits: Limits, definitions: str
) -> dict[str, Any]:
    """The bounded schema of a function's arguments; names in `$defs` begin with `definitions`."""
    parameters = dict(function.get("parameters") or {})
    if parameters.setdefault("type", "object") != "object":
        raise GrammarError(f"tool {function['name']!r}: its parameters must be of the type object")
    if not parameters.keys() & {"$ref", "allOf", "anyOf", "oneOf", "additionalProperties"}:
        parameters.setdefault("properties", {})  # a schema without any has no parameters
    try:
        return bounded_schema(parameters, limits, definitions)
    except UnsupportedSchema as error:
        reason = f"{error.reason} (tool {function['name']!r})"
        raise UnsupportedSchema(error.keyword, reason) from None
    except (GrammarError, SchemaError) as error:
        raise type(error)(f"tool {function['name']!r}: {error}") from None


def _json_for_grammar(schema: dict[str, Any], limits: Limits) -> str:
    """The schema with llguidance's own options: by default its whitespace is unbounded."""
    if limits.max_indent:
        options = {"whitespace_pattern": f" |\\n {{0,{limits.max_indent}}}"}
    else:
        options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return json.dumps({**schema, "x-guidance": options})
