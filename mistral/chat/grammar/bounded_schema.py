"""A JSON schema rewritten for the grammar: the same values or fewer, and none of them endless.

What is valid for the rewritten schema is valid for the original. It consists of anyOf, enum,
references and one type at a time, so that the grammar has no keyword to overlook. What can't be
said so raises UnsupportedSchema.

Three things are narrower than JSON Schema on purpose: an object that names properties has no
others, a schema that names no type means the one that its keywords speak of, and `format` holds for
the formats that the grammar knows.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mistral.chat.grammar.schema_options import (
    ANY_TYPE,
    KEYWORDS,
    REFUSED,
    GrammarError,
    Option,
    Options,
    Schema,
    UnsupportedSchema,
)
from mistral.chat.tools.json_schema import as_json, compile_schema

MONTHS = (
    r"(0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8])"
)
LEAP_YEAR = r"[12]\d(0[48]|[2468][048]|[13579][26])|(12|16|20|24|28)00"
DATE = rf"([12]\d\d\d-({MONTHS})|({LEAP_YEAR})-02-29)"
CLOCK = r"([01]\d|2[0-3]):[0-5]\d"
TIME = rf"{CLOCK}:[0-5]\d(\.\d{{1,6}})?(Z|[+-]{CLOCK})"
# The grammar's own have the 31st of February, and seconds that Python's datetime does not read.
FORMAT_PATTERNS = {"date": f"^{DATE}$", "time": f"^{TIME}$", "date-time": f"^{DATE}T{TIME}$"}
GRAMMAR_FORMATS = ("duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")


@dataclass(frozen=True)
class Limits:
    """Where values end that a schema leaves open. A schema's own minimum beats a limit.

    max_string      characters of a string, and of a property's name where the schema does not give
                    the names
    max_items       items of an array
    max_properties  properties of an object whose names the schema does not give
    max_digits      digits of a number (1 to 15), up to 6 of them behind the point
    max_depth       levels of a value that the schema says nothing about, and steps of a schema that
                    refers to itself
    max_indent      spaces that may begin a line; 0: one line with the spaces that json.dumps
                    writes, and no others

    Raises ValueError for numbers out of range.
    """

    max_string: int = 2000
    max_items: int = 100
    max_properties: int = 100
    max_digits: int = 15
    max_depth: int = 5
    max_indent: int = 16

    def __post_init__(self):
        if not 1 <= self.max_digits <= 15:
            raise ValueError(
                f"max_digits must be 1 to 15, not {self.max_digits}: a float holds no more"
            )
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"{name} must be 0 or more, not {value}")


def bounded_schema(
    schema: Mapping[str, Any], limits: Limits, definitions: str = ""
) -> dict[str, Any]:
    """The schema for the grammar, with its `$defs` beside; their names begin with `definitions`.

    Raises SchemaError for a malformed schema, UnsupportedSchema for what a grammar cannot express,
    and GrammarError where no value is left. Needs the extra `chat`.
    """
    validator = compile_schema(schema)
    try:
        bounder = _Bounder(as_json(dict(schema)), validator, limits, definitions)
        root = bounder.schema(bounder.root, limits.max_depth)
    except RecursionError:
        raise UnsupportedSchema("$ref", "the schema is nested too deeply") from None
    if root is None:
        raise GrammarError(f"no value is valid for the schema (with max_depth={limits.max_depth})")
    return {
        **root,
        "$defs": {name: body for name, body in bounder.definitions.values() if body is not None},
    }


class _Bounder:
    """Rewrites the parts of one schema.

    definitions  by reference (None: any value) and depth, the name and the body of what is written
                 once. A body is None where no value is valid.
    """

    def __init__(self, root: dict[str, Any], validator: Any, limits: Limits, prefix: str):
        self.root, self._validator, self._limits, self._prefix = root, validator, limits, prefix
        self._options = Options(root)
        self.definitions: dict[tuple[str | None, int], tuple[str, dict[str, Any] | None]] = {}

    def schema(self, schema: Schema, depth: int) -> dict[str, Any] | None:
        """The bounded form of a part of the schema; None if no value is valid for it."""
        if schema is False:
            return None
        said = [] if schema is True else [key for key in schema if key in KEYWORDS]
        if said not in ([], ["$ref"]):
            return self._any_of(schema, depth)
        # What is referred to, and the schema of any value, may occur often: written once for each
        # depth
        key = (schema["$ref"] if said else None, depth)
        if key not in self.definitions:
            name = f"{self._prefix}{len(self.definitions)}"
            self.definitions[key] = (name, None)
            self.definitions[key] = (name, self._any_of(schema, depth))
        name, body = self.definitions[key]
        return None if body is None else {"$ref": f"#/$defs/{name}"}

    def _any_of(self, schema: Schema, depth: int) -> dict[str, Any] | None:
        options = self._options.of(schema, depth)
        listed = self._valid(
            schema, [value for option in options for value in option.keywords.get("enum", ())]
        )
        forms: list[dict[str, Any] | None] = [{"enum": listed}] if listed else []
        for option in options:
            if "enum" in option.keywords:
                continue
            kinds = option.types
            if kinds == ANY_TYPE:  # nothing else says how deep such a value goes
                option = Option(option.keywords, option.depth - 1)
                kinds -= {"array", "object"} if option.depth < 0 else set()
            forms += [self._typed(kind, option) for kind in sorted(kinds)]
        found = [form for form in forms if form is not None]
        return {"anyOf": found} if len(found) > 1 else found[0] if found else None

    def _valid(self, schema: Schema, values: list[Any]) -> list[Any]:
        """Those of the listed values that are valid for the whole schema, written as the grammar
        writes them.
        """
        once = {json.dumps(plain, sort_keys=True): plain for plain in map(_plain, values)}
        # An enum beside the others allows them all: not searched again for each, which takes long
        # for a long one
        rest = {key: schema[key] for key in schema if key != "enum"} if values else {}
        validator = self._validator.evolve(schema=rest)
        return [value for value in once.values() if validator.is_valid(value)]

    def _typed(self, kind: str, option: Option) -> dict[str, Any] | None:
        for keyword in option.keywords.get("refused", ()):
            if REFUSED[keyword] in (kind, "any"):
                raise UnsupportedSchema(keyword, "only a validator understands it")
        for keyword, other in option.keywords.get("not", ()):
            mine = Option({**option.keywords, "type": frozenset({kind})}, option.depth)
            if not all(
                self._options.disjoint(mine, one)
                for one in self._options.of(other, option.depth, every=True)
            ):
                raise UnsupportedSchema(
                    keyword, "it is not plain that its parts exclude each other"
                )
        if kind in ("null", "boolean"):
            return {"type": kind}
        if kind in ("integer", "number"):
            return self._number(kind, option)
        return {"string": self._string, "array": self._array, "object": self._object}[kind](option)

    def _string(self, option: Option) -> dict[str, Any] | None:
        keywords, limit = option.keywords, self._limits.max_string
        if "format" in keywords:
            limit = max(limit, 64)  # room for every date, address and uuid
        shortest = keywords.get("minLength", 0)
        longest = min(keywords.get("maxLength", math.inf), max(shortest, limit))
        if shortest > longest:
            return None
        form = {"type": "string", "minLength": shortest, "maxLength": longest}
        formats = keywords.get("format", ())
        rules = [{"format": name} for name in formats if name in GRAMMAR_FORMATS]
        rules += [{"pattern": FORMAT_PATTERNS[name]} for name in formats if name in FORMAT_PATTERNS]
        rules += [
            {"pattern": part}
            for pattern in keywords.get("pattern", ())
            for part in _patterns(pattern)
        ]
        return form | {"allOf": rules} if rules else form

    def _number(self, kind: str, option: Option) -> dict[str, Any] | None:
        keywords, digits = option.keywords, self._limits.max_digits
        if Fraction(keywords.get("multipleOf", 1)).denominator > 1024:
            raise UnsupportedSchema(
                "multipleOf", f"validators round when they divide by {keywords['multipleOf']}"
            )
        lows = {
            key: Fraction(str(keywords[key]))
            for key in ("minimum", "exclusiveMinimum")
            if key in keywords
        }
        highs = {
            key: Fraction(str(keywords[key]))
            for key in ("maximum", "exclusiveMaximum")
            if key in keywords
        }
        # A float is exact for 15 digits. Before the point there are as many as the least possible
        # number needs.
        least = max([Fraction(0), *lows.values(), *(-high for high in highs.values())])
        behind = 0 if kind == "integer" else min(6, digits // 2)
        before = max(digits - behind, len(str(int(least))))
        if before > 15:
            raise UnsupportedSchema(
                "minimum" if least in lows.values() else "maximum", "more than 15 digits"
            )
        step = Fraction(1, 10 ** min(behind, 15 - before))
        high = 10**before - step
        low = -high
        if kind == "number":
            step = Fraction(keywords.get("multipleOf", step))
        # Among multiples of the step every bound can be inclusive. Of exclusive ones the grammar
        # lets some through.
        for key, bound in lows.items():
            low = max(
                low,
                step
                * (math.ceil(bound / step) if key == "minimum" else math.floor(bound / step) + 1),
            )
        for key, bound in highs.items():
            high = min(
                high,
                step
                * (math.floor(bound / step) if key == "maximum" else math.ceil(bound / step) - 1),
            )
        if low > high:
            return None
        form = {"type": kind, "minimum": _as_number(low), "maximum": _as_number(high)}
        return form | {"multipleOf": _as_number(Fraction(keywords.get("multipleOf", step)))}

    def _array(self, option: Option) -> dict[str, Any] | None:
        keywords = option.keywords
        shortest, places = keywords.get("minItems", 0), len(keywords.get("prefixItems", ()))
        longest = min(keywords.get("maxItems", math.inf), max(shortest, self._limits.max_items))
        first = []
        while len(first) < min(places, longest):
            if (form := self.schema(option.item(len(first)), option.depth)) is None:
                longest = len(first)
            else:
                first.append(form)
        rest = (
            self.schema(keywords.get("items", True), option.depth) if longest > len(first) else None
        )
        longest = longest if rest else len(first)
        if shortest > longest:
            return None
        form = {"type": "array", "minItems": shortest, "maxItems": longest, "items": rest or False}
        return form | {"prefixItems": first} if first else form

    def _object(self, option: Option) -> dict[str, Any] | None:
        keywords, names = option.keywords, option.names
        if not names and ("properties" not in keywords or "additionalProperties" in keywords):
            return self._map(option)
        required = list(keywords.get("required", ()))
        forms = {name: self.schema(option.property(name), option.depth) for name in names}
        known = {name: form for name, form in forms.items() if form is not None}
        least, most = keywords.get("minProperties", 0), keywords.get("maxProperties", math.inf)
        if least > len(known) and keywords.get("additionalProperties") is not False:
            raise UnsupportedSchema(
                "minProperties", f"{least} properties, and the schema gives {len(known)} names"
            )
        if not known.keys() >= set(required) or least > len(known) or most < len(required):
            return None
        form = {
            "type": "object",
            "properties": known,
            "required": required,
            "additionalProperties": False,
        }
        form |= {"minProperties": least} if least > len(required) else {}
        return form | ({"maxProperties": most} if most < len(known) else {})

    def _map(self, option: Option) -> dict[str, Any] | None:
        """An object whose properties may have any names: up to so many, with names up to so
        long.
        """
        keywords = option.keywords
        least = keywords.get("minProperties", 0)
        if keywords.get("patternProperties"):
            raise UnsupportedSchema("patternProperties", "names of any length")
        if least > 1:
            raise UnsupportedSchema(
                "minProperties", "a grammar does not see that two names are the same"
            )
        most = min(keywords.get("maxProperties", math.inf), max(least, self._limits.max_properties))
        value = (
            self.schema(keywords.get("additionalProperties", True), option.depth) if most else None
        )
        if value is None or not most:
            return (
                None
                if least
                else {"type": "object", "properties": {}, "additionalProperties": False}
            )
        names = {f"^(?s:.{{0,{self._limits.max_string}}})$": value}
        form = {"type": "object", "patternProperties": names, "additionalProperties": False}
        return form | {"minProperties": least, "maxProperties": most}


def _as_number(exact: Fraction) -> int | float:
    return exact.numerator if exact.denominator == 1 else float(exact)


def _plain(value: Any) -> Any:
    """A listed value with its numbers as the grammar writes them: integers where they are whole."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) >= 10**15:
            raise UnsupportedSchema("enum", "a number of more than 15 digits")
        return int(value) if value == int(value) else value
    return value


def _patterns(pattern: str) -> list[str]:
    """The pattern, and what keeps to the strings for which Python's `re` and the grammar's regexes
    mean the same.

    Python has \\w, \\d and \\s for all of Unicode, the grammar has the first two for ASCII. Sets of
    sets, possessive repetition and verbose patterns exist on one side only.
    """
    parts = re.findall(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", pattern, re.DOTALL)
    sets = [part for part in parts if part.startswith("[")]
    bare = "".join("x" if len(part) > 1 else part for part in parts)
    if any(re.search(r"(?<!\\)\[|--|&&|~~", inner[1:]) for inner in sets) or re.search(
        r"[*+?}]\+|\(\?[a-z]*x", bare
    ):
        raise UnsupportedSchema(
            "pattern", f"{pattern!r} means one thing in Python and another in the grammar"
        )
    negated = " ".join(
        [part for part in parts if len(part) == 2] + [inner for inner in sets if inner[1] == "^"]
    )
    if re.search(r"\\[WD]|\[\^.*\\[wd]", negated) or re.search(r"\(\?[a-z]", bare):
        return [pattern, r"^[\x00-\x7f]*$"]
    return [pattern, r"^[^\x1c-\x1f]*$"] if re.search(r"\\S|\[\^.*\\s", negated) else [pattern]
