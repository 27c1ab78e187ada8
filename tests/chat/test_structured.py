"""JSON by a schema: prompt, generate, parse, validate, try again."""

import json
from collections.abc import Callable

import pytest
import small
from scripted import TOKENIZER, Scripted

import mistral
from mistral.chat import generate_json
from mistral.chat.formats.prompts import json_prompt
from mistral.chat.grammar import json_constraint
from mistral.chat.structured import JSONError, OutOfTokens, read_schema
from mistral.chat.tools.json_schema import SchemaError

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
        assert set(value) <= {"name", "age"}
        assert isinstance(value["name"], str)


def test_a_schema_without_a_grammar_warns_and_is_only_checked():
    model, tokenizer = mistral.load("demo", device="cpu")
    schema = {
        "type": "object",
        "properties": {"y": {"not": {}}},
        "required": ["y"],
    }  # nothing is valid
    with (
        pytest.warns(UserWarning, match="checked only after it is written"),
        pytest.raises((JSONError, OutOfTokens)),
    ):
        generate_json(model, tokenizer, "Hello!", schema, retries=0, max_new_tokens=20)
