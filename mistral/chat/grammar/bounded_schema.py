"""A JSON schema rewritten for the grammar: the same values or fewer, and none of them endless.

A value that is valid for the rewritten schema is valid for the original. The rewritten schema
consists of anyOf, enum, references and one type at a time, so the grammar cannot overlook a
keyword. UnsupportedSchema is raised for a schema that cannot be rewritten so.

It is narrower than JSON Schema on purpose: an object that names properties has no others, a schema
without a type means the type that its keywords are about, and `format` holds for the formats that
the grammar knows.
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

_MONTHS = (
    r"(0[13578]|1[02])-(0[1-9]|[12]\d|3[01])"
    r"|(0[469]|11)-(0[1-9]|[12]\d|30)"
    r"|02-(0[1-9]|1\d|2[0-8])"
)
_LEAP_YEAR = r"[12]\d(0[48]|[2468][048]|[13579][26])|(12|16|20|24|28)00"
_DATE = rf"([12]\d\d\d-({_MONTHS})|({_LEAP_YEAR})-02-29)"
_CLOCK = r"([01]\d|2[0-3]):[0-5]\d"
_TIME = rf"{_CLOCK}:[0-5]\d(\.\d{{1,6}})?(Z|[+-]{_CLOCK})"
# The grammar's own allow the 31st of February, and seconds that Python's datetime rejects.
_FORMAT_PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
_GRAMMAR_FORMATS = ("duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")


@dataclass(frozen=True)
class Limits:
    """Bounds for values that a schema leaves unbounded. A schema's own minimum beats a limit.

    max_string      characters of a string, and of a property's name that the schema does not list
    max_items       items of an array
    max_properties  properties of an object whose names the schema does not list
    max_digits      digits of a number (1 to 15), up to 6 of them after the point
    max_depth       levels of a value that the schema does not describe, and steps of a schema that
                    refers to itself
    max_indent      spaces that may begin a line; 0: one line, with the spaces of json.dumps alone

    Raises ValueError for limits out of range.
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
                f"max_digits must be 1 to 15, not {self.max_digits}: a float has no more"
            )
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"{name} must be 0 or more, not {value}")


def bounded_schema(
    schema: Mapping[str, Any], limits: Limits, definitions: str = ""
) -> dict[str, Any]:
    """The schema for the grammar, and its `$defs`; their names begin with `definitions`.

    Raises SchemaError for a malformed schema, UnsupportedSchema for one that a grammar cannot
    express, and GrammarError for one that no value is valid for. Needs the extra `chat`.
    """
    validator = compile_schema(schema)
    try:
        bounder = _Bounder(as_json(dict(schema)), validator, limits, definitions)
        root = bounder.schema(bounder.root, limits.max_depth)
    except RecursionError:
        raise UnsupportedSchema("$ref", "the schema is nested too deeply") from None
    if root is None:
        raise GrammarError(f"no value is valid for the schema (with max_depth={limits.max_depth})")
    bodies = {name: body for name, body in bounder.definitions.values() if body is not None}
    return {**root, "$defs": bodies}


class _Bounder:
    """Rewrites the parts of one schema.

    definitions  name and body of each definition, by its reference (None: any value) and depth;
                 the body is None if no value is valid
    """

    def __init__(self, root: dict[str, Any], validator: Any, limits: Limits, prefix: str):
        self.root = root
        self._validator = validator
        self._limits = limits
        self._prefix = prefix
        self._options = Options(root)
        self.definitions: dict[tuple[str | None, int], tuple[str, dict[str, Any] | None]] = {}

    def schema(self, schema: Schema, depth: int) -> dict[str, Any] | None:
        """The bounded form of a part of the schema; None if no value is valid for it."""
        if schema is False:
            return None
        known = [] if schema is True else [key for key in schema if key in KEYWORDS]
        if known not in ([], ["$ref"]):
            return self._any_of(schema, depth)
        # References, and the schema of any value, may occur often: one definition for each depth.
        key = (schema["$ref"] if known else None, depth)
        if key not in self.definitions:
            name = f"{self._prefix}{len(self.definitions)}"
            self.definitions[key] = (name, None)
            self.definitions[key] = (name, self._any_of(schema, depth))
        name, body = self.definitions[key]
        return None if body is None else {"$ref": f"#/$defs/{name}"}

    def _any_of(self, schema: Schema, depth: int) -> dict[str, Any] | None:
        options = self._options.of(schema, depth)
        values = [value for option in options for value in option.keywords.get("enum", ())]
        listed = self._valid(schema, values)
        forms: list[dict[str, Any] | None] = [{"enum": listed}] if listed else []
        for option in options:
            if "enum" in option.keywords:
                continue
            types = option.types
            if types == ANY_TYPE:  # nothing else limits the depth of such a value
                option = Option(option.keywords, option.depth - 1)
                types -= {"array", "object"} if option.depth < 0 else set()
            forms += [self._typed(type, option) for type in sorted(types)]
        found = [form for form in forms if form is not None]
        if len(found) > 1:
            return {"anyOf": found}
        return found[0] if found else None

    def _valid(self, schema: Schema, values: list[Any]) -> list[Any]:
        """The listed values that are valid for the whole schema, in the grammar's form."""
        once = {json.dumps(plain, sort_keys=True): plain for plain in map(_plain, values)}
        # Its own enum allows them all: searching it for each value would be slow if it is long.
        rest = {key: schema[key] for key in schema if key != "enum"} if values else {}
        validator = self._validator.evolve(schema=rest)
        return [value for value in once.values() if validator.is_valid(value)]

    def _typed(self, type: str, option: Option) -> dict[str, Any] | None:
        """The bounded form of an option's values of one type."""
        for keyword in option.keywords.get("refused", ()):
            if REFUSED[keyword] in (type, "any"):
                raise UnsupportedSchema(keyword, "only a validator can check it")
        for keyword, other in option.keywords.get("not", ()):
            mine = Option({**option.keywords, "type": frozenset({type})}, option.depth)
            others = self._options.of(other, option.depth, every=True)
            if not all(self._options.disjoint(mine, one) for one in others):
                raise UnsupportedSchema(keyword, "its parts do not clearly exclude each other")
        if type in ("null", "boolean"):
            return {"type": type}
        if type in ("integer", "number"):
            return self._number(type, option)
        return {"string": self._string, "array": self._array, "object": self._object}[type](option)

    def _string(self, option: Option) -> dict[str, Any] | None:
        keywords = option.keywords
        limit = self._limits.max_string
        if "format" in keywords:
            limit = max(limit, 64)  # room for every date, address and uuid
        shortest = keywords.get("minLength", 0)
        longest = min(keywords.get("maxLength", math.inf), max(shortest, limit))
        if shortest > longest:
            return None
        form = {"type": "string", "minLength": shortest, "maxLength": longest}
        formats = keywords.get("format", ())
        rules = [{"format": name} for name in formats if name in _GRAMMAR_FORMATS]
        rules += [
            {"pattern": _FORMAT_PATTERNS[name]} for name in formats if name in _FORMAT_PATTERNS
        ]
        for pattern in keywords.get("pattern", ()):
            rules += [{"pattern": part} for part in _patterns(pattern)]
        return form | {"allOf": rules} if rules else form

    def _number(self, type: str, option: Option) -> dict[str, Any] | None:
        keywords = option.keywords
        digits = self._limits.max_digits
        # 1. The schema's bounds, exactly.
        if Fraction(keywords.get("multipleOf", 1)).denominator > 1024:
            raise UnsupportedSchema(
                "multipleOf", f"validators round when they divide by {keywords['multipleOf']}"
            )
        lows = _fractions(keywords, "minimum", "exclusiveMinimum")
        highs = _fractions(keywords, "maximum", "exclusiveMaximum")
        # 2. The digits. A float is exact for 15; before the point there are at least as many as the
        # number of least magnitude has.
        least = max([Fraction(0), *lows.values(), *(-high for high in highs.values())])
        after_point = 0 if type == "integer" else min(6, digits // 2)
        before_point = max(digits - after_point, len(str(int(least))))
        if before_point > 15:
            keyword = "minimum" if least in lows.values() else "maximum"
            raise UnsupportedSchema(keyword, "more than 15 digits")
        step = Fraction(1, 10 ** min(after_point, 15 - before_point))
        high = 10**before_point - step
        low = -high
        if type == "number":
            step = Fraction(keywords.get("multipleOf", step))
        # 3. Inclusive bounds: the grammar does not keep all exclusive ones, and among multiples of
        # the step each exclusive bound has an inclusive equal.
        if "minimum" in lows:
            low = max(low, step * math.ceil(lows["minimum"] / step))
        if "exclusiveMinimum" in lows:
            low = max(low, step * (math.floor(lows["exclusiveMinimum"] / step) + 1))
        if "maximum" in highs:
            high = min(high, step * math.floor(highs["maximum"] / step))
        if "exclusiveMaximum" in highs:
            high = min(high, step * (math.ceil(highs["exclusiveMaximum"] / step) - 1))
        if low > high:
            return None
        form = {"type": type, "minimum": _as_number(low), "maximum": _as_number(high)}
        return form | {"multipleOf": _as_number(Fraction(keywords.get("multipleOf", step)))}

    def _array(self, option: Option) -> dict[str, Any] | None:
        keywords = option.keywords
        shortest = keywords.get("minItems", 0)
        places = len(keywords.get("prefixItems", ()))
        longest = min(keywords.get("maxItems", math.inf), max(shortest, self._limits.max_items))
        first = []
        while len(first) < min(places, longest):
            if (form := self.schema(option.item(len(first)), option.depth)) is None:
                longest = len(first)
            else:
                first.append(form)
        rest = None
        if longest > len(first):
            rest = self.schema(keywords.get("items", True), option.depth)
        longest = longest if rest else len(first)
        if shortest > longest:
            return None
        form = {"type": "array", "minItems": shortest, "maxItems": longest, "items": rest or False}
        return form | {"prefixItems": first} if first else form

    def _object(self, option: Option) -> dict[str, Any] | None:
        keywords = option.keywords
        names = option.names
        if not names and ("properties" not in keywords or "additionalProperties" in keywords):
            return self._map(option)
        required = list(keywords.get("required", ()))
        forms = {name: self.schema(option.property(name), option.depth) for name in names}
        known = {name: form for name, form in forms.items() if form is not None}
        least = keywords.get("minProperties", 0)
        most = keywords.get("maxProperties", math.inf)
        if least > len(known) and keywords.get("additionalProperties") is not False:
            raise UnsupportedSchema(
                "minProperties", f"{least} properties, and the schema names {len(known)}"
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
        """An object whose properties may have any names, within the limits."""
        keywords = option.keywords
        least = keywords.get("minProperties", 0)
        if keywords.get("patternProperties"):
            raise UnsupportedSchema("patternProperties", "names of any length")
        if least > 1:
            raise UnsupportedSchema(
                "minProperties", "a grammar cannot see that two names are equal"
            )
        most = min(keywords.get("maxProperties", math.inf), max(least, self._limits.max_properties))
        value = None
        if most:
            value = self.schema(keywords.get("additionalProperties", True), option.depth)
        if value is None:
            empty = {"type": "object", "properties": {}, "additionalProperties": False}
            return None if least else empty
        names = {f"^(?s:.{{0,{self._limits.max_string}}})$": value}
        form = {"type": "object", "patternProperties": names, "additionalProperties": False}
        return form | {"minProperties": least, "maxProperties": most}


def _fractions(keywords: dict[str, Any], *keys: str) -> dict[str, Fraction]:
    return {key: Fraction(str(keywords[key])) for key in keys if key in keywords}


def _as_number(exact: Fraction) -> int | float:
    return exact.numerator if exact.denominator == 1 else float(exact)


def _plain(value: Any) -> Any:
    """A listed value with its numbers in the grammar's form: an integer if it is whole."""
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
    """The pattern, and one for the strings that Python's `re` and the grammar match alike.

    In Python \\w, \\d and \\s are about all of Unicode, in the grammar the first two about ASCII.
    Only one of them has sets of sets, possessive repetition and verbose patterns.
    """
    parts = re.findall(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", pattern, re.DOTALL)
    sets = [part for part in parts if part.startswith("[")]
    bare = "".join("x" if len(part) > 1 else part for part in parts)
    nested = any(re.search(r"(?<!\\)\[|--|&&|~~", inner[1:]) for inner in sets)
    if nested or re.search(r"[*+?}]\+|\(\?[a-z]*x", bare):
        raise UnsupportedSchema(
            "pattern", f"{pattern!r} has different meanings in Python and in the grammar"
        )
    escapes = [part for part in parts if len(part) == 2]
    negated = " ".join(escapes + [inner for inner in sets if inner[1] == "^"])
    if re.search(r"\\[WD]|\[\^.*\\[wd]", negated) or re.search(r"\(\?[a-z]", bare):
        return [pattern, r"^[\x00-\x7f]*$"]
    return [pattern, r"^[^\x1c-\x1f]*$"] if re.search(r"\\S|\[\^.*\\s", negated) else [pattern]
