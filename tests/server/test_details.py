"""How tokens were found: recorded for those who ask, and for nobody else."""

import asyncio
import json

import pytest
import small
import torch
from scripted_server import Client
from starlette.testclient import TestClient
from test_slots import GREEDY, Pattern, finish, model, prompt, request  # noqa: F401

from mistral import Decoder
from mistral.server import Slots, watch
from mistral.server.app import App, Settings
from mistral.server.service import Service
from mistral.server.watch import Passes
from mistral.server.window import run as live
from mistral.server.window.window import Window

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def counted(monkeypatch):
    """How often log-probabilities and clocks were asked for."""
    counts = {"log_softmax": 0, "clock": 0}
    log_softmax = torch.Tensor.log_softmax
    clock = watch.time.perf_counter

    class Clock:
        @staticmethod
        def perf_counter():
            counts["clock"] += 1
            return clock()

    def counting(*args, **options):
        counts["log_softmax"] += 1
        return log_softmax(*args, **options)

    monkeypatch.setattr(torch.Tensor, "log_softmax", counting)
    monkeypatch.setattr(watch, "time", Clock)
    return counts


def passes_and_slots(model, rows=2, **options):  # noqa: F811
    passes = Passes()
    return passes, Slots(Decoder(model, rows), chunk=8, watch=passes, **options)


def test_without_details_nothing_is_computed(model, counted):  # noqa: F811
    passes, slots = passes_and_slots(model)
    run = slots.submit(request(prompt(20), constraint=Pattern()))
    finish(slots, run)
    assert counted == {"log_softmax": 0, "clock": 0}
    assert not run.forwards and passes.last is None and not passes.recorded


def test_details_change_no_ids_and_ask_for_no_forced_ones(model, counted):  # noqa: F811
    constraints = [Pattern(), Pattern()]
    _, slots = passes_and_slots(model)
    plain = slots.submit(request(prompt(20), n=12, constraint=constraints[0]))
    expected = finish(slots, plain)[0]
    _, slots = passes_and_slots(model)
    detailed = slots.submit(request(prompt(20), n=12, constraint=constraints[1], alternatives=3))
    while slots.turn():
        pass
    tokens = detailed.take()
    assert [token.id for token in tokens] == expected
    assert constraints[0].asked == constraints[1].asked
    # 1. Probabilities of those that were sampled, and of no others.
    sampled = [token for token in tokens if token.origin == "sampled"]
    forced = [token for token in tokens if token.origin == "forced"]
    assert sampled and forced and counted["log_softmax"] == len(sampled)
    assert all(token.logprob is None and not token.top for token in forced)
    assert all(token.logprob < 0 and len(token.top) == 3 for token in sampled)
    # 2. Forward passes: the prompt in chunks, steps, and forced ids together.
    kinds = {one.n: one.kind for one in detailed.forwards}
    assert [kinds[token.forward] for token in tokens] == [
        {"sampled": "step"}.get(token.origin, "forced") for token in tokens
    ]
    assert [one.tokens for one in detailed.forwards if one.kind == "prompt"] == [8, 8, 4]
    assert all(one.seconds >= 0 for one in detailed.forwards)
    assert not plain.forwards


def test_the_probability_is_that_of_the_model(model):  # noqa: F811
    _, slots = passes_and_slots(model)
    ids = prompt(9)
    run = slots.submit(request(ids, n=1, alternatives=2))
    while run.state != "ended":
        slots.turn()
    token = run.take()[0]
    expected = model(torch.tensor([ids]))[0, -1].log_softmax(dim=-1)
    assert token.logprob == pytest.approx(expected[token.id].item(), abs=1e-4)
    assert [id for id, _ in token.top] == expected.topk(2).indices.tolist()


def test_while_somebody_listens_every_pass_is_recorded(model, counted):  # noqa: F811
    passes, slots = passes_and_slots(model)
    passes.listeners = 1
    run = slots.submit(request(prompt(20), n=3))
    finish(slots, run)
    assert passes.recorded == 3 + 3 and passes.last.kind == "step"
    assert counted["log_softmax"] == 0 and not run.forwards


# The endpoint


@pytest.fixture(scope="module")
def served():
    """A client of a random model with two slots."""
    random = small.model(vocab_size=32032, max_position_embeddings=256, sliding_window=32).float()

    def open():
        engine = Decoder(random, 2, slack=16)
        return Service(engine, small.true_tokenizer(), window=Window(model=random))

    app = App(open, Settings(), wait=True)
    with TestClient(app.asgi, base_url="http://127.0.0.1:8000") as client:
        client.served = app
        yield client


def chunks(client, **fields):
    response = client.post(CHAT, json=HI | {"stream": True} | fields)
    assert response.status_code == 200, response.text
    lines = response.text.strip().split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_details_in_a_stream(served):
    fields = dict(max_tokens=40, temperature=0)
    got = chunks(served, details=True, **fields)
    details = [one["details"] for one in got if "details" in one]
    tokens = [token for one in details for token in one.get("tokens", ())]
    forwards = [forward for one in details for forward in one.get("forwards", ())]
    # 1. The prompt.
    first = details[0]["prompt"]
    asked = served.post("/tokenize", json=HI | {"with_pieces": True}).json()["tokens"]
    assert first["tokens"] == [[one["id"], one["piece"]] for one in asked]
    assert first["cached"] >= 0 and first["slot"] in (0, 1)
    assert all("prompt" not in one for one in details[1:])
    # 2. The tokens.
    assert len(tokens) == 40
    for token in tokens:
        assert token["origin"] == "sampled" and 0 < token["p"] <= 1 and len(token["top"]) == 8
        assert token["top"][0] == [token["text"], token["p"]]  # greedy
    # 3. The passes.
    numbers = [forward["n"] for forward in forwards]
    assert numbers == sorted(set(numbers)) and {token["forward"] for token in tokens} <= {*numbers}
    assert {forward["kind"] for forward in forwards} == {"prompt", "step"}
    # 4. The end.
    end = [one["end"] for one in details if "end" in one]
    position = len(asked) + 40
    assert end == [{"position": position, "window": 32, "rolled": position - 32}]
    # 5. The same in one reply, and nothing of it for others.
    whole = served.post(CHAT, json=HI | {"details": True} | fields).json()["details"]
    assert [token["text"] for token in whole["tokens"]] == [token["text"] for token in tokens]
    assert whole["end"] == end[0] and whole["prompt"]["tokens"] == first["tokens"]
    assert not any("details" in one for one in chunks(served, **fields))


def test_details_of_several_answers_are_refused():
    with Client() as client:
        error = client.post(CHAT, json=HI | {"details": True, "n": 2}).json()["error"]
        assert error["param"] == "details"
        asked = {"details": True, "logprobs": True, "top_logprobs": 2}
        assert client.post(CHAT, json=HI | asked).status_code == 200
        request = client.worker.requests[-1]
        assert request.top_logprobs == 2 and request.num_reported == 8


# The run


async def listen(app, events, then=lambda: None, leaves=True):
    """The first events of /page/run, over ASGI; the client leaves then, or waits for the end."""
    got = []
    left = asyncio.Event()
    enough = asyncio.Event()

    async def receive():
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if body := message.get("body"):
            got.append(json.loads(body.decode().removeprefix("data: ")))
            then()
            if len(got) >= events:
                enough.set()

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/page/run",
        "headers": [(b"host", b"localhost")],
        "query_string": b"",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }
    running = asyncio.create_task(app.asgi(scope, receive, send))
    await asyncio.wait_for(enough.wait(), 60)
    if leaves:
        left.set()
    await asyncio.wait_for(running, 60)
    return got


def test_the_run_is_recorded_while_somebody_listens(served, monkeypatch):
    monkeypatch.setattr(live, "_EVERY", 0.005)
    app = served.served
    passes = app.service.passes
    before = passes.recorded

    def ask():
        assert passes.listeners == 1
        served.post(CHAT, json=HI | {"max_tokens": 40, "seed": 1})

    first, second, *_ = asyncio.run(listen(app, 2, ask))
    assert first["turn"] is None and first["waiting"] == 0
    assert [row["id"] for row in first["slots"]] == [0, 1]
    assert {(row["window"], row["capacity"]) for row in first["slots"]} == {(32, 32 + 16)}
    held = max(row["held_tokens"] for row in second["slots"])
    assert max(row["rolled"] for row in second["slots"]) == held - 32 > 0
    assert second["turn"]["kind"] == "step" and second["turn"]["n"] > before
    # Nobody listens any more.
    assert passes.listeners == 0
    after = passes.recorded
    served.post(CHAT, json=HI | {"max_tokens": 4, "seed": 1})
    assert passes.recorded == after > before


def test_the_run_ends_with_the_server(monkeypatch):
    monkeypatch.setattr(live, "_EVERY", 0.005)
    with Client() as client:
        app = client.served

        def end():
            app.is_draining = True

        got = asyncio.run(listen(app, 1, end, leaves=False))
        assert len(got) == 1 and app.service.passes.listeners == 0


def test_listeners_are_bounded():
    with Client() as client:
        client.base_url = "http://127.0.0.1"
        client.served.service.passes.listeners = 16
        assert client.get("/page/run").status_code == 429
