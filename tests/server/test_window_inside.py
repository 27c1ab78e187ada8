"""The window looks inside the model: pages of real runs, next to the slots' own."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import small
import torch
from starlette.testclient import TestClient
from test_window import error

from mistral import Decoder
from mistral.inside import with_own_hooks
from mistral.server.app import App, Settings
from mistral.server.service import Service
from mistral.server.window.window import Window
from mistral.tracing import Recorder

CHAT = [{"role": "user", "content": "Hi </script><b>"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(scope="module")
def model():
    return small.model(vocab_size=32032, max_position_embeddings=1024, sliding_window=64).float()


@pytest.fixture(scope="module")
def client(model):
    def open():
        engine = Decoder(model, 1, slack=16)
        return Service(engine, small.true_tokenizer(), window=Window(model=model))

    app = App(open, Settings(api_key="key"), wait=True)
    with TestClient(app.asgi, base_url="http://127.0.0.1") as made:
        made.headers["Authorization"] = "Bearer key"
        about = made.get("/page/about").json()
        assert about["inside"] is True and about["quantization"] == "float32"
        assert about["bytes"] == 4 * about["parameters"]
        made.headers["X-Page-Token"] = about["token"]
        yield made


def test_a_page_of_a_conversation(client, model):
    response = client.post("/page/inside", json={"messages": CHAT})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/html")
    page = response.text
    assert len(re.findall("</script", page)) == 2 and "<b>" not in page
    # It is kept under a name, for a tab of its own, which has no key; its script has no rights.
    path = response.headers["content-location"]
    kept = client.get(path, headers={"Authorization": ""})
    assert kept.text == page
    for one in (response, kept):
        assert one.headers["content-security-policy"].startswith("sandbox allow-scripts;")
        assert one.headers["x-content-type-options"] == "nosniff"
    assert not any(module._forward_hooks for module in model.modules())


def test_the_last_pages_are_kept(client):
    paths = [
        client.post("/page/inside", json={"messages": CHAT[:1]}).headers["content-location"]
        for _ in range(5)
    ]
    assert error(client.get(paths[0]), 404)
    assert all(client.get(path).status_code == 200 for path in paths[1:])
    assert error(client.get("/page/inside/other"), 404)


def test_what_cannot_be_shown_is_refused(client):
    long = [{"role": "user", "content": "word " * 600}]
    assert (
        "holds 512" in error(client.post("/page/inside", json={"messages": long}), 400)["message"]
    )
    assert error(client.post("/page/inside", json={"messages": []}), 400)
    client.app.state.app.service.inside._is_busy = True
    try:
        assert error(client.post("/page/inside", json={"messages": CHAT}), 429)
    finally:
        client.app.state.app.service.inside._is_busy = False


def test_own_hooks_see_nothing_of_the_engine_and_the_weights_are_shared(model):
    own = with_own_hooks(model)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(own.parameters(), model.parameters()))
    tokens = torch.tensor([[1, 5, 7]])
    with Recorder(own) as trace:
        expected = model(tokens)
        assert not trace.steps
        assert torch.equal(own(tokens), expected)
    assert len(trace.steps) == 1


def test_an_answer_that_is_being_written_does_not_change(client):
    asked = {"prompt": "Once", "max_tokens": 80, "seed": 1}

    def answer():
        return client.post("/v1/completions", json=asked).json()["choices"][0]["text"]

    alone = answer()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(answer)
        pages = 0
        while not writing.done():
            assert client.post("/page/inside", json={"messages": CHAT}).status_code == 200
            pages += 1
        assert writing.result() == alone and pages
