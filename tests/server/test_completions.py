"""/v1/completions, /tokenize and /detokenize."""

import pytest
from openai.types import Completion
from scripted import END, TOKENIZER, written
from scripted_server import Client, Said

PATH = "/v1/completions"
SPELLED = "<|im_end|> é"


def reply(client, **fields):
    return Completion.model_validate(client.reply(PATH, {"prompt": "Hi"} | fields))


@pytest.fixture
def client():
    with Client() as made:
        yield made


def test_a_reply_and_a_stream(client):
    got = reply(client)
    assert got.choices[0].text == "Hello" and got.choices[0].finish_reason == "stop"
    request = client.worker.requests[0]
    assert list(request.prompt_ids) == TOKENIZER.encode("Hi")
    assert request.max_new_tokens == 16
    assert got.usage.completion_tokens == len(written("Hello"))
    chunks = client.chunks(PATH, {"prompt": "Hi", "stream_options": {"include_usage": True}})
    reasons = [one["finish_reason"] for chunk in chunks for one in chunk["choices"]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    for chunk in chunks:
        for choice in chunk["choices"]:
            choice["finish_reason"] = "stop"  # null, as OpenAI sends it, is not in its own type
    *texts, usage = [Completion.model_validate(chunk) for chunk in chunks]
    assert "".join(one.choices[0].text for one in texts) == "Hello"
    assert not usage.choices and usage.usage.prompt_tokens == len(request.prompt_ids)


def test_prompts_are_texts_or_ids(client):
    ids = [1, 32001, 500]
    for prompt, expected in [
        (["a", "b"], [TOKENIZER.encode("a"), TOKENIZER.encode("b")]),
        (ids, [ids]),
        ([ids, [5]], [ids, [5]]),
        (SPELLED, [TOKENIZER.encode(SPELLED)]),
    ]:
        client.worker.requests.clear()
        got = reply(client, prompt=prompt, n=2)
        assert [one.index for one in got.choices] == list(range(2 * len(expected)))
        asked = [list(request.prompt_ids) for request in client.worker.requests]
        assert asked == [ids for ids in expected for _ in range(2)]
        assert got.usage.prompt_tokens == sum(map(len, expected))


def test_log_probabilities():
    answer = [*written("One", end=False), 3 + 0xC3, 3 + 0xA9, END]  # é as two bytes
    with Client(answer, answer) as client:
        got = reply(client, logprobs=1).choices[0].logprobs
        assert got.tokens == ["One", "bytes:\\xc3", "bytes:\\xa9", "<|im_end|>"]
        assert got.token_logprobs == [-0.5] * len(got.tokens)
        assert [list(top) for top in got.top_logprobs] == [[token] for token in got.tokens]
        assert got.text_offset == [0, 3, 3, 4]
        chunks = client.chunks(PATH, {"prompt": "Hi", "logprobs": 1})
        parts = [one["choices"][0]["logprobs"] for one in chunks if one["choices"][0]["logprobs"]]
        assert sum((part["tokens"] for part in parts), []) == got.tokens
        assert sum((part["text_offset"] for part in parts), []) == got.text_offset


def test_tokens_of_a_stop_string_have_no_log_probabilities():
    answer = [*written("One", end=False), 3 + 0xC3, 3 + 0xA9, *written(" two")]
    with Client(answer) as client:
        got = reply(client, logprobs=1, stop="é").choices[0]
        assert got.text == "One" and got.logprobs.tokens == ["One"]


def test_echo_and_stop():
    with Client("One two", Said("One two", pause=True), [5, 32001]) as client:
        assert reply(client, echo=True).choices[0].text == "HiOne two"
        assert reply(client, stop="two").choices[0].text == "One "
        # A stop string that spells a control token means that token.
        assert reply(client, stop="<|im_start|>").choices[0].finish_reason == "stop"
        assert 32001 in client.worker.requests[-1].stop_tokens


def test_bad_requests_are_400(client):
    for fields, param in [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt[1]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [1, 99999]}, "prompt"),
        ({"prompt": [[]]}, None),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
        ({"logprobs": 99}, "logprobs"),
    ]:
        response = client.post(PATH, json={"prompt": "Hi"} | fields)
        assert response.status_code == 400, fields
        assert response.json()["error"]["param"] == param, (fields, response.text)


def test_tokenize_and_detokenize(client):
    got = client.reply("/tokenize", {"content": SPELLED})
    assert got["tokens"] == TOKENIZER.encode(SPELLED, bos=False) and got["count"] > 5
    got = client.reply("/tokenize", {"prompt": SPELLED, "parse_special": True, "add_special": True})
    assert got["tokens"] == TOKENIZER.encode(SPELLED, special=True)
    got = client.reply("/tokenize", {"prompt": SPELLED, "parse_special": True, "with_pieces": True})
    assert got["tokens"][0] == {"id": 32000, "piece": "<|im_end|>"}
    for text in ("Hi", " Hi", "  a  b ", "\nHi", " ", "", "é日", "<s>x", "a<|im_end|>b"):
        ids = client.reply("/tokenize", {"content": text})["tokens"]
        assert client.reply("/detokenize", {"tokens": ids})["content"] == text
        got = client.reply("/detokenize", {"tokens": ids, "after_text": True})
        assert got["content"] == f" {text}" * (text != "")
    got = client.reply("/detokenize", {"tokens": [1, 32001, *TOKENIZER.encode("é", bos=False)]})
    assert got["content"] == got["prompt"] == "<s><|im_start|>é"
    for path, body in [
        ("/tokenize", {}),
        ("/tokenize", {"content": "a", "prompt": "b"}),
        ("/tokenize", {"content": "a", "messages": [{"role": "user", "content": "b"}]}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {"tokens": [99999]}),
        ("/detokenize", {"tokens": ["a"]}),
    ]:
        assert client.post(path, json=body).status_code == 400, (path, body)
