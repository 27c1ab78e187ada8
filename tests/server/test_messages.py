"""/v1/messages: Anthropic's API."""

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter
from scripted import TOKENIZER, call
from scripted_server import Client, Said

PATH = "/v1/messages"
HI = [{"role": "user", "content": "Hi"}]
EVENTS = TypeAdapter(RawMessageStreamEvent)
TOOL = {
    "name": "weather",
    "description": "The weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
LISBON = call("weather", city="Lisbon")


def reply(client, **fields):
    body = {"messages": HI, "max_tokens": 50} | fields
    return Message.model_validate(client.reply(PATH, body))


def events(client, **fields):
    found = []
    for name, data in client.events(PATH, {"messages": HI, "max_tokens": 50} | fields):
        assert name == data["type"]
        found.append(EVENTS.validate_python(data))
    return found


def read(client, n=-1):
    return TOKENIZER.decode(client.worker.requests[n].prompt_ids, control=True)


@pytest.fixture
def client():
    with Client() as made:
        yield made


def test_a_reply(client):
    got = reply(client, system=[{"type": "text", "text": "Be brief."}], temperature=0.5, top_k=3)
    assert got.content[0].text == "Hello" and got.stop_reason == "end_turn"
    request = client.worker.requests[0]
    assert got.usage.input_tokens == len(request.prompt_ids)
    assert request.sampling.temperature == 0.5 and request.sampling.top_k == 3
    assert request.max_new_tokens == 50
    assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>" in read(client)


def test_a_stream_of_text_and_calls():
    with Client("Wait. " + LISBON + " Done") as client:
        got = events(client, tools=[TOOL])
        assert got[0].type == "message_start" and got[-1].type == "message_stop"
        assert got[-2].delta.stop_reason == "tool_use" and got[-2].usage.output_tokens
        starts = [one for one in got if one.type == "content_block_start"]
        assert [one.content_block.type for one in starts] == ["text", "tool_use", "text"]
        assert [one.index for one in starts] == [0, 1, 2]
        assert [one.index for one in got if one.type == "content_block_stop"] == [0, 1, 2]
        deltas = [one.delta for one in got if one.type == "content_block_delta"]
        assert "".join(one.text for one in deltas if one.type == "text_delta") == "Wait.\nDone"
        assert [one.partial_json for one in deltas if one.type == "input_json_delta"] == [
            '{"city": "Lisbon"}'
        ]


def test_the_client_gets_calls_and_sends_results():
    with Client(LISBON, "Sunny", LISBON) as client:
        api = anthropic.Anthropic(api_key="x", base_url="http://testserver", http_client=client)
        said = dict(model="x", max_tokens=50, tools=[TOOL])
        first = api.messages.create(messages=HI, **said)
        use = first.content[0]
        assert first.stop_reason == "tool_use" and use.input == {"city": "Lisbon"}
        results = [{"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}]
        results.append({"type": "text", "text": "And?"})
        answered = [*HI, {"role": "assistant", "content": first.content}]
        asked = [*answered, {"role": "user", "content": results}]
        with api.messages.stream(messages=asked, **said) as stream:
            assert "".join(stream.text_stream) == "Sunny"
        assert '{"name": "weather", "content": "sunny"}' in read(client)
        assert read(client).endswith("<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n")
        failed = [{"type": "tool_result", "tool_use_id": use.id, "content": "no", "is_error": True}]
        api.messages.create(messages=[*answered, {"role": "user", "content": failed}], **said)
        assert '"sunny"' not in read(client) and "no" in read(client)
        count = api.messages.count_tokens(model="x", messages=asked, tools=[TOOL])
        assert count.input_tokens == len(client.worker.requests[1].prompt_ids)


def test_stop_sequences_and_limits():
    with Client(Said("One two", pause=True), Said("Hel", "length"), "One") as client:
        got = reply(client, stop_sequences=["x", "two"])
        assert (got.stop_reason, got.stop_sequence) == ("stop_sequence", "two")
        assert got.content[0].text == "One "
        assert reply(client).stop_reason == "max_tokens"
        assert reply(client, stop_sequences=["x"]).stop_reason == "end_turn"


def test_usage_counts_cached_tokens_apart():
    with Client(Said("Hello", cached=3)) as client:
        usage = reply(client).usage
        assert usage.cache_read_input_tokens == 3 and usage.cache_creation_input_tokens == 0
        assert usage.input_tokens == len(client.worker.requests[0].prompt_ids) - 3


def test_choices_are_held_by_a_grammar(client):
    for choice, may_end in [
        ({"type": "any"}, False),
        ({"type": "tool", "name": "weather", "disable_parallel_tool_use": True}, False),
        ({"type": "auto"}, True),
        ({"type": "none"}, True),
    ]:
        reply(client, tools=[TOOL], tool_choice=choice)
        assert client.worker.requests[-1].constraint.accepting == may_end
    format = {"type": "json_schema", "schema": {"type": "integer"}}
    client.worker.answers += ["12", "no"]
    assert reply(client, output_config={"format": format}).content[0].text == "12"
    body = {"messages": HI, "max_tokens": 5, "output_config": {"format": format}}
    assert client.post(PATH, json=body).status_code == 500


def test_errors_have_anthropics_form():
    with Client(Said("Hel", "error", ValueError("NaN"))) as client:
        api = anthropic.Anthropic(
            api_key="x", base_url="http://testserver", http_client=client, max_retries=0
        )
        stream = api.messages.stream(model="x", max_tokens=5, messages=HI)
        with pytest.raises(anthropic.APIStatusError, match="NaN"), stream as events_of_it:
            events_of_it.get_final_message()
        image = [{"type": "image"}]
        result = {"type": "tool_result", "tool_use_id": "a", "content": "b"}
        for fields in (
            {"max_tokens": 0},
            {"messages": []},
            {"messages": [*HI, {"role": "assistant", "content": "So"}]},
            {"messages": [{"role": "user", "content": image}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]},
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "content": image}]}
                ]
            },
            {"messages": [{"role": "system", "content": "x"}]},
            {"messages": [{"role": "user", "content": []}, *HI]},
            {
                "messages": [
                    *HI,
                    {"role": "user", "content": [{"type": "text", "text": "So"}, result]},
                ]
            },
            {"container": "x"},
            {"foo": 1},
        ):
            response = client.post(PATH, json={"messages": HI, "max_tokens": 5} | fields)
            assert response.status_code == 400, fields
            assert response.json()["type"] == "error"
            assert response.json()["error"]["type"] == "invalid_request_error"
