"""/v1/responses."""

import json

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from scripted import TOKENIZER, call
from scripted_server import Client, Said, allows

from mistral.server.protocol.errors import ApiError
from mistral.server.protocol.responses import Stored

PATH = "/v1/responses"
EVENTS = TypeAdapter(ResponseStreamEvent)
TOOL = {
    "type": "function",
    "name": "weather",
    "description": "The weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
LISBON = call("weather", city="Lisbon")


def reply(client, **fields):
    return Response.model_validate(client.reply(PATH, {"input": "Hi"} | fields))


def events(client, **fields):
    found = []
    for n, (name, data) in enumerate(client.events(PATH, {"input": "Hi"} | fields)):
        assert name == data["type"] and data["sequence_number"] == n
        found.append(EVENTS.validate_python(data))
    return found


def read(client, n=-1):
    """The prompt of a request."""
    return TOKENIZER.decode(client.worker.requests[n].prompt_ids, control=True)


@pytest.fixture
def client():
    with Client() as made:
        yield made


def test_a_reply(client):
    got = reply(client, instructions="Be brief.", metadata={"a": "b"}, temperature=0.5)
    assert got.output_text == "Hello" and got.status == "completed"
    assert got.usage.output_tokens and got.usage.input_tokens == len(
        client.worker.requests[0].prompt_ids
    )
    assert got.metadata == {"a": "b"} and got.instructions == "Be brief."
    assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>" in read(client)
    assert client.worker.requests[0].sampling.temperature == 0.5


def test_a_stream_of_text_and_calls():
    with Client("Wait. " + LISBON + " Done") as client:
        got = events(client, tools=[TOOL])
        kinds = [one.type.removeprefix("response.") for one in got]
        assert kinds[:2] == ["created", "in_progress"] and kinds[-1] == "completed"
        assert [one for one in kinds if "delta" not in one][2:-1] == [
            "output_item.added",
            "content_part.added",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "output_item.added",
            "function_call_arguments.done",
            "output_item.done",
            "output_item.added",
            "content_part.added",
            "output_text.done",
            "content_part.done",
            "output_item.done",
        ]
        text = "".join(one.delta for one in got if one.type == "response.output_text.delta")
        assert text == "Wait.\nDone"
        output = got[-1].response.output
        assert [item.type for item in output] == ["message", "function_call", "message"]
        assert json.loads(output[1].arguments) == {"city": "Lisbon"}
        assert [one.item for one in got if one.type == "response.output_item.done"] == output


def test_a_conversation_continues_by_its_id():
    with Client(LISBON, "Sunny", "Bye", "Bye") as client:
        first = reply(client, tools=[TOOL], instructions="Be brief.")
        result = {"type": "function_call_output", "call_id": first.output[0].call_id}
        result["output"] = "sunny"
        second = reply(client, input=[result], previous_response_id=first.id, tools=[TOOL])
        assert second.output_text == "Sunny" and second.previous_response_id == first.id
        assert "Be brief." not in read(client)  # instructions are those of one request
        assert '{"city": "Lisbon"}' in read(client) and '"content": "sunny"' in read(client)
        events(client, input="Thanks", previous_response_id=second.id, store=False)
        assert "Sunny<|im_end|>\n<|im_start|>user\nThanks<|im_end|>" in read(client)
        # The same conversation, sent whole.
        items = [{"role": "user", "content": "Hi"}, *_items(first), result, *_items(second)]
        reply(client, input=[*items, {"role": "user", "content": "Thanks"}])
        assert read(client) == read(client, -2)


def _items(response):
    return [item.model_dump(exclude_none=True) for item in response.output]


def test_what_was_not_stored_cannot_be_continued(client):
    for id in ("resp_x", reply(client, store=False).id):
        response = client.post(PATH, json={"input": "Hi", "previous_response_id": id})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "previous_response_not_found"


def test_the_oldest_responses_are_forgotten(client):
    stored = Stored(capacity=1000)
    message = {"role": "user", "content": "a" * 300}
    for n in range(20):
        stored.put(f"r{n}", [message])
    assert stored.get("r19") == [message] and stored.get(None) == []
    with pytest.raises(ApiError, match="r0"):
        stored.get("r0")
    assert 500 < stored._size == sum(size for _, size in stored._messages.values()) <= 1000


def test_choices_and_formats(client):
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    format = {"type": "json_schema", "name": "point", "schema": schema, "strict": True}
    client.worker.answers += ['{"x": 1}', LISBON, LISBON]
    assert reply(client, text={"format": format}).output_text == '{"x": 1}'
    assert not client.worker.requests[-1].constraint.accepting
    for choice in ("required", {"type": "function", "name": "weather"}):
        got = reply(client, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
        assert got.output[0].type == "function_call" and got.parallel_tool_calls is False
        assert not client.worker.requests[-1].constraint.accepting
    # A function that is named is called once.
    client.worker.answers += [LISBON, LISBON]
    for choice, twice in (("required", True), ({"type": "function", "name": "weather"}, False)):
        reply(client, tools=[TOOL], tool_choice=choice)
        assert allows(client.worker.requests[-1], LISBON + LISBON) is twice
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}  # fmt: skip
    assert reply(client, tools=[TOOL], tool_choice=allowed).output_text == "Hello"


def test_an_answer_that_is_cut_off_is_incomplete():
    with Client(Said("Hel", "length"), Said("Hel", "length")) as client:
        got = reply(client)
        assert got.status == "incomplete" and got.output_text == "Hel"
        assert got.incomplete_details.reason == "max_output_tokens"
        assert got.output[0].status == "incomplete"
        assert events(client)[-1].type == "response.incomplete"


def test_log_probabilities(client):
    fields = dict(include=["message.output_text.logprobs"], top_logprobs=1)
    part = reply(client, **fields).output[0].content[0]
    assert "".join(one.token for one in part.logprobs) == "Hello"
    deltas = [one for one in events(client, **fields) if one.type == "response.output_text.delta"]
    assert "".join(one.token for delta in deltas for one in delta.logprobs) == "Hello"


def test_log_probabilities_belong_to_their_text_streamed_or_not():
    said = "A < B. " + LISBON + " Done"  # "<" is held back: it might begin a call
    fields = dict(include=["message.output_text.logprobs"], tools=[TOOL])
    with Client(said, said) as client:
        whole = reply(client, **fields).output
        streamed = events(client, **fields)[-1].response.output
    spelled = []
    for output in (whole, streamed):
        parts = [item.content[0] for item in output if item.type == "message"]
        spelled.append(["".join(one.token for one in part.logprobs) for part in parts])
    assert spelled == [["A < B.", " Done"]] * 2


def test_an_error_in_the_middle_of_a_stream_is_raised_by_the_client():
    with Client(*[Said("Hel", "error", ValueError("NaN"))] * 2) as client:
        last = events(client)[-1]
        assert last.type == "error" and last.message == "NaN"
        api = openai.OpenAI(api_key="x", base_url="http://testserver/v1", http_client=client)
        with pytest.raises(openai.APIError, match="NaN"):
            for _ in api.responses.create(model="x", input="Hi", stream=True):
                pass


def test_bad_requests_are_400(client):
    for fields, param in [
        ({"input": []}, "messages"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": "x", "foo": 1}]}, "input"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "messages"),
        ({"background": True}, "background"),
        ({"conversation": "x"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ]:
        response = client.post(PATH, json={"input": "Hi"} | fields)
        assert response.status_code == 400, fields
        assert response.json()["error"]["param"] == param, (fields, response.text)
