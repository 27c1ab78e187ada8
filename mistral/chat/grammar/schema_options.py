"""A JSON schema as a list of options: a value is valid for the schema if it is valid for one option
at least.

`$ref`, `allOf`, `anyOf` and `oneOf` are resolved, each option is one merged set of keywords. It may
still say `not`, which is also how `oneOf` is kept: this one, and not the others. `Options.disjoint`
works out whether that holds by itself.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from mistral.errors import MistralError

Schema = dict[str, Any] | bool
ANY_TYPE = frozenset({"null", "boolean", "number", "string", "array", "object"})
MAX_OPTIONS = 250  # of one schema: combinations multiply, and listed values are tried one by one

# Keywords that cannot be expressed, and the type whose values they restrict; an option keeps their
# names as "refused"
REFUSED = {
    "if": "any",
    "$dynamicRef": "any",
    "uniqueItems": "array",
    "contains": "array",
    "unevaluatedItems": "array",
    "propertyNames": "object",
    "dependentRequired": "object",
    "dependentSchemas": "object",
    "unevaluatedProperties": "object",
}
WITHOUT_EFFECT = {"uniqueItems": False, "unevaluatedItems": True, "unevaluatedProperties": True}
TYPE_OF = {
    **dict.fromkeys(
        ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf"), "number"
    ),
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format"), "string"),
    **dict.fromkeys(("minItems", "maxItems", "prefixItems", "items"), "array"),
    **dict.fromkeys(
        ("properties", "required", "additionalProperties", "patternProperties"), "object"
    ),
    **dict.fromkeys(("minProperties", "maxProperties"), "object"),
}


class GrammarError(MistralError, ValueError):
    """A grammar cannot be made, or a token has left it."""


class UnsupportedSchema(GrammarError):
    """A schema that the grammar cannot express, because of `keyword`; answers have to be validated
    instead.
    """

    def __init__(self, keyword: str, reason: str):
        super().__init__(f"the grammar cannot express {keyword!r}: {reason}")
        self.keyword, self.reason = keyword, reason


@dataclass(frozen=True)
class Option:
    """Keywords that all hold, in the form that `_own_keywords` gives them;

    `depth` is what is left of it inside.
    """

    keywords: dict[str, Any]
    depth: int

    @property
    def types(self) -> frozenset[str]:
        """The types of its values; where none is named, the type that the other keywords speak of
        is meant.
        """
        spoken_of = frozenset(TYPE_OF[key] for key in self.keywords if key in TYPE_OF)
        return self.keywords.get("type", spoken_of or ANY_TYPE)

    @property
    def names(self) -> list[str]:
        """The properties that it names, in order."""
        return list(
            dict.fromkeys(
                [*self.keywords.get("properties", ()), *self.keywords.get("required", ())]
            )
        )

    def property(self, name: str) -> Schema:
        """What the property of this name must be valid for."""
        found = [
            schema for key, schema in self.keywords.get("properties", {}).items() if key == name
        ]
        patterns = self.keywords.get("patternProperties", {})
        found += [schema for pattern, schema in patterns.items() if re.search(pattern, name)]
        return joined(*found) if found else self.keywords.get("additionalProperties", True)

    def item(self, i: int) -> Schema:
        """What the item at place i must be valid for."""
        first = self.keywords.get("prefixItems", ())
        return first[i] if i < len(first) else self.keywords.get("items", True)


def joined(*schemas: Schema) -> Schema:
    """The schema of the values that are valid for all of these."""
    telling = [schema for schema in schemas if schema is not True and schema != {}]
    return {"allOf": telling} if len(telling) > 1 else telling[0] if telling else True


class Options:
    """The options of a schema's parts; references begin at `root`, which is known to be
    well-formed.
    """

    def __init__(self, root: dict[str, Any]):
        self._root = root
        self._recursive: dict[str, bool] = {}
        if any(node is not root for node in _nodes_with(root, "$id")):
            raise UnsupportedSchema("$id", "a part of the schema has an address of its own")

    def of(self, schema: Schema, depth: int, every: bool = False) -> list[Option]:
        """The options of `schema`, without those that take more than `depth` references into
        something recursive.

        every  raise UnsupportedSchema rather than leave one out
        """
        if isinstance(schema, bool):
            return [Option({}, depth)] if schema else []
        options = [Option(_own_keywords(schema), depth)]
        if "$ref" in schema:
            options = _both(options, self._referenced(schema["$ref"], depth, every))
        for part in schema.get("allOf", ()):
            options = _both(options, self.of(part, depth, every))
        if "anyOf" in schema:
            options = _both(
                options,
                [option for part in schema["anyOf"] for option in self.of(part, depth, every)],
            )
        if "oneOf" in schema:
            options = _both(options, self._exactly_one(schema["oneOf"], depth, every))
        if schema.get("nullable") is True:  # OpenAPI's: see json_schema.py
            options.append(Option({"type": frozenset({"null"})}, depth))
        return options

    def disjoint(self, a: Option, b: Option) -> bool:
        """Whether no value of `a` is valid for `b`; False where that can't be told.

        `a` is taken as the grammar will: it has the types that it speaks of, and no properties but
        those it names.
        """
        if "enum" in a.keywords and "enum" in b.keywords:
            return not any(value in b.keywords["enum"] for value in a.keywords["enum"])
        shared = _common_types(a.types, b.keywords.get("type", ANY_TYPE))
        if shared != {"object"}:
            return not shared
        required = [*a.keywords.get("required", ()), *b.keywords.get("required", ())]
        return any(self._never_both(a, b, name) for name in required)

    def _never_both(self, a: Option, b: Option, name: str) -> bool:
        if a.names and name not in a.names:
            return True
        others = self.of(b.property(name), b.depth, every=True)
        return all(self.disjoint(x, y) for x in self.of(a.property(name), a.depth) for y in others)

    def _exactly_one(self, parts: list[Schema], depth: int, every: bool) -> list[Option]:
        found = []
        for i, part in enumerate(parts):
            others = tuple(("oneOf", other) for j, other in enumerate(parts) if j != i)
            for option in self.of(part, depth, every):
                denied = option.keywords.get("not", ()) + others
                found.append(Option({**option.keywords, "not": denied}, option.depth))
        return found

    def _referenced(self, reference: str, depth: int, every: bool) -> list[Option]:
        if reference not in self._recursive:
            self._recursive[reference] = self._leads_to_itself(reference)
        if self._recursive[reference]:
            depth -= 1
        if depth >= 0:
            return self.of(self._target(reference), depth, every)
        if every:
            raise UnsupportedSchema(
                "$ref", "whether options exclude each other depends on a recursive part"
            )
        return []

    def _leads_to_itself(self, reference: str) -> bool:
        seen, waiting = set(), [reference]
        while waiting:
            target = self._target(waiting.pop())
            inside = {node["$ref"] for node in _nodes_with(target, "$ref")}
            if reference in inside:
                return True
            waiting += inside - seen
            seen |= inside
        return False

    def _target(self, reference: str) -> Schema:
        """What a reference points to: `#` and a JSON pointer (RFC 6901) behind it."""
        node: Any = self._root
        if reference != "#" and not reference.startswith("#/"):
            raise UnsupportedSchema("$ref", f"{reference!r} does not begin with #/")
        try:
            for step in unquote(reference).split("/")[1:]:
                step = step.replace("~1", "/").replace("~0", "~")
                node = node[int(step)] if isinstance(node, list) else node[step]
        except (KeyError, IndexError, ValueError, TypeError):
            raise UnsupportedSchema("$ref", f"{reference!r} leads nowhere") from None
        return node


def _both(left: list[Option], right: list[Option]) -> list[Option]:
    """An option for each pair: what is valid for one of `left` and for one of `right`."""
    if len(left) * len(right) > MAX_OPTIONS:
        raise UnsupportedSchema("anyOf", f"{len(left) * len(right)} combinations of options")
    merged = (_merged(a, b) for a in left for b in right)
    return [option for option in merged if option.keywords.get("type") != frozenset()]


def _merged(a: Option, b: Option) -> Option:
    x, y = a.keywords, b.keywords
    both = {**x, **y}
    both |= {key: MERGE[key](x[key], y[key]) for key in x.keys() & y.keys() & MERGE.keys()}
    if names := list(dict.fromkeys([*a.names, *b.names])):
        both["properties"] = {name: joined(a.property(name), b.property(name)) for name in names}
    for one, other in ((x, y), (y, x)):
        if (
            "patternProperties" in one
            and {"patternProperties", "additionalProperties"} & other.keys()
        ):
            raise UnsupportedSchema(
                "patternProperties", "it meets another schema's rule for further properties"
            )
    first = max(len(x.get("prefixItems", ())), len(y.get("prefixItems", ())))
    if first:
        both["prefixItems"] = [joined(a.item(i), b.item(i)) for i in range(first)]
    return Option(both, min(a.depth, b.depth))


def _own_keywords(schema: dict[str, Any]) -> dict[str, Any]:
    """What a schema says by itself, in the form that `MERGE` merges."""
    own = {key: schema[key] for key in MERGE if key in schema}
    if "type" in own:
        own["type"] = frozenset([own["type"]] if isinstance(own["type"], str) else own["type"])
    if "const" in schema:
        own["enum"] = [
            value for value in own.get("enum", [schema["const"]]) if value == schema["const"]
        ]
    if "enum" in own:
        types = frozenset().union(*map(_types_of_value, own["enum"]))
        own["type"] = _common_types(own.get("type", types), types)
    for key in ("pattern", "format"):
        if key in own:
            own[key] = (own[key],)
    own["not"] = (("not", schema["not"]),) if "not" in schema else ()
    own["refused"] = tuple(
        key for key in REFUSED if key in schema and schema[key] is not WITHOUT_EFFECT.get(key)
    )
    return {key: value for key, value in own.items() if value != ()}


def _types_of_value(value: Any) -> frozenset[str]:
    if isinstance(value, bool):
        return frozenset({"boolean"})
    names = {
        type(None): "null",
        str: "string",
        int: "number",
        float: "number",
        list: "array",
        dict: "object",
    }
    return frozenset({names[type(value)]})


def _common_types(a: frozenset[str], b: frozenset[str]) -> frozenset[str]:
    """Types of both; integers are numbers."""
    integer = (
        {"integer"}
        if ("integer" in a and "number" in b) or ("integer" in b and "number" in a)
        else set()
    )
    common = (a & b) | integer
    return common - {"integer"} if "number" in common else common


def _common_multiple(a: float, b: float) -> float:
    if a != b and not (isinstance(a, int) and isinstance(b, int)):
        raise UnsupportedSchema("multipleOf", f"{a} together with {b}")
    return a if a == b else math.lcm(a, b)


def _nodes_with(node: Any, key: str) -> Iterator[dict[str, Any]]:
    """Every object inside `node` in which `key` has a text."""
    if isinstance(node, dict):
        if isinstance(node.get(key), str):
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _nodes_with(child, key)


MERGE: dict[str, Callable[[Any, Any], Any]] = {
    "type": _common_types,
    "enum": lambda a, b: [value for value in a if value in b],
    "minimum": max,
    "exclusiveMinimum": max,
    "maximum": min,
    "exclusiveMaximum": min,
    "multipleOf": _common_multiple,
    "minLength": max,
    "maxLength": min,
    "pattern": tuple.__add__,
    "format": tuple.__add__,
    "minItems": max,
    "maxItems": min,
    "prefixItems": lambda a, b: a,  # item by item, in `_merged`; so are the properties
    "items": joined,
    "properties": lambda a, b: a,
    "required": lambda a, b: list(dict.fromkeys([*a, *b])),
    "additionalProperties": joined,
    "patternProperties": lambda a, b: a,
    "minProperties": max,
    "maxProperties": min,
    "not": tuple.__add__,
    "refused": tuple.__add__,
}
KEYWORDS = (
    frozenset(MERGE) | frozenset(REFUSED) | {"$ref", "allOf", "anyOf", "oneOf", "const", "nullable"}
)
