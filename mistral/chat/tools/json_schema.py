"""JSON Schema: checked before it is used, and applied to JSON that a model wrote.

The validator is jsonschema-rs (https://github.com/Stranger6667/jsonschema). `$schema` chooses the
dialect, Draft 4 to 2020-12 (https://json-schema.org/specification); 2020-12 without it. Schemas are
read as they are published: a keyword that is null is absent, and OpenAPI's `nullable` adds null. No
reference is fetched, neither from the network nor from a file, and the work of a check is bounded.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mistral.chat.tools.references import References, Schema, in_place, inside, parts, rewritten
from mistral.errors import MistralError, one_line

# Parsers of JSON recurse, and their limit depends on the caller's stack: this is far below it.
_MAX_DEPTH = 64
_TOO_DEEP = f"it is nested more than {_MAX_DEPTH} levels deep"
MAX_STEPS = 1_000_000  # of one check: a part of the schema applied to a part of the value
_MAX_CHAIN = 500  # parts of a schema that apply to the same value because of each other
_MAX_DEPTH_OF_PARTS = 1000  # references followed
_SHOWN = 3  # problems of a value that are told
_CLOSED = ("additionalProperties", "unevaluatedProperties")


class SchemaError(MistralError, ValueError):
    """A schema is malformed, endless or refers to another document; or a value has no schema."""


def as_json(value: Any) -> Any:
    """A copy of the value as parsed from its JSON: tuples are lists, every key is a str.

    Raises ValueError, with the reason, for a value that JSON cannot hold: other objects, NaN and
    infinities, circles, text that is not valid Unicode, numbers of thousands of digits, more than
    64 levels.
    """
    try:
        copy = json.loads(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError) as error:
        raise ValueError(one_line(str(error))) from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [copy]
    for _ in range(_MAX_DEPTH):
        level = [child for one in level for child in _children(one)]
    if level:
        raise ValueError(_TOO_DEEP)
    return copy


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


@dataclass(frozen=True)
class Validator:
    """A compiled schema.

    schema  as it is checked: without keywords that are null, and without `nullable`
    draft   4, 6, 7, 2019 or 2020: the dialect
    """

    schema: dict[str, Any]
    draft: int
    _compiled: Any
    _references: References

    def is_valid(self, value: Any) -> bool:
        """Whether a value of JSON is valid; False if the check would take too many steps."""
        return problem(self, value) is None


def compile_schema(schema: Mapping[str, Any]) -> Validator:
    """A validator, for `problem`.

    Raises SchemaError for a malformed schema, for a dialect that is not known, for a `$ref` to
    nothing or to another document (nothing is fetched), and for `$ref`s in a circle; a schema may
    be recursive if the data is. Needs the extra `chat`.
    """
    if not isinstance(schema, Mapping):
        raise SchemaError(f"a schema is a JSON object, not {type(schema).__name__}")
    library = _jsonschema_rs()
    try:
        copy = rewritten(as_json(dict(schema)), _as_published)
        references = References(copy)
        references.check()
        _check_depth(copy, references)
        # `format` is a note, as in 2020-12; only grammars keep to it.
        compiled = library.validator_for(copy, retriever=_refuse, validate_formats=False)
        _check_circles(copy, references)
    except library.ValidationError as error:
        where = "/".join(map(str, error.instance_path))
        text = ", or ".join(dict.fromkeys(_messages(error)))
        if "meta-schema" in text:
            text = f"its $schema {copy.get('$schema')!r} is not a known dialect: remove it"
        raise SchemaError(
            one_line(f"malformed schema: {where}{': ' * bool(where)}{text}")
        ) from None
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"malformed schema: {one_line(str(error))}") from None
    dialect = re.search(r"\d+", library.validator_cls_for(copy).__name__)[0]
    return Validator(copy, int(dialect[:4]), compiled, references)


def pydantic_schema(model: Any) -> dict[str, Any]:
    """The JSON schema of a pydantic 2 model.

    SchemaError for a value that is not such a class, and for a class without a schema.
    """
    if not isinstance(model, type) or not hasattr(model, "model_json_schema"):
        raise SchemaError(f"{model!r} is not a subclass of pydantic 2's BaseModel")
    try:
        return model.model_json_schema()
    # pydantic's own errors are of these classes
    except (RuntimeError, NameError, TypeError, AttributeError) as error:
        raise SchemaError(f"{model.__name__} has no JSON schema: {one_line(str(error))}") from None


def problem(validator: Validator, value: Any) -> str | None:
    """The problem of a value, in one line for a model; None if it is valid.

    A check of more than MAX_STEPS steps is not made, and that is the problem.
    """
    try:
        value = as_json(value)
    except ValueError as error:
        return f"not JSON: {error}"
    try:
        steps = _Steps(validator).count(validator.schema, value)
    except RecursionError:
        return "it is nested too deeply"
    if steps > MAX_STEPS:
        return f"it cannot be checked: that takes more than {MAX_STEPS:,} steps"
    if validator._compiled.is_valid(value):
        return None
    found: dict[str, list[str]] = {}  # problems that are alternatives, by their place
    for error in validator._compiled.evaluate(value).errors():
        keyword = error["schemaLocation"].rpartition("/")[2]
        where, part = _place(value, error["instanceLocation"])
        text = _explain(error, keyword, part, validator)
        text = f"{where}: {text}" if where else text
        place = where if keyword in ("type", "enum", "const") else f"{where} {text}"
        if keyword not in _CLOSED or "alse schema" not in text:  # else told for the object
            found.setdefault(place, []).append(text)
        if len(found) > _SHOWN:
            break
    told = [", or ".join(dict.fromkeys(texts)) for texts in list(found.values())[:_SHOWN]]
    return one_line("; ".join(told)) or "it is not valid"


def with_integers(validator: Validator, value: Any) -> Any:
    """A valid value with 5.0 as 5 where the schema says integer: JSON Schema has one for both."""
    return _with_integers([validator.schema], value, validator._references)


def _with_integers(schemas: list[Schema], value: Any, references: References) -> Any:
    known = {id(schema): schema for schema in schemas}
    every = list(known.values())
    for schema in every:  # grows
        new = {id(part): part for part in in_place(schema, references) if id(part) not in known}
        known |= new
        every += new.values()
    if isinstance(value, float):
        types = [part.get("type", ()) for part in every if isinstance(part, dict)]
        named = {name for one in types for name in ([one] if isinstance(one, str) else one)}
        return (
            int(value)
            if value.is_integer() and ("integer" in named) > ("number" in named)
            else value
        )
    parts: dict[Any, list[Schema]] = {}
    for schema in every:
        for part, key, _ in inside(schema, value) if isinstance(schema, dict) else ():
            parts.setdefault(key, []).append(part)
    if isinstance(value, dict):
        return {k: _with_integers(parts.get(k, []), v, references) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_integers(parts.get(i, []), v, references) for i, v in enumerate(value)]
    return value


def _explain(error: dict[str, Any], keyword: str, value: Any, validator: Validator) -> str:
    pointer = error["schemaLocation"].rpartition("#")[2].rpartition("/")[0]
    try:
        schema = validator._references.target(validator.schema, f"#{pointer}")
    except (LookupError, ValueError):
        schema = {}
    text = one_line(error["error"])
    if keyword == "enum" and isinstance(schema, dict):
        value, listed = (json.dumps(one, ensure_ascii=False) for one in (value, schema.get("enum")))
        return f"{one_line(value, 100)} is not one of {listed}"
    if keyword in _CLOSED and isinstance(schema, dict):
        text += f"; known: {', '.join(schema.get('properties', ())) or 'none'}"
    return text


def _place(value: Any, pointer: str) -> tuple[str, Any]:
    """A JSON pointer as in Python, a.b[0], and the part of the value there."""
    path = ""
    for step in pointer.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        path += f"[{step}]" if isinstance(value, list) else f".{step}"
        value = value[int(step)] if isinstance(value, list) else value.get(step)
    return path.removeprefix("."), value


class _Steps:
    """Counts the steps of a check without making them: equal parts of it are counted once.

    The validator makes them again and again, 2^n times if each of n parts refers to the next twice.
    """

    def __init__(self, validator: Validator):
        self._references = validator._references
        self._known: dict[tuple[int, int], int] = {}

    def count(self, schema: Schema, value: Any) -> int:
        key = (id(schema), id(value))
        if key not in self._known:
            self._known[key] = 0  # `_check_circles` saw to it that there are none
            steps = 1
            if isinstance(schema, dict):
                for part in in_place(schema, self._references):
                    steps += self.count(part, value)
                for part, _, child in inside(schema, value):
                    steps += self.count(part, child)
            self._known[key] = min(steps, 2 * MAX_STEPS)
        return self._known[key]


def _as_published(node: dict[str, Any]) -> Schema:
    """A part of a schema without keywords that are null, and with null instead of `nullable`."""
    node = {key: value for key, value in node.items() if value is not None or key in _MAY_BE_NULL}
    if node.pop("nullable", None) is not True:
        return node
    if "$ref" in node or any(key in node for key in ("allOf", "anyOf", "oneOf", "not", "if")):
        kept = {key: node.pop(key) for key in ("$schema", "$id", *_DEFINITIONS) if key in node}
        return {"anyOf": [{"type": "null"}, node], **kept}
    for key in ("type", "enum"):
        if isinstance(node.get(key), str):
            node[key] = [node[key]]
    if "const" in node:
        node["enum"] = [node.pop("const")]
    if isinstance(node.get("type"), list) and "null" not in node["type"]:
        node["type"] = [*node["type"], "null"]
    if isinstance(node.get("enum"), list) and None not in node["enum"]:
        node["enum"] = [*node["enum"], None]
    return node


_MAY_BE_NULL = ("const", "default")
_DEFINITIONS = ("$defs", "definitions")


def _check_circles(root: dict[str, Any], references: References) -> None:
    """ValueError for parts that apply to the same value in a circle, or in too long a chain."""
    heights: dict[int, int] = {}
    for node in references.nodes():
        path: list[tuple[Schema, Any]] = [(node, iter(in_place(node, references)))]
        open_parts = {id(node)}
        while path and id(node) not in heights:
            part = next(path[-1][1], None)
            if part is None:
                done, _ = path.pop()
                open_parts.discard(id(done))
                parts = in_place(done, references)
                heights[id(done)] = 1 + max((heights.get(id(one), 0) for one in parts), default=0)
            elif id(part) in open_parts:
                raise ValueError("a $ref leads back to itself without going into the value")
            elif isinstance(part, dict) and id(part) not in heights:
                open_parts.add(id(part))
                path.append((part, iter(in_place(part, references))))
    if max(heights.values(), default=0) > _MAX_CHAIN:
        raise ValueError(f"more than {_MAX_CHAIN} parts of it apply to a value in a chain")


def _check_depth(root: dict[str, Any], references: References) -> None:
    """ValueError for references so deep in each other that libraries would exhaust the stack."""
    seen: set[int] = set()
    path: list[Iterator[Schema]] = [iter([root])]
    while path:
        node = next(path[-1], None)
        if node is None:
            path.pop()
        elif isinstance(node, dict) and id(node) not in seen:
            seen.add(id(node))
            used = {key: value for key, value in node.items() if key not in _DEFINITIONS}
            path.append(iter([*in_place(node, references), *parts(used)]))
        if len(path) > _MAX_DEPTH_OF_PARTS:
            raise ValueError(f"its parts are more than {_MAX_DEPTH_OF_PARTS:,} levels deep")


def _messages(error: Any) -> list[str]:
    """What is wrong, without the options that it is wrong for."""
    options = getattr(error.kind, "context", None)
    if not options:
        return [error.message]
    return [text for option in options for inner in option for text in _messages(inner)]


def _refuse(address: str) -> Any:
    raise ValueError(f"{address} is not fetched")


def _jsonschema_rs() -> Any:
    try:
        import jsonschema_rs
    except ImportError:
        raise MistralError(
            'jsonschema-rs is not installed; install the extra: pip install -e ".[chat]"'
        ) from None
    return jsonschema_rs
