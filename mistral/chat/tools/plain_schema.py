"""pydantic's JSON schemas in the words of transformers' `get_json_schema`.

These are the words that models for function calling have read: no titles and no defaults, the type
first and the description last, `nullable` for Optional, a list of types for a union of plain types.
https://github.com/huggingface/transformers/blob/main/src/transformers/utils/chat_template_utils.py
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

_NULL = {"type": "null"}
_LEFT_OUT = ("title", "default", "discriminator")  # `discriminator` is OpenAPI's
_NAMED = ("properties", "patternProperties")  # name -> schema
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "propertyNames")
_ORDER = {"type": 0, "enum": 1, "nullable": 8, "description": 9}  # the others are between them
_TYPE_NAMES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


def plain_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema in transformers' words.

    A definition that is used once is written where it is used; shared and recursive ones stay in
    `$defs`. The length of a tuple is left out: pydantic checks it when it converts the arguments.
    """
    # 1. How often each definition is used.
    definitions = schema.get("$defs", {})
    schema = {key: value for key, value in schema.items() if key != "$defs"}
    uses: Counter[str] = Counter()

    def count(node: Any) -> Any:
        uses[_definition(node)] += 1
        return _each(node, count)

    for node in (schema, *definitions.values()):
        count(node)
    shared = {name for name in definitions if uses[name] > 1}

    # 2. Those that are used once, in their places.
    def insert(node: Any) -> Any:
        name = _definition(node)
        if name not in definitions or name in shared:
            return _each(node, insert)
        rest = {key: value for key, value in node.items() if key != "$ref"}
        return insert(definitions[name]) | rest

    # 3. The words.
    plain = _plain(insert(schema))
    if shared:
        plain["$defs"] = {name: _plain(_each(definitions[name], insert)) for name in sorted(shared)}
    return plain


def keywords(schema: dict[str, Any]) -> set[str]:
    """All keywords in a schema."""
    found: set[str] = set()

    def collect(node: Any) -> Any:
        found.update(node if isinstance(node, dict) else ())
        return _each(node, collect)

    collect(schema)
    return found


def _definition(node: Any) -> str:
    """The name of the definition that a schema refers to; "" without one."""
    reference = node.get("$ref", "") if isinstance(node, dict) else ""
    return reference.removeprefix("#/$defs/")


def _plain(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return {} if schema is True else schema
    schema = {key: value for key, value in schema.items() if key not in _LEFT_OUT}
    schema = _each(schema, _plain)
    if "anyOf" in schema:
        schema = _without_null(schema)
    if "const" in schema:
        schema["enum"] = [schema.pop("const")]
    values = schema.get("enum")
    if values and "type" not in schema and all(type(value) in _TYPE_NAMES for value in values):
        schema["type"] = _one_or_all(_TYPE_NAMES[type(value)] for value in values)
    if "prefixItems" in schema:
        schema.pop("minItems", None)
        schema.pop("maxItems", None)
    return _ordered(schema)


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """`nullable` in place of an alternative null, and a list of types if nothing else differs."""
    branches = [branch for branch in schema["anyOf"] if branch != _NULL]
    is_nullable = len(branches) < len(schema["anyOf"])
    if is_nullable and any("$ref" in branch for branch in branches):
        return schema  # not every reader of schemas heeds `nullable` next to a $ref
    schema = {key: value for key, value in schema.items() if key != "anyOf"}
    if len(branches) == 1:
        schema = branches[0] | schema
    elif all(branch.keys() == {"type"} for branch in branches):
        schema["type"] = _one_or_all(sorted(branch["type"] for branch in branches))
    else:
        schema["anyOf"] = branches
    return schema | {"nullable": True} if is_nullable else schema


def _one_or_all(names: Any) -> str | list[str]:
    names = list(dict.fromkeys(names))
    return names if len(names) > 1 else names[0]


def _ordered(schema: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(schema.items(), key=lambda item: _ORDER.get(item[0], 5)))


def _each(schema: Any, change: Callable[[Any], Any]) -> Any:
    """The schema with every schema directly in it changed."""
    if not isinstance(schema, dict):
        return schema
    changed = dict(schema)
    for key, value in schema.items():
        if key in _NAMED:
            changed[key] = {name: change(inner) for name, inner in value.items()}
        elif key in _LISTED:
            changed[key] = [change(inner) for inner in value]
        elif key in _SINGLE:
            changed[key] = change(value)
    return changed
