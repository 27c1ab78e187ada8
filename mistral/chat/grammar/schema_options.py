"""A JSON schema as a list of options: a value is valid if it is valid for at least one of them.

`$ref`, `allOf`, `anyOf` and `oneOf` are resolved: each option is one merged set of keywords. It may
have `not`, which also expresses `oneOf`: this part, and not the others. `Options.disjoint` computes
whether that holds by itself.
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
_MAX_OPTIONS = 250  # of one schema: combinations multiply, and listed values are tried one by one

# Keywords that cannot be expressed, and the type whose values they restrict. An option has their
# names under "refused".
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
_WITHOUT_EFFECT = {"uniqueItems": False, "unevaluatedItems": True, "unevaluatedProperties": True}
_KEYWORDS_OF = {
    "number": ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": ("minItems", "maxItems", "prefixItems", "items"),
    "object": ("properties", "required", "additionalProperties", "patternProperties")
    + ("minProperties", "maxProperties"),
}
_TYPE_OF = {key: type for type, keys in _KEYWORDS_OF.items() for key in keys}


class GrammarError(MistralError, ValueError):
    """A grammar cannot be built, or it does not allow a token."""


class UnsupportedSchema(GrammarError):
    """A schema that the grammar cannot express, because of `keyword`: validate answers instead."""

    def __init__(self, keyword: str, reason: str):
        super().__init__(f"the grammar cannot express {keyword!r}: {reason}")
        self.keyword = keyword
        self.reason = reason


@dataclass(frozen=True)
class Option:
    """Keywords that all hold, in the form of `_own_keywords`.

    depth  how many more levels, or steps of recursion, are allowed inside
    """

    keywords: dict[str, Any]
    depth: int

    @property
    def types(self) -> frozenset[str]:
        """The types of its values; without "type", the types that its keywords are about."""
        meant = frozenset(_TYPE_OF[key] for key in self.keywords if key in _TYPE_OF)
        return self.keywords.get("type", meant or ANY_TYPE)

    @property
    def names(self) -> list[str]:
        """The properties that it names, in order."""
        named = [*self.keywords.get("properties", ()), *self.keywords.get("required", ())]
        return list(dict.fromkeys(named))

    def property(self, name: str) -> Schema:
        """The schema of the property with this name."""
        properties = self.keywords.get("properties", {})
        found = [properties[name]] if name in properties else []
        patterns = self.keywords.get("patternProperties", {})
        found += [schema for pattern, schema in patterns.items() if re.search(pattern, name)]
        return joined(*found) if found else self.keywords.get("additionalProperties", True)

    def item(self, i: int) -> Schema:
        """The schema of the item at index i."""
        first = self.keywords.get("prefixItems", ())
        return first[i] if i < len(first) else self.keywords.get("items", True)


def joined(*schemas: Schema) -> Schema:
    """The schema of the values that are valid for all of these."""
    restricting = [schema for schema in schemas if schema is not True and schema != {}]
    if len(restricting) > 1:
        return {"allOf": restricting}
    return restricting[0] if restricting else True


class Options:
    """The options of a schema's parts; `root`, where references begin, is well-formed."""

    def __init__(self, root: dict[str, Any]):
        self._root = root
        self._recursive: dict[str, bool] = {}
        if any(node is not root for node in _nodes_with(root, "$id")):
            raise UnsupportedSchema("$id", "a part of the schema has an address of its own")

    def of(self, schema: Schema, depth: int, every: bool = False) -> list[Option]:
        """The options of `schema`, without those beyond `depth` recursive references.

        every  raise UnsupportedSchema instead of leaving one out
        """
        if isinstance(schema, bool):
            return [Option({}, depth)] if schema else []
        options = [Option(_own_keywords(schema), depth)]
        if "$ref" in schema:
            options = _both(options, self._referenced(schema["$ref"], depth, every))
        for part in schema.get("allOf", ()):
            options = _both(options, self.of(part, depth, every))
        if "anyOf" in schema:
            any_of = [option for part in schema["anyOf"] for option in self.of(part, depth, every)]
            options = _both(options, any_of)
        if "oneOf" in schema:
            options = _both(options, self._exactly_one(schema["oneOf"], depth, every))
        if schema.get("nullable") is True:  # OpenAPI's: see json_schema.py
            options.append(Option({"type": frozenset({"null"})}, depth))
        return options

    def disjoint(self, a: Option, b: Option) -> bool:
        """Whether no value of `a` is valid for `b`; False if that is unknown.

        `a` is read as the grammar reads it: with the types that its keywords are about, and only
        the properties that it names.
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
        seen = set()
        waiting = [reference]
        while waiting:
            target = self._target(waiting.pop())
            inside = {node["$ref"] for node in _nodes_with(target, "$ref")}
            if reference in inside:
                return True
            waiting += inside - seen
            seen |= inside
        return False

    def _target(self, reference: str) -> Schema:
        """The target of a reference: `#`, then a JSON pointer (RFC 6901)."""
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
    """One option for each pair: values valid for both."""
    if len(left) * len(right) > _MAX_OPTIONS:
        raise UnsupportedSchema("anyOf", f"{len(left) * len(right)} combinations of options")
    merged = (_merged(a, b) for a in left for b in right)
    return [option for option in merged if option.keywords.get("type") != frozenset()]


def _merged(a: Option, b: Option) -> Option:
    x = a.keywords
    y = b.keywords
    both = {**x, **y}
    both |= {key: _MERGE[key](x[key], y[key]) for key in x.keys() & y.keys() & _MERGE.keys()}
    if names := list(dict.fromkeys([*a.names, *b.names])):
        both["properties"] = {name: joined(a.property(name), b.property(name)) for name in names}
    for one, other in ((x, y), (y, x)):
        other_has_rule = {"patternProperties", "additionalProperties"} & other.keys()
        if "patternProperties" in one and other_has_rule:
            raise UnsupportedSchema(
                "patternProperties", "it meets another schema's rule for further properties"
            )
    first = max(len(x.get("prefixItems", ())), len(y.get("prefixItems", ())))
    if first:
        both["prefixItems"] = [joined(a.item(i), b.item(i)) for i in range(first)]
    return Option(both, min(a.depth, b.depth))


def _own_keywords(schema: dict[str, Any]) -> dict[str, Any]:
    """The keywords of the schema itself, in the form that `_MERGE` merges."""
    own = {key: schema[key] for key in _MERGE if key in schema}
    if "type" in own:
        own["type"] = frozenset([own["type"]] if isinstance(own["type"], str) else own["type"])
    if "const" in schema:
        listed = own.get("enum", [schema["const"]])
        own["enum"] = [value for value in listed if value == schema["const"]]
    if "enum" in own:
        types = frozenset().union(*map(_types_of_value, own["enum"]))
        own["type"] = _common_types(own.get("type", types), types)
    for key in ("pattern", "format"):
        if key in own:
            own[key] = (own[key],)
    own["not"] = (("not", schema["not"]),) if "not" in schema else ()
    own["refused"] = tuple(
        key for key in REFUSED if key in schema and schema[key] is not _WITHOUT_EFFECT.get(key)
    )
    return {key: value for key, value in own.items() if value != ()}


def _types_of_value(value: Any) -> frozenset[str]:
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if value is None:
        return frozenset({"null"})
    names = {str: "string", int: "number", float: "number", list: "array", dict: "object"}
    return frozenset({names[type(value)]})


def _common_types(a: frozenset[str], b: frozenset[str]) -> frozenset[str]:
    """The types of both; integers are numbers."""
    common = a & b
    if ("integer" in a and "number" in b) or ("integer" in b and "number" in a):
        common |= {"integer"}
    return common - {"integer"} if "number" in common else common


def _common_multiple(a: float, b: float) -> float:
    if a != b and not (isinstance(a, int) and isinstance(b, int)):
        raise UnsupportedSchema("multipleOf", f"{a} together with {b}")
    return a if a == b else math.lcm(a, b)


def _nodes_with(node: Any, key: str) -> Iterator[dict[str, Any]]:
    """Every object inside `node` in which `key` is a string."""
    if isinstance(node, dict):
        if isinstance(node.get(key), str):
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _nodes_with(child, key)


_MERGE: dict[str, Callable[[Any, Any], Any]] = {
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
_RESOLVED = {"$ref", "allOf", "anyOf", "oneOf", "const", "nullable"}
KEYWORDS = frozenset(_MERGE) | frozenset(REFUSED) | _RESOLVED
