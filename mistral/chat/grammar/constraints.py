"""The grammars of JSON and of tool calls, as constraints for `mistral.generate`.

Needs the extra `chat`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mistral.chat.formats.mistral_instruct import CALL_ID
from mistral.chat.formats.prompts import wrapped
from mistral.chat.grammar.bounded_schema import Limits, bounded_schema
from mistral.chat.grammar.schema_options import GrammarError, UnsupportedSchema
from mistral.chat.grammar.token_masks import GrammarConstraint, grammar_constraint
from mistral.chat.tools.json_schema import SchemaError
from mistral.tokenizer import Tokenizer

__all__ = [
    "GrammarConstraint",
    "GrammarError",
    "Limits",
    "UnsupportedSchema",
    "call_list_constraint",
    "json_constraint",
    "tool_call_constraint",
]

LIMITS = Limits()

# The tag is plain text for this model: several tokens, cut where the model likes.
TOOL_GRAMMAR = r"""
start: {start}
call: "<tool_call>" rest
text_call: text_and_tag rest
text_and_tag[lazy]: ANY "<tool_call>"
rest: "\n" json "\n</tool_call>"
json: %json {schema}
ANY: /(?s:.*)/
TEXT: ANY & ~/(?s:.*)<tool_call>(?s:.*)/
"""
TEXT_GRAMMAR = r"""
start: TEXT
TEXT: /(?s:.*)/ & ~/(?s:.*)<tool_call>(?s:.*)/
"""


def json_constraint(
    tokenizer: Tokenizer,
    vocab_size: int,
    schema: Mapping[str, Any],
    *,
    limits: Limits = LIMITS,
    stop_tokens: Sequence[int] | None = None,
    begins_text: bool = False,
) -> GrammarConstraint:
    """A constraint to JSON that is valid for `schema`, with nothing before or behind it.

    vocab_size   the model's, which may be larger than the tokenizer's
    limits       where values end that the schema leaves open
    stop_tokens  None: the tokenizer's
    begins_text  the first token may have a leading space, which is not part of the text:
                 `ChatFormat`

    Raises SchemaError for a malformed schema, UnsupportedSchema (a GrammarError) for one that no
    grammar expresses, GrammarError for one that no value is valid for, and where the extra `chat`
    is not installed.
    """
    space = '" "? ' if begins_text else ""
    grammar = (
        f"start: {space}json\njson: %json "
        f"{_json_for_grammar(bounded_schema(schema, limits), limits)}"
    )
    return grammar_constraint(grammar, tokenizer, vocab_size, stop_tokens)


def tool_call_constraint(
    tokenizer: Tokenizer,
    vocab_size: int,
    tools: Sequence[Mapping[str, Any]],
    *,
    choice: str = "auto",
    limits: Limits = LIMITS,
    stop_tokens: Sequence[int] | None = None,
) -> GrammarConstraint:
    """A constraint to calls of these tools, in the form that Hermes-2-Pro was trained to write
    them:
    `<tool_call>`, a line of JSON with "name" and "arguments" in either order, `</tool_call>`.

    tools   {"type": "function", "function": {"name", "description", "parameters"}} each, or the
            inner object alone
    choice  auto      any text; what follows `<tool_call>` in it is a call
            required  calls, one at least and limits.max_items at most, and no other text
            none      any text without `<tool_call>`
            a name    like required, of this tool only

    The other arguments and errors are those of `json_constraint`; an error names the tool that it
    is about. GrammarError, too, for a choice that is none of these.
    """
    if choice == "none":
        return grammar_constraint(TEXT_GRAMMAR, tokenizer, vocab_size, stop_tokens)
    call = _call_schema(_chosen(tools, choice), limits)
    start = (
        "text_call* TEXT"
        if choice == "auto"
        else f'call ("\\n"? call){{0,{max(limits.max_items, 1) - 1}}}'
    )
    grammar = TOOL_GRAMMAR.format(start=start, schema=_json_for_grammar(call, limits))
    return grammar_constraint(grammar, tokenizer, vocab_size, stop_tokens)


def call_list_constraint(
    tokenizer: Tokenizer,
    vocab_size: int,
    tools: Sequence[Mapping[str, Any]],
    *,
    choice: str = "auto",
    limits: Limits = LIMITS,
    stop_tokens: Sequence[int] | None = None,
) -> GrammarConstraint:
    """A constraint to what Mistral's models write behind `[TOOL_CALLS]`: a JSON list of calls of
    these tools, one at least and limits.max_items at most, perhaps with an "id" of nine letters or
    digits each.

    choice  auto, required  calls of any of the tools
            a name          of this tool only

    The other arguments and errors are those of `tool_call_constraint`.
    """
    id = {"type": "string", "pattern": f"^{CALL_ID.pattern}$"}
    call = _call_schema(_chosen(tools, choice), limits, {"id": id})
    calls = {"type": "array", "items": call, "minItems": 1, "maxItems": max(limits.max_items, 1)}
    calls["$defs"] = call.pop("$defs")
    # the space: of the first token
    grammar = f'start: " "? json\njson: %json {_json_for_grammar(calls, limits)}'
    return grammar_constraint(grammar, tokenizer, vocab_size, stop_tokens)


def _chosen(tools: Sequence[Mapping[str, Any]], choice: str) -> list[Mapping[str, Any]]:
    """The functions that may be called: all of them, or the one that `choice` names."""
    functions = [wrapped(tool)["function"] for tool in tools]
    names = [function.get("name") for function in functions]
    if not all(isinstance(name, str) and name for name in names):
        raise GrammarError("a tool has no name")
    if len(set(names)) < len(names) or not names:
        raise GrammarError(
            "two tools have the same name" if names else "there are no tools to call"
        )
    if choice not in ("auto", "required", *names):
        raise GrammarError(f"there is no tool {choice!r} to choose; there are {', '.join(names)}")
    return [function for function in functions if choice in ("auto", "required", function["name"])]


def _call_schema(
    functions: Sequence[Mapping[str, Any]],
    limits: Limits,
    optional: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Calls of the functions, with either key first; `optional` keys may follow."""
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
    """The bounded schema of a function's arguments; the names of its `$defs` begin with
    `definitions`.
    """
    parameters = dict(function.get("parameters") or {})
    if parameters.setdefault("type", "object") != "object":
        raise GrammarError(f"tool {function['name']!r}: its parameters must be of the type object")
    if not parameters.keys() & {"$ref", "allOf", "anyOf", "oneOf", "additionalProperties"}:
        parameters.setdefault("properties", {})  # no parameters are described: there are none
    try:
        return bounded_schema(parameters, limits, definitions)
    except UnsupportedSchema as error:
        raise UnsupportedSchema(
            error.keyword, f"{error.reason} (tool {function['name']!r})"
        ) from None
    except (GrammarError, SchemaError) as error:
        raise type(error)(f"tool {function['name']!r}: {error}") from None


def _json_for_grammar(schema: dict[str, Any], limits: Limits) -> str:
    """The schema with llguidance's own options; its whitespace has no end unless told."""
    if limits.max_indent:
        options = {"whitespace_pattern": f" |\\n {{0,{limits.max_indent}}}"}
    else:
        options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return json.dumps({**schema, "x-guidance": options})
