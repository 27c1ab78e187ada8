"""What all endpoints have in common: keys, limits, clients who leave, the begin and the end."""

import asyncio
import json
import logging
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import small
from openai.types import Model
from prometheus_client.parser import text_string_to_metric_families
from scripted_server import Client, Said
from starlette.testclient import TestClient

import mistral.server
from mistral.server import run
from mistral.server.app import App, Settings

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "Hi"}]}


def error(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_a_key_is_asked_for():
    with Client(settings=Settings(api_key="secret")) as client:
        assert client.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/slots", "/props"):
            assert error(client.get(path), 401)["code"] == "invalid_api_key"
        assert error(client.post(CHAT, json=HI), 401)
        wrong = {"Authorization": "Bearer sécret".encode()}
        assert error(client.post(CHAT, json=HI, headers=wrong), 401)
        body = client.post("/v1/messages", json=HI).json()
        assert body["error"]["type"] == "authentication_error"
        for right in ({"Authorization": "Bearer secret"}, {"x-api-key": "secret"}):
            assert client.post(CHAT, json=HI, headers=right).status_code == 200
        assert not client.worker.answers and len(client.worker.requests) == 2


def test_bodies_are_bounded_and_json():
    with Client(settings=Settings(max_body=2000)) as client:
        large = {"messages": [{"role": "user", "content": "a" * 2000}]}
        assert error(client.post(CHAT, json=large), 413)["code"] == "request_too_large"
        assert (
            client.post("/v1/messages", json=large).json()["error"]["type"] == "request_too_large"
        )
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert error(client.post(CHAT, content=json.dumps(HI), headers=form), 415)
        for body in (
            b"",
            b"[]",
            b"{",
            b'{"n": NaN}',
            b"\xff",
            b'{"messages":' + b"[" * 1500,
            b"1" * 1500,
        ):
            response = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
            assert error(response, 400)["message"], body
        assert not client.worker.requests


def test_paths_and_methods_that_do_not_exist():
    with Client() as client:
        assert error(client.get("/v1/embeddings"), 404)["code"] == "not_found"
        assert error(client.get(CHAT), 405)
        assert client.get("/v1/messages").json()["type"] == "error"
        assert error(client.get("/v1/models/other"), 404)["code"] == "model_not_found"


def test_models_slots_and_props():
    with Client() as client:
        listed = client.get("/v1/models").json()
        assert listed["object"] == "list" and Model.model_validate(listed["data"][0]).id == "tiny"
        assert Model.model_validate(client.get("/v1/models/tiny").json()).id == "tiny"
        theirs = {"anthropic-version": "2023-06-01"}
        one = client.get("/v1/models", headers=theirs).json()["data"][0]
        assert one["type"] == "model" and one["id"] == "tiny" and one["created_at"]
        assert client.get("/slots").json()[0]["state"] == "free"
        assert client.get("/props").json()["max_tokens"] == 4096


def test_metrics_count_requests_and_tokens():
    with Client("Hello", "Hello") as client:
        client.post(CHAT, json=HI)
        client.events(CHAT, HI)
        client.post(CHAT, json={})
        families = text_string_to_metric_families(client.get("/metrics").text)
        values = {
            (sample.name, *sample.labels.values()): sample.value
            for family in families
            for sample in family.samples
        }
        assert values["mistral_requests_total", CHAT, "200"] == 2
        assert values["mistral_requests_total", CHAT, "400"] == 1
        prompts = sum(len(request.prompt_ids) for request in client.worker.requests)
        assert values["mistral_prompt_tokens_total",] == prompts
        assert values["mistral_generated_tokens_total",] == 2 * len(
            client.worker.streams[0].said.ids
        )
        assert values["mistral_answer_seconds_count",] == 2
        assert values["mistral_slots",] == 1 and values["mistral_slots_busy",] == 0


def test_the_log_has_no_contents(caplog):
    caplog.set_level(logging.DEBUG, logger="mistral")
    with Client("Sesame", RuntimeError("boom")) as client:
        client.post(CHAT, json={"messages": [{"role": "user", "content": "Open"}]})
        assert error(client.post(CHAT, json=HI), 500)["code"] == "internal_error"
    assert CHAT in caplog.text and "boom" in caplog.text
    assert "Open" not in caplog.text and "Sesame" not in caplog.text


async def ask(app, body, leave_after):
    """A request over ASGI whose client leaves when so many messages of the reply have come."""
    sent = []
    left = asyncio.Event()
    asked = False

    async def receive():
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        if len(sent) >= leave_after:
            left.set()

    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "headers": [(b"content-type", b"application/json")],
        "query_string": b"",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }
    if not leave_after:
        asyncio.get_running_loop().call_later(0.05, left.set)
    await asyncio.wait_for(app(scope, receive, send), 5)
    return sent


@pytest.mark.parametrize(("stream", "leave_after"), [(True, 3), (False, 0)])
def test_a_client_who_leaves_frees_its_slots(stream, leave_after):
    client = Client(Said("Hello", pause=True), Said("Hello", pause=True))
    client.served.service = client.served._open()
    body = HI | {"stream": stream, "n": 2}
    asyncio.run(ask(client.served.asgi, body, leave_after))
    assert [stream.closed for stream in client.worker.streams] == [True, True]


@contextmanager
def loading(open, **settings):
    """A client of an application that loads with `open`, and its App."""
    app = App(open, Settings(**settings))
    with TestClient(app.asgi) as client:
        yield client, app


def test_while_the_model_loads_the_server_says_so():
    ready = threading.Event()
    ended = Client()

    def open():
        ready.wait(60)
        return ended.served._open()

    with loading(open) as (client, app):
        for path in ("/health", "/v1/models"):
            assert error(client.get(path), 503)["message"] == "the model is loading"
        response = client.post(CHAT, json=HI)
        assert error(response, 503) and response.headers["retry-after"]
        ready.set()
        deadline = time.monotonic() + 60
        while client.get("/health").status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.post(CHAT, json=HI).status_code == 200
        app.is_draining = True
        for path in ("/health", "/v1/models"):
            assert error(client.get(path), 503)["message"] == "the server is shutting down"


def test_a_model_that_cannot_be_loaded():
    def open():
        raise ValueError("no such file")

    with (
        pytest.raises(ValueError, match="no such file"),
        TestClient(App(open, Settings(), wait=True).asgi),
    ):
        pass


def test_pages_of_other_origins_may_call_only_if_they_are_named():
    origin = {"Origin": "http://page.example"}
    with Client() as client:
        assert "access-control-allow-origin" not in client.get("/health", headers=origin).headers
    with Client(settings=Settings(cors_origins=("http://page.example",))) as client:
        headers = client.get("/health", headers=origin).headers
        assert headers["access-control-allow-origin"] == "http://page.example"


def test_the_extra_is_named_if_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(mistral.server, "_EXTRA", ("json", "not_installed"))
    with pytest.raises(ImportError, match=r"not_installed is not installed.*\[serve\]"):
        mistral.server.create_app  # noqa: B018


def test_the_application_of_a_model():
    model = small.model(vocab_size=32032, max_position_embeddings=64)
    app = mistral.server.create_app(model.float(), small.true_tokenizer(), slots=3, name="random")
    with TestClient(app) as client:
        facts = client.get("/props").json()
        assert facts["total_slots"] == 3 and facts["max_tokens"] == 64
        got = client.post(
            "/v1/completions", json={"prompt": "a", "n": 3, "max_tokens": 4, "seed": 1}
        )
        assert [one["index"] for one in got.json()["choices"]] == [0, 1, 2]
        assert got.json()["usage"]["completion_tokens"] == 12
        assert {row["state"] for row in client.get("/slots").json()} == {"free"}


def test_events_are_sent_at_once():
    """Nagle's algorithm would hold the first event of a stream back for 40 ms."""

    async def accepted():
        sockets = asyncio.Queue()

        async def note(reader, writer):
            sockets.put_nowait(writer.get_extra_info("socket"))

        with run._bound("127.0.0.1", 0) as listening:
            async with await asyncio.start_server(note, sock=listening):
                _, writer = await asyncio.open_connection(*listening.getsockname())
                found = await sockets.get()
                at_once = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                writer.close()
                return at_once

    assert asyncio.run(accepted())
