"""A function described by its type hints and its Google docstring.

The schema is the same as from transformers' `get_json_schema`, so that a model reads the same
words:
https://github.com/huggingface/transformers/blob/main/src/transformers/utils/chat_template_utils.py
"""

import inspect
import json
import re
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from mistral.chat.tools.json_schema import SchemaError
from mistral.errors import one_line

_SECTION = re.compile("Args:|Returns:|Raises:")
_ARGS = re.compile(r"(?:^|\n)\s*Args:[ \t]*\n(.*?)(?:Returns:|Raises:|\Z)", re.DOTALL)
_RETURNS = re.compile(r"\n\s*Returns:\n(.*?)(?:Raises:|\Z)", re.DOTALL)
_ENTRY = re.compile(r"([ \t]*)(\w+)(?:[ \t]*\([^:]*\))?:(.*)")  # name: text, or name (type): text
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)

_JSON_TYPES = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
    list: "array",
    tuple: "array",
    dict: "object",
}
_HINTS = "int, float, str, bool, None, list, tuple, dict, Any, Literal"
_SCALARS = (int, float, str, bool, type(None))


class _Docstring(NamedTuple):
    """The parts of a Google docstring; `returns` is None without such a section."""

    description: str
    arguments: dict[str, str]
    returns: str | None


def function_schema(
    function: Callable[..., Any], name: str | None = None, description: str | None = None
) -> dict[str, Any]:
    """A function as {"name", "description", "parameters", "return" if the result has a schema}.

    Raises SchemaError, with the reason, for a function that has no schema.
    """
    if not inspect.isroutine(function):
        raise SchemaError(
            f"{function!r} is not a function: use Tool.from_schema or Tool.from_pydantic"
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
    properties = {}
    required = []
    for key, parameter in parameters.items():
        properties[key] = _parameter_schema(name, key, hints[key], documented.arguments)
        if parameter.default is parameter.empty:
            required.append(key)
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required
    described = {"name": name, "description": description, "parameters": schema}
    if "return" in hints:
        # the model never writes a result, so one without a schema may stay undescribed
        with suppress(SchemaError):
            described["return"] = _type_schema(hints["return"])
            if documented.returns is not None:
                described["return"]["description"] = documented.returns
    return described


def _type_schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type hint, as transformers' `get_json_schema` writes it.

    int, float, str, bool, None, list, tuple, dict, Any, Literal, Optional, Union, and combinations
    of them. Raises SchemaError for every other hint.
    """
    origin = get_origin(hint)
    args = get_args(hint)
    if hint is Any:
        return {}
    if origin in (Union, types.UnionType):
        return _union_schema(args)
    if origin is Literal:
        return _literal_schema(args)
    cls = origin or hint
    if not isinstance(cls, type) or cls not in _JSON_TYPES:
        raise SchemaError(f"{hint!r} has no JSON schema; {_HINTS} and unions of them do")
    schema: dict[str, Any] = {"type": _JSON_TYPES[cls]}
    if (cls is list and args) or (cls is tuple and args[1:] == (...,)):
        schema["items"] = _type_schema(args[0])
    elif cls is tuple and args:
        schema["prefixItems"] = [_type_schema(arg) for arg in args]
    elif cls is dict and len(args) == 2:
        if _type_schema(args[0]).get("type", "string") != "string":
            raise SchemaError(f"{hint!r} has no JSON schema: the keys of a JSON object are str")
        schema["additionalProperties"] = _type_schema(args[1])
    return schema


def _union_schema(hints: tuple) -> dict[str, Any]:
    schemas = [_type_schema(hint) for hint in hints if hint is not type(None)]
    if len(schemas) == 1:
        schema = schemas[0]
    elif all(one.keys() == {"type"} and isinstance(one["type"], str) for one in schemas):
        json_types = sorted({one["type"] for one in schemas})
        schema = {"type": json_types if len(json_types) > 1 else json_types[0]}
    else:
        schema = {"anyOf": schemas}
    return schema | {"nullable": True} if type(None) in hints else schema


def _literal_schema(values: tuple) -> dict[str, Any]:
    if not all(type(value) in _SCALARS for value in values):
        raise SchemaError(
            f"Literal{list(values)} has no JSON schema: its values must be int, str, bool or None"
        )
    json_types = list(dict.fromkeys(_JSON_TYPES[type(value)] for value in values))
    return {"type": json_types if len(json_types) > 1 else json_types[0], "enum": list(values)}


def parse_docstring(text: str) -> _Docstring:
    """The parts of a docstring whose indentation `inspect.getdoc` has removed. Never raises."""
    text = text.strip()
    description = _SECTION.split(text, maxsplit=1)[0].strip()
    args = _ARGS.search(text)
    returns = _RETURNS.search(text)
    return _Docstring(
        description=description,
        arguments=_entries(args[1]) if args else {},
        returns=returns[1].strip() if returns else None,
    )


def _split_choices(description: str) -> tuple[str, list[Any] | None]:
    """A parameter's description without its `(choices: ["tea", "coffee"])`, and the choices.

    ValueError if they are not a JSON list.
    """
    found = _CHOICES.search(description)
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
    """Name -> text. A line that is indented deeper than its entry always continues it."""
    entries: dict[str, list[str]] = {}
    name = indent = None
    for line in filter(str.strip, block.split("\n")):
        begins = _ENTRY.match(line)
        if begins and (name is None or not line.startswith((indent + " ", indent + "\t"))):
            indent = begins[1]
            name = begins[2]
            entries[name] = [begins[3]]
        elif name is not None:
            entries[name].append(line)
    return {name: " ".join(filter(None, map(str.strip, lines))) for name, lines in entries.items()}


def _signature(
    name: str, function: Callable[..., Any]
) -> tuple[Mapping[str, inspect.Parameter], dict[str, Any]]:
    """Parameters and type hints.

    SchemaError for a parameter that cannot be passed by name, and for one without a type hint.
    """
    try:
        parameters = inspect.signature(function).parameters
        hints = get_type_hints(function)
    except (NameError, TypeError, ValueError, AttributeError, SyntaxError) as error:
        raise SchemaError(
            f"tool {name}: its type hints cannot be read: {one_line(str(error))}"
        ) from None
    for parameter in parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise SchemaError(f"tool {name}: {parameter} cannot be passed by name, as models do")
        if parameter.name not in hints:
            raise SchemaError(f"tool {name}: the parameter {parameter.name} has no type hint")
    return parameters, hints


def _parameter_schema(
    name: str, parameter: str, hint: Any, descriptions: Mapping[str, str]
) -> dict[str, Any]:
    if parameter not in descriptions:
        raise SchemaError(f"tool {name}: the docstring has no entry for {parameter} under Args:")
    try:
        schema = _type_schema(hint)
        description, choices = _split_choices(descriptions[parameter])
    except ValueError as error:
        raise SchemaError(f"tool {name}: the parameter {parameter}: {error}") from None
    if choices is not None:
        schema["enum"] = choices
    return schema | {"description": description}
