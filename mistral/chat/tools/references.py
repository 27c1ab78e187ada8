"""The parts of a JSON schema: where they are, and where its references lead.

Nothing here checks a schema, and nothing is fetched: a reference leads to a place in the same
document, by a JSON pointer (RFC 6901), an anchor or an `$id`.
"""

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote, urljoin

Schema = dict[str, Any] | bool
_SAME_VALUE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "dependentSchemas", "dependencies")
_MAPS += ("$defs", "definitions")
_SINGLE = ("not", "if", "then", "else", "items", "additionalItems", "unevaluatedItems", "contains")
_SINGLE += ("additionalProperties", "unevaluatedProperties", "propertyNames", "contentSchema")
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


def rewritten(schema: Any, rewrite: Callable[[dict[str, Any]], Schema]) -> Any:
    """A copy of a schema with each of its parts rewritten, the inner ones first."""
    if not isinstance(schema, dict):
        return schema
    copy = dict(schema)
    for key, value in schema.items():
        if key in _LISTS and isinstance(value, list):
            copy[key] = [rewritten(part, rewrite) for part in value]
        elif key in _MAPS and isinstance(value, dict):
            copy[key] = {name: rewritten(part, rewrite) for name, part in value.items()}
        elif key in _SINGLE:
            copy[key] = rewritten(value, rewrite)
    return rewrite(copy)


def parts(schema: dict[str, Any]) -> Iterator[Schema]:
    """The parts of a schema, definitions included, without the parts of its parts."""
    for key, value in schema.items():
        if key in _LISTS and isinstance(value, list):
            yield from value
        elif key in _MAPS and isinstance(value, dict):
            yield from value.values()
        elif key in _SINGLE:
            yield value


def in_place(schema: Schema, references: "References") -> list[Schema]:
    """The parts that apply to the value itself, and the targets of references."""
    if not isinstance(schema, dict):
        return []
    found: list[Schema] = []
    for key in _SAME_VALUE:
        value = schema.get(key, [])
        found += value if isinstance(value, list) else [value]
    for key in ("dependentSchemas", "dependencies"):
        found += [part for part in schema.get(key, {}).values() if not isinstance(part, list)]
    for key in _REFERENCES:
        if isinstance(schema.get(key), str):
            found.append(references.target(schema, schema[key]))
    return found


def inside(schema: dict[str, Any], value: Any) -> Iterator[tuple[Schema, Any, Any]]:
    """The parts that apply to parts of the value, or may do so: each with the key and the part.

    The key of a property's name, which `propertyNames` is about, is None.
    """
    if isinstance(value, dict):
        named = schema.get("properties", {})
        keys = ("additionalProperties", "unevaluatedProperties")
        others = [schema[key] for key in keys if key in schema]
        others += schema.get("patternProperties", {}).values()
        for name, child in value.items():
            own = [named[name]] if name in named else []
            for part in (*own, *others):
                yield part, name, child
            if "propertyNames" in schema:
                yield schema["propertyNames"], None, name
    elif isinstance(value, list):
        lists = [schema[key] for key in ("prefixItems", "items") if key in schema]
        first = [part for one in lists if isinstance(one, list) for part in one]
        keys = ("items", "additionalItems", "unevaluatedItems", "contains")
        others = [schema[key] for key in keys if not isinstance(schema.get(key, []), list)]
        for i, child in enumerate(value):
            for part in (*first[i : i + 1], *others):
                yield part, i, child


class References:
    """Where the references of a schema lead. ValueError for a part with a dialect of its own."""

    def __init__(self, root: dict[str, Any]):
        self._root = root
        self._resources: dict[int, dict[str, Any]] = {}  # the part with the $id, by id(part)
        self._named: dict[str, Schema] = {}  # by $id, and by $id and anchor
        self._nodes: list[dict[str, Any]] = []
        self._add(root, root, "")

    def nodes(self) -> list[dict[str, Any]]:
        """All parts that are objects."""
        return self._nodes

    def check(self) -> None:
        """ValueError for a reference that leads nowhere."""
        i = 0
        while i < len(self._nodes):  # targets may add some
            node = self._nodes[i]
            i += 1
            for key in _REFERENCES:
                if isinstance(node.get(key), str):
                    self._check_one(node, node[key])

    def _check_one(self, node: dict[str, Any], reference: str) -> None:
        try:
            self.target(node, reference)
        except (LookupError, ValueError):
            raise ValueError(
                f"its $ref {reference!r} leads nowhere in it, and nothing is fetched"
            ) from None

    def target(self, node: Schema, reference: str) -> Schema:
        """The part that a reference in `node` leads to; LookupError if there is none."""
        resource = self._resources.get(id(node), self._root)
        address, _, fragment = reference.partition("#")
        base = resource.get("$id", resource.get("id", ""))
        base = base if isinstance(base, str) else ""
        if address and urljoin(base, address) != base.partition("#")[0]:
            resource = self._named[urljoin(base, address)]
            base = urljoin(base, address)
        if fragment and not fragment.startswith("/"):
            return self._named[f"{base.partition('#')[0]}#{fragment}"]
        found: Any = resource
        for step in unquote(fragment).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            found = found[int(step)] if isinstance(found, list) else found[step]
        if not isinstance(found, dict | bool):
            raise LookupError(reference)
        if isinstance(found, dict) and id(found) not in self._resources:
            self._add(found, resource, base)
        return found

    def _add(self, node: Schema, resource: dict[str, Any], base: str) -> None:
        if not isinstance(node, dict) or id(node) in self._resources:
            return
        own = node.get("$id", node.get("id"))
        if isinstance(own, str) and not own.startswith("#"):
            resource = node
            base = urljoin(base, own).partition("#")[0]
            self._named[base] = node
        elif isinstance(own, str):
            self._named[f"{base}{own}"] = node
        if node is not self._root and node.get("$schema", self._root.get("$schema")) != (
            self._root.get("$schema")
        ):
            raise ValueError("a part of it has a $schema of its own: remove it")
        self._resources[id(node)] = resource
        self._nodes.append(node)
        for key in ("$anchor", "$dynamicAnchor"):
            if isinstance(node.get(key), str):
                self._named[f"{base}#{node[key]}"] = node
        for part in parts(node):
            self._add(part, resource, base)
