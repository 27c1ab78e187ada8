import gc
import itertools
import json
import random
import re
import sys
import time
import warnings
import weakref

import jsonschema
import pytest
import small
import torch

import mistral
from mistral.chat.formats.prompts import write_call
from mistral.chat.formats.tool_calls import parse_tool_calls
from mistral.chat.grammar import (
    GrammarError,
    UnsupportedSchema,
    call_list_constraint,
    json_constraint,
    token_masks,
    tool_call_constraint,
)
from mistral.chat.tools.json_schema import SchemaError, compile_schema, problem

STOP = 32000
VOCAB_SIZE = 32032  # 32001 is a control token, 32002 and on have no token
STRING = {"type": "string"}
INTEGER = {"type": "integer"}
NODE = {
    "type": "object",
    "properties": {"v": INTEGER, "next": {"$ref": "#/$defs/node"}},
    "required": ["v"],
}
SCHEMAS = {
    "string": STRING,
    "integer": INTEGER,
    "number": {"type": "number"},
    "several types": {"type": ["integer", "null", "boolean"]},
    "anything": {},
    "any array": {"type": "array"},
    "any object": {"type": "object"},
    "object": {"type": "object", "properties": {"a": STRING, "b": INTEGER}, "required": ["b"]},
    "no type": {"properties": {"a": STRING}, "required": ["a"]},
    "required without a schema": {
        "type": "object",
        "required": ["a"],
        "additionalProperties": INTEGER,
    },
    "names that need escapes": {
        "type": "object",
        "properties": {'a"\\\n/é': INTEGER},
        "required": ['a"\\\n/é'],
    },
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1},
    "pattern for a named property": {
        "properties": {"x": {}},
        "required": ["x"],
        "patternProperties": {"x": INTEGER},
    },
    "one property at most": {
        "type": "object",
        "properties": {"a": INTEGER, "b": INTEGER},
        "maxProperties": 1,
    },
    "array": {"type": "array", "items": INTEGER, "minItems": 1},
    "one item": {"type": "array", "items": INTEGER, "maxItems": 1},
    "tuple": {"type": "array", "prefixItems": [INTEGER, STRING], "items": False, "minItems": 2},
    "tuple that goes on": {"type": "array", "prefixItems": [STRING], "items": INTEGER},
    "enum": {"enum": [1, "a", None, 2.5, {"a": [True]}, "日本", -0.0, 1e-7]},
    "enum and more": {
        "enum": [1, 2, "a", "abc", True],
        "type": ["string", "boolean"],
        "maxLength": 1,
    },
    "const": {"const": {"x": [1, 1.0, "//#%"]}},
    "bounds": {"type": "integer", "minimum": -3, "exclusiveMaximum": 2},
    "bounds of a number": {"type": "number", "exclusiveMinimum": 0, "maximum": 0.3},
    "a large minimum": {"type": "number", "minimum": 10**12},
    "bounds beyond every limit": {"type": "integer", "minimum": -(10**30), "maximum": 1e300},
    "multiples": {"type": "integer", "multipleOf": 7},
    "multiples of a fraction": {"type": "number", "multipleOf": 0.25, "minimum": 1},
    "lengths": {"type": "string", "minLength": 3, "maxLength": 4},
    "pattern": {"type": "string", "pattern": "^[a-c]+-\\d{2}$"},
    "pattern without ends": {"type": "string", "pattern": "b|^c"},
    "two patterns": {"type": "string", "pattern": "^a", "allOf": [{"pattern": "z$"}]},
    "no spaces": {"type": "string", "pattern": "^\\S+$"},
    "not words": {"type": "string", "pattern": "^\\W[^\\d]$"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "date-time"},
    "address": {"type": "string", "format": "ipv6"},
    "a format of OpenAPI": {"type": "integer", "format": "int32"},
    "anyOf": {"anyOf": [STRING, {"type": "object", "properties": {"a": INTEGER}}]},
    "anyOf beside properties": {
        "properties": {"a": INTEGER, "b": INTEGER},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
    },
    "allOf": {
        "allOf": [
            {"properties": {"a": STRING}},
            {"properties": {"a": {"maxLength": 1}}, "required": ["a"]},
        ]
    },
    "oneOf types": {"oneOf": [STRING, INTEGER, {"type": "array", "items": STRING}]},
    "oneOf with a common value": {"oneOf": [{"enum": [1, 2]}, {"enum": [2, 3]}]},
    "oneOf told apart by a name": {
        "oneOf": [
            {"type": "object", "properties": {"is": {"const": n}}, "required": ["is"]}
            for n in ("a", "b")
        ]
    },
    "oneOf told apart by what is required": {
        "oneOf": [
            {"type": "object", "properties": {n: STRING}, "required": [n]} for n in ("a", "b")
        ]
    },
    "not": {"type": "integer", "not": STRING},
    "enum beside a reference": {
        "properties": {"a": {"enum": [1, "x"], "$ref": "#/$defs/s"}},
        "$defs": {"s": STRING},
    },
    "not one of the values": {"enum": ["a", "b"], "not": {"const": "b"}},
    "nullable": {"type": "string", "nullable": True},
    "recursive": {**NODE, "$defs": {"node": NODE}},
    "recursive at its root": {
        "type": "object",
        "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}},
    },
    "reference beside others": {
        "$ref": "#/definitions/a~1b",
        "maxLength": 1,
        "definitions": {"a/b": STRING},
    },
    "impossible property": {
        "type": "object",
        "properties": {"a": False, "b": INTEGER},
        "required": ["b"],
    },
    "annotations": {
        "type": "boolean",
        "title": "t",
        "default": 1,
        "x-guidance": {"item_separator": ";"},
    },
}
# Their grammars allow more, or other spellings: `format` is a note for the validator
WIDER = ("oneOf told apart by what is required",)
FORMATS = ("date", "time", "address")
# Only the validator can check these; the values are one that is valid, and one that is not.
DROPPED = {
    "uniqueItems": ({"type": "array", "uniqueItems": True}, [1, 2], [1, 1]),
    "contains": ({"type": "array", "contains": INTEGER}, ["a", 1], ["a"]),
    "unevaluatedItems": (
        {"type": "array", "prefixItems": [INTEGER], "unevaluatedItems": False},
        [1],
        [1, 2],
    ),
    "dependentRequired": (
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        {"a": 1, "b": 1},
        {"a": 1},
    ),
    "dependentSchemas": (
        {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
        {"a": 1, "b": 1},
        {"a": 1},
    ),
    "if": ({"type": "integer", "if": {"minimum": 5}, "then": {"maximum": 7}}, 7, 8),
    "not": ({"type": "integer", "not": {"minimum": 5}}, 4, 5),
    "oneOf": ({"oneOf": [INTEGER, {"type": "number"}]}, 1.5, 1),
    "$dynamicRef": (
        {"$dynamicRef": "#a", "$defs": {"a": {"$dynamicAnchor": "a", "type": "string"}}},
        "a",
        1,
    ),
    "anyOf": (
        {
            "type": "string",
            "allOf": [
                {"anyOf": [{"minLength": i} for i in range(2, 22)]},
                {"anyOf": [{"maxLength": i} for i in range(20)]},
            ],
        },
        "abc",
        "a" * 30,
    ),
    "pattern": ({"type": "string", "pattern": "(?=a)ab"}, "ab", "b"),
}
# What earlier grammars could not express
EXPRESSED = {
    "propertyNames": (
        {"type": "object", "propertyNames": {"maxLength": 3}},
        {"abc": 1},
        {"abcd": 1},
    ),
    "names of an enum": (
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": INTEGER},
        {"b": 1, "a": 2},
        {"c": 1},
    ),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^x": INTEGER}, "additionalProperties": False},
        {"x1": 1},
        {"x1": "a"},
    ),
    "minProperties": ({"type": "object", "minProperties": 2}, {"a": 1, "b": 1}, {"a": 1}),
    "maxProperties beside names": (
        {
            "type": "object",
            "properties": {"a": INTEGER},
            "maxProperties": 2,
            "additionalProperties": True,
        },
        {"b": 1, "a": 1},
        {"b": 1, "a": 1, "c": 1},
    ),
    "multipleOf": ({"type": "number", "multipleOf": 0.01}, 19.99, 19.999),
    "minimum": ({"type": "integer", "minimum": 10**15}, 10**15, 10**15 - 1),
    "a large minimum": ({"type": "integer", "minimum": 2**53 + 1}, 2**53 + 1, 2**53),
    "maximum": ({"type": "number", "maximum": -1e20}, -1e20, -1e19),
    "enum": ({"enum": [1e300]}, 1e300, 1e299),
    "an anchor": ({"$ref": "#a", "$defs": {"a": {"$anchor": "a", **STRING}}}, "x", 1),
    "$id": ({"properties": {"a": {"$id": "http://x/y", **INTEGER}}}, {"a": 1}, {"a": "x"}),
    "not {}": ({"anyOf": [{"not": {}}, STRING]}, "x", 1),
    "names of any text": (
        {"type": "object", "propertyNames": STRING, "additionalProperties": STRING},
        {"a b": "x"},
        {"a": 1},
    ),
}


def opened(schema):
    """The schema with other properties wherever it names some: without a word, it allows them."""
    if isinstance(schema, list):
        return [opened(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: opened(inner) for key, inner in schema.items()}
    return {"additionalProperties": True} | schema if "properties" in schema else schema


@pytest.fixture(scope="module")
def tokenizer():
    return small.true_tokenizer(stop_ids=[STOP])


@pytest.fixture(scope="module")
def small_tokenizer():
    return mistral.load(small.DATA / "small")[1]


def random_id(mask, generator):
    allowed = mask.nonzero().flatten()
    return allowed[torch.randint(len(allowed), (), generator=generator)].item()


ENDS = ['"', "z", "}", "]", "\n</", '"}', "}}", "0", "1", "-", ".", "null", "a", ":", ",", "{", "["]


def words_of(schema):
    """The names of properties in a schema, as JSON without its quotes."""
    if isinstance(schema, dict):
        names = [name for name in schema.get("properties", {}) if isinstance(name, str)]
        names += [name for name in schema.get("required", []) if isinstance(name, str)]
        return [*names, *(word for inner in schema.values() for word in words_of(inner))]
    return (
        [word for inner in schema for word in words_of(inner)] if isinstance(schema, list) else []
    )


def walk(constraint, tokenizer, seed, budget=600, choose=random_id, words=()):
    """The text of tokens drawn evenly from the masks, up to the stop token.

    Nothing but the end of a text bounds it: after a while tokens that end something are preferred,
    and at the beginning of strings `words`. Every mask is checked on the way.
    """
    generator = torch.Generator().manual_seed(seed)
    written = [json.dumps(word, ensure_ascii=False)[1:-1].encode() for word in words]
    byte_id = {tokenizer.token_bytes(id): id for id in range(min(1100, tokenizer.vocab_size))}
    ends = [*tokenizer.stop_ids, *(encode(tokenizer, text)[0] for text in ENDS)]
    ids = []
    wanted = []
    never = torch.ones(len(constraint.mask()), dtype=torch.bool)
    never[: tokenizer.vocab_size] = False
    never[list(tokenizer.control_ids - set(tokenizer.stop_ids))] = True
    for step in range(budget):
        mask = constraint.mask()
        assert not (mask & never).any()
        assert mask[list(tokenizer.stop_ids)].tolist() == [constraint.accepting] * len(
            tokenizer.stop_ids
        )
        id = choose(mask, generator)
        hurry = torch.rand((), generator=generator) < 0.85
        if step > 60 and choose is random_id and (wanted or hurry):
            if written and not wanted and text_of(tokenizer, ids[-1:], "replace").endswith('"'):
                wanted = [byte_id[b"%c" % byte] for byte in written[step % len(written)]]
            id = next((end for end in ends if end < len(mask) and mask[end]), id)
            if wanted and mask[wanted[0]]:
                id = wanted.pop(0)
            else:
                wanted = []
        if id in tokenizer.stop_ids:
            return text_of(tokenizer, ids)
        constraint.accept(id)
        ids.append(id)
    raise AssertionError(f"no end: {text_of(tokenizer, ids)!r}")


def text_of(tokenizer, ids, errors="strict"):
    return b"".join(map(tokenizer.token_bytes, ids)).decode(errors=errors)


def encode(tokenizer, text):
    return tokenizer.encode(text, bos=False, prefix_space=False)


def allows(constraint, tokenizer, text, ids=None):
    """Whether the text is possible from here, and may end."""
    constraint = constraint.copy()
    try:
        for id in encode(tokenizer, text) if ids is None else ids:
            constraint.accept(id)
    except GrammarError:
        return False
    return constraint.accepting


def allows_json(tokenizer, schema, value):
    return allows(
        json_constraint(tokenizer, VOCAB_SIZE, schema),
        tokenizer,
        json.dumps(value, ensure_ascii=False),
    )


# --- JSON


@pytest.mark.filterwarnings("ignore:.*leaves 'oneOf' to")
@pytest.mark.parametrize("name", SCHEMAS)
def test_random_tokens_end_in_valid_json(tokenizer, name):
    constraint = json_constraint(tokenizer, VOCAB_SIZE, SCHEMAS[name])
    validator = compile_schema(SCHEMAS[name])
    for seed in range(2):
        text = walk(constraint.copy(), tokenizer, seed, words=words_of(SCHEMAS[name]))
        assert problem(validator, json.loads(text)) is None, text


def made_up(choose, depth=2):
    """A random schema."""
    kind = choose.choice(
        ["string", "integer", "number", "boolean", "null", "enum", "$ref"] + ["object", "array"] * 2
    )
    if kind == "$ref":
        return {"$ref": f"#/$defs/{choose.choice('ab')}"}
    if kind == "enum" or depth == 0:
        return {"enum": choose.sample([0, 1, True, None, "a", "b", 2.5, [], {"a": 1}], 3)}
    schema = {"type": kind} if choose.random() < 0.8 else {}
    low = choose.randrange(4)
    if kind == "string":
        schema |= choose.choice(
            [{}, {"minLength": low, "maxLength": low + 2}, {"pattern": "^[a-é]{2}|z"}]
        )
    elif kind in ("integer", "number"):
        schema |= choose.choice(
            [{}, {"minimum": -low, "exclusiveMaximum": low + 0.5}, {"multipleOf": low + 1}]
        )
    elif kind == "array":
        schema |= {"items": made_up(choose, depth - 1), "minItems": low // 2, "maxItems": low}
    elif kind == "object":
        names = choose.sample("abcd", low)
        schema |= {
            "properties": {name: made_up(choose, depth - 1) for name in names},
            "required": names[: low // 2],
        }
        others = choose.choice([True, made_up(choose, depth - 1)])
        schema |= {"additionalProperties": others}
    if choose.random() < 0.3:
        schema[choose.choice(["anyOf", "oneOf", "allOf"])] = [
            made_up(choose, depth - 1) for _ in range(2)
        ]
    return schema


def test_random_tokens_end_in_valid_json_for_made_up_schemas(tokenizer):
    ended = 0
    refused = 0
    for seed in range(40):
        choose = random.Random(seed)
        schema = {**made_up(choose), "$defs": {name: made_up(choose) for name in "ab"}}
        try:
            validator = compile_schema(schema)
            constraint = json_constraint(tokenizer, VOCAB_SIZE, schema)
        except (SchemaError, GrammarError):  # a circle of references; no value; or not expressed
            refused += 1
            continue
        text = walk(constraint, tokenizer, seed, words=words_of(schema))
        assert problem(validator, json.loads(text)) is None, (text, schema)
        ended += 1
    assert ended > 20 > refused


def random_value(choose, depth=3):
    scalars = [
        None,
        True,
        False,
        0,
        1,
        2,
        -3,
        7,
        0.25,
        0.3,
        1.5,
        10**12,
        "",
        "a",
        "b",
        "az",
        "c",
        "日本",
        "a-12",
    ]
    if depth == 0 or choose.random() < 0.3:
        return choose.choice(scalars)
    if choose.random() < 0.3:
        return [random_value(choose, depth - 1) for _ in range(choose.randrange(3))]
    names = ["a", "b", "is", "v", "next", "kids", "x"]
    return {
        name: random_value(choose, depth - 1) for name in choose.sample(names, choose.randrange(3))
    }


@pytest.mark.filterwarnings("ignore:.*leaves 'oneOf' to")
@pytest.mark.parametrize("name", SCHEMAS)
def test_the_grammar_allows_a_value_if_and_only_if_it_is_valid(tokenizer, name):
    schema = opened(SCHEMAS[name])
    original = compile_schema(SCHEMAS[name])
    constraint = json_constraint(tokenizer, VOCAB_SIZE, schema)
    choose = random.Random(name)
    for _ in range(60):
        value = random_value(choose)
        allowed = allows(constraint, tokenizer, json.dumps(value, ensure_ascii=False))
        if name not in WIDER:
            assert allowed <= original.is_valid(value), value
        if name not in FORMATS:
            assert allowed >= original.is_valid(value), value


@pytest.mark.parametrize("keyword", DROPPED)
def test_a_keyword_that_the_grammar_cannot_express_is_dropped_and_named_once(tokenizer, keyword):
    schema, valid, invalid = DROPPED[keyword]
    twice = {"type": "array", "items": {"anyOf": [schema, {**schema, "title": "b"}]}}
    twice["$defs"] = schema.get("$defs", {})
    with pytest.warns(UserWarning, match=f"leaves '{re.escape(keyword)}' to") as warned:
        constraint = json_constraint(tokenizer, VOCAB_SIZE, twice)
    assert len(warned) == 1
    for value in (valid, invalid):
        assert allows(constraint, tokenizer, json.dumps([value]))
    assert compile_schema(twice).is_valid([valid])
    assert not compile_schema(twice).is_valid([invalid])
    assert not allows(constraint, tokenizer, '["a" "b"]')
    # For values of other types the keyword has no effect
    assert allows_json(tokenizer, {"type": "boolean", "uniqueItems": True}, True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", EXPRESSED)
def test_what_the_grammar_expresses_is_not_dropped(tokenizer, name):
    schema, valid, invalid = EXPRESSED[name]
    assert compile_schema(schema).is_valid(valid) and allows_json(tokenizer, schema, valid)
    assert not compile_schema(schema).is_valid(invalid)
    assert not allows_json(tokenizer, schema, invalid)


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
@pytest.mark.parametrize(
    "pattern", ["(?=a)b", "(a)\\1", "\\bfoo", "[a&&b]", "[[a]]", "a++", "(?x)a b", "a(?!b)"]
)
def test_a_pattern_that_the_grammar_reads_in_another_way_is_dropped(tokenizer, pattern):
    schema = {"type": "string", "pattern": pattern, "maxLength": 4}
    with pytest.warns(UserWarning, match="leaves 'pattern' to"):
        constraint = json_constraint(tokenizer, VOCAB_SIZE, schema)
    assert allows(constraint, tokenizer, '"zzzz"')
    assert not allows(constraint, tokenizer, '"zzzzz"')


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 5, "maximum": 4},
        {"type": "array", "minItems": 2, "maxItems": 1},
        {"type": "array", "minItems": 1, "items": False},
        {"type": "object", "required": ["a"], "properties": {"a": False}},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "string", "pattern": "^a{50}$", "maxLength": 49},
        {"allOf": [STRING, INTEGER]},
        {"enum": [1], "type": "string"},
        {**NODE, "required": ["next"], "$defs": {"node": {**NODE, "required": ["next"]}}},
    ],
)
def test_a_schema_without_a_valid_value_is_an_error(tokenizer, schema):
    with pytest.raises(GrammarError, match="no value is valid") as raised:
        json_constraint(tokenizer, VOCAB_SIZE, schema)
    assert not isinstance(raised.value, UnsupportedSchema) and "\n" not in str(raised.value)


def test_an_empty_reference_leads_to_the_root(tokenizer):
    schema = {"type": "object", "properties": {"a": {}, "b": {"$ref": ""}}}
    assert allows_json(tokenizer, schema, {"b": {"b": {}}})
    assert not allows_json(tokenizer, schema, {"b": 1})


@pytest.mark.parametrize(
    "schema", [5, None, {"type": "foo"}, {"$ref": "#/nowhere"}, {"minimum": "1"}, {"a": {1, 2}}]
)
def test_a_malformed_schema_is_an_error(tokenizer, schema):
    with pytest.raises(SchemaError):
        json_constraint(tokenizer, VOCAB_SIZE, schema)


def test_values_that_only_the_grammar_forbids_are_no_schema_error(tokenizer):
    schema = {
        "type": "object",
        "required": ["a"],
        "minProperties": 2,
    }  # valid with a property of any other name
    assert allows_json(tokenizer, schema, {"b": 1, "a": 1})
    assert not allows_json(tokenizer, schema, {"a": 1})


def test_large_schemas_are_compiled_in_time_or_refused(tokenizer):
    many = {f"p{i}": INTEGER for i in range(1000)}
    assert allows_json(tokenizer, {"type": "object", "properties": many}, {"p3": 1, "p999": 2})
    assert allows_json(tokenizer, {"enum": list(many)}, "p500")
    tree = {"type": "object", "properties": {name: {"$ref": "#"} for name in "abcdef"}}
    assert allows_json(tokenizer, tree, {"a": {"b": {}}, "f": {}})
    twice = [{"properties": dict.fromkeys("xy", {"$ref": f"#/$defs/{i + 1}"})} for i in range(25)]
    doubling = {
        "$ref": "#/$defs/0",
        "$defs": {str(i): part for i, part in enumerate([*twice, INTEGER])},
    }
    assert allows_json(tokenizer, doubling, {"y": {"x": {}}})
    assert allows_json(tokenizer, {"anyOf": [{"minimum": i} for i in range(300)]}, 5)


# --- Bounds: those of the schema, and no others


def nested(value, levels):
    for _ in range(levels):
        value = {"v": 1, "next": value}
    return value


def test_the_grammar_has_no_bound_that_the_schema_has_not(tokenizer):
    ints = {"type": "array", "items": INTEGER}
    table = {"type": "object", "additionalProperties": INTEGER}
    for schema, value in (
        (STRING, "日" * 5000),
        (STRING, '\x7f\x01"\\/\n'),
        ({"type": "string", "maxLength": 10_000}, "a" * 10_000),
        (INTEGER, 1187654321098765432),
        (INTEGER, -(10**30)),
        ({"type": "integer", "minimum": 0}, 10**30),
        ({"type": "number"}, 1_400_000_000),
        ({"type": "number"}, 6.62607015e-34),
        ({"type": "number"}, 1.7976931348623157e308),
        ({"type": "number", "minimum": 0}, 4e-7),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, 5e-324),
        ({"type": "number", "minimum": -1e20}, 3.141592653589793),
        (ints, list(range(150))),
        (table, {f"a long name, number {i}": i for i in range(150)}),
        (opened({"type": "object", "properties": {"a": INTEGER}}), {"b": [{}], "a": 1}),
        ({}, json.loads("[" * 40 + "]" * 40)),
        (SCHEMAS["recursive"], nested({"v": 1}, 20)),
    ):
        assert compile_schema(schema).is_valid(value)
        assert allows_json(tokenizer, schema, value), value


def test_each_bound_of_the_schema_holds(tokenizer):
    for schema, valid, invalid in (
        ({"type": "string", "maxLength": 10_000}, "a" * 10_000, "a" * 10_001),
        ({"type": "string", "minLength": 3000}, "日" * 3000, "a" * 2999),
        ({"type": "string", "maxLength": 1}, "\N{GRINNING FACE}", "ab"),
        ({"type": "array", "maxItems": 300}, [1] * 300, [1] * 301),
        ({"type": "array", "items": INTEGER, "minItems": 5}, [1] * 5, [1] * 4),
        ({"type": "array", "prefixItems": [INTEGER] * 5, "minItems": 5}, [1] * 5, [1] * 4),
        ({"type": "integer", "maximum": -5 * 10**9}, -6 * 10**9, -4 * 10**9),
        ({"type": "number", "exclusiveMinimum": 0.3}, 0.30000000000000004, 0.3),
        ({"type": "number", "maximum": 0.3}, 0.3, 0.30000000000000004),
    ):
        assert allows_json(tokenizer, schema, valid)
        assert not allows_json(tokenizer, schema, invalid)


def test_a_number_may_be_written_in_every_way(tokenizer):
    forms = ["0", "5.0", "0.0", "-0.5e-3", "1E-7", "4e-07", "1.5e+300", "123456e5", "1.50"]
    forms += ["1e6", "1.4E9", "14e8", "1.5e+02", "1e300"]
    for bounds in ({}, {"minimum": -(10**301)}):
        constraint = json_constraint(tokenizer, VOCAB_SIZE, {"type": "number", **bounds})
        for form in forms if not bounds else forms[:1]:
            assert allows(constraint, tokenizer, form), form
        for form in ("01", "+1", ".5", "1.", "1e", "1e999", "Infinity", "0x1"):
            assert not allows(constraint, tokenizer, form), form


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"minimum": -50, "exclusiveMaximum": 10**6},
        {"minimum": 0.5},
        {"multipleOf": 1},
        {"multipleOf": 0.5},
        {"multipleOf": 5, "maximum": 1e18},
        {"enum": [50, 5, "50"]},
        {"const": 50},
        {"type": ["integer", "null"]},
        {"type": "number", "allOf": [INTEGER, {"maximum": 500}]},
        {"anyOf": [{"minimum": 60}, {"maximum": 55}]},
        {"$schema": "http://json-schema.org/draft-04/schema#", "multipleOf": 0.1},
    ],
    ids=str,
)
def test_an_integer_is_written_in_digits_alone(tokenizer, schema):
    constraint = json_constraint(tokenizer, VOCAB_SIZE, {"type": "integer", **schema})
    assert allows(constraint, tokenizer, "50")
    for form in ("50.0", "50.", "5e1", "5E+1", "5.0e1", "500e-1", "+50", "050"):
        assert not allows(constraint, tokenizer, form), form


def test_a_number_may_be_written_as_its_schema_spells_it(tokenizer):
    for text, forms in (("27.0", ["27.0", "27"]), ("1e20", ["1e+20"]), ("27", ["27"])):
        for schema in ({"const": json.loads(text)}, {"enum": [json.loads(text)]}):
            constraint = json_constraint(tokenizer, VOCAB_SIZE, {"type": "integer", **schema})
            allowed = [
                form
                for form in ("27", "27.0", "27.00", "2.7e1", "1e+20")
                if allows(constraint, tokenizer, form)
            ]
            assert sorted(allowed) == sorted(forms), schema


NAMED = {"properties": {"a": INTEGER, "b": STRING}, "required": ["a"]}


@pytest.mark.filterwarnings("ignore:.*leaves '[a-zA-Z]*' to")
@pytest.mark.parametrize(
    ("schema", "has_others"),
    [
        (NAMED, False),
        ({"type": ["object", "null"], **NAMED}, False),
        ({"$ref": "#/$defs/named", "$defs": {"named": NAMED}}, False),
        ({"allOf": [{"properties": {"b": STRING}}, NAMED]}, False),
        ({"anyOf": [NAMED, {"properties": {"c": INTEGER}, "required": ["c"]}]}, False),
        ({**NAMED, "minProperties": 1}, False),
        ({**NAMED, "additionalProperties": False}, False),
        ({**NAMED, "unevaluatedProperties": False}, False),
        ({**NAMED, "additionalProperties": True}, True),
        ({**NAMED, "additionalProperties": {}}, True),
        ({**NAMED, "unevaluatedProperties": True}, True),
        ({**NAMED, "unevaluatedProperties": INTEGER}, True),
        ({**NAMED, "patternProperties": {"^c": INTEGER}}, True),
        ({**NAMED, "propertyNames": {"maxLength": 1}}, True),
        ({**NAMED, "minProperties": 3}, True),
        ({**NAMED, "if": {"required": ["b"]}, "then": {"required": ["c"]}}, True),
        ({**NAMED, "dependentRequired": {"b": ["c"]}}, True),
        ({"allOf": [NAMED, {"additionalProperties": True}]}, True),
        ({"properties": {}}, True),
        ({"required": ["a"]}, True),
        ({"type": "object"}, True),
    ],
    ids=str,
)
def test_an_object_has_the_properties_that_its_schema_names(tokenizer, schema, has_others):
    for inside in (False, True):
        value = {"a": 1, "b": "x"}
        whole = schema
        if inside:
            whole = {"items": schema, "$defs": schema.get("$defs", {}), "type": "array"}
        for given, allowed in (({"a": 1}, not has_others), ({**value, "c": 3}, has_others)):
            given = [given] if inside else given
            if allowed:
                assert compile_schema(whole).is_valid(given)
            if allowed or not has_others:
                assert allows_json(tokenizer, whole, given) == allowed, given


def test_more_properties_than_can_be_are_no_dead_end(tokenizer):
    schema = {"type": "object", **NAMED, "additionalProperties": False, "minProperties": 3}
    with pytest.raises(GrammarError, match="no value is valid"):
        json_constraint(tokenizer, VOCAB_SIZE, schema)


@pytest.mark.parametrize("seed", range(40))
def test_bounds_of_numbers_are_exact(tokenizer, seed):
    choose = random.Random(seed)
    numbers = [0, 1, -1, 0.5, 9.99, 10, 100, -3.5, 19.99, 1e-3, 999, 12345.678, -0.25]
    schema = {"type": choose.choice(["integer", "number"])}
    for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        if choose.random() < 0.4:
            schema[key] = choose.choice(numbers)
    if choose.random() < 0.3:
        schema["multipleOf"] = choose.choice([1, 0.1, 0.01])
    validator = compile_schema(schema)
    try:
        constraint = json_constraint(tokenizer, VOCAB_SIZE, schema)
    except GrammarError:
        assert not any(validator.is_valid(number) for number in numbers)
        return
    numbers += [choose.choice(numbers) + choose.choice(numbers) for _ in range(20)]
    for number in numbers:
        valid = validator.is_valid(number)
        if schema["type"] == "integer" and valid:
            number = int(number)
        assert allows(constraint, tokenizer, json.dumps(number)) == valid, (number, schema)


def test_properties_come_in_any_order_and_required_ones_cannot_be_forgotten(tokenizer):
    schema = {
        "type": "object",
        "properties": {"a": INTEGER, "b": STRING, "c": {"type": "null"}, "d": INTEGER},
        "required": ["c", "a"],
        "additionalProperties": False,
    }
    constraint = json_constraint(tokenizer, VOCAB_SIZE, schema)
    value = {"a": 1, "b": "x", "c": None, "d": 2}
    for n in range(5):
        for names in itertools.permutations(value, n):
            text = json.dumps({name: value[name] for name in names})
            assert allows(constraint, tokenizer, text) == ({"a", "c"} <= {*names}), text
    assert not allows(constraint, tokenizer, '{"a": 1, "c": null, "a": 2}')
    assert not allows(constraint, tokenizer, '{"a": 1, "c": null, "b": "x", "d": 2, }')


def test_an_object_may_have_more_names_than_a_rule_has_bits(tokenizer):
    names = [f"p{i}" for i in range(200)]
    schema = {
        "type": "object",
        "properties": dict.fromkeys(names, INTEGER),
        "required": names[150:],
    }
    constraint = json_constraint(tokenizer, VOCAB_SIZE, schema)
    assert allows(constraint, tokenizer, json.dumps(dict.fromkeys(reversed(names), 1)))
    assert not allows(constraint, tokenizer, json.dumps(dict.fromkeys(names[:150], 1)))


def test_references_and_tuples_are_read_by_the_dialect(tokenizer):
    draft = "http://json-schema.org/draft-{}/schema#"
    four = {"$schema": draft.format("04"), "minimum": 3, "exclusiveMinimum": True}
    four |= {"type": "integer"}
    assert allows_json(tokenizer, four, 4) and not allows_json(tokenizer, four, 3)
    pair = {"$schema": draft.format("07"), "type": "array", "items": [INTEGER, STRING]}
    pair |= {"additionalItems": False}
    assert allows_json(tokenizer, pair, [1, "a"]) and not allows_json(tokenizer, pair, ["a", 1])
    assert not allows_json(tokenizer, pair, [1, "a", 2])
    beside = {"$ref": "#/definitions/s", "maxLength": 1, "definitions": {"s": STRING}}
    assert not allows_json(tokenizer, beside, "abc")
    assert allows_json(tokenizer, {"$schema": draft.format("07"), **beside}, "abc")
    absent = {"type": "string", "enum": None, "maxLength": None, "properties": None, "items": None}
    assert allows_json(tokenizer, absent, "abc")
    for pattern, text in ((r"^\p{L}+$", "é日"), (r"^(?<year>\d{4})$", "1999")):
        assert allows_json(tokenizer, {"type": "string", "pattern": pattern}, text)
        assert not allows_json(tokenizer, {"type": "string", "pattern": pattern}, "-")


def chain(keyword, n, leaf):
    """n definitions, each the next one twice."""
    both = [
        [{"$ref": f"#/$defs/{i + 1}"}, {"allOf": [{"$ref": f"#/$defs/{i + 1}"}]}] for i in range(n)
    ]
    definitions = {str(i): {keyword: parts} for i, parts in enumerate(both)}
    return {"$ref": "#/$defs/0", "$defs": {**definitions, str(n): leaf}}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("keyword", ["anyOf", "oneOf", "allOf"])
@pytest.mark.parametrize("leaf", [STRING, {"allOf": [STRING, INTEGER]}])
def test_a_schema_that_doubles_is_compiled_and_checked_in_time(tokenizer, keyword, leaf):
    for n in (18, 60):
        schema = chain(keyword, n, leaf)
        start = time.process_time()
        try:
            assert allows_json(tokenizer, schema, "x")
        except GrammarError as error:
            assert "no value is valid" in str(error) and leaf != STRING
        told = problem(compile_schema(schema), 1)
        assert told if n == 18 else "more than 1,000,000 steps" in told
        assert time.process_time() - start < 10


def test_a_pattern_that_backtracks_is_checked_in_time(tokenizer):
    schema = {"enum": ["a" * 30 + "!", "aaa"], "pattern": "^(a+)+$"}
    start = time.process_time()
    assert allows_json(tokenizer, schema, "aaa")
    assert not allows_json(tokenizer, schema, "a" * 30 + "!")
    assert problem(compile_schema({"pattern": "^(?=(a+)+$)"}), "a" * 5000 + "!")
    assert (
        problem(compile_schema({"patternProperties": {"^(a+)+$": False}}), {"a" * 50 + "!": 1})
        is None
    )
    assert time.process_time() - start < 5


@pytest.mark.parametrize("keyword", ["properties", "allOf", "both"])
def test_a_schema_that_would_exhaust_the_stack_is_an_error(keyword):
    def part(i):
        inner = {"$ref": f"#/$defs/{i + 1}"}
        return {"properties": {"x": inner}} if keyword != "allOf" else {"allOf": [inner]}

    every = {str(i): part(i) for i in range(3000)} | {"3000": STRING}
    first = {"$ref": "#/$defs/0"}
    if keyword == "both":  # the first to be read leads to all others
        first = {"anyOf": [{"$ref": f"#/$defs/{i}"} for i in range(3000)]}
    with pytest.raises(SchemaError, match="levels deep|in a chain"):
        compile_schema({**first, "$defs": every})


def test_many_places_of_a_tuple_are_left_to_the_validator(tokenizer):
    schema = {"type": "array", "prefixItems": [{"const": i} for i in range(3000)]}
    with pytest.warns(UserWarning, match="leaves 'prefixItems' to"):
        constraint = json_constraint(tokenizer, VOCAB_SIZE, schema)
    assert allows(constraint, tokenizer, json.dumps(list(range(600))))
    assert not allows(constraint, tokenizer, "[1]")


def test_more_parts_than_a_grammar_may_have_are_an_error(tokenizer):
    many = {f"p{i}": {"type": "string", "maxLength": i} for i in range(6000)}
    with pytest.raises(UnsupportedSchema, match="more than 10,000 parts"):
        json_constraint(tokenizer, VOCAB_SIZE, {"type": "object", "properties": many})


def test_whitespace_ends_and_json_may_be_indented(tokenizer):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": INTEGER}},
        "required": ["a"],
    }
    constraint = json_constraint(tokenizer, VOCAB_SIZE, schema)
    for text in (json.dumps({"a": [1, 2]}), json.dumps({"a": [1, 2]}, indent=4), '{"a":[1,2]}'):
        assert allows(constraint, tokenizer, text)
    for text in (
        '{"a":  [1]}',
        '{"a":\n\n[1]}',
        "{" + "\n" + " " * 17 + '"a":[]}',
        ' {"a":[]}',
        '{"a":[]}\n',
    ):
        assert not allows(constraint, tokenizer, text)


def test_without_indent_json_is_what_json_dumps_writes(tokenizer):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": INTEGER}},
        "required": ["a"],
        "additionalProperties": False,
    }
    constraint = json_constraint(tokenizer, VOCAB_SIZE, schema, one_line=True)
    assert allows(constraint, tokenizer, '{"a": [1, 2]}')
    assert not allows(constraint, tokenizer, '{"a":[1, 2]}') and not allows(
        constraint, tokenizer, '{ "a": [1, 2]}'
    )
    assert text_of(tokenizer, constraint.forced()) == '{"a":'


# --- Any valid value survives


def random_text(choose):
    characters = 'ab "\\/\n\t\x00\x1f\x7fé日\u2028\N{GRINNING FACE}\U0010ffff</tool_call>{}[]:,'
    return "".join(choose.choices(characters, k=choose.randrange(8)))


def random_number(choose):
    return choose.choice(
        [
            choose.randrange(-9, 9),
            choose.randrange(-(10**20), 10**20),
            choose.random(),
            choose.uniform(-50, 50),
            choose.uniform(-1, 1) * 10.0 ** choose.randrange(-320, 300),
            round(choose.uniform(-99, 99), 2),
        ]
    )


def value_for(choose, schema, root, depth=4):
    """A random value that is often valid for the schema."""
    if schema is True or schema is False or depth < 0 or not schema:
        return choose.choice([None, True, random_number(choose), random_text(choose), [], {}])
    if "$ref" in schema:
        return value_for(choose, root["$defs"][schema["$ref"][-1]], root, depth - 1)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema and choose.random() < 0.5:
            return value_for(choose, choose.choice(schema[key]), root, depth - 1)
    if "enum" in schema:
        return choose.choice(schema["enum"])
    kind = schema.get("type") or ("array" if "items" in schema else "object")
    if kind in ("integer", "number"):
        number = random_number(choose)
        number = round(number) if kind == "integer" and abs(number) < 1e300 else number
        return number * schema.get("multipleOf", 1)
    if kind == "string":
        return choose.choice([random_text(choose), "aé", "z", "abc"])
    if kind == "array":
        length = choose.randrange(schema.get("minItems", 0), schema.get("maxItems", 4) + 1)
        return [value_for(choose, schema["items"], root, depth - 1) for _ in range(length)]
    if kind == "object":
        names = list(schema.get("properties", {})) + [random_text(choose), "a"]
        chosen = {*schema.get("required", []), *choose.sample(names, choose.randrange(len(names)))}
        named = schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        order = sorted(
            sorted(chosen), key=lambda name: choose.random()
        )  # a set has no order of its own
        return {name: value_for(choose, named.get(name, others), root, depth - 1) for name in order}
    return {"boolean": choose.random() < 0.5, "null": None}[kind]


def same(a, b):
    """Whether two values are the same JSON, and in the same order."""
    return json.dumps(a) == json.dumps(b)


@pytest.mark.filterwarnings("ignore:.*leaves '[a-zA-Z]*' to")
@pytest.mark.parametrize("part", range(4))
def test_any_value_that_is_valid_for_a_random_schema_survives(tokenizer, part):
    survived = 0
    for seed in range(100 * part, 100 * part + 40):
        choose = random.Random(seed)
        schema = {**made_up(choose), "$defs": {name: made_up(choose) for name in "ab"}}
        try:
            validator = compile_schema(schema)
            constraint = json_constraint(tokenizer, VOCAB_SIZE, schema)
        except (SchemaError, GrammarError) as error:
            assert "leads back" in str(error) or "no value is valid" in str(error), error
            continue
        parameters = {"type": "object", "properties": {"x": schema}, "$defs": schema["$defs"]}
        calls = tool_constraint(tokenizer, tools=[{"name": "f", "parameters": parameters}])
        second = jsonschema.Draft202012Validator(schema)
        for _ in range(12):
            value = value_for(choose, schema, schema)
            valid = validator.is_valid(value)
            assert valid == second.is_valid(value), (schema, value)
            if not valid:
                continue
            text = json.dumps(value, ensure_ascii=choose.random() < 0.3)
            text = choose.choice([text, json.dumps(value, indent=2, ensure_ascii=False)])
            patterned = '"pattern"' in json.dumps(schema)
            if re.search(r'"multipleOf": [2-9]', json.dumps(schema)) and re.search(
                r"\d(\.0|[eE])", text
            ):
                continue  # a multiple of these is written in digits alone
            if not (patterned and ("\\u" in text or "\x7f" in text)):
                assert allows(constraint, tokenizer, text), (schema, text)
                assert same(json.loads(text), value)
                call = write_call("f", {"x": value}, choose.choice(["json", "tool_use"]))
                assert allows(calls, tokenizer, call)
                assert same(parse_tool_calls(call).calls[0].arguments, {"x": value})
                survived += 1
    assert survived > 40


# --- Tool calls

WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": STRING, "unit": {"$ref": "#/$defs/unit"}},
        "required": ["city"],
        "$defs": {"unit": {"enum": ["C", "F"]}},
    },
}
ADD = {
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/unit"}},
        "required": ["x"],
    },
}
ADD["parameters"]["$defs"] = {"unit": INTEGER}
TOOLS = [
    {"type": "function", "function": WEATHER},
    ADD,
    {"name": "now", "description": "", "parameters": {}},
]
WORDS = ["arguments", "name", "city", "x"]
CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NOW = '<tool_call>\n{"arguments": {}, "name": "now"}\n</tool_call>'


def tool_constraint(tokenizer, choice="auto", tools=TOOLS):
    return tool_call_constraint(tokenizer, VOCAB_SIZE, tools, choice=choice)


@pytest.mark.parametrize("choice", ["required", "add"])
def test_random_tokens_end_in_calls_of_the_tools(tokenizer, choice):
    schemas = {
        tool.get("function", tool)["name"]: tool.get("function", tool)["parameters"]
        for tool in TOOLS
    }
    constraint = tool_constraint(tokenizer, choice)
    first = set()
    for seed in range(8):
        text = walk(constraint.copy(), tokenizer, seed, words=WORDS)
        calls = [json.loads(call) for call in CALL.findall(text)]
        assert calls and not CALL.sub("", text).strip("\n")
        for call in calls:
            assert call.keys() == {"name", "arguments"} and choice in ("required", call["name"])
            assert problem(compile_schema(schemas[call["name"]]), call["arguments"]) is None
            first.add(next(iter(call)))
    assert first == {"name", "arguments"}


def test_text_is_free_before_the_tag_and_after_the_call(tokenizer):
    constraint = tool_constraint(tokenizer)
    for text in (
        "",
        "Hello.",
        "a < b <tool",
        "<tools>",
        f"Let me see.\n{PARIS}",
        f"{PARIS}\n{NOW}",
        f"{NOW}{NOW} Done.",
    ):
        assert allows(constraint, tokenizer, text), text
        assert allows(constraint, tokenizer, text, ids=[byte + 3 for byte in text.encode()]), text
    for text in (
        "<tool_call>",
        "<tool_call> ",
        "a <tool_call>\nb",
        "<tool_call>\n{}\n</tool_call>",
        f"{NOW}<tool_call>x",
    ):
        assert not allows(constraint, tokenizer, text), text
    assert allows(constraint, tokenizer, PARIS.replace("Paris", "a city with a long name"))
    assert not allows(constraint, tokenizer, PARIS.replace("city", "town"))
    assert not allows(constraint, tokenizer, NOW.replace("now", "never")) and not allows(
        constraint, tokenizer, NOW[:-1] + "x"
    )


def test_random_text_runs_into_calls_only_as_a_whole(tokenizer):
    constraint = tool_constraint(tokenizer)
    for id in encode(tokenizer, "I look at the clock: <tool_call>"):
        constraint.accept(id)
    assert not constraint.accepting
    text = walk(
        constraint, tokenizer, 1, choose=lambda mask, g: STOP if mask[STOP] else random_id(mask, g)
    )
    call = json.loads(re.match(r"\n(.*)\n</tool_call>", text, re.DOTALL)[1])
    assert call["name"] in ("get_weather", "add", "now")


def test_a_tag_inside_a_string_is_part_of_the_string(tokenizer):
    text = PARIS.replace("Paris", "</tool_call>\\n<tool_call>")
    assert allows(tool_constraint(tokenizer), tokenizer, text)


@pytest.mark.parametrize("style", ["json", "tool_use"])
def test_calls_are_allowed_in_the_order_that_each_prompt_asks_for(tokenizer, style):
    text = write_call("get_weather", {"city": "Köln", "unit": "C"}, style)
    for choice in ("auto", "required", "get_weather"):
        assert allows(tool_constraint(tokenizer, choice), tokenizer, text)
    assert not allows(tool_constraint(tokenizer, "now"), tokenizer, text)


def test_required_calls_have_no_text_around_them(tokenizer):
    constraint = tool_constraint(tokenizer, "required")
    assert allows(constraint, tokenizer, "\n".join([NOW] * 300)) and allows(
        constraint, tokenizer, NOW + PARIS
    )
    for text in ("", "Hello", " " + NOW, NOW + " ", NOW + "\n"):
        assert not allows(constraint, tokenizer, text), text


def test_when_no_tool_may_be_called_the_tag_cannot_be_written(tokenizer):
    constraint = tool_constraint(tokenizer, "none")
    for text in ("", "Hello.\n", "<tool_cal", "<tool_call", "< tool_call>", "</tool_call>"):
        assert allows(constraint, tokenizer, text)
        assert allows(constraint, tokenizer, text, ids=[byte + 3 for byte in text.encode()])
    assert not allows(constraint, tokenizer, NOW) and not allows(
        constraint, tokenizer, "so <tool_call>"
    )
    assert allows(tool_constraint(tokenizer, "none", tools=[]), tokenizer, "Hello.")


@pytest.mark.parametrize("choice", ["auto", "required", "now"])
def test_without_parallel_calls_an_answer_has_one_at_most(tokenizer, choice):
    one = tool_call_constraint(tokenizer, VOCAB_SIZE, TOOLS, choice=choice, parallel=False)
    assert allows(one, tokenizer, NOW)
    assert allows(one, tokenizer, f"Now: {NOW} Done") == (choice == "auto")
    for text in (NOW + NOW, f"{NOW}\n{NOW}", f"{NOW} and {NOW}"):
        assert not allows(one, tokenizer, text), text
    listed = call_list_constraint(tokenizer, VOCAB_SIZE, TOOLS, choice=choice, parallel=False)
    call = '{"name": "now", "arguments": {}}'
    assert allows(listed, tokenizer, f"[{call}]")
    assert not allows(listed, tokenizer, f"[{call}, {call}]")


def test_an_answer_with_a_schema_is_calls_or_json_and_nothing_else(tokenizer):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    options = {"choice": "auto", "answer": schema}
    for parallel in (True, False):
        either = tool_call_constraint(tokenizer, VOCAB_SIZE, TOOLS, parallel=parallel, **options)
        assert allows(either, tokenizer, NOW) and allows(either, tokenizer, '{"n": 1}')
        assert allows(either, tokenizer, NOW + NOW) == parallel
        for text in ("", "Hello", '{"n": "1"}', f'{{"n": 1}}{NOW}', f'{NOW}{{"n": 1}}'):
            assert not allows(either, tokenizer, text), text


@pytest.mark.parametrize("choice", ["auto", "required", "add"])
def test_random_tokens_end_in_a_list_of_calls(tokenizer, choice):
    schemas = {
        tool.get("function", tool)["name"]: tool.get("function", tool)["parameters"]
        for tool in TOOLS
    }
    constraint = call_list_constraint(tokenizer, VOCAB_SIZE, TOOLS, choice=choice)
    keys = set()
    for seed in range(8):
        calls = json.loads(walk(constraint.copy(), tokenizer, seed, words=WORDS))
        assert calls
        for call in calls:
            assert choice in ("auto", "required", call["name"])
            assert problem(compile_schema(schemas[call["name"]]), call["arguments"]) is None
            assert re.fullmatch("[A-Za-z0-9]{9}", call.get("id", "123456789"))
            keys |= call.keys()
    assert keys == {"name", "arguments", "id"}
    assert not allows(constraint, tokenizer, "[]") and not allows(constraint, tokenizer, "Hello")
    assert not allows(constraint, tokenizer, '[{"name": "add", "arguments": {"x": 1}}] and so')
    assert allows(
        constraint, tokenizer, ' [{"name": "add", "arguments": {"x": 1}, "id": "aB3456789"}]'
    )


def test_unusable_tools_are_errors(tokenizer):
    for tools, choice, message in (
        ([], "auto", "no tools"),
        ([ADD, ADD], "auto", "same name"),
        (TOOLS, "never", "'never'.*get_weather, add, now"),
        ([{"description": "x"}], "auto", "no name"),
        ([{**ADD, "parameters": {"type": "array"}}], "required", "'add'"),
    ):
        with pytest.raises(GrammarError, match=message):
            tool_constraint(tokenizer, choice, tools=tools)
    with pytest.raises(SchemaError, match="'add'"):
        tool_constraint(tokenizer, tools=[{**ADD, "parameters": {"properties": 5}}])


@pytest.mark.parametrize("constrain", [tool_call_constraint, call_list_constraint])
def test_a_tool_that_cannot_be_expressed_leaves_the_others_their_grammar(tokenizer, constrain):
    unique = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    large = {"type": "object", "properties": {f"p{i}": {"maxLength": i} for i in range(6000)}}
    tools = [WEATHER, {"name": "tags", "parameters": unique}, {"name": "big", "parameters": large}]
    with pytest.warns(UserWarning) as warned:
        constraint = constrain(tokenizer, VOCAB_SIZE, tools)
    told = sorted(str(warning.message) for warning in warned)
    assert len(told) == 2
    assert "tool 'big'" in told[0] and "10,000 parts" in told[0]
    assert "tool 'tags'" in told[1] and "'uniqueItems'" in told[1]
    around = ["<tool_call>\n%s\n</tool_call>", "[%s]"][constrain is call_list_constraint]
    for call, allowed in (
        ('{"name": "get_weather", "arguments": {"city": "Paris"}}', True),
        ('{"name": "get_weather", "arguments": {"town": "Paris"}}', False),
        ('{"name": "tags", "arguments": {"a": [1, 1]}}', True),
        ('{"name": "tags", "arguments": {"a": "x"}}', False),
        ('{"name": "big", "arguments": {"anything": [1]}}', True),
        ('{"name": "big", "arguments": [1]}', False),
    ):
        assert allows(constraint, tokenizer, around % call) == allowed, call


def test_many_tools_get_a_grammar_and_it_is_compiled_once(tokenizer):
    kinds = [STRING, INTEGER, {"type": "number", "minimum": 0}, {"enum": ["a", "b"]}]
    kinds += [{"type": "array", "items": STRING}, {"type": "boolean"}, {"format": "date"}, {}]
    tools = []
    for i in range(160):
        properties = {f"p{i}_{j}": kind for j, kind in enumerate(kinds)}
        parameters = {"type": "object", "properties": properties, "required": [f"p{i}_1"]}
        tools.append({"name": f"tool_{i}", "parameters": parameters})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constraint = tool_constraint(tokenizer, tools=tools)
    call = (
        '<tool_call>\n{"name": "tool_%d", "arguments": {"p77_4": ["x"], "p77_1": 3}}\n</tool_call>'
    )
    assert allows(constraint, tokenizer, call % 77)
    assert not allows(constraint, tokenizer, call % 78)
    start = time.process_time()
    for _ in range(10):
        tool_constraint(tokenizer, tools=tools)
    assert time.process_time() - start < 3  # each of them would take a second


def test_tools_beyond_the_largest_grammar_may_have_any_arguments(tokenizer):
    def properties(i):
        return {
            f"p{i}_{j}": {
                "type": "object",
                "properties": {f"q{i}_{j}_{k}": {"maxLength": i + k} for k in range(20)},
            }
            for j in range(8)
        }

    tools = [
        {"name": f"tool_{i}", "parameters": {"type": "object", "properties": properties(i)}}
        for i in range(160)
    ]
    with pytest.warns(UserWarning, match="grammar of all tools is too large") as warned:
        constraint = tool_constraint(tokenizer, tools=tools)
    assert len(warned) == 1
    call = '<tool_call>\n{"name": "tool_%d", "arguments": {"x": 3}}\n</tool_call>'
    assert not allows(constraint, tokenizer, call % 0)
    assert allows(constraint, tokenizer, call % 159)


# --- The constraint


def test_forced_tokens_are_allowed_and_lead_to_the_same_texts(tokenizer):
    constraint = tool_constraint(tokenizer, "required")
    saved = 0
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        ids = []
        one = constraint.copy()
        while not one.is_finished:
            forced = one.forced()
            for id in forced:
                assert one.mask()[id]
                one.accept(id)
            saved += len(forced)
            id = random_id(one.mask(), generator)
            ids += forced + ([] if id == STOP else [id])
            if id == STOP:
                break
            one.accept(id)
        assert allows(constraint, tokenizer, text_of(tokenizer, ids), ids)
        assert CALL.search(text_of(tokenizer, ids))
    assert saved > 50
    assert one.forced() == [] or not one.is_finished


def test_forced_tokens_leave_the_border_of_the_last_one_open(tokenizer):
    schema = {
        "type": "object",
        "properties": {"name": {"const": "get_weather"}},
        "required": ["name"],
        "additionalProperties": False,
    }
    constraint = json_constraint(tokenizer, VOCAB_SIZE, schema, one_line=True)
    forced = constraint.forced()
    whole = encode(tokenizer, '{"name": "get_weather"}')
    assert forced == whole  # nothing else can come, and nothing can follow
    # The name's quote may belong to '":', so it is not forced by itself
    constraint = json_constraint(tokenizer, VOCAB_SIZE, schema)
    for id in encode(tokenizer, '{"'):
        constraint.accept(id)
    assert text_of(tokenizer, constraint.forced()) == "name"


def test_rollback_restores_the_masks(tokenizer):
    constraint = tool_constraint(tokenizer)
    ids = encode(tokenizer, f"Well. {PARIS}\n")
    masks = []
    for id in ids:
        masks.append(constraint.mask())
        constraint.accept(id)
    end = constraint.mask()
    for n in (1, 2, 7, len(ids)):
        constraint.rollback(n)
        for i in range(len(ids) - n, len(ids)):
            assert torch.equal(constraint.mask(), masks[i])
            constraint.accept(ids[i])
        assert torch.equal(constraint.mask(), end)
    with pytest.raises(GrammarError, match="cannot roll back"):
        constraint.rollback(len(ids) + 1)
    assert torch.equal(constraint.mask(), end)


def test_rollback_works_after_the_end(tokenizer):
    constraint = json_constraint(tokenizer, VOCAB_SIZE, {"const": True})
    for id in encode(tokenizer, "true"):
        constraint.accept(id)
    assert constraint.is_finished and constraint.accepting
    assert constraint.mask().nonzero().flatten().tolist() == [STOP] and constraint.forced() == []
    constraint.accept(STOP)
    constraint.rollback(2)
    assert not constraint.is_finished and not constraint.accepting and not constraint.mask()[STOP]


def test_a_copy_is_independent(tokenizer):
    constraint = json_constraint(tokenizer, VOCAB_SIZE, {"enum": ["ab", "ac"]})
    constraint.accept(encode(tokenizer, '"')[0])
    before = constraint.mask()
    other = constraint.copy()
    other.accept(encode(tokenizer, "ab")[0])
    assert torch.equal(constraint.mask(), before) and not torch.equal(other.mask(), before)
    other.rollback(2)


def test_a_token_outside_of_the_grammar_is_an_error_and_changes_nothing(tokenizer):
    constraint = json_constraint(tokenizer, VOCAB_SIZE, STRING)
    before = constraint.mask()
    for id in (encode(tokenizer, "{")[0], 0, 1, STOP, 32001, 32031, 32032, -1, 10**12):
        with pytest.raises(GrammarError, match=f"token {id} "):
            constraint.accept(id)
    assert torch.equal(constraint.mask(), before)


def test_characters_without_a_token_are_spelled_in_bytes(tokenizer, small_tokenizer):
    text = '"é日\N{GRINNING FACE}\U0010ffff"'
    for made, vocab_size in ((tokenizer, VOCAB_SIZE), (small_tokenizer, 480)):
        constraint = json_constraint(made, vocab_size, {"const": json.loads(text)})
        ids = encode(made, text)
        assert sum(len(made.token_bytes(id)) == 1 for id in ids) >= 6
        assert allows(constraint, made, text)
        assert walk(constraint, made, 0) == text
        # Half a character is not one
        free = json_constraint(made, vocab_size, STRING)
        for id in ids[:-2]:
            free.accept(id)
        assert not free.mask()[encode(made, '"')[0]]


def test_mistral_gguf_and_sentencepiece_vocabularies_work_alike():
    file = mistral.load(small.DATA / "gguf/q8_0.gguf", sliding_window=None)[1]
    folder = mistral.load(small.DATA / "small")[1]
    constraints = [json_constraint(made, 480, SCHEMAS["object"]) for made in (file, folder)]
    for id in encode(file, '{"a": "é x", "b": 12}'):
        masks = [constraint.mask() for constraint in constraints]
        assert torch.equal(*masks) and masks[0][id] and not masks[0][462:].any()
        for constraint in constraints:
            constraint.accept(id)
    assert all(constraint.is_finished for constraint in constraints)


@pytest.mark.parametrize(
    "name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]
)
def test_every_sentencepiece_vocabulary_of_mistral_works(name):
    made = mistral.Tokenizer((small.TRUE_TOKENIZERS / name).read_bytes())
    constraint = json_constraint(made, made.vocab_size, SCHEMAS["object"])
    assert (
        problem(
            compile_schema(SCHEMAS["object"]), json.loads(walk(constraint, made, 0, words="ab"))
        )
        is None
    )


def test_a_vocabulary_that_cannot_spell_the_answer_is_an_error():
    class Digits(mistral.Tokenizer):
        def token_bytes(self, id):
            return b"%d" % (id - 3) if 3 <= id < 13 else None

    proto = (small.TRUE_TOKENIZERS / "tokenizer.model.v1").read_bytes()
    constraint = json_constraint(Digits(proto), VOCAB_SIZE, {"enum": [12, "12"]})
    assert constraint.mask().sum() == 1
    # What must come is cut by the tokenizer into pieces that this vocabulary does not have.
    assert json_constraint(Digits(proto), VOCAB_SIZE, {"const": 12}).forced() == []
    with pytest.raises(GrammarError, match="cannot spell"):
        json_constraint(Digits(proto), VOCAB_SIZE, STRING).mask()


def test_only_text_and_stop_tokens_are_allowed(tokenizer):
    constraint = tool_constraint(tokenizer)  # any text may come
    allowed = constraint.mask().nonzero().flatten().tolist()
    assert STOP in allowed
    assert len(allowed) > 30_000
    assert all(tokenizer.token_bytes(id) is not None for id in allowed if id != STOP)


def test_stop_tokens_are_the_tokenizers_unless_given(tokenizer):
    constraint = json_constraint(tokenizer, VOCAB_SIZE, INTEGER, stop_tokens=[2, 32001])
    constraint.accept(encode(tokenizer, "1")[0])
    assert constraint.mask()[[2, STOP, 32001]].tolist() == [True, False, True]
    assert not constraint.is_finished
    constraint.accept(2)
    assert constraint.is_finished
    (digit,) = encode(tokenizer, "7")
    assert not json_constraint(tokenizer, VOCAB_SIZE, INTEGER, stop_tokens=[digit]).mask()[digit]
    for wrong in ([], [-1], [VOCAB_SIZE]):
        with pytest.raises(GrammarError, match="stop token"):
            json_constraint(tokenizer, VOCAB_SIZE, INTEGER, stop_tokens=wrong)
    with pytest.raises(GrammarError, match="32002 ids, but the model only 32000"):
        json_constraint(tokenizer, 32000, INTEGER)


def test_masks_are_counted(tokenizer):
    constraint = json_constraint(tokenizer, VOCAB_SIZE, INTEGER)
    for _ in range(3):
        constraint.mask()
    assert constraint.mask_count == 3 and 0 < constraint.mask_seconds < 3
    assert constraint.copy().mask_count == 0


def test_a_vocabulary_is_prepared_once_and_let_go_with_its_tokenizer():
    made = small.true_tokenizer(stop_ids=[STOP])
    constraint = json_constraint(made, VOCAB_SIZE, INTEGER)
    json_constraint(made, VOCAB_SIZE, STRING)
    assert len(token_masks._VOCABULARIES[made]) == 1
    assert len(json_constraint(made, VOCAB_SIZE + 32, STRING).mask()) == VOCAB_SIZE + 32
    assert len(token_masks._VOCABULARIES[made]) == 2
    constraint.accept(encode(made, "1")[0])
    constraint.accept(STOP)
    assert json_constraint(made, VOCAB_SIZE, INTEGER).mask()[encode(made, "-")[0]]
    alive = weakref.ref(made)
    del made
    constraint.forced()
    del constraint
    gc.collect()
    assert alive() is None


def test_the_last_grammars_of_a_vocabulary_are_kept():
    made = mistral.load(small.DATA / "small")[1]
    for number in range(40):
        json_constraint(made, 480, {"const": number})
    (known,) = token_masks._VOCABULARIES[made].values()
    assert len(known.matchers) == 32
    assert "39" in list(known.matchers)[-1]


def test_generate_and_generate_batch_keep_to_the_grammar(small_tokenizer):
    model = mistral.load(small.DATA / "small")[0]
    prompt = small_tokenizer.encode("Answer:")
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "string", "maxLength": 8},
            "b": {
                "type": "array",
                "items": {"minimum": 0, "maximum": 99, **INTEGER},
                "maxItems": 3,
            },
        },
        "required": ["a"],
        "additionalProperties": False,
    }
    constraint = json_constraint(small_tokenizer, model.config.vocab_size, schema)
    sampling = mistral.Sampling(temperature=1.0, seed=0)
    rows = [
        list(
            mistral.generate(
                model, prompt, sampling, max_new_tokens=100, constraint=constraint.copy()
            )
        )
    ]
    constraints = [constraint.copy() for _ in range(2)]
    rows += mistral.generate_batch(
        model, [prompt] * 2, sampling, max_new_tokens=100, constraints=constraints
    )
    for row in rows:
        assert row[-1] in small_tokenizer.stop_ids
        text = text_of(small_tokenizer, row[:-1])
        assert problem(compile_schema(schema), json.loads(text)) is None


def test_a_missing_library_is_an_error_that_names_the_extra(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for make in (
        lambda: json_constraint(tokenizer, VOCAB_SIZE, {}),
        lambda: tool_constraint(tokenizer),
    ):
        with pytest.raises(GrammarError, match=r"llguidance.*\[chat\]"):
            make()


def test_a_copy_of_an_ended_constraint_has_ended(tokenizer):
    constraint = json_constraint(tokenizer, VOCAB_SIZE, {"const": True})
    for id in [*encode(tokenizer, "true"), STOP]:
        constraint.accept(id)
    with pytest.raises(GrammarError, match="the text has ended"):
        constraint.copy().mask()


def test_every_32nd_token_is_in_the_mask(tokenizer):
    """The last bit of a word of llguidance's mask is its sign."""
    constraint = json_constraint(tokenizer, VOCAB_SIZE, STRING)
    constraint.accept(encode(tokenizer, '"')[0])
    mask = constraint.mask()
    assert mask[31:32000:32].sum() > 900
    assert mask[30:32000:32].sum() > 900


def test_bounds_that_meet_leave_one_number(tokenizer):
    for type in ("integer", "number"):
        constraint = json_constraint(
            tokenizer, VOCAB_SIZE, {"type": type, "minimum": 5, "maximum": 5}
        )
        assert allows(constraint, tokenizer, "5")
        assert not any(allows(constraint, tokenizer, text) for text in ("4", "6", "50", "-5"))
        with pytest.raises(GrammarError, match="no value is valid"):
            json_constraint(
                tokenizer, VOCAB_SIZE, {"type": type, "minimum": 5, "exclusiveMaximum": 5}
            )


def test_a_power_of_ten_that_crosses_a_bound_has_no_exponent(tokenizer):
    constraint = json_constraint(tokenizer, VOCAB_SIZE, {"type": "number", "maximum": 50})
    assert allows(constraint, tokenizer, "9e0")
    assert not any(allows(constraint, tokenizer, text) for text in ("9e1", "1e2", "51"))
