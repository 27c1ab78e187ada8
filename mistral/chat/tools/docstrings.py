"""A function described by its type hints and its Google docstring.

The schema is the one that transformers' `get_json_schema` makes, so that a model reads the same
words from both:
https://github.com/huggingface/transformers/blob/main/src/transformers/utils/chat_template_utils.py
"""

import inspect
import json
import re
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from mistral.chat.tools.json_schema import SchemaError, one_line

SECTION = re.compile("Args:|Returns:|Raises:")
ARGS = re.compile(r"(?:^|\n)\s*Args:[ \t]*\n(.*?)(?:Returns:|Raises:|\Z)", re.DOTALL)
RETURNS = re.compile(r"\n\s*Returns:\n(.*?)(?:Raises:|\Z)", re.DOTALL)
ENTRY = re.compile(r"([ \t]*)(\w+)(?:[ \t]*\([^:]*\))?:(.*)")  # name: text, or name (type): text
CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)

JSON_TYPES = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
    list: "array",
    tuple: "array",
    dict: "object",
}
HINTS = "int, float, str, bool, None, list, tuple, dict, Any, Literal"
SCALARS = (int, float, str, bool, type(None))


class Docstring(NamedTuple):
    """What a Google docstring says. returns is None where it has no such section."""

    description: str
    arguments: dict[str, str]
    returns: str | None


def function_schema(
    function: Callable[..., Any], name: str | None = None, description: str | None = None
) -> dict[str, Any]:
    """{"name", "description", "parameters", and "return" where the result has a schema} of a
    function.

    Raises SchemaError, with the reason, for a function that no schema can be made of.
    """
    if not inspect.isroutine(function):
        raise SchemaError(
            f"{function!r} is not a function; see Tool.from_schema and Tool.from_pydantic for "
            f"others"
        )
    name = name or function.__name__
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise SchemaError(
            f"tool {name}: an async function cannot be called; wrap it in one that uses asyncio.run"
        )
    documented = parse_docstring(inspect.getdoc(function) or "")
    description = description or documented.description
    if not description:
        raise SchemaError(f"tool {name} has no description: give it a docstring")
    parameters, hints = _signature(name, function)
    properties = {
        key: _parameter_schema(name, key, hints[key], documented.arguments) for key in parameters
    }
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required := [
        key for key, parameter in parameters.items() if parameter.default is parameter.empty
    ]:
        schema["required"] = required
    described = {"name": name, "description": description, "parameters": schema}
    if "return" in hints:
        with suppress(
            SchemaError
        ):  # the model never writes a result: one without a schema goes undescribed
            described["return"] = type_schema(hints["return"])
            if documented.returns is not None:
                described["return"]["description"] = documented.returns
    return described


def type_schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type hint, as transformers' `get_json_schema` writes it.

    int, float, str, bool, None, list, tuple, dict, Any, Literal, Optional, Union and what they are
    made of.
    Raises SchemaError for every other hint.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if origin in (Union, types.UnionType):
        return _union_schema(args)
    if origin is Literal:
        return _literal_schema(args)
    kind = origin or hint
    if not isinstance(kind, type) or kind not in JSON_TYPES:
        raise SchemaError(f"{hint!r} has no JSON schema; {HINTS} and unions of them do")
    schema: dict[str, Any] = {"type": JSON_TYPES[kind]}
    if (kind is list and args) or (kind is tuple and args[1:] == (...,)):
        schema["items"] = type_schema(args[0])
    elif kind is tuple and args:
        schema["prefixItems"] = [type_schema(arg) for arg in args]
    elif kind is dict and len(args) == 2:
        if type_schema(args[0]).get("type", "string") != "string":
            raise SchemaError(f"{hint!r} has no JSON schema: the keys of a JSON object are str")
        schema["additionalProperties"] = type_schema(args[1])
    return schema


def _union_schema(hints: tuple) -> dict[str, Any]:
    schemas = [type_schema(hint) for hint in hints if hint is not type(None)]
    if len(schemas) == 1:
        schema = schemas[0]
    elif all(one.keys() == {"type"} and isinstance(one["type"], str) for one in schemas):
        kinds = sorted({one["type"] for one in schemas})
        schema = {"type": kinds if len(kinds) > 1 else kinds[0]}
    else:
        schema = {"anyOf": schemas}
    return schema | {"nullable": True} if type(None) in hints else schema


def _literal_schema(values: tuple) -> dict[str, Any]:
    if not all(type(value) in SCALARS for value in values):
        raise SchemaError(
            f"Literal{list(values)} has no JSON schema: its values must be int, str, bool or None"
        )
    kinds = list(dict.fromkeys(JSON_TYPES[type(value)] for value in values))
    return {"type": kinds if len(kinds) > 1 else kinds[0], "enum": list(values)}


def parse_docstring(text: str) -> Docstring:
    """The parts of a docstring whose indentation `inspect.getdoc` has removed.

    Reads any text, and never raises.
    """
    text = text.strip()
    description = SECTION.split(text, maxsplit=1)[0].strip()
    args, returns = ARGS.search(text), RETURNS.search(text)
    return Docstring(
        description, _entries(args[1]) if args else {}, returns[1].strip() if returns else None
    )


def split_choices(description: str) -> tuple[str, list[Any] | None]:
    """A parameter's description without its `(choices: ["tea", "coffee"])`, and these.

    ValueError if they are none.
    """
    found = CHOICES.search(description)
    if not found:
        return description, None
    try:
        choices = json.loads(found[1])
    except (ValueError, RecursionError):
        choices = None
    if not isinstance(choices, list):
        raise ValueError(
            f'the choices must be a JSON list, such as (choices: ["tea", "coffee"]), not {found[1]}'
        )
    choices = [choice.strip() if isinstance(choice, str) else choice for choice in choices]
    return description[: found.start()].strip(), choices


def _entries(block: str) -> dict[str, str]:
    """Name -> text. A line that is indented deeper than its entry goes on with it, whatever it
    looks like.
    """
    entries: dict[str, list[str]] = {}
    name = indent = None
    for line in filter(str.strip, block.split("\n")):
        begins = ENTRY.match(line)
        if begins and (name is None or not line.startswith((indent + " ", indent + "\t"))):
            indent, name = begins[1], begins[2]
            entries[name] = [begins[3]]
        elif name is not None:
            entries[name].append(line)
    return {name: " ".join(filter(None, map(str.strip, lines))) for name, lines in entries.items()}


def _signature(
    name: str, function: Callable[..., Any]
) -> tuple[Mapping[str, inspect.Parameter], dict[str, Any]]:
    """Parameters and type hints;

    SchemaError for a parameter that a model could not fill in by name.
    """
    try:
        parameters, hints = inspect.signature(function).parameters, get_type_hints(function)
    except (NameError, TypeError, ValueError, AttributeError, SyntaxError) as error:
        raise SchemaError(
            f"tool {name}: its type hints cannot be read: {one_line(str(error))}"
        ) from None
    for parameter in parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise SchemaError(f"tool {name}: {parameter} cannot be given by name, as a model does")
        if parameter.name not in hints:
            raise SchemaError(f"tool {name}: the parameter {parameter.name} has no type hint")
    return parameters, hints


def _parameter_schema(
    name: str, parameter: str, hint: Any, descriptions: Mapping[str, str]
) -> dict[str, Any]:
    if parameter not in descriptions:
        raise SchemaError(f"tool {name}: the docstring has no entry for {parameter} under Args:")
    try:
        schema = type_schema(hint)
        description, choices = split_choices(descriptions[parameter])
    except ValueError as error:
        raise SchemaError(f"tool {name}: the parameter {parameter}: {error}") from None
    if choices is not None:
        schema["enum"] = choices
    return schema | {"description": description}
