"""JSON by a schema: prompt, generate, parse, validate, try again."""

import json
from collections.abc import Callable

import pytest
import small
import torch
from scripted import TOKENIZER, Scripted

import mistral
from mistral.chat import generate_json
from mistral.chat.formats.prompts import json_prompt
from mistral.chat.grammar import GrammarError, json_constraint
from mistral.chat.structured import JSONError, OutOfTokens, read_schema
from mistral.chat.tools.json_schema import SchemaError, compile_schema

V3 = mistral.Tokenizer(
    (small.TRUE_TOKENIZERS / "mistral_instruct_tokenizer_240323.model.v3").read_bytes()
)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}


def ask(*answers, schema=SCHEMA, **options):
    engine = Scripted(*answers)
    return engine, generate_json(
        engine, TOKENIZER, "Ada, 36", schema, **{"grammar": False, **options}
    )


def test_a_valid_answer_is_returned_at_once():
    engine, value = ask('{"name": "Ada 日本", "age": 36}')
    assert value == {"name": "Ada 日本", "age": 36}
    prompt = TOKENIZER.decode(engine.reads[0], control=True)
    assert json_prompt(SCHEMA) in prompt
    assert prompt.count("<s>") == 1


def test_a_conversation_is_answered_and_its_system_message_follows_the_schema():
    told = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Ada"},
        {"role": "assistant", "content": "How old?"},
        {"role": "user", "content": "36"},
    ]
    engine = Scripted('{"name": "Ada", "age": 36}')
    assert generate_json(engine, TOKENIZER, told, SCHEMA, grammar=False)["age"] == 36
    text = TOKENIZER.decode(engine.reads[0], control=True)
    assert f"{json_prompt(SCHEMA)}\n\nBe brief.<|im_end|>" in text
    assert "How old?<|im_end|>" in text
    assert text.endswith("36<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_start|>system") == 1
    for wrong in ([], told[:3], [{"role": "tool", "content": "x"}], {"role": "user"}):
        with pytest.raises(ValueError):
            generate_json(Scripted("{}"), TOKENIZER, wrong, SCHEMA, grammar=False)


def test_a_wrong_answer_is_shown_with_its_error_and_corrected():
    engine, value = ask('{"age": "old"}', "no json", '{"name": "Ada"}')
    assert value == {"name": "Ada"}
    text = TOKENIZER.decode(engine.ids, control=True)
    assert '{"age": "old"}<|im_end|>\n<|im_start|>tool\n<tool_response>\n' in text
    assert "Json schema validation failed" in text
    assert "the answer is not valid JSON" in text
    assert len(engine.reads[1]) < len(engine.reads[0])  # only what is new is read


def test_when_tries_run_out_the_error_has_the_last_answer():
    with pytest.raises(JSONError, match="no valid answer in 2 attempts") as caught:
        ask("[1]", "[2]", retries=1)
    assert (caught.value.text, caught.value.attempts) == ("[2]", 2)


def test_running_out_of_tokens_is_an_error_of_its_own_with_the_partial_text():
    with pytest.raises(OutOfTokens, match="not complete after 4 tokens") as caught:
        ask('{"name": "Ada"}', max_new_tokens=4)
    assert caught.value.text
    assert '{"name": "Ada"}'.startswith(caught.value.text)


def test_the_first_token_of_json_may_have_the_leading_space_of_a_format_that_begins_a_text():
    pytest.importorskip("llguidance")
    [with_space], [without] = (
        V3.encode("{", bos=False, prefix_space=space)[:1] for space in (True, False)
    )
    assert with_space != without
    for strip_leading_space in (True, False):
        constraint = json_constraint(
            V3, V3.vocab_size, SCHEMA, strip_leading_space=strip_leading_space
        )
        mask = constraint.mask()
        assert (mask[with_space].item(), mask[without].item()) == (strip_leading_space, True)
    constraint = json_constraint(V3, V3.vocab_size, SCHEMA, strip_leading_space=True)
    for id in V3.encode('{"name": "Ada"}', bos=False):
        assert constraint.mask()[id]
        constraint.accept(id)


def test_a_schema_may_be_a_file_or_a_pydantic_model(tmp_path):
    pydantic = pytest.importorskip("pydantic")

    class Person(pydantic.BaseModel):
        name: str
        age: int = pydantic.Field(ge=0)

        @pydantic.field_validator("name")
        @classmethod
        def is_short(cls, name):
            if len(name) > 5:
                raise ValueError("too long a name")
            return name

    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    assert ask('{"name": "Ada"}', schema=path)[1] == {"name": "Ada"}
    engine, person = ask(
        '{"name": "Ada Lovelace", "age": 1}', '{"name": "Ada", "age": 36}', schema=Person
    )
    assert person == Person(name="Ada", age=36)
    assert "too long a name" in TOKENIZER.decode(engine.reads[1])


def test_a_pydantic_model_without_a_schema_is_refused():
    pydantic = pytest.importorskip("pydantic")

    class Greeter(pydantic.BaseModel):
        greet: Callable[[], str]

    with pytest.raises(SchemaError, match="Greeter has no JSON schema"):
        ask("{}", schema=Greeter)


def test_an_invalid_schema_is_refused(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    for schema, words in (
        ({"type": "strin"}, "strin"),
        (3, "int"),
        (tmp_path / "bad.json", "not valid JSON"),
        (tmp_path / "none.json", "cannot be read"),
        (int, "pydantic"),
    ):
        with pytest.raises(SchemaError, match=words):
            ask("{}", schema=schema)
    with pytest.raises(SchemaError):
        read_schema("[1]")


def test_an_engine_is_emptied_first():
    engine = Scripted('{"name": "A"}', '{"name": "B"}')
    assert generate_json(engine, TOKENIZER, "A", SCHEMA, grammar=False) == {"name": "A"}
    assert generate_json(engine, TOKENIZER, "B", SCHEMA, grammar=False) == {"name": "B"}
    assert engine.ids.count(TOKENIZER.bos_id) == 1


def test_under_a_grammar_the_demo_answers_validly_even_at_a_high_temperature():
    model, tokenizer = mistral.load("demo", device="cpu")
    for seed in range(4):
        value = generate_json(
            model,
            tokenizer,
            "Anything",
            SCHEMA,
            sampling=mistral.Sampling(temperature=1.5, seed=seed),
            retries=0,
        )
        assert isinstance(value["name"], str)  # other properties are valid, too
        assert isinstance(value.get("age", 0), int)


def test_a_keyword_without_a_grammar_warns_and_is_only_checked():
    schema = {"type": "array", "items": {"const": 1}, "uniqueItems": True, "minItems": 2}
    model, tokenizer = mistral.load("demo", device="cpu")
    with (
        pytest.warns(UserWarning, match="leaves 'uniqueItems' to the check") as warned,
        pytest.raises((JSONError, OutOfTokens)),
    ):
        generate_json(model, tokenizer, "Hello!", schema, retries=0, max_new_tokens=20)
    assert len(warned) == 1


def test_a_schema_that_no_value_is_valid_for_is_an_error():
    schema = {"type": "object", "properties": {"y": {"not": {}}}, "required": ["y"]}
    with pytest.raises(GrammarError, match="no value is valid"):
        ask("{}", schema=schema, grammar=True)


@pytest.mark.parametrize(
    "text",
    [
        '```json\n{"name": "Ada", "age": 36}\n```',
        'Here you are:\n{"name": "Ada", "age": 36}',
        '{"name": "Ada", "age": 36}\n\nLet me know if you need more.',
        "{'name': 'Ada', 'age': 36}",
        '<schema>\n{"name": "Ada", "age": 36.0}\n</schema>',
        '{"name": "Ada", "age": 36,}',
    ],
)
def test_json_in_other_clothes_is_an_answer(text):
    value = ask(text, retries=0)[1]
    assert value == {"name": "Ada", "age": 36} and isinstance(value["age"], int)


@pytest.mark.parametrize(
    "text", ['{"name": "Ada", "name": "Eve"}', '{"name": "A"} {"name": "B"}', ""]
)
def test_an_answer_that_would_lose_a_value_is_wrong(text):
    with pytest.raises(JSONError, match="occurs twice|not valid JSON"):
        ask(text, retries=0)


@pytest.mark.parametrize("schema", [{"type": "string"}, {"type": "array"}, {"type": "number"}])
def test_max_new_tokens_ends_every_answer_with_a_named_error_and_its_text(schema):
    torch.manual_seed(0)
    model, tokenizer = mistral.load("demo", device="cpu")
    noise = mistral.Mistral(model.config)
    for seed in range(3):
        sampling = mistral.Sampling(temperature=1.0, seed=seed)
        try:
            value = generate_json(
                noise, tokenizer, "Go", schema, sampling=sampling, max_new_tokens=12, retries=0
            )
        except OutOfTokens as error:
            assert error.text
        else:
            assert compile_schema(schema).is_valid(value)
