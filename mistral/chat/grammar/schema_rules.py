"""A JSON schema as rules of llguidance's grammars: the values that are valid, and no others.

Keywords that cannot be expressed are dropped, and named: the rules then allow more than the schema,
and the validator decides. They allow less in two ways. The spelling: numbers as in numbers.py, a
name of `properties` as json.dumps writes it, whitespace up to 16 spaces of indentation. And an
object that names properties has no others, unless its schema speaks of others: models invent some,
and programs refuse or ignore them. Neither changes what a model wrote, only what it may write.

Properties may come in any order, each that the schema names once (the first 64 of an object, the
required ones first, so that none can be lost or forgotten). Other names may be repeated: who parses
the answer must refuse that.
"""

import functools
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from mistral.chat.grammar.numbers import number_exponents, number_terminal
from mistral.chat.grammar.schema_options import NOTHING, SchemaOptions, property_schema
from mistral.chat.grammar.token_masks import GrammarError, UnsupportedSchema, why_refused
from mistral.chat.tools.references import Schema

MAX_RULES = 10_000  # of all schemas of a grammar
_MAX_CHECKS = 1000  # of patterns, formats and multiples: llguidance is asked about each
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_CHARACTER = (
    r'([^"\\\x00-\x1F]|\\["\\\/bfnrt]|\\u([0-9a-ce-fA-CE-F][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}'
    r"|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))"
)
_SPACE = r"( |\n {0,16})?"
_SYMBOLS = {"OPEN": r"\{_", "CLOSE": r"_\}", "LIST": r"\[_", "END": r"_\]", "COMMA": "_,_"}
_SYMBOLS |= {"COLON": "_:_"}
_LENGTHS = ("minLength", "maxLength")
_NUMBERS = ("multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_MAX_PLACES = 500  # items with schemas of their own
_EXACT = 10**15  # llguidance computes with floats
_MAX_LENGTH = 1_000_000
_FORMATS = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")
_FORMATS += ("uri",)
_NAMES = 48  # bits of a rule's parameter, one for each property; the other 16 count properties
_COUNT = f"[{_NAMES}:64]"
Line = tuple[str, list[str]]  # what a rule may be, and the rules in it


def terminals(one_line: bool) -> str:
    """The terminals that all rules use; `one_line`: spaces as json.dumps writes them."""
    symbols = {name: pattern.replace("_", _SPACE) for name, pattern in _SYMBOLS.items()}
    if one_line:
        symbols = {name: pattern.replace("_", "") for name, pattern in _SYMBOLS.items()}
        symbols |= {"COMMA": ", ", "COLON": ": "}
    lines = [f"{name}: /{pattern}/" for name, pattern in symbols.items()]
    return "\n".join([*lines, f'STRING: /"{_CHARACTER}*"/'])


@dataclass
class _Object:
    """An object; `required` are the first of `names`, which are rules by property."""

    names: dict[str, str]
    required: list[str]
    others: list[Line]
    least: int
    most: float


class SchemaRules:
    """The rules of one schema; their names begin with `prefix`.

    dropped  the keywords that the rules leave to the validator, and why
    """

    def __init__(self, options: SchemaOptions, prefix: str):
        self._options = options
        self._prefix = prefix
        self._names: dict[str, str] = {}  # of rules, by schema
        self._waiting: list[tuple[str, dict[str, Any]]] = []
        self._rules: dict[str, list[Line]] = {}
        self._objects: dict[str, _Object] = {}
        self._terminals: dict[str, str] = {}  # names, by what they are
        self._checks = 0
        self.dropped = options.dropped

    def rule(self, schema: Schema) -> str:
        """The name of the rule for a schema."""
        node = self._options.plain(schema)
        key = json.dumps(node)
        if key not in self._names:
            self._names[key] = f"{self._prefix}{len(self._names)}"
            self._waiting.append((self._names[key], node))
        return self._names[key]

    def written(self, start: str) -> list[str]:
        """All rules and terminals.

        GrammarError if `start` allows no value, UnsupportedSchema for too many.
        """
        while self._waiting:
            name, node = self._waiting.pop()
            self._rules[name] = self._lines(name, node)
            if len(self._rules) > MAX_RULES:
                raise UnsupportedSchema("schema", f"it has more than {MAX_RULES:,} parts")
        possible = self._possible()
        if start not in possible:
            raise GrammarError("no value is valid for the schema")
        written = [f"{name}: {body}" for body, name in self._terminals.items()]
        for name in self._rules.keys() & possible:
            lines = [text for text, inner in self._rules[name] if possible.issuperset(inner)]
            written.append(f"{name}: {_options(lines)}")
            if any(text.startswith("OPEN") and text != "OPEN CLOSE" for text in lines):
                written += self._property_rules(name, possible)
        return written

    def _possible(self) -> set[str]:
        """The rules that allow any text at all."""
        found: set[str] = set()
        users: dict[str, list[str]] = {}
        for name, lines in self._rules.items():
            for used in {rule for _, inner in lines for rule in inner}:
                users.setdefault(used, []).append(name)
        waiting = list(self._rules)
        while waiting:
            name = waiting.pop()
            if name in found:
                continue
            if any(found.issuperset(inner) for _, inner in self._rules[name]):
                found.add(name)
                waiting += users.get(name, [])
        return found

    def _lines(self, name: str, node: dict[str, Any]) -> list[Line]:
        if node.keys() == {"$ref"}:
            inner = self.rule(self._options.target(node))
            return [(inner, [inner])]
        if node.keys() == {"anyOf"} or (
            node.keys() == {"oneOf"} and self._options.exclusive(node["oneOf"])
        ):
            [parts] = node.values()
            return [(rule, [rule]) for rule in dict.fromkeys(map(self.rule, parts))]
        lines: list[Line] = []
        for i, option in enumerate(self._options.of(node)):
            inner = f"{name}_{i}"
            self._rules[inner] = self._option(inner, option)
            lines.append((inner, [inner]))
        return lines

    def _option(self, name: str, option: dict[str, Any]) -> list[Line]:
        if "enum" in option:
            return [self._constant(value) for value in option["enum"]]
        lines: list[Line] = []
        types = option.get("type", _TYPES)
        for type in _TYPES:
            if type not in types or (type == "integer" and "number" in types):
                continue
            if type == "null":
                lines.append(('"null"', []))
            elif type == "boolean":
                lines.append(('"true" | "false"', []))
            elif type in ("integer", "number"):
                lines += self._number(option, type)
            elif type == "string":
                lines += self._string(option)
            elif type == "array":
                lines += self._array(f"{name}a", option)
            else:
                self._rules[f"{name}o"] = self._object(f"{name}o", option)
                lines.append((f"{name}o", [f"{name}o"]))
        return lines

    def _constant(self, value: Any) -> Line:
        if isinstance(value, dict | list):
            if isinstance(value, dict):
                properties = {name: {"const": inner} for name, inner in value.items()}
                schema = {"type": "object", "properties": properties, "required": list(value)}
                schema["additionalProperties"] = False
            else:
                items = [{"const": inner} for inner in value]
                schema = {"type": "array", "prefixItems": items, "items": False}
                schema["minItems"] = len(value)
            rule = self.rule(schema)
            return rule, [rule]
        forms = [value]
        # A number that the schema spells 27.0 may be written 27, too; not the other way round.
        if isinstance(value, float) and value.is_integer() and self._options.draft > 4:
            forms += [int(value)] * (abs(value) < 2**53)
        texts = dict.fromkeys(_literal(json.dumps(form, ensure_ascii=False)) for form in forms)
        return " | ".join(texts), []

    def _terminal(self, body: str) -> str:
        # Schemas share terminals: the name says what it is.
        name = f"T{hashlib.sha256(body.encode()).hexdigest()[:16].upper()}"
        return self._terminals.setdefault(body, name)

    def _number(self, option: dict[str, Any], type: str) -> list[Line]:
        body = number_terminal(option, type == "integer")
        if body is not None:
            return [(self._terminal(body), [])] if body else []
        keywords = {key: option[key] for key in _NUMBERS if key in option}
        for key, value in list(keywords.items()):
            if key != "multipleOf" and abs(value) > _EXACT:
                self._options.drop(key, f"{value} together with multipleOf")
                del keywords[key]
        exponents = "" if type == "integer" else number_exponents(option)
        lines = self._leaf({"type": type}, [(key, {key: keywords[key]}) for key in keywords])
        return lines + [(self._terminal(exponents), [])] * bool(exponents)

    def _string(self, option: dict[str, Any]) -> list[Line]:
        lengths = {key: option[key] for key in _LENGTHS if key in option}
        least, most = option.get("minLength", 0), option.get("maxLength", "")
        if most != "" and least > most:
            return []
        rules = [("format", {"format": one}) for one in option.get("format", ()) if one in _FORMATS]
        rules += [("pattern", {"pattern": one}) for one in option.get("pattern", ())]
        if rules:
            return self._leaf({"type": "string", **lengths}, rules)
        if lengths and max(least, most or 0) <= _MAX_LENGTH:
            return [(self._terminal(f'/"{_CHARACTER}{{{least},{most}}}"/'), [])]
        if lengths:
            self._options.drop("maxLength" if most else "minLength", f"{most or least}")
        return [("STRING", [])]

    def _leaf(self, leaf: dict[str, Any], rules: list[tuple[str, dict[str, Any]]]) -> list[Line]:
        """A string or a number that llguidance's own reading of JSON schemas expresses."""
        kept: list[dict[str, Any]] = []
        self._checks += len(rules)
        for keyword, rule in rules:
            if self._checks > _MAX_CHECKS:
                self._options.drop(keyword, f"there are more than {_MAX_CHECKS:,} of these")
                continue
            refused = _refused(json.dumps({**leaf, "allOf": [*kept, rule]}))
            if refused is None:
                kept.append(rule)
            elif "nsatisfiable" in refused:
                return []
            else:
                self._options.drop(keyword, refused)
        return [(f"%json {_json(json.dumps({**leaf, 'allOf': kept}))}", [])]

    def _array(self, name: str, option: dict[str, Any]) -> list[Line]:
        first, rest = option.get("prefixItems", ()), option.get("items", True)
        least, most = option.get("minItems", 0), option.get("maxItems")
        if most is not None and least > most:
            return []
        if len(first) > _MAX_PLACES:
            self._options.drop("prefixItems", f"there are {len(first)}")
            first, rest = first[:_MAX_PLACES], True
        empty: list[Line] = [("LIST END", [])] * (least == 0)
        if most == 0:
            return empty
        # 1. Items with a schema of their own: after each of them the list ends or continues.
        places = len(first) if most is None else min(len(first), most)
        for i in range(places):
            after = f"{name}{i + 1}"
            item = self.rule(first[i])
            self._rules[f"{name}{i}"] = [(f"{'COMMA ' * (i > 0)}{item} {after}", [item, after])]
            self._rules[after] = []
            if i + 1 >= least:
                self._rules[f"{name}{i}"].append((f"{'COMMA ' * (i > 0)}{item} END", [item]))
        # 2. The others.
        item = self.rule(rest)
        more = "" if most is None else most - max(places, 1)
        if not places:
            repeated = f"(COMMA {item}){{{max(least - 1, 0)},{more}}}" if more != 0 else ""
            return [*empty, (f"LIST {item} {repeated} END", [item])]
        if most is None or most > places:
            repeated = f"(COMMA {item}){{{max(least - places, 1)},{more}}} END"
            self._rules[f"{name}{places}"] = [(repeated, [item])]
        return [*empty, (f"LIST {name}0", [f"{name}0"])]

    def _object(self, name: str, option: dict[str, Any]) -> list[Line]:
        least, most = option.get("minProperties", 0), option.get("maxProperties", float("inf"))
        properties = option.get("properties", {})
        additional = option.get("additionalProperties", not self._names_all(option))
        required = list(option.get("required", ()))
        patterns = option.get("patternProperties", {})
        # 1. The names of the schema, the required ones first.
        names = {}
        for property in dict.fromkeys([*required, *properties]):
            names[property] = self.rule(property_schema(option, property))
        # 2. Other names.
        others: list[Line] = []
        for pattern, schema in patterns.items():
            value = self.rule(schema)
            key = self.rule({"type": "string", "pattern": pattern})
            others.append((f"{key} COLON {value}", [key, value]))
        value = self.rule(additional)
        if "propertyNames" in option:
            key = self.rule({"type": "string", "allOf": [option["propertyNames"]]})
            others.append((f"{key} COLON {value}", [key, value]))
        elif self._options.plain(additional) is not NOTHING:
            taken = " | ".join(_literal(json.dumps(one, ensure_ascii=False)) for one in names)
            key = self._terminal(f"STRING & ~({taken})") if taken else "STRING"
            others.append((f"{key} COLON {value}", [value]))
        if most < max(len(required), least) or (not others and least > len(names)):
            return []
        self._objects[name] = _Object(names, required, others, least, most)
        # 3. Empty, or one that has all required properties, and at least one.
        needed = [names[one] for one in required]
        any_of = [needed] if needed else [[rule] for rule in names.values()]
        any_of += [inner for _, inner in others] if not needed else []
        lines: list[Line] = [("OPEN CLOSE", [])] * (not required and least == 0)
        return lines + [(f"OPEN {name}p::0", inner) for inner in any_of if most > 0]

    def _names_all(self, option: dict[str, Any]) -> bool:
        """Whether an object has the properties that its schema names, and no others."""
        schemas = option.get("properties", {}).values()
        possible = [one for one in schemas if self._options.plain(one) is not NOTHING]
        if not possible or option.get("minProperties", 0) > len(possible):
            return False
        return not {"patternProperties", "propertyNames"} & option.keys()

    def _property_rules(self, name: str, possible: set[str]) -> list[str]:
        """The rules of an object's properties: a bit of their parameter for each name in it."""
        one = self._objects[name]
        counts = one.least > len(one.required) or one.most < float("inf")
        # 1. What may come after a property, and under which conditions.
        tracked = [key for key, rule in one.names.items() if rule in possible]
        tracked, others = tracked[: _NAMES if counts else 64], tracked[_NAMES if counts else 64 :]
        required = min(len(one.required), len(tracked))
        room = f"lt({_COUNT}, {one.most})" if one.most < 2**16 else ""
        enough = f"ge({_COUNT}, {min(one.least, 2**16 - 1)})" if counts else ""
        then = f"{name}{'c' if counts else 'n'}"
        # 2. A property.
        lines = []
        for i, key in enumerate(tracked):
            condition = _condition(f"bit_clear({i})", room)
            lines.append(f"{_named(key)} COLON {one.names[key]} {then}::set_bit({i}){condition}")
        free = [f"{_named(key)} COLON {one.names[key]}" for key in others]
        free += [text for text, inner in one.others if possible.issuperset(inner)]
        lines += [f"{text} {then}::_{_condition(room)}" for text in free]
        # 3. After it: the end, or another one if there is one left.
        all_there = f"is_ones([0:{required}])" if required else ""
        left = "" if free else f"not(is_ones([0:{len(tracked)}]))"
        ends = [
            f"CLOSE{_condition(all_there, enough)}",
            f"COMMA {name}p::_{_condition(left, room)}",
        ]
        # Without a condition llguidance 1.9 takes the rule for another name of the next one.
        counter = [f"{name}c::_ : {name}n::incr({_COUNT}) %if ge({_COUNT}, 0)"] * counts
        return [f"{name}p::_ : {_options(lines)}", f"{name}n::_ : {_options(ends)}", *counter]


def _options(lines: list[str]) -> str:
    return "\n  | ".join(dict.fromkeys(lines))


def _condition(*conditions: str) -> str:
    given = [one for one in conditions if one]
    if len(given) == 2:
        return f" %if and({', '.join(given)})"
    return f" %if {given[0]}" if given else ""


def _literal(text: str) -> str:
    """A terminal that is this text."""
    return json.dumps(text, ensure_ascii=False)


def _named(property: str) -> str:
    return _literal(json.dumps(property, ensure_ascii=False))


def _json(schema: str) -> str:
    return f'{schema[:-1]}, "x-guidance": {{"whitespace_flexible": false}}}}'


@functools.lru_cache(10_000)
def _refused(schema: str) -> str | None:
    """Why llguidance does not express a string or a number, in one line; None if it does."""
    pattern = json.loads(schema)["allOf"][-1].get("pattern", "")
    if _OTHER_MEANING.search(re.sub(r"\\p\{\w+\}|\\.", "x", pattern)):
        return f"{pattern!r} has another meaning in the grammar"
    return why_refused(f"start: x\nx: %json {_json(schema)}")


# Sets of sets, possessive repetition, and verbose patterns: not in ECMA 262
_OTHER_MEANING = re.compile(r"\[[^]]*(\[|--|&&|~~)|[*+?}]\+|\(\?[a-zA-Z-]*x")
