"""A real model behind the endpoints, asked by the official clients; and the script that serves."""

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import small
import torch
from starlette.testclient import TestClient

import mistral
from mistral.chat import Conversation, tool
from mistral.server import create_app

QUESTION = "How many miles are 42 kilometers?"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@tool
def miles(kilometers: float) -> float:
    """Convert a length from kilometers to miles.

    Args:
        kilometers: The length in kilometers.
    """
    return round(kilometers / 1.609344, 3)


@pytest.fixture(scope="module")
def demo():
    return mistral.load("demo", device="cpu")


@pytest.fixture(scope="module")
def api(demo):
    with TestClient(create_app(*demo, slots=3, name="demo")) as http:
        yield openai.OpenAI(api_key="x", base_url="http://testserver/v1", http_client=http)


def test_a_conversation_with_a_tool_is_the_same_as_without_a_server(demo, api):
    conversation = Conversation(*demo, tools=[miles])
    *_, end = conversation.say(QUESTION)
    said = dict(model="demo", temperature=0, tools=[miles.schema()])
    messages = [{"role": "user", "content": QUESTION}]
    first = api.chat.completions.create(messages=messages, **said).choices[0].message
    (call,) = first.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "miles" and arguments == {"kilometers": 42}
    result = json.dumps(miles(**arguments))
    messages += [first, {"role": "tool", "tool_call_id": call.id, "content": result}]
    with api.chat.completions.stream(messages=messages, **said) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        whole = stream.get_final_completion()
    assert text == whole.choices[0].message.content == conversation.messages[-1]["content"]
    again = api.chat.completions.create(messages=messages, **said)
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


def test_answers_do_not_depend_on_their_company(api):
    def ask(seed):
        messages = [{"role": "user", "content": f"Tell me about {seed}."}]
        got = api.chat.completions.create(
            model="demo", messages=messages, seed=seed, max_tokens=12, logprobs=True
        )
        return [token.token for token in got.choices[0].logprobs.content]

    alone = [ask(seed) for seed in range(5)]
    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(ask, range(5))) == alone


def test_json_is_valid_for_its_schema_at_any_temperature(api):
    format = {"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": PERSON}}
    for seed in range(3):
        got = api.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Invent a person."}],
            temperature=1.5,
            seed=seed,
            max_tokens=100,
            response_format=format,
        ).choices[0]
        if got.finish_reason == "stop":
            assert json.loads(got.message.content).keys() == {"name", "age"}
        else:
            assert got.finish_reason == "length"


def test_the_log_probabilities_of_a_prompt_are_those_of_a_forward_pass(demo, api):
    model, tokenizer = demo
    prompt = "The result is 42."
    ids = tokenizer.encode(prompt)
    expected = model(torch.tensor([ids]))[0].log_softmax(dim=-1)  # [T, V]
    asked = dict(model="demo", echo=True, logprobs=1, max_tokens=1, temperature=0)
    for given, text in (([prompt] * 2, prompt), (ids, f"<s>{prompt}")):
        got = api.completions.create(prompt=given, **asked)
        for choice in got.choices:
            logprobs = choice.logprobs
            assert choice.text.startswith(text)
            assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
            assert len(logprobs.tokens) == len(ids) + 1  # one more: even if it ends the answer
            assert logprobs.text_offset[-1] == len(text) and len(logprobs.text_offset) == 1 + len(
                ids
            )
            for t, id in enumerate(ids[1:]):
                found = logprobs.token_logprobs[t + 1]
                assert found == pytest.approx(expected[t, id].item(), abs=1e-4)
                best = max(logprobs.top_logprobs[t + 1].values())
                assert best == pytest.approx(expected[t].max().item(), abs=1e-4)
        assert got.usage.prompt_tokens == len(ids) * len(got.choices)
        assert got.usage.completion_tokens == len(got.choices)


@pytest.fixture
def process():
    """scripts/serve.py with the demo: (its process, its address)."""
    options = (
        "--port",
        "0",
        "--slots",
        "1",
        "--engine",
        "eager",
    )  # numba would compile for seconds
    command = [sys.executable, "scripts/serve.py", "demo", *options]
    environment = os.environ | {
        "MISTRAL_API_KEY": "secret",
        "PYTHONPATH": f"{small.ROOT}:{small.ROOT}/kernels",
    }
    started = subprocess.Popen(
        command, cwd=small.ROOT, stderr=subprocess.PIPE, text=True, env=environment
    )
    lines = iter(started.stderr.readline, "")
    address = next(
        found[1] for line in lines if (found := re.search(r"serving at (http:\S+)", line))
    )
    try:
        yield started, address
    finally:
        started.kill()
        started.wait()
        started.stderr.close()


def test_the_script_serves_and_lets_a_request_finish_when_it_is_told_to_end(process):
    started, address = process
    api = openai.OpenAI(api_key="secret", base_url=f"{address}/v1", max_retries=20)
    messages = [{"role": "user", "content": "Numbers"}]
    digit = {"type": "integer", "minimum": 0, "maximum": 9}  # no draw makes a number without end
    schema = {"type": "array", "items": digit, "minItems": 9, "maxItems": 9}
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    # While the model loads, the server says 503, and the client tries again.
    stream = api.chat.completions.create(
        model="demo", messages=messages, response_format=format, stream=True
    )
    text = ""
    for n, chunk in enumerate(stream):
        text += chunk.choices[0].delta.content or ""
        if n == 3:
            started.send_signal(signal.SIGTERM)
    assert len(json.loads(text)) == 9
    assert started.wait(20) == 0
    rest = started.stderr.read()
    assert "SIGTERM" in rest and "Traceback" not in rest and "Numbers" not in rest
