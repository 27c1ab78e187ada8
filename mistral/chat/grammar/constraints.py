"""The grammars of JSON and of calls, as constraints for `mistral.generate`."""

import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from mistral.chat.formats.call_objects import CALL_ID
from mistral.chat.grammar.schema_options import SchemaOptions
from mistral.chat.grammar.schema_rules import MAX_RULES, SchemaRules, terminals
from mistral.chat.grammar.token_masks import (
    GrammarConstraint,
    GrammarError,
    UnsupportedSchema,
    grammar_constraint,
)
from mistral.chat.tools import wrapped
from mistral.chat.tools.json_schema import SchemaError, as_json, compile_schema
from mistral.tokenizer import Tokenizer

# The tag is plain text for these models: several tokens, which the model may cut anywhere.
_TOOL_GRAMMAR = r"""
start: {start}
call: "<tool_call>" rest
text_call: text_and_tag rest
text_and_tag[lazy]: ANY "<tool_call>"
rest: "\n" json "\n</tool_call>"
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
    one_line: bool = False,
    stop_tokens: Sequence[int] | None = None,
    strip_leading_space: bool = False,
) -> GrammarConstraint:
    """A constraint to JSON that is valid for `schema`, with nothing before or after it.

    The schema is the only bound of an answer, with two exceptions: an integer has digits alone (in
    JSON 27.0 is one, too), and an object that names properties has no others, unless its schema
    speaks of others (schema_rules.py). A keyword that the grammar cannot express is dropped with a
    warning: validate the answer, which is always right.

    vocab_size           the model's, which may be larger than the tokenizer's
    one_line             the spaces of json.dumps, and no others; False: also none, or lines
    stop_tokens          None: the tokenizer's
    strip_leading_space  the first token may have a leading space that is not part of the text: see
                         `ChatFormat`

    Raises SchemaError for a malformed schema, UnsupportedSchema (a GrammarError) for one that is
    too large, GrammarError for one that no value is valid for, and if the extra `chat` is not
    installed.
    """
    start, rules, dropped = _rules(_written(schema), "v")
    _warn(dropped)
    space = '" "? ' if strip_leading_space else ""
    grammar = f"start: {space}{start}\n{terminals(one_line)}\n" + "\n".join(rules)
    return grammar_constraint(grammar, tokenizer, vocab_size, stop_tokens)


def tool_call_constraint(
    tokenizer: Tokenizer,
    vocab_size: int,
    tools: Sequence[Mapping[str, Any]],
    *,
    choice: str = "auto",
    parallel: bool = True,
    answer: Mapping[str, Any] | None = None,
    one_line: bool = False,
    stop_tokens: Sequence[int] | None = None,
) -> GrammarConstraint:
    """A constraint to calls of these tools in Hermes-2-Pro's form.

    That is `<tool_call>`, JSON with "name" and "arguments" in either order, `</tool_call>`. A tool
    whose schema is too large may have any arguments, with a warning; the others keep theirs.

    tools   {"type": "function", "function": {"name", "description", "parameters"}} each, or the
            inner object alone
    choice  auto      any text, but a call after each `<tool_call>`
            required  only calls, one or more
            none      any text without `<tool_call>`
            a name    like required, of this tool only
    parallel  False: one call at most
    answer    a schema: with the choice auto, either calls or JSON that is valid for it, alone

    The other arguments and errors are those of `json_constraint`; an error names its tool.
    GrammarError, too, for an unknown choice.
    """
    if choice == "none":
        return grammar_constraint(_TEXT_GRAMMAR, tokenizer, vocab_size, stop_tokens)
    calls = 'call ("\\n"? call)*' if parallel else "call"
    start = calls
    answer_rules: list[str] = []
    if choice == "auto" and answer is None:
        start = "text_call* TEXT" if parallel else "text_call? TEXT"
    elif choice == "auto":
        first, answer_rules, dropped = _rules(_written(answer), "v")
        _warn(dropped)
        start = f"{calls} | {first}"
    grammar = _TOOL_GRAMMAR.replace("{start}", start) + terminals(one_line)
    return _calls_constraint(
        _chosen(tools, choice),
        grammar,
        {},
        (tokenizer, vocab_size, stop_tokens),
        answer_rules,
    )


def call_list_constraint(
    tokenizer: Tokenizer,
    vocab_size: int,
    tools: Sequence[Mapping[str, Any]],
    *,
    choice: str = "auto",
    parallel: bool = True,
    one_line: bool = False,
    stop_tokens: Sequence[int] | None = None,
) -> GrammarConstraint:
    """A constraint to the list of calls that Mistral's models write after `[TOOL_CALLS]`.

    It is JSON, one call or (if `parallel`) more, each with an optional "id" of nine letters or
    digits.

    choice  auto, required  calls of any of the tools
            a name          of this tool only

    The other arguments and errors are those of `tool_call_constraint`.
    """
    id = {"type": "string", "pattern": f"^{CALL_ID.pattern}$"}
    # The optional space is the leading space of the first token.
    more = "(COMMA json)*" if parallel else ""
    grammar = f'start: " "? LIST json {more} END\n{terminals(one_line)}'
    return _calls_constraint(
        _chosen(tools, choice), grammar, {"id": id}, (tokenizer, vocab_size, stop_tokens)
    )


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


def _calls_constraint(
    functions: Sequence[Mapping[str, Any]],
    grammar: str,
    optional: Mapping[str, Any],
    options: tuple[Tokenizer, int, Sequence[int] | None],
    other_rules: Sequence[str] = (),
) -> GrammarConstraint:
    """`grammar` with a rule `json` for a call; too large tools lose their schemas.

    other_rules  that the grammar uses
    """
    calls = []
    open_tools: list[str] = []
    for i, function in enumerate(functions):
        any_object = sum(len(call[1]) for call in calls) > MAX_RULES
        calls.append(_call(function, optional, f"c{i}_", any_object))
        open_tools += [function["name"]] * any_object
    while True:
        starts = " | ".join(call[0] for call in calls)
        lines = [line for call in calls for line in call[1]]
        rules = "\n".join(dict.fromkeys([*other_rules, *lines]))
        try:
            constraint = grammar_constraint(f"{grammar}\njson: {starts}\n{rules}", *options)
            break
        except UnsupportedSchema:
            closed = [i for i in range(len(calls)) if functions[i]["name"] not in open_tools]
            if not closed:
                raise
            closed.sort(key=lambda i: sum(map(len, calls[i][1])), reverse=True)
            for i in closed[: max(len(closed) // 2, 1)]:  # try again without the largest ones
                calls[i] = _call(functions[i], optional, f"c{i}_", any_object=True)
                open_tools.append(functions[i]["name"])
    for call, function in zip(calls, functions):
        _warn(call[2], f"tool {function['name']!r}: ")
    if open_tools:
        some = ", ".join(open_tools[:3]) + ", ..." * (len(open_tools) > 3)
        warnings.warn(
            f"the grammar of all tools is too large: the arguments of {len(open_tools)} of them "
            f"are checked only after they are written ({some})",
            stacklevel=4,
        )
    return constraint


def _call(
    function: Mapping[str, Any],
    optional: Mapping[str, Any],
    prefix: str,
    any_object: bool = False,
) -> tuple[str, list[str], dict[str, str]]:
    """The start, the rules, and the dropped keywords of the calls of one function."""
    parameters = {} if any_object else dict(function.get("parameters") or {})
    if parameters.setdefault("type", "object") != "object":
        raise GrammarError(f"tool {function['name']!r}: its parameters must be of the type object")
    # Models invent arguments: as in `check_arguments`, there are no others.
    if not any_object and {"additionalProperties", "unevaluatedProperties"}.isdisjoint(parameters):
        parameters["unevaluatedProperties"] = False
    around = {"name": {"const": function["name"]}, **optional}
    try:
        return _rules(_written(parameters), prefix, json.dumps(around))
    except UnsupportedSchema as error:
        start, rules, _ = _call(function, optional, prefix, any_object=True)
        return start, rules, {error.keyword: error.reason}
    except (GrammarError, SchemaError) as error:
        raise type(error)(f"tool {function['name']!r}: {error}") from None


def _written(schema: Any) -> str:
    if not isinstance(schema, Mapping):
        raise SchemaError(f"a schema is a JSON object, not {type(schema).__name__}")
    try:
        return json.dumps(as_json(dict(schema)))
    except ValueError as error:
        raise SchemaError(f"malformed schema: {error}") from None


@functools.lru_cache(512)
def _rules(schema: str, prefix: str, around: str = "") -> tuple[str, list[str], dict[str, str]]:
    """The first rule, all rules, and the dropped keywords of a schema in JSON.

    around  other properties of the object whose "arguments" the schema is for
    """
    options = SchemaOptions(compile_schema(json.loads(schema)))
    rules = SchemaRules(options, prefix)
    whole: Any = options.root
    if around:
        properties = {"arguments": whole, **json.loads(around)}
        whole = {"type": "object", "properties": properties, "required": ["arguments", "name"]}
        whole["additionalProperties"] = False
    try:
        start = rules.rule(whole)
        return start, rules.written(start), options.dropped
    except RecursionError:
        raise UnsupportedSchema("$ref", "the schema is nested too deeply") from None


def _warn(dropped: Mapping[str, str], where: str = "") -> None:
    for keyword, reason in dropped.items():
        warnings.warn(
            f"{where}the grammar leaves {keyword!r} to the check of what is written: {reason}",
            stacklevel=5,
        )
