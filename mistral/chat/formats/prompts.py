"""Hermes-2-Pro's system prompts, for calling functions and for answering in JSON, and the forms of
calls and results.

Sources: the model card of NousResearch/Hermes-2-Pro-Mistral-7B, its chat template `tool_use`, and
the prompts of https://github.com/NousResearch/Hermes-Function-Calling, which differ among
themselves in quotes, order and line breaks. The model reads all of them, and does not always write
the form that its prompt shows.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

WHO = "You are a function calling AI model."
SIGNATURES = "You are provided with function signatures within <tools></tools> XML tags."
USE = (
    "You may call one or more functions to assist with the user query. "
    "Don't make assumptions about what values to plug into functions."
)
HERE = "Here are the available tools:"
SCHEMA = "Use the following pydantic model json schema for each tool call you will make:"
ANSWER = (
    "For each function call return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags as follows:"
)

# The schema of a call as pydantic 2.6 printed it, and pydantic 1 before; today's prints another.
CALL_SCHEMA = {
    "properties": {
        "arguments": {"title": "Arguments", "type": "object"},
        "name": {"title": "Name", "type": "string"},
    },
    "required": ["arguments", "name"],
    "title": "FunctionCall",
    "type": "object",
}
CALL_SCHEMA_V1 = {key: CALL_SCHEMA[key] for key in ("title", "type", "properties", "required")}


def to_json(value: Any) -> str:
    """JSON as the prompts write it: one line, letters of every language as they are.

    Raises ValueError for NaN and infinities, TypeError for what JSON does not have.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def tool_prompt(tools: Sequence[Mapping[str, Any]], style: str = "json") -> str:
    """The system prompt for function calling.

    tools  {"type": "function", "function": {"name", "description", "parameters"}} each, or the
           inner object alone
    style  json          the card's, all of it valid JSON, one tool a line (the default)
           card          the GGUF card's of March 2024: Python's quotes
           eval          of the evaluation behind the card's 91% (commit 1c9fcb5, March 2024)
           eval_2024_07  of the same evaluation, as of July 2024
           tool_use      the chat template's `tool_use`, its oddities included

    Raises ValueError for another style, and for tools that the style cannot describe.
    """
    _check_style(style)
    return TOOL_PROMPTS[style]([wrapped(tool) for tool in tools])


def wrapped(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The tool as {"type": "function", "function": {...}}."""
    return dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}


def json_prompt(schema: Mapping[str, Any] | str) -> str:
    """The system prompt for an answer in JSON; a schema given as text is passed on as it is."""
    text = schema if isinstance(schema, str) else to_json(schema)
    return (
        "You are a helpful assistant that answers in JSON. "
        f"Here's the json schema you must adhere to:\n<schema>\n{text}\n</schema>"
    )


def write_call(name: str, arguments: Mapping[str, Any] | str, style: str = "json") -> str:
    """A call in its tags, in the form that the `tool_prompt` of this style asks for.

    Arguments in text are JSON that is written already. Raises ValueError where a style reads them
    and they are not, and for another style.
    """
    _check_style(style)
    if style in ("card", "eval"):
        read = json.loads(arguments) if isinstance(arguments, str) else arguments
        call = repr({"arguments": read, "name": name})
    else:
        written = arguments if isinstance(arguments, str) else to_json(arguments)
        parts = [f'"arguments": {written}', f'"name": {to_json(name)}']
        call = "{" + ", ".join(parts if style == "json" else reversed(parts)) + "}"
    return f"<tool_call>\n{call}\n</tool_call>"


def write_result(name: str, content: Any) -> str:
    """A function's result for the model to read: JSON, in a tag that nothing inside can close.

    `</` is written `<\\/`, which is the same JSON string.
    """
    result = to_json({"name": name, "content": content}).replace("</", "<\\/")
    return f"<tool_response>\n{result}\n</tool_response>\n"


def write_error(text: str) -> str:
    """What went wrong with a call, in words, where its result would be; no text can close the
    tag.
    """
    text = text.replace("</tool_response", "<\\/tool_response")
    return f"<tool_response>\n{text}\n</tool_response>\n"


def _check_style(style: str) -> None:
    if style not in TOOL_PROMPTS:
        raise ValueError(f"there is no tool prompt {style!r}; there are {', '.join(TOOL_PROMPTS)}")


def _json(tools: list[dict]) -> str:
    listed = "\n".join(map(to_json, tools))
    form = '{"arguments": <args-dict>, "name": <function-name>}'
    return _one_line(listed, to_json(CALL_SCHEMA), form)


def _card(tools: list[dict]) -> str:
    listed = " ".join(map(repr, tools)) + " "
    return _one_line(
        listed, repr(CALL_SCHEMA_V1), "{'arguments': <args-dict>, 'name': <function-name>}"
    )


def _eval(tools: list[dict]) -> str:
    return _one_line(
        to_json(tools), repr(CALL_SCHEMA), "{'arguments': <args-dict>, 'name': <function-name>}"
    )


def _eval_2024_07(tools: list[dict]) -> str:
    form = '{"name": <function-name>, "arguments": <args-dict>}'
    return (
        f"{WHO} {SIGNATURES}\n{USE}\n{HERE}\n<tools>\n{to_json(tools)}\n</tools>\n"
        f"{SCHEMA}\n<schema>\n{CALL_SCHEMA!r}\n</schema>\n"
        f"{ANSWER}\n<tool_call>\n{form}\n</tool_call>"
    )


def _one_line(tools: str, schema: str, form: str) -> str:
    return (
        f"{WHO} {SIGNATURES} {USE} {HERE} <tools> {tools} </tools> {SCHEMA} {schema} "
        f"{ANSWER}\n<tool_call>\n{form}\n</tool_call>"
    )


def _tool_use(tools: list[dict]) -> str:
    """As the template writes it: tools that lack a closing brace, and a schema with one too
    many.
    """
    listed = "\n".join(_tool_use_line(tool["function"]) for tool in tools)
    schema = (
        '{"properties": {"name": {"title": "Name", "type": "string"}, '
        '"arguments": {"title": "Arguments", "type": "object"}}, '
        '"required": ["name", "arguments"], '
        '"title": "FunctionCall", "type": "object"}}'
    )
    form = '{"name": <function-name>, "arguments": <args-dict>}'
    return (
        f"{WHO} {SIGNATURES} {USE} {HERE} <tools> {listed} </tools>{SCHEMA} {schema}\n"
        f"{ANSWER}\n<tool_call>\n{form}\n</tool_call>"
    )


def _tool_use_line(function: Mapping[str, Any]) -> str:
    """A tool as the template describes it: the signature rebuilt from the schema, newlines and
    quotes unescaped.
    """
    name, description, parameters = (
        function.get(key) for key in ("name", "description", "parameters")
    )
    if (
        not isinstance(name, str)
        or not isinstance(description, str)
        or not isinstance(parameters, Mapping)
    ):
        raise ValueError(
            f"tool {name!r}: the style tool_use needs a name, a description and parameters"
        )
    properties, returns = parameters.get("properties") or {}, function.get("return")
    types = {key: _python_type(name, schema) for key, schema in properties.items()}
    signature = ", ".join(f"{key}: {kind}" for key, kind in types.items())
    text = (
        f'{{"type": "function", "function": {{"name": "{name}", "description": "{name}({signature})'
    )
    text += f" -> {_python_type(name, returns)}" if returns is not None else ""
    text += f" - {description}\n\n" + ("    Args:\n" if properties else "")
    for key, schema in properties.items():
        described = schema.get("description", "") if isinstance(schema, Mapping) else ""
        text += f"        {key}({types[key]}): {str(described).strip()}"
    if isinstance(returns, Mapping) and "description" in returns:
        text += f"\n    Returns:\n        {returns['description']}"
    return text + f'", "parameters": {to_json(parameters) if properties else "{}"}}}'


def _python_type(tool: str, schema: Any) -> str:
    """As the template finds it, by accident in places: it never sees the type of an array's
    items.
    """
    names = {
        "string": "str",
        "number": "float",
        "integer": "int",
        "boolean": "bool",
        "array": "list[Union[]]",
    }
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind is None:
        return "Union[]"
    if isinstance(kind, list):
        return "Union[" + ",".join(_python_type(tool, {"type": one}) for one in kind) + "]"
    if kind == "object":
        known = "additionalProperties" in schema
        return (
            f"dict[str, {_python_type(tool, schema['additionalProperties'])}]" if known else "dict"
        )
    if (
        not isinstance(kind, str) or kind not in names
    ):  # the template itself would never come to an end
        raise ValueError(
            f"tool {tool!r}: the style tool_use has no word for the type {kind!r}; another style "
            f"has"
        )
    return names[kind]


TOOL_PROMPTS: dict[str, Callable[[list[dict]], str]] = {
    "json": _json,
    "card": _card,
    "eval": _eval,
    "eval_2024_07": _eval_2024_07,
    "tool_use": _tool_use,
}
