"""A JSON schema as options: a value is valid if it is valid for at least one of them.

`$ref`, `allOf`, `anyOf` and `oneOf` beside other keywords are resolved: an option is one set of
keywords that all hold. Keywords that a grammar cannot express are dropped, and named.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

from mistral.chat.grammar.token_masks import UnsupportedSchema
from mistral.chat.tools.json_schema import SchemaError, Validator, compile_schema
from mistral.chat.tools.references import References, Schema, rewritten

_MAX_OPTIONS = 250  # of one part
_MAX_STEPS = 20_000  # parts merged, of one schema
_DEFINITIONS = ("$defs", "definitions")
# Only a validator can check these. `oneOf` is read as `anyOf`.
_DROPPED = ("not", "if", "uniqueItems", "contains", "unevaluatedItems", "dependentRequired")
_DROPPED += ("dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef")
# They may ask for properties that an option does not name: it must allow others.
_OF_OTHER_NAMES = {"if", "dependentRequired", "dependentSchemas", "dependencies"}
_OF_OTHER_NAMES |= {"$dynamicRef", "$recursiveRef"}
_WITHOUT_EFFECT = {
    "uniqueItems": False,
    "unevaluatedItems": True,
    "propertyNames": {"type": "string"},
    "minLength": 0,
    "minItems": 0,
    "minProperties": 0,
}
NOTHING: dict[str, Any] = {"enum": []}
# A part that is not known: any value, and any property beside those of the parts around it
_ANYTHING: dict[str, Any] = {"additionalProperties": True}


class SchemaOptions:
    """The options of a schema's parts.

    draft    the dialect; in Draft 4 alone 5.0 is not an integer
    dropped  the keywords that the options leave to the validator, and why
    """

    def __init__(self, validator: Validator):
        self.root = rewritten(validator.schema, lambda node: _as_in_2020(node, validator.draft))
        self.draft = validator.draft
        self.dropped: dict[str, str] = {}
        self._references = References(self.root)
        addresses = [str(node["$id"]) for node in self._references.nodes()[1:] if "$id" in node]
        self._is_one_document = all(address.startswith("#") for address in addresses)
        self._known: dict[str, list[dict[str, Any]]] = {}
        self._steps = 0

    def drop(self, keyword: str, reason: str) -> None:
        """Leave a keyword to the validator."""
        self.dropped.setdefault(keyword, reason)

    def plain(self, schema: Schema) -> dict[str, Any]:
        """The part with the keywords that have an effect, and no others."""
        if isinstance(schema, bool):
            return {} if schema else NOTHING
        if schema.get("not") in ({}, True) and "not" in schema:
            return NOTHING
        node = {}
        for key, value in schema.items():
            known = key in _MERGE or key in _RESOLVED or key in _DROPPED
            if known and _WITHOUT_EFFECT.get(key, ...) != value:
                node[key] = value
        for key in ("anyOf", "oneOf"):
            if key in node:
                node[key] = [part for part in node[key] if self.plain(part) is not NOTHING]
        return node

    def target(self, node: dict[str, Any]) -> Schema:
        """Where the part's reference leads; anywhere in doubt."""
        try:
            if self._is_one_document:
                return self._references.target(node, node["$ref"])
        except (LookupError, ValueError):
            pass
        self.drop("$ref", f"{node['$ref']!r} leads to a part with an $id, or of an older draft")
        return _ANYTHING

    def of(self, schema: Schema) -> list[dict[str, Any]]:
        """The options of a part. UnsupportedSchema if there is too much to merge."""
        node = self.plain(schema)
        key = json.dumps(node)
        if key not in self._known:
            self._steps += 1
            if self._steps > _MAX_STEPS:
                raise UnsupportedSchema("allOf", f"more than {_MAX_STEPS:,} parts to merge")
            self._known[key] = self._of(node)
        return self._known[key]

    def _of(self, node: dict[str, Any]) -> list[dict[str, Any]]:
        options = [_own_keywords(node)]
        conjuncts = [self.of(self.target(node))] if "$ref" in node else []
        conjuncts += map(self.of, node.get("allOf", ()))
        for key in ("anyOf", "oneOf"):
            if key in node:
                every = [option for part in node[key] for option in self.of(part)]
                conjuncts.append(list({json.dumps(option): option for option in every}.values()))
        for conjunct in conjuncts:
            if len(options) * len(conjunct) > _MAX_OPTIONS:
                self.drop("anyOf", f"{len(options) * len(conjunct)} combinations of options")
                conjunct = [_ANYTHING]
            merged = [self._merged(a, b) for a in options for b in conjunct]
            options = [option for option in merged if option.get("type") != []]
        dropped = [key for key in _DROPPED if key in node]
        if "oneOf" in node and not self.exclusive(node["oneOf"]):
            dropped.append("oneOf")
        if node.keys() - {"enum", "const"}:
            options = [
                {"enum": self._valid(node, option["enum"])} if "enum" in option else option
                for option in options
            ]
        if options and all("enum" in option for option in options):
            return options
        for keyword in dropped:
            self.drop(keyword, "only a validator can check it")
        if "unevaluatedProperties" in node or node.keys() & _OF_OTHER_NAMES:
            others = node.get("unevaluatedProperties", True)
            options = [{"additionalProperties": others} | option for option in options]
        return options

    def _valid(self, node: dict[str, Any], values: list[Any]) -> list[Any]:
        """The listed values that are valid for the whole part, if that can be told."""
        used = _DEFINITIONS if '"$ref"' in json.dumps(node) else ()
        try:
            validator = compile_schema(
                {key: self.root[key] for key in used if key in self.root} | node
            )
        except SchemaError:  # a reference to another place of the root
            return values
        once = {json.dumps(value, sort_keys=True): value for value in values}
        return [value for value in once.values() if validator.is_valid(value)]

    def exclusive(self, parts: list[Schema]) -> bool:
        """Whether no value is valid for two of the parts, as far as types and tags tell."""
        found = [self.of(part) for part in parts]
        pairs = (
            (a, b) for i in range(len(found)) for a in found[i] for j in range(i) for b in found[j]
        )
        return all(self._apart(a, b) for a, b in pairs)

    def _apart(self, a: dict[str, Any], b: dict[str, Any]) -> bool:
        merged = self._merged(a, b)
        if merged.get("type") == [] or merged.get("enum") == []:
            return True
        tags = [name for name in merged.get("required", ()) if merged["type"] == ["object"]]
        return any(
            one.get("enum") == [] for name in tags for one in self.of(property_schema(merged, name))
        )

    def _merged(self, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        """One option for the values that are valid for both."""
        both = {**a, **b}
        for key in a.keys() & b.keys() & _MERGE.keys():
            both[key] = _MERGE[key](a[key], b[key])
            if both[key] is None:
                both[key] = a[key]
                self.drop(key, f"{a[key]} together with {b[key]}")
        names = dict.fromkeys([*a.get("properties", ()), *b.get("properties", ())])
        if names:
            both["properties"] = {
                name: _joined(property_schema(a, name), property_schema(b, name)) for name in names
            }
        places = max(len(a.get("prefixItems", ())), len(b.get("prefixItems", ())))
        if places:
            both["prefixItems"] = [_joined(_item(a, i), _item(b, i)) for i in range(places)]
        return both


def property_schema(option: dict[str, Any], name: str) -> Schema:
    """The schema of the property with this name."""
    found = [option["properties"][name]] if name in option.get("properties", {}) else []
    patterns = option.get("patternProperties", {})
    found += [schema for pattern, schema in patterns.items() if _matches(pattern, name)]
    return _joined(*found) if found else option.get("additionalProperties", True)


@functools.lru_cache(1000)
def _matches(pattern: str, name: str) -> bool:
    return compile_schema({"pattern": pattern}).is_valid(name)


def _item(option: dict[str, Any], i: int) -> Schema:
    first = option.get("prefixItems", ())
    return first[i] if i < len(first) else option.get("items", True)


def _joined(*schemas: Schema) -> Schema:
    """The schema of the values that are valid for all of these."""
    restricting = [one for one in schemas if one is not True and one != {}]
    restricting = list({json.dumps(one): one for one in restricting}.values())
    if len(restricting) > 1:
        return {"allOf": restricting}
    return restricting[0] if restricting else True


def _own_keywords(node: dict[str, Any]) -> dict[str, Any]:
    own = {key: node[key] for key in _MERGE if key in node}
    if "type" in own:
        own["type"] = [own["type"]] if isinstance(own["type"], str) else own["type"]
    if "const" in node:
        own["enum"] = [
            value for value in own.get("enum", [node["const"]]) if value == node["const"]
        ]
    for key in ("pattern", "format"):
        if key in own:
            own[key] = [own[key]]
    return own


def _as_in_2020(node: dict[str, Any], draft: int) -> dict[str, Any]:
    """A part of an older draft in the form of Draft 2020-12."""
    if draft <= 7 and "$ref" in node:  # its siblings have no effect there
        return {key: node[key] for key in ("$ref", "$id", *_DEFINITIONS) if key in node}
    node = dict(node)
    if draft < 2020:
        items, rest = node.get("items"), node.pop("additionalItems", True)
        node.pop("prefixItems", None)
        if isinstance(items, list):
            node["prefixItems"], node["items"] = items, rest
    if draft == 4:
        node.pop("const", None)
        for key in ("minimum", "maximum"):
            exclusive = f"exclusive{key.capitalize()}"
            if node.pop(exclusive, False) is True and key in node:
                node[exclusive] = node.pop(key)
    return node


def _common_types(a: list[str], b: list[str]) -> list[str]:
    common = [type for type in a if type in b]
    if "integer" in (*a, *b) and "number" not in common:
        whole = [
            type
            for type in ("integer",)
            if {"integer", "number"} & set(a) and {"integer", "number"} & set(b)
        ]
        common = list(dict.fromkeys([*common, *whole]))
    return common


def _common_multiple(a: float, b: float) -> float | None:
    return next((one for one, other in ((a, b), (b, a)) if one % other == 0), None)


def _union(a: list[Any], b: list[Any]) -> list[Any]:
    return [*a, *(value for value in b if value not in a)]


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
    "pattern": _union,
    "format": _union,
    "minItems": max,
    "maxItems": min,
    "prefixItems": lambda a, b: a,  # item by item, in `_merged`; so are the properties
    "items": _joined,
    "properties": lambda a, b: a,
    "required": _union,
    "additionalProperties": _joined,
    "patternProperties": lambda a, b: {**a, **b},
    "propertyNames": _joined,
    "minProperties": max,
    "maxProperties": min,
}
_RESOLVED = ("$ref", "allOf", "anyOf", "oneOf", "const", "unevaluatedProperties")
