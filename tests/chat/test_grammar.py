import gc
import json
import random
import re
import sys
import weakref

import pytest
import small
import torch

import mistral
from mistral.chat.formats.prompts import write_call
from mistral.chat.grammar import (
    GrammarError,
    UnsupportedSchema,
    call_list_constraint,
    json_constraint,
    token_masks,
    tool_call_constraint,
)
from mistral.chat.grammar.bounded_schema import Limits, bounded_schema
from mistral.chat.tools.json_schema import SchemaError, compile_schema, problem

STOP = 32000
VOCAB_SIZE = 32032  # 32001 is a control token, 32002 and on have no token
SHORT = Limits(max_string=8, max_items=3, max_properties=2, max_digits=6, max_depth=2, max_indent=2)
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
REFUSED = {
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": INTEGER},
    "unevaluatedItems": {"type": "array", "unevaluatedItems": False},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 3}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
    "patternProperties": {"type": "object", "patternProperties": {"^x": INTEGER}},
    "minProperties": {"type": "object", "minProperties": 2},
    "if": {"type": "integer", "if": {"minimum": 5}, "then": {"maximum": 7}},
    "not": {"type": "integer", "not": {"minimum": 5}},
    "oneOf": {"oneOf": [INTEGER, {"type": "number"}]},
    "multipleOf": {"type": "number", "multipleOf": 0.01},
    "minimum": {"type": "integer", "minimum": 10**15},
    "maximum": {"type": "number", "maximum": -1e20},
    "enum": {"enum": [1e300]},
    "$dynamicRef": {"$dynamicRef": "#a", "$defs": {"a": {"$dynamicAnchor": "a"}}},
    "$ref": {"$ref": "#a", "$defs": {"a": {"$anchor": "a"}}},
    "$id": {"properties": {"a": {"$id": "http://x/y"}}},
    "anyOf": {"allOf": [{"anyOf": [{"const": i} for i in range(99)]}] * 2},
}


@pytest.fixture(scope="module")
def tokenizer():
    return small.true_tokenizer(stop_ids=[STOP])


@pytest.fixture(scope="module")
def small_tokenizer():
    return mistral.load(small.DATA / "small")[1]


def random_id(mask, generator):
    allowed = mask.nonzero().flatten()
    return allowed[torch.randint(len(allowed), (), generator=generator)].item()


def walk(constraint, tokenizer, seed, budget=400, choose=random_id):
    """The text of tokens drawn evenly from the masks, up to the stop token.

    Every mask is checked on the way.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = []
    never = torch.ones(len(constraint.mask()), dtype=torch.bool)
    never[: tokenizer.vocab_size] = False
    never[list(tokenizer.control_ids - set(tokenizer.stop_ids))] = True
    for _ in range(budget):
        mask = constraint.mask()
        assert not (mask & never).any()
        assert mask[list(tokenizer.stop_ids)].tolist() == [constraint.accepting] * len(
            tokenizer.stop_ids
        )
        id = choose(mask, generator)
        if id in tokenizer.stop_ids:
            return text_of(tokenizer, ids)
        constraint.accept(id)
        ids.append(id)
    raise AssertionError(f"no end: {text_of(tokenizer, ids)!r}")


def text_of(tokenizer, ids):
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


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


def allows_json(tokenizer, schema, value, limits=SHORT):
    return allows(
        json_constraint(tokenizer, VOCAB_SIZE, schema, limits=limits),
        tokenizer,
        json.dumps(value, ensure_ascii=False),
    )


# --- JSON


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_tokens_end_in_valid_json(tokenizer, name):
    constraint = json_constraint(tokenizer, VOCAB_SIZE, SCHEMAS[name], limits=SHORT)
    validator = compile_schema(SCHEMAS[name])
    for seed in range(2):
        text = walk(constraint.copy(), tokenizer, seed)
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
        schema |= choose.choice([{}, {"additionalProperties": made_up(choose, depth - 1)}])
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
            constraint = json_constraint(tokenizer, VOCAB_SIZE, schema, limits=SHORT)
        except (SchemaError, GrammarError):  # a circle of references; no value; or not expressed
            refused += 1
            continue
        text = walk(constraint, tokenizer, seed)
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


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_bounded_schema_allows_only_values_of_the_original(name):
    bounded = compile_schema(bounded_schema(SCHEMAS[name], SHORT))
    original = compile_schema(SCHEMAS[name])
    choose = random.Random(name)
    for _ in range(60):
        value = random_value(choose)
        assert original.is_valid(value) or not bounded.is_valid(value), value


@pytest.mark.parametrize("keyword", REFUSED)
def test_a_keyword_that_the_grammar_cannot_express_is_named(tokenizer, keyword):
    with pytest.raises(UnsupportedSchema, match=re.escape(keyword)) as raised:
        json_constraint(tokenizer, VOCAB_SIZE, REFUSED[keyword])
    assert raised.value.keyword == keyword
    # For values of other types the keyword has no effect
    if keyword in (
        "uniqueItems",
        "contains",
        "propertyNames",
        "dependentRequired",
        "patternProperties",
    ):
        assert allows_json(tokenizer, {**REFUSED[keyword], "type": "boolean"}, True)


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
@pytest.mark.parametrize(
    "pattern", ["(?=a)b", "(a)\\1", "\\bfoo", "[a&&b]", "[[a]]", "a++", "(?x)a b", "a(?!b)"]
)
def test_a_pattern_that_the_grammar_reads_in_another_way_is_refused(tokenizer, pattern):
    with pytest.raises(UnsupportedSchema, match="'pattern'"):
        json_constraint(tokenizer, VOCAB_SIZE, {"type": "string", "pattern": pattern})


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 5, "maximum": 4},
        {"type": "array", "minItems": 2, "maxItems": 1},
        {"type": "array", "minItems": 1, "items": False},
        {"type": "object", "required": ["a"], "properties": {"a": False}},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "string", "pattern": "^a{50}$"},
        {"allOf": [STRING, INTEGER]},
        {"enum": [1], "type": "string"},
        {**NODE, "required": ["next"], "$defs": {"node": {**NODE, "required": ["next"]}}},
    ],
)
def test_a_schema_without_a_valid_value_is_an_error(tokenizer, schema):
    with pytest.raises(GrammarError, match="no value is valid") as raised:
        json_constraint(tokenizer, VOCAB_SIZE, schema, limits=SHORT)
    assert not isinstance(raised.value, UnsupportedSchema) and "\n" not in str(raised.value)


def test_an_empty_reference_does_not_allow_every_value():
    with pytest.raises(UnsupportedSchema, match="does not begin with #/"):
        bounded_schema({"type": "object", "properties": {"a": {}, "b": {"$ref": ""}}}, Limits())


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
    with pytest.raises(UnsupportedSchema, match="minProperties"):
        json_constraint(tokenizer, VOCAB_SIZE, schema)


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
    with pytest.raises(UnsupportedSchema, match="anyOf"):
        json_constraint(tokenizer, VOCAB_SIZE, {"anyOf": [{"minimum": i} for i in range(300)]})


# --- Limits


@pytest.mark.parametrize(
    "schema", [STRING, INTEGER, {"type": "number"}, {"type": "array"}, {"type": "object"}, {}]
)
def test_the_limits_end_every_answer(tokenizer, schema):
    liked = [encode(tokenizer, text)[0] for text in ('"', "9", ".", "a", ",", "[", "{", " ")]

    def insist(mask, generator):
        return next((id for id in liked[1:] + liked[:1] if mask[id]), None) or random_id(
            mask & mask.roll(0), generator
        )

    text = walk(
        json_constraint(tokenizer, VOCAB_SIZE, schema, limits=SHORT), tokenizer, 0, 3000, insist
    )
    assert problem(compile_schema(schema), json.loads(text)) is None


def test_each_limit_holds(tokenizer):
    assert allows_json(tokenizer, STRING, "日" * 8) and not allows_json(tokenizer, STRING, "a" * 9)
    assert allows_json(tokenizer, INTEGER, -999999) and not allows_json(tokenizer, INTEGER, 10**6)
    assert allows_json(tokenizer, {"type": "number"}, 999.123) and not allows_json(
        tokenizer, {"type": "number"}, 1000
    )
    assert not allows_json(tokenizer, {"type": "number"}, 0.1234)
    ints = {"type": "array", "items": INTEGER}
    assert allows_json(tokenizer, ints, [1] * 3) and not allows_json(tokenizer, ints, [1] * 4)
    table = {"type": "object", "additionalProperties": INTEGER}
    assert allows_json(tokenizer, table, {"a" * 8: 1, "b": 2}) and not allows_json(
        tokenizer, table, {"a" * 9: 1}
    )
    assert not allows_json(tokenizer, table, {"a": 1, "b": 2, "c": 3})
    assert allows_json(tokenizer, {}, [{"a": 1}]) and not allows_json(tokenizer, {}, [{"a": []}])
    node = SCHEMAS["recursive"]
    deepest = {"v": 1, "next": {"v": 2, "next": {"v": 3}}}
    assert allows_json(tokenizer, node, deepest) and not allows_json(
        tokenizer, node, {"v": 0, "next": deepest}
    )


def test_a_minimum_of_the_schema_beats_a_limit(tokenizer):
    assert allows_json(tokenizer, {"type": "array", "items": INTEGER, "minItems": 5}, [1] * 5)
    assert allows_json(tokenizer, {"type": "string", "minLength": 20}, "a" * 20)
    assert allows_json(tokenizer, {"type": "integer", "minimum": 5 * 10**9}, 6 * 10**9)
    assert allows_json(tokenizer, {"type": "integer", "maximum": -5 * 10**9}, -6 * 10**9)
    assert allows_json(
        tokenizer, {"type": "array", "prefixItems": [INTEGER] * 5, "minItems": 5}, [1] * 5
    )
    assert allows_json(
        tokenizer,
        {"const": "a string that is longer than others may be"},
        "a string" + " that is longer than others may be",
    )


def test_limits_out_of_range_are_errors():
    for wrong in ({"max_digits": 0}, {"max_digits": 16}, {"max_items": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Limits(**wrong)


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
    }
    constraint = json_constraint(tokenizer, VOCAB_SIZE, schema, limits=Limits(max_indent=0))
    assert allows(constraint, tokenizer, '{"a": [1, 2]}')
    assert not allows(constraint, tokenizer, '{"a":[1, 2]}') and not allows(
        constraint, tokenizer, '{ "a": [1, 2]}'
    )
    assert text_of(tokenizer, constraint.forced()) == '{"a":'


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
CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NOW = '<tool_call>\n{"arguments": {}, "name": "now"}\n</tool_call>'


def tool_constraint(tokenizer, choice="auto", limits=SHORT, tools=TOOLS):
    return tool_call_constraint(tokenizer, VOCAB_SIZE, tools, choice=choice, limits=limits)


@pytest.mark.parametrize("choice", ["required", "add"])
def test_random_tokens_end_in_calls_of_the_tools(tokenizer, choice):
    schemas = {
        tool.get("function", tool)["name"]: tool.get("function", tool)["parameters"]
        for tool in TOOLS
    }
    constraint = tool_constraint(tokenizer, choice)
    first = set()
    for seed in range(8):
        text = walk(constraint.copy(), tokenizer, seed)
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
    assert not allows(constraint, tokenizer, PARIS.replace("Paris", "a city with a long name"))
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
    assert allows(tool_constraint(tokenizer, limits=Limits()), tokenizer, text)


@pytest.mark.parametrize("style", ["json", "tool_use"])
def test_calls_are_allowed_in_the_order_that_each_prompt_asks_for(tokenizer, style):
    text = write_call("get_weather", {"city": "Köln", "unit": "C"}, style)
    for choice in ("auto", "required", "get_weather"):
        assert allows(tool_constraint(tokenizer, choice), tokenizer, text)
    assert not allows(tool_constraint(tokenizer, "now"), tokenizer, text)


def test_required_calls_have_no_text_around_them_and_are_limited(tokenizer):
    constraint = tool_constraint(tokenizer, "required")
    assert allows(constraint, tokenizer, "\n".join([NOW] * 3)) and allows(
        constraint, tokenizer, NOW + PARIS
    )
    for text in ("", "Hello", " " + NOW, NOW + " ", NOW + "\n", "\n".join([NOW] * 4)):
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


@pytest.mark.parametrize("choice", ["auto", "required", "add"])
def test_random_tokens_end_in_a_list_of_calls(tokenizer, choice):
    schemas = {
        tool.get("function", tool)["name"]: tool.get("function", tool)["parameters"]
        for tool in TOOLS
    }
    constraint = call_list_constraint(tokenizer, VOCAB_SIZE, TOOLS, choice=choice, limits=SHORT)
    keys = set()
    for seed in range(8):
        calls = json.loads(walk(constraint.copy(), tokenizer, seed))
        assert 1 <= len(calls) <= SHORT.max_items
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
    unique = {"type": "object", "properties": {"a": REFUSED["uniqueItems"]}}
    with pytest.raises(UnsupportedSchema, match="'add'") as raised:
        tool_constraint(tokenizer, tools=[*TOOLS[:1], {**ADD, "parameters": unique}])
    assert raised.value.keyword == "uniqueItems"


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
    }
    constraint = json_constraint(tokenizer, VOCAB_SIZE, schema, limits=Limits(max_indent=0))
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
    constraints = [
        json_constraint(made, 480, SCHEMAS["object"], limits=SHORT) for made in (file, folder)
    ]
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
    constraint = json_constraint(made, made.vocab_size, SCHEMAS["object"], limits=SHORT)
    assert problem(compile_schema(SCHEMAS["object"]), json.loads(walk(constraint, made, 0))) is None


def test_a_vocabulary_that_cannot_spell_the_answer_is_an_error():
    class Digits(mistral.Tokenizer):
        def token_bytes(self, id):
            return b"%d" % (id - 3) if 3 <= id < 13 else None

    proto = (small.TRUE_TOKENIZERS / "tokenizer.model.v1").read_bytes()
    constraint = json_constraint(Digits(proto), VOCAB_SIZE, {"enum": [12, "12"]})
    assert constraint.mask().sum() == 1
    with pytest.raises(GrammarError, match="cannot spell"):
        json_constraint(Digits(proto), VOCAB_SIZE, STRING).mask()


def test_stop_tokens_are_the_tokenizers_unless_given(tokenizer):
    constraint = json_constraint(tokenizer, VOCAB_SIZE, INTEGER, stop_tokens=[2, 32001])
    constraint.accept(encode(tokenizer, "0")[0])
    assert constraint.mask()[[2, STOP, 32001]].tolist() == [True, False, True]
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
    json_constraint(made, VOCAB_SIZE + 32, STRING)
    assert len(token_masks._VOCABULARIES[made]) == 2
    alive = weakref.ref(made)
    del made
    constraint.forced()
    del constraint
    gc.collect()
    assert alive() is None


def test_generate_and_generate_batch_keep_to_the_grammar(small_tokenizer):
    model = mistral.load(small.DATA / "small")[0]
    prompt = small_tokenizer.encode("Answer:")
    schema = {
        "type": "object",
        "properties": {"a": STRING, "b": {"type": "array", "items": INTEGER}},
        "required": ["a"],
    }
    constraint = json_constraint(small_tokenizer, model.config.vocab_size, schema, limits=SHORT)
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
        assert (
            problem(compile_schema(schema), json.loads(text_of(small_tokenizer, row[:-1]))) is None
        )


def test_a_missing_library_is_an_error_that_names_the_extra(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for make in (
        lambda: json_constraint(tokenizer, VOCAB_SIZE, {}),
        lambda: tool_constraint(tokenizer),
    ):
        with pytest.raises(GrammarError, match=r"llguidance.*\[chat\]"):
            make()
