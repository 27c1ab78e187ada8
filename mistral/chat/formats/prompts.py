"""Hermes-2-Pro's system prompts for function calling and JSON, and its form of calls and results.

Sources: the model card of NousResearch/Hermes-2-Pro-Mistral-7B, its chat template `tool_use`, and
the prompts of https://github.com/NousResearch/Hermes-Function-Calling, which differ among
themselves in quotes, order and line breaks. The model understands all of them, and does not always
write the form that its prompt shows.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mistral.chat.tools import wrapped

_WHO = "You are a function calling AI model."
_SIGNATURES = "You are provided with function signatures within <tools></tools> XML tags."
_USE = (
    "You may call one or more functions to assist with the user query. "
    "Don't make assumptions about what values to plug into functions."
)
_HERE = "Here are the available tools:"
_SCHEMA = "Use the following pydantic model json schema for each tool call you will make:"
_ANSWER = (
    "For each function call return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags as follows:"
)

# The schema of a call as pydantic 2.6 and, before it, pydantic 1 printed it; today's differs.
_CALL_SCHEMA = {
    "properties": {
        "arguments": {"title": "Arguments", "type": "object"},
        "name": {"title": "Name", "type": "string"},
    },
    "required": ["arguments", "name"],
    "title": "FunctionCall",
    "type": "object",
}
_CALL_SCHEMA_V1 = {key: _CALL_SCHEMA[key] for key in ("title", "type", "properties", "required")}


def to_json(value: Any) -> str:
    """JSON as in the prompts: one line, letters of every language unescaped.

    Raises ValueError for NaN and infinities, TypeError for other values that JSON does not have.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def tool_prompt(tools: Sequence[Mapping[str, Any]], style: str = "json") -> str:
    """The system prompt for function calling.

    tools  {"type": "function", "function": {"name", "description", "parameters"}} each, or the
           inner object alone
    style  json          the card's, all of it valid JSON, one tool a line (the default)
           card          the GGUF card's of March 2024: Python's quotes
           eval          that of the card's evaluation, 91% (commit 1c9fcb5, March 2024)
           eval_2024_07  that of the same evaluation in July 2024
           tool_use      that of the chat template `tool_use`, its oddities included

    Except for tool_use, which is to the byte that of its template, nothing in a tool can close the
    tag around the tools: `</tools` becomes `<\\/tools`. Raises ValueError for an unknown style, and
    for tools that the style cannot describe.
    """
    _check_style(style)
    return _TOOL_PROMPTS[style]([wrapped(tool) for tool in tools])


def json_prompt(schema: Mapping[str, Any] | str) -> str:
    """The system prompt for an answer in JSON; a schema may be JSON as text.

    Nothing in it can close its tag: `</schema` becomes `<\\/schema`, which is the same JSON string.
    """
    text = _kept_inside("schema", schema if isinstance(schema, str) else to_json(schema))
    return (
        "You are a helpful assistant that answers in JSON. "
        f"Here's the json schema you must adhere to:\n<schema>\n{text}\n</schema>"
    )


def write_call(name: str, arguments: Mapping[str, Any] | str, style: str = "json") -> str:
    """A call in its tags, in the form that the `tool_prompt` of this style asks for.

    Arguments that are text are JSON already. Raises ValueError for an unknown style, and if a
    style has to parse such arguments and they are not valid JSON.
    """
    _check_style(style)
    if style in ("card", "eval"):
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
        call = repr({"arguments": value, "name": name})
    else:
        text = arguments if isinstance(arguments, str) else to_json(arguments)
        parts = [f'"arguments": {text}', f'"name": {to_json(name)}']
        call = "{" + ", ".join(parts if style == "json" else reversed(parts)) + "}"
    return f"<tool_call>\n{call}\n</tool_call>"


def write_result(name: str, content: Any) -> str:
    """A function's result for the model: JSON, in a tag that nothing inside can close."""
    return write_json_result(name, to_json(content))


def write_json_result(name: str, content: str) -> str:
    """The same for a result that is JSON as text, which stays as it is.

    But `</` becomes `<\\/`, which is the same JSON string.
    """
    result = f'{{"name": {to_json(name)}, "content": {content}}}'.replace("</", "<\\/")
    return f"<tool_response>\n{result}\n</tool_response>\n"


def write_error(text: str) -> str:
    """A call's error in the place of its result: text, in a tag that nothing inside can close."""
    text = text.replace("</tool_response", "<\\/tool_response")
    return f"<tool_response>\n{text}\n</tool_response>\n"


def _kept_inside(tag: str, text: str) -> str:
    """Text that cannot close the tag around it; JSON stays the same JSON."""
    return text.replace(f"</{tag}", f"<\\/{tag}")


def _check_style(style: str) -> None:
    if style not in _TOOL_PROMPTS:
        raise ValueError(
            f"there is no tool prompt {style!r}; choose one of {', '.join(_TOOL_PROMPTS)}"
        )


def _json(tools: list[dict]) -> str:
    listed = "\n".join(map(to_json, tools))
    form = '{"arguments": <args-dict>, "name": <function-name>}'
    return _one_line(listed, to_json(_CALL_SCHEMA), form)


def _card(tools: list[dict]) -> str:
    listed = " ".join(map(repr, tools)) + " "
    form = "{'arguments': <args-dict>, 'name': <function-name>}"
    return _one_line(listed, repr(_CALL_SCHEMA_V1), form)


def _eval(tools: list[dict]) -> str:
    form = "{'arguments': <args-dict>, 'name': <function-name>}"
    return _one_line(to_json(tools), repr(_CALL_SCHEMA), form)


def _eval_2024_07(tools: list[dict]) -> str:
    listed = _kept_inside("tools", to_json(tools))
    form = '{"name": <function-name>, "arguments": <args-dict>}'
    return (
        f"{_WHO} {_SIGNATURES}\n{_USE}\n{_HERE}\n<tools>\n{listed}\n</tools>\n"
        f"{_SCHEMA}\n<schema>\n{_CALL_SCHEMA!r}\n</schema>\n"
        f"{_ANSWER}\n<tool_call>\n{form}\n</tool_call>"
    )


def _one_line(tools: str, schema: str, form: str) -> str:
    tools = _kept_inside("tools", tools)
    return (
        f"{_WHO} {_SIGNATURES} {_USE} {_HERE} <tools> {tools} </tools> {_SCHEMA} {schema} "
        f"{_ANSWER}\n<tool_call>\n{form}\n</tool_call>"
    )


def _tool_use(tools: list[dict]) -> str:
    """As in the template: tools lack a closing brace, and the schema has one too many."""
    listed = "\n".join(_tool_use_line(tool["function"]) for tool in tools)
    schema = (
        '{"properties": {"name": {"title": "Name", "type": "string"}, '
        '"arguments": {"title": "Arguments", "type": "object"}}, '
        '"required": ["name", "arguments"], '
        '"title": "FunctionCall", "type": "object"}}'
    )
    form = '{"name": <function-name>, "arguments": <args-dict>}'
    return (
        f"{_WHO} {_SIGNATURES} {_USE} {_HERE} <tools> {listed} </tools>{_SCHEMA} {schema}\n"
        f"{_ANSWER}\n<tool_call>\n{form}\n</tool_call>"
    )


def _tool_use_line(function: Mapping[str, Any]) -> str:
    """A tool as in the template: a signature from the schema, newlines and quotes unescaped."""
    # 1. The signature.
    name = function.get("name")
    description = function.get("description")
    parameters = function.get("parameters")
    is_described = isinstance(name, str) and isinstance(description, str)
    if not is_described or not isinstance(parameters, Mapping):
        raise ValueError(
            f"tool {name!r}: the style tool_use needs a name, a description and parameters"
        )
    properties = parameters.get("properties") or {}
    returns = function.get("return")
    types = {key: _python_type(name, schema) for key, schema in properties.items()}
    signature = ", ".join(f"{key}: {type_name}" for key, type_name in types.items())
    text = f'{{"type": "function", "function": {{"name": "{name}", "description": '
    text += f'"{name}({signature})'
    if returns is not None:
        text += f" -> {_python_type(name, returns)}"
    # 2. The docstring.
    text += f" - {description}\n\n"
    if properties:
        text += "    Args:\n"
    for key, schema in properties.items():
        described = schema.get("description", "") if isinstance(schema, Mapping) else ""
        text += f"        {key}({types[key]}): {str(described).strip()}"
    if isinstance(returns, Mapping) and "description" in returns:
        text += f"\n    Returns:\n        {returns['description']}"
    # 3. The schema.
    return text + f'", "parameters": {to_json(parameters) if properties else "{}"}}}'


def _python_type(tool: str, schema: Any) -> str:
    """The type as in the template, which never looks at the items of an array."""
    names = {
        "string": "str",
        "number": "float",
        "integer": "int",
        "boolean": "bool",
        "array": "list[Union[]]",
    }
    type_name = schema.get("type") if isinstance(schema, Mapping) else None
    if type_name is None:
        return "Union[]"
    if isinstance(type_name, list):
        return "Union[" + ",".join(_python_type(tool, {"type": one}) for one in type_name) + "]"
    if type_name == "object":
        if "additionalProperties" not in schema:
            return "dict"
        return f"dict[str, {_python_type(tool, schema['additionalProperties'])}]"
    if isinstance(type_name, str) and type_name in names:
        return names[type_name]
    # the template itself would never end
    raise ValueError(
        f"tool {tool!r}: the style tool_use has no word for the type {type_name!r}; "
        "use another style"
    )


_TOOL_PROMPTS: dict[str, Callable[[list[dict]], str]] = {
    "json": _json,
    "card": _card,
    "eval": _eval,
    "eval_2024_07": _eval_2024_07,
    "tool_use": _tool_use,
}
