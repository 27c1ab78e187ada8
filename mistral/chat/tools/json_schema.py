"""JSON Schema: checked before it is used, and applied to JSON that a model wrote.

Schemas follow Draft 2020-12 (https://json-schema.org/draft/2020-12) and may have OpenAPI's
`nullable`: transformers writes `Optional` with it. No `$ref` is fetched from the network, as
jsonschema by itself would do.
"""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from mistral.errors import MistralError, one_line

# Parsers of JSON recurse, and their limit depends on the caller's stack: this is far below it.
_MAX_DEPTH = 64
_TOO_DEEP = f"it is nested more than {_MAX_DEPTH} levels deep"


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


def compile_schema(schema: Mapping[str, Any]) -> Any:
    """A jsonschema validator, for `problem`.

    Raises SchemaError for a malformed schema, for a `$ref` to nothing or to another document
    (nothing is fetched), and for `$ref`s in a circle; a schema may be recursive if the data is.
    Needs the extra `chat`.
    """
    if not isinstance(schema, Mapping):
        raise SchemaError(f"a schema is a JSON object, not {type(schema).__name__}")
    validator_class = _validator_class()  # first: its error says which extra to install
    from referencing import Registry

    try:
        copy = as_json(dict(schema))
        copy.pop("$schema", None)  # otherwise references to the root would follow that draft
        if _names_a_draft(copy):
            raise ValueError("a part of it has a $schema of its own: remove it")
        if wrong := problem(_metaschema(), copy):
            raise ValueError(wrong)
        _check_references(copy)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"malformed schema: {one_line(str(error))}") from None
    return validator_class(copy, registry=Registry())


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


def problem(validator: Any, value: Any) -> str | None:
    """The problem of a value, in one line for a model; None if it is valid."""
    from jsonschema.exceptions import best_match

    try:
        value = as_json(value)
        errors = [best_match([error]) for error in islice(validator.iter_errors(value), 3)]
    except RecursionError:  # every `$ref` on the way uses more of the stack
        return "it is nested too deeply"
    except OverflowError as error:  # multipleOf with an integer beyond every float
        return str(error)
    except ValueError as error:
        return f"not JSON: {error}"
    return "; ".join(dict.fromkeys(map(_explain, errors))) or None


def _explain(error: Any) -> str:
    if error.validator in ("anyOf", "oneOf") and error.context:
        return one_line(", or ".join(dict.fromkeys(map(_explain, error.context))))
    where = error.json_path.removeprefix("$").removeprefix(".")
    text = one_line(error.message)
    about_others = error.validator in ("additionalProperties", "unevaluatedProperties")
    if about_others and error.validator_value is False:
        text += one_line(f"; known: {', '.join(error.schema.get('properties', ())) or 'none'}")
    return f"{where}: {text}" if where else text


@functools.cache
def _validator_class() -> Any:
    """jsonschema's for Draft 2020-12, but `nullable` makes null valid, despite other keywords."""
    try:
        from jsonschema import Draft202012Validator, validators
    except ImportError:
        raise MistralError(
            'jsonschema is not installed; install the extra: pip install -e ".[chat]"'
        ) from None

    def or_null(rule: Any) -> Any:
        def apply(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
            is_null = instance is None and schema.get("nullable") is True
            return () if is_null else rule(validator, value, instance, schema)

        return apply

    rules = {keyword: or_null(rule) for keyword, rule in Draft202012Validator.VALIDATORS.items()}
    return validators.extend(Draft202012Validator, rules)


@functools.cache
def _metaschema() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(
        Draft202012Validator.META_SCHEMA, format_checker=Draft202012Validator.FORMAT_CHECKER
    )


def _names_a_draft(value: Any) -> bool:
    """Whether a part has a `$schema` of its own: its rules would not be checked here."""
    own = isinstance(value, dict) and isinstance(value.get("$schema"), str)
    return own or any(map(_names_a_draft, _children(value)))


def _check_references(schema: dict[str, Any]) -> None:
    """Follow every `$ref`. ValueError for one that leads nowhere, or in a circle without an end."""
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    done: set[int] = set()
    root = DRAFT202012.create_resource(schema)
    waiting = [(root, Registry().resolver_with_root(root))]

    def visit(resource: Any, resolver: Any, path: tuple[int, ...]) -> None:
        node = resource.contents
        if id(node) in path:
            raise ValueError("a $ref leads back to itself without going into the value")
        if id(node) in done or not isinstance(node, dict):
            return
        path += (id(node),)
        for reference in (node[key] for key in ("$ref", "$dynamicRef") if key in node):
            try:
                found = resolver.lookup(reference)
            except Unresolvable:
                raise ValueError(
                    f"its $ref {reference!r} leads nowhere in it, and nothing is fetched"
                ) from None
            if wrong := problem(_metaschema(), found.contents):
                raise ValueError(f"its $ref {reference!r} leads to an invalid schema: {wrong}")
            visit(DRAFT202012.create_resource(found.contents), found.resolver, path)
        same_value = {id(inner) for inner in _applied_to_the_same_value(node)}
        for inner in resource.subresources():
            inside = resolver.in_subresource(inner)
            if id(inner.contents) in same_value:
                visit(inner, inside, path)
            else:
                waiting.append((inner, inside))
        done.add(id(node))

    while waiting:
        visit(*waiting.pop(), ())


def _applied_to_the_same_value(schema: dict[str, Any]) -> Iterator[Any]:
    """The parts of a schema that apply to the value itself, not to a part of it."""
    for keyword in ("allOf", "anyOf", "oneOf"):
        yield from schema.get(keyword, ())
    for keyword in ("not", "if", "then", "else"):
        if keyword in schema:
            yield schema[keyword]
    yield from schema.get("dependentSchemas", {}).values()
