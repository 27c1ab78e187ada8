"""/v1/chat/completions: requests to prompts and constraints, answers to replies and chunks."""

import json

import openai
import pytest
import small
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from scripted import TOKENIZER, call, written
from scripted_server import Client, Said, allows

from mistral.server.slots import QueueFull
from mistral.server.worker import Stopped

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
LISBON = call("weather", city="Lisbon")
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}


def chat(**fields):
    return {"messages": HI, **fields}


def reply(client, **fields):
    return ChatCompletion.model_validate(client.reply(PATH, chat(**fields)))


def chunks(client, **fields):
    return [
        ChatCompletionChunk.model_validate(data) for data in client.chunks(PATH, chat(**fields))
    ]


@pytest.fixture
def client():
    with Client() as made:
        yield made


def test_a_reply(client):
    got = reply(client)
    assert got.object == "chat.completion" and got.model == "tiny"
    assert got.choices[0].message.content == "Hello"
    assert got.choices[0].message.role == "assistant" and not got.choices[0].message.tool_calls
    assert got.choices[0].finish_reason == "stop"
    request = client.worker.requests[0]
    assert got.usage.prompt_tokens == len(request.prompt_ids)
    assert got.usage.completion_tokens == len(written("Hello"))
    assert got.usage.prompt_tokens_details.cached_tokens == 0
    assert TOKENIZER.decode(request.prompt_ids, control=True).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_stream(client):
    got = chunks(client)
    assert got[0].choices[0].delta.role == "assistant"
    assert "".join(one.choices[0].delta.content or "" for one in got) == "Hello"
    assert [one.choices[0].finish_reason for one in got] == [None] * (len(got) - 1) + ["stop"]
    assert len({one.id for one in got}) == 1 and all(one.usage is None for one in got)
    *_, last = chunks(client, stream_options={"include_usage": True})
    assert not last.choices and last.usage.completion_tokens == len(written("Hello"))


def test_calls():
    both = "Wait. " + LISBON + call("now")
    with Client(both, both) as client:
        got = reply(client, tools=[WEATHER, NOW]).choices[0]
        assert got.finish_reason == "tool_calls" and got.message.content == "Wait."
        first, second = got.message.tool_calls
        assert first.id != second.id and first.type == "function"
        assert first.function.name == "weather"
        assert json.loads(first.function.arguments) == {"city": "Lisbon"}
        deltas = [one.choices[0] for one in chunks(client, tools=[WEATHER, NOW])]
        called = [one for delta in deltas for one in delta.delta.tool_calls or ()]
        assert [(one.index, one.type, one.function.name) for one in called] == [
            (0, "function", "weather"),
            (1, "function", "now"),
        ]
        assert all(one.id and isinstance(one.function.arguments, str) for one in called)
        assert deltas[-1].finish_reason == "tool_calls"


def test_the_answer_that_a_clients_stream_has_put_together_can_be_sent_back():
    with Client(LISBON, "Sunny.", "Sunny.") as client:
        api = openai.OpenAI(api_key="x", base_url="http://testserver/v1", http_client=client)
        said = dict(model="tiny", tools=[WEATHER])
        with api.chat.completions.stream(messages=HI, **said) as stream:
            message = stream.get_final_completion().choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "17"}
        answer = message.model_dump()  # as JavaScript's client sends it
        assert "parsed" in answer and "parsed_arguments" in answer["tool_calls"][0]["function"]
        for sent in (message, answer):
            api.chat.completions.create(messages=[*HI, sent, result], **said)
        prompts = [request.prompt_ids for request in client.worker.requests]
    assert prompts[1] == prompts[2]


def test_numbers_reach_the_client_with_all_their_digits():
    digits = '{"city": 1.000000000000000000000001}'
    text = f'<tool_call>\n{{"name": "weather", "arguments": {digits}}}\n</tool_call>'
    with Client(text) as client:
        calls = reply(client, tools=[WEATHER]).choices[0].message.tool_calls
        assert calls[0].function.arguments == digits


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_off_is_text(stream):
    cut = LISBON[:30]
    with Client(Said(cut, "length")) as client:
        if stream:
            got = [one.choices[0] for one in chunks(client, tools=[WEATHER])]
            text = "".join(one.delta.content or "" for one in got)
        else:
            got = [reply(client, tools=[WEATHER]).choices[0]]
            text = got[0].message.content
        assert text == cut and got[-1].finish_reason == "length"


def test_a_call_before_the_end_of_a_cut_answer_is_a_call():
    with Client(Said(LISBON + " And", "length", cached=3)) as client:
        got = reply(client, tools=[WEATHER])
        assert got.choices[0].message.tool_calls and got.choices[0].finish_reason == "length"
        assert got.usage.prompt_tokens_details.cached_tokens == 3


def test_a_spelled_end_of_turn_ends_text_and_not_json():
    text = '"All done<|im_end|> more"'
    with Client(text, text) as client:
        assert reply(client).choices[0].message.content == '"All done'
        format = {"type": "json_schema", "json_schema": {"schema": {"type": "string"}}}
        assert reply(client, response_format=format).choices[0].message.content == text


@pytest.mark.parametrize(
    ("fields", "allowed", "forbidden"),
    [
        ({}, ["Hi", LISBON, f"Hi {LISBON}", LISBON + LISBON], []),
        ({"tool_choice": "none"}, ["Hi"], [LISBON]),
        ({"tool_choice": "required"}, [LISBON, call("now"), LISBON + call("now")], ["Hi", ""]),
        (
            {"tool_choice": {"type": "function", "function": {"name": "now"}}},
            [call("now")],
            [LISBON, call("now") + call("now")],
        ),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "auto",
                        "tools": [{"type": "function", "function": {"name": "now"}}],
                    },
                }
            },
            ["Hi", call("now")],
            [LISBON],
        ),
        ({"parallel_tool_calls": False}, ["Hi", LISBON], [LISBON + LISBON]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [LISBON], [LISBON + LISBON]),
    ],
)
def test_choices_of_tools_are_held_by_a_grammar(client, fields, allowed, forbidden):
    reply(client, tools=[WEATHER, NOW], **fields)
    request = client.worker.requests[0]
    assert b"weather" in bytes(TOKENIZER.decode(request.prompt_ids), "utf-8")
    for text in allowed:
        assert allows(request, text), text
    for text in forbidden:
        assert not allows(request, text), text


def schema_format(**more):
    return {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT, **more}}


def test_response_formats_are_held_by_a_grammar(client):
    formats = [{"type": "text"}, {"type": "json_object"}, schema_format()]
    for format in formats:
        client.worker.answers.append('{"x": 1}')
        got = reply(client, response_format=format)
        assert got.choices[0].message.content == '{"x": 1}'
    text, an_object, point = client.worker.requests
    assert [allows(one, "Hi") for one in (text, an_object, point)] == [True, False, False]
    assert [allows(one, '{"y": 1}') for one in (text, an_object, point)] == [True, True, False]
    assert all(allows(one, '{"x": 1}') for one in (text, an_object, point))
    # The model reads a schema that is given.
    read = [TOKENIZER.decode(one.prompt_ids).count('"x"') for one in (text, an_object, point)]
    assert read == [0, 0, 2]


def test_what_strict_clients_refuse_is_not_offered(client):
    # Both are valid for the schema: an integer as 2.0, and a property that it does not name.
    at = {"type": "object", "properties": {"x": {"type": "integer"}}}
    parameters = {"type": "object", "properties": {"at": at}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    format = {"type": "json_schema", "json_schema": {"name": "p", "schema": parameters}}
    client.worker.answers += ['{"at": {}}', "Hi"]
    reply(client, response_format=format)
    reply(client, tools=[tool])
    answer, calls = client.worker.requests
    for arguments, offered in (
        ('{"at": {"x": 2}}', True),
        ('{"at": {"x": 2.0}}', False),
        ('{"at": {"x": 2, "y": 3}}', False),
        ('{"at": {}, "y": 3}', False),
    ):
        assert allows(answer, arguments) == offered, arguments
        assert allows(calls, call("f", **json.loads(arguments))) == offered, arguments


def test_calls_in_mistrals_own_form():
    proto = (small.TRUE_TOKENIZERS / "mistral_instruct_tokenizer_240323.model.v3").read_bytes()
    v3 = small.mistral.Tokenizer(proto)
    begin = [v3.control_id("[TOOL_CALLS]")]
    digits = '{"city": 1.00000000000000000001}'
    calls = f'[{{"name": "weather", "arguments": {digits}, "id": "abcdefghi"}}]'
    said = [*begin, *v3.encode(calls, bos=False), v3.eos_id]
    number = [*v3.encode("[1]", bos=False), v3.eos_id]
    list_of_numbers = {"type": "json_schema", "json_schema": {"schema": {"type": "array"}}}
    with Client(said, said, number, tokenizer=v3) as client:
        for fields in ({}, {"response_format": list_of_numbers}):
            got = reply(client, tools=[WEATHER], **fields).choices[0]
            (called,) = got.message.tool_calls
            assert called.id == "abcdefghi" and called.function.arguments == digits
            assert got.message.content is None and got.finish_reason == "tool_calls"
            assert client.worker.requests[-1].constraint.mask()[begin[0]]
        got = reply(client, tools=[WEATHER], response_format=list_of_numbers).choices[0]
        assert got.message.content == "[1]" and got.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_with_tools_and_a_schema_is_a_call_or_json(stream):
    tag = "{\"x\": \"<tool_call>{'name': 'weather', 'arguments': {}}</tool_call>\"}"
    either = dict(tools=[WEATHER], response_format=schema_format())
    with Client(LISBON, tag) as client:
        if not stream:
            called, text = (reply(client, **either).choices[0] for _ in range(2))
            assert called.message.tool_calls and text.message.content == tag
        else:
            called, text = ([one.choices[0] for one in chunks(client, **either)] for _ in range(2))
            assert any(one.delta.tool_calls for one in called)
            assert "".join(one.delta.content or "" for one in text) == tag
        request = client.worker.requests[0]
        assert allows(request, LISBON) and allows(request, '{"x": 1}')
        assert not allows(request, "Hi") and not allows(request, '{"y": 1}')


def test_a_strict_answer_that_is_not_valid_is_an_error():
    with Client(*['{"x": "1"}'] * 3) as client:
        assert reply(client, response_format=schema_format()).choices[0].message.content
        strict = chat(response_format=schema_format(strict=True))
        response = client.post(PATH, json=strict)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "invalid_answer"
        assert client.events(PATH, strict)[-1][1]["error"]["code"] == "invalid_answer"


def test_several_answers_have_seeds_of_their_own():
    with Client("One", "Two", "Three") as client:
        got = reply(client, n=3, seed=-1)
        assert [one.message.content for one in got.choices] == ["One", "Two", "Three"]
        assert [one.index for one in got.choices] == [0, 1, 2]
        seeds = [one.sampling.seed for one in client.worker.requests]
        assert seeds == [2**64 - 1, 0, 1]
        assert got.usage.prompt_tokens == len(client.worker.requests[0].prompt_ids)
        assert got.usage.completion_tokens == sum(map(len, map(written, ("One", "Two", "Three"))))
        client.worker.answers += ["One", "Two"]
        streamed = {0: "", 1: ""}
        for one in chunks(client, n=2):
            streamed[one.choices[0].index] += one.choices[0].delta.content or ""
        assert streamed == {0: "One", 1: "Two"}
        first, second = client.worker.requests[-2:]
        assert first.sampling.seed != second.sampling.seed  # without one: a random one


def test_several_answers_have_constraints_of_their_own(client):
    reply(client, n=2, tools=[WEATHER], tool_choice="required")
    first, second = (request.constraint for request in client.worker.requests)
    first.accept(first.forced()[0])
    assert first.forced() != second.forced()


def test_options_become_a_sampling(client):
    options = dict(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, typical_p=0.8)
    options |= dict(repetition_penalty=1.1, no_repeat_ngram_size=4)
    options |= dict(frequency_penalty=-0.5, presence_penalty=1, logit_bias=())
    reply(client, **options | {"logit_bias": {}}, max_tokens=9)
    request = client.worker.requests[0]
    assert {name: getattr(request.sampling, name) for name in options} == options
    assert request.max_new_tokens == 9
    reply(client, max_completion_tokens=8)
    assert client.worker.requests[1].max_new_tokens == 8
    reply(client)
    reply(client, logit_bias={"7": -100, "5": 1.5})
    assert client.worker.requests[3].sampling.logit_bias == ((5, 1.5), (7, -100))
    everything = client.worker.requests[2]
    assert everything.max_new_tokens == 4096 - len(everything.prompt_ids)
    assert everything.sampling.temperature == 1


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_the_tokens_of_the_text(stream):
    with Client("One two. Three") as client:
        fields = dict(logprobs=True, top_logprobs=2, stop=[". "])
        if stream:
            got = [one.choices[0] for one in chunks(client, **fields)]
            tokens = [token for one in got if one.logprobs for token in one.logprobs.content]
        else:
            tokens = reply(client, **fields).choices[0].logprobs.content
        assert "".join(token.token for token in tokens) == "One two"
        assert b"".join(map(bytes, (token.bytes for token in tokens))) == b"One two"
        assert [len(token.top_logprobs) for token in tokens] == [2] * len(tokens)
        assert tokens[0].logprob == -0.5 and tokens[0].top_logprobs[1].logprob == -9999
    with Client("Hi é") as client:
        got = reply(client, logprobs=True).choices[0]
        assert b"".join(map(bytes, (one.bytes for one in got.logprobs.content))) == "Hi é".encode()
        assert not got.logprobs.content[0].top_logprobs
        assert reply(client).choices[0].logprobs is None


@pytest.mark.parametrize("stop", ["two", ["x", "two"]])
def test_stop_strings(stop):
    paused = Said("One two three", pause=True)
    with Client(paused, Said("One two three", at_once=True)) as client:
        for _ in range(2):  # however many tokens come at a time
            got = reply(client, stop=stop)
            assert got.choices[0].message.content == "One "
            assert got.choices[0].finish_reason == "stop"
            assert got.usage.completion_tokens == len(written("One two", end=False))
            assert client.worker.streams[-1].closed  # the slot is free


def test_an_error_in_the_middle_of_a_stream_is_an_event():
    broken = Said("Hel", "error", ValueError("row 0: the logits are NaN"))
    with Client(broken, broken, Said("Hel", "error", RuntimeError("secret"))) as client:
        *_, (_, last) = client.events(PATH, chat())
        assert last["error"]["type"] == "server_error" and "NaN" in last["error"]["message"]
        api = openai.OpenAI(api_key="x", base_url="http://testserver/v1", http_client=client)
        with pytest.raises(openai.APIError, match="NaN"):
            for _ in api.chat.completions.create(model="x", messages=HI, stream=True):
                pass
        response = client.post(PATH, json=chat())
        assert response.status_code == 500 and "secret" not in response.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_and_a_server_that_ends_are_errors_before_the_stream(stream):
    with Client(QueueFull("9"), "One", QueueFull("9"), Stopped("the end")) as client:
        response = client.post(PATH, json=chat(stream=stream))
        assert response.status_code == 429 and response.headers["retry-after"]
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        # Of two answers the second has no place: the first is cancelled.
        assert client.post(PATH, json=chat(n=2)).status_code == 429
        assert client.worker.streams[0].closed
        response = client.post(PATH, json=chat(n=66))  # a slot, and a queue of 64
        assert response.status_code == 400 and response.json()["error"]["param"] == "n"
        assert client.post(PATH, json=chat()).status_code == 503


BAD = [
    ({"messages": []}, "messages", None),
    ({"messages": "Hi"}, "messages", "invalid_value"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "king", "content": "Hi"}]}, "messages", None),
    ({"messages": [{"role": "user"}]}, "messages", None),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", None),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", None),
    ({"messages": [{"role": "user", "content": "x", "error": "y"}]}, "messages[0].error", "unknown_parameter"),
    ({"foo": 1}, "foo", "unknown_parameter"),
    ({"temperature": "hot"}, "temperature", "invalid_value"),
    ({"temperature": -1}, "temperature", "invalid_value"),
    ({"temperature": True}, "temperature", "invalid_value"),
    ({"top_p": 2}, "top_p", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 1000}, "n", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", None),
    ({"top_logprobs": 2}, "top_logprobs", None),
    ({"stream_options": {"include_usage": True}}, "stream_options", None),
    ({"stream": False, "stream_options": {}}, "stream_options", None),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"stop": [""]}, "stop", "invalid_value"),
    ({"seed": 1.5}, "seed", "invalid_value"),
    ({"functions": []}, "functions", "unsupported_parameter"),
    ({"logit_bias": {"1_0": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"32032": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5": "1"}}, "logit_bias", "invalid_value"),
    ({"frequency_penalty": 101}, "frequency_penalty", "invalid_value"),
    ({"tool_choice": "required"}, "tool_choice", None),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", None),
    ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}}, "tool_choice", None),
    ({"tools": [WEATHER, WEATHER]}, "tools", None),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].custom", "unknown_parameter"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools", "invalid_schema"),
    ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format", None),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}}}, "response_format", "invalid_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": []}}}}, "response_format", "invalid_schema"),
]  # fmt: skip


def test_a_bad_request_is_400_and_names_its_field(client):
    for fields, param, code in BAD:
        response = client.post(
            PATH,
            content=json.dumps(chat() | fields),
            headers={"Content-Type": "application/json"},
        )
        error = response.json()["error"]
        assert response.status_code == 400, (fields, error)
        assert error.keys() == {"message", "type", "param", "code"}
        assert (error["param"], error["code"]) == (param, code), (fields, error)
        assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
    assert not client.worker.requests


def test_a_prompt_that_leaves_no_room_has_the_code_that_clients_look_for():
    with Client(limit=20) as client:
        api = openai.OpenAI(api_key="x", base_url="http://testserver/v1", http_client=client)
        with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
            api.chat.completions.create(
                model="x", messages=[{"role": "user", "content": "a " * 30}]
            )
        assert caught.value.code == "context_length_exceeded"
        for count, status in ((19, 200), (20, 400)):
            body = {"prompt": [5] * count}
            assert client.post("/v1/completions", json=body).status_code == status
