"""Our server next to llama-server, on the same GGUF files: ids, greedy answers, status codes."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx2
import pytest
import real_model
import real_texts
import torch
from benchmark_parts.llama_server import LlamaServer
from starlette.testclient import TestClient

import mistral
import mistral.demo
from mistral.checkpoints.gguf_export import export
from mistral.server import create_app
from mistral.server.protocol.tokens_as_text import token_text

pytest.importorskip("xllamacpp")

SLOTS = 4
ROOM = 1024  # tokens of a slot
MANY_SLOTS = 16  # for many short answers: a step of 16 rows takes little longer than one of 4
SHORT_ROOM = 64
NEAR_TIE = 1e-2  # of logits that are up to 40: the servers add in different orders
DEMO = Path(mistral.demo.__file__).parent / "demo.gguf"
FILES = {"demo": DEMO, "smollm2": real_model.PATH}
SMOLLM2 = pytest.param("smollm2", marks=[pytest.mark.slow, real_model.needs_it])


@contextmanager
def servers(model, tokenizer, path, slots=SLOTS, room=ROOM):
    """(a client of our server, a client of llama-server)."""
    app = create_app(model, tokenizer, slots=slots, max_tokens=room)
    with (
        LlamaServer(path, slots=slots, room=room, exact=True) as server,
        TestClient(app) as ours,
        httpx2.Client(base_url=server.address, timeout=120) as theirs,
    ):
        yield ours, theirs


@pytest.fixture(scope="module")
def demo():
    return mistral.load("demo", device="cpu", sliding_window=None)


@pytest.fixture(scope="module")
def on_demo(demo):
    with servers(*demo, DEMO) as clients:
        yield clients


def reply(client, path, body):
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def check_tokenize(ours, theirs, texts):
    """Compare the ids of texts, each with one of the four pairs of flags; and the texts of ids."""
    for n, text in enumerate(texts):
        body = {"content": text, "parse_special": bool(n & 1), "add_special": bool(n & 2)}
        found = reply(ours, "/tokenize", body)["tokens"]
        assert found == reply(theirs, "/tokenize", body)["tokens"], body
        if not n & 3 and "\u2581" not in text:
            back = reply(ours, "/detokenize", {"tokens": found})["content"]
            spaced = reply(ours, "/detokenize", {"tokens": found, "after_text": True})["content"]
            assert back == text
            # Theirs keeps the space that they put before a text.
            assert spaced == reply(theirs, "/detokenize", {"tokens": found})["content"]


def test_tokenize_gives_llama_servers_ids(on_demo):
    check_tokenize(*on_demo, real_texts.texts()[::19])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", SMOLLM2])
def test_tokenize_gives_llama_servers_ids_of_200_texts(name):
    pair = mistral.load(FILES[name], device="cpu", sliding_window=None)
    with servers(*pair, FILES[name]) as clients:
        check_tokenize(*clients, real_texts.texts())


def test_greedy_ids_are_llama_servers(demo, tmp_path):
    print(greedy("demo", demo, tmp_path, range(0, 200, 20), new=6))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", SMOLLM2])
def test_greedy_ids_are_llama_servers_on_200_prompts(name, tmp_path):
    pair = mistral.load(FILES[name], device="cpu", dtype=torch.float32, sliding_window=None)
    print(greedy(name, pair, tmp_path, range(200), new=4))


def greedy(name, pair, folder, which, new):
    """Compare the greedy answers to the begins of some texts; returns a line about them.

    llama.cpp gets the values of the file in float32: it multiplies packed blocks with activations
    of 8 bits, which moves logits by up to 1.
    """
    model, tokenizer = pair
    path = folder / f"{name}.gguf"
    export(model, tokenizer, path, "F32")
    texts = real_texts.texts()
    prompts = [tokenizer.encode(texts[i] or "An", bos=tokenizer.adds_bos)[:8] for i in which]
    with (
        servers(model, tokenizer, path, MANY_SLOTS, SHORT_ROOM) as clients,
        ThreadPoolExecutor(MANY_SLOTS) as pool,
    ):
        # First all of ours, then all of theirs: each server answers many at a time.
        ours, theirs = (
            list(pool.map(partial(ask, client, new=new), prompts))
            for ask, client in zip((ask_ours, ask_theirs), clients)
        )
    results = [compare(tokenizer, *pair, new) for pair in zip(ours, theirs)]
    gaps = sorted(gap for _, gap in results if gap is not None)
    line = (
        f"{name}: {sum(count for count, _ in results)} equal tokens in {len(prompts)} answers; "
        f"{len(gaps)} diverge, where our best two are {[round(gap, 4) for gap in gaps]} apart"
    )
    assert all(gap < NEAR_TIE for gap in gaps), line
    assert len(gaps) < len(prompts) / 10, line
    return line


def ask_ours(client, prompt, new):
    body = {"prompt": prompt, "temperature": 0, "max_tokens": new, "logprobs": 2}
    return reply(client, "/v1/completions", body)["choices"][0]


def ask_theirs(client, prompt, new):
    body = {"prompt": prompt, "temperature": 0, "n_predict": new}
    body |= {"return_tokens": True, "cache_prompt": False}
    return reply(client, "/completion", body)["tokens"]


def compare(tokenizer, choice, expected, new):
    """(equal tokens, our gap between the two best where the answers diverge, or None)."""
    got = choice["logprobs"]
    spelled = [token_text(tokenizer, id) for id in expected]
    assert choice["finish_reason"] == "stop" or len(got["tokens"]) == new
    for t, (token, text) in enumerate(zip(got["tokens"], spelled)):
        best, second, *_ = sorted(got["top_logprobs"][t].values(), reverse=True)
        if token != text:
            return t, best - second
    return min(len(got["tokens"]), len(spelled)), None


CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
LONG = "word " * 6000
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "g"}}
SPAM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "spam"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


def said(*messages):
    return {"messages": list(messages)}


def user(content):
    return said({"role": "user", "content": content})


# Both servers refuse these with the same status.
SAME = [
    *((400, path, body) for path in (CHAT, TEXT) for body in (b"{", b"", b"[]", b"\xff", {})),
    (400, CHAT, {"messages": "Hi"}),
    (400, CHAT, {"messages": None}),
    (400, CHAT, said("Hi")),
    (400, CHAT, said({"role": "user"})),
    (400, CHAT, user(3)),
    (400, CHAT, user([{"type": "video"}])),
    (400, CHAT, user(LONG)),
    *(
        (400, CHAT, {"messages": HI, **wrong})
        for wrong in (
            {"temperature": "hot"},
            {"top_p": "x"},
            {"max_tokens": "many"},
            {"max_tokens": -5},
            {"n": 0},
            {"n": "2"},
            {"stream": "yes"},
            {"seed": "x"},
            {"tools": [TOOL], "tool_choice": "never"},
            {"response_format": {"type": "xml"}},
            {"response_format": {"type": "json_schema"}},
            {"response_format": SPAM},
            {"top_logprobs": 3},
        )
    ),
    *((400, TEXT, {"prompt": wrong}) for wrong in (None, 3, [], [1, 10**6], [-1], [1, 1.5], {})),
    (400, TEXT, {"prompt": LONG}),
    (400, TEXT, {"prompt": "Hi", "logprobs": "x"}),
    (400, TEXT, {"prompt": "Hi", "stop": [1]}),
    (400, TEXT, {"prompt": "Hi", "n": 0}),
    (400, "/tokenize", {"content": 3}),
    (400, "/detokenize", {"tokens": "x"}),
    (400, "/v1/responses", {}),
    (400, "/v1/responses", {"input": 3}),
    (400, "/v1/responses", {"input": "Hi", "previous_response_id": "resp_x"}),
    (404, "/v1/nothing", {}),
]

# (our status, theirs, path, body, why ours is another)
A_FAULT_OF_THE_CLIENT = "the client's fault, so not a 500"
NOTHING_SILENT = "nothing that a request says is ignored"
OTHERS = [
    (400, 500, CHAT, said({"content": "Hi"}), A_FAULT_OF_THE_CLIENT),
    (400, 500, CHAT, user([IMAGE]), A_FAULT_OF_THE_CLIENT),
    (400, 500, CHAT, user([{"type": "text"}]), A_FAULT_OF_THE_CLIENT),
    (400, 500, CHAT, {"messages": HI, "tools": "f"}, A_FAULT_OF_THE_CLIENT),
    (400, 500, CHAT, {"messages": HI, "tools": [{"type": "function"}]}, A_FAULT_OF_THE_CLIENT),
    (400, 500, "/detokenize", {"tokens": [10**6]}, A_FAULT_OF_THE_CLIENT),
    (400, 500, "/v1/messages", {}, A_FAULT_OF_THE_CLIENT),
    (400, 500, "/v1/messages/count_tokens", {}, A_FAULT_OF_THE_CLIENT),
    (400, 200, CHAT, {"messages": HI, "stop": 3}, NOTHING_SILENT),
    (400, 200, CHAT, {"messages": HI, "logit_bias": 3}, NOTHING_SILENT),
    (400, 200, CHAT, {"messages": HI, "response_format": "json"}, NOTHING_SILENT),
    (400, 200, CHAT, {"messages": HI, "tool_choice": "required"}, "there is nothing to call"),
    (400, 200, CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": OTHER}, "no such tool"),
    (400, 200, CHAT, {"messages": HI, "temperature": -1}, "OpenAI refuses it"),
    (400, 200, CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 99}, "OpenAI refuses it"),
    (400, 200, CHAT, said(), "OpenAI refuses a conversation without a message"),
    (400, 200, CHAT, said({"role": "king", "content": "Hi"}), "the role would become a token"),
    (400, 200, TEXT, {"prompt": "Hi", "logprobs": -1}, NOTHING_SILENT),
    (400, 200, "/tokenize", {}, "there is no text"),
    (400, 200, "/detokenize", {}, "there are no tokens"),
    (400, 200, "/v1/messages", {"messages": HI}, "Anthropic requires max_tokens"),
    (400, 200, "/v1/messages", {"messages": "x", "max_tokens": 2}, NOTHING_SILENT),
    (400, 200, "/v1/messages", {"messages": HI, "max_tokens": 2, "tools": "x"}, NOTHING_SILENT),
]


def test_bad_requests_get_llama_servers_status_or_another_for_a_reason(on_demo):
    cases = [(status, status, path, body) for status, path, body in SAME]
    cases += [case[:4] for case in OTHERS]
    assert len(cases) >= 60
    for *expected, path, body in cases:
        if isinstance(body, dict) and path in (CHAT, TEXT):
            body = {"max_tokens": 2} | body  # for a server that answers
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        got = [client.post(path, content=content, headers=headers) for client in on_demo]
        assert [response.status_code for response in got] == expected, (path, body)
        assert got[0].json()["error"]["message"]
