"""An application whose answers are given: everything around the slots, without an engine."""

import asyncio
import json
from dataclasses import dataclass, field, replace

from scripted import END, TOKENIZER, Scripted, written
from starlette.testclient import TestClient

from mistral.chat.grammar import GrammarError
from mistral.server.app import App, Settings
from mistral.server.request import Chosen, Run
from mistral.server.service import Service
from mistral.server.worker import Snapshot, Stream


@dataclass
class Said:
    """An answer: its ids or text, and how its run ends.

    pause   it never ends by itself
    at_once all tokens come in one list
    cached  tokens of the prompt that the slot held already
    """

    text: str | list[int]
    reason: str = "stop"
    error: Exception | None = None
    pause: bool = False
    cached: int = 0
    at_once: bool = False

    @property
    def ids(self):
        if isinstance(self.text, str):
            return written(self.text, end=self.reason == "stop" and not self.pause)
        return self.text


@dataclass
class FakeStream(Stream):
    """Yields an answer's tokens one by one."""

    said: Said
    run: Run
    left: list[int] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self):
        self.left = list(self.said.ids)
        self.run.cached_tokens = self.said.cached
        for name in ("queued", "admitted", "first"):
            self.run.note(name)

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0)
        if not self.left or self.closed:
            if self.said.pause and not self.closed:
                await asyncio.wait_for(asyncio.Event().wait(), 5)  # a test that hangs fails
            self.run.end(self.said.reason, self.said.error)
            raise StopAsyncIteration
        count = len(self.left) if self.said.at_once else 1
        ids = self.left[:count]
        del self.left[:count]
        return [self.chosen(id) for id in ids]

    def chosen(self, id):
        top = self.run.request.top_logprobs
        if top is None:
            return Chosen(id)
        return Chosen(id, -0.5, [(id, -0.5), (5, float("-inf"))][:top])

    async def aclose(self):
        self.closed = True


class FakeWorker:
    """In the place of a `Worker`: `answers` are texts, `Said`, or exceptions, one a request."""

    failure = None
    snapshot = Snapshot([{"id": 0, "state": "free", "held_tokens": 0}], 0)

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []
        self.streams = []

    def start(self):
        pass

    async def stop(self, seconds):
        return True

    async def stream(self, request):
        self.requests.append(request)
        answer = self.answers.pop(0) if self.answers else "Hello"
        if isinstance(answer, Exception):
            raise answer
        said = answer if isinstance(answer, Said) else Said(answer)
        self.streams.append(FakeStream(said, Run(request)))
        return self.streams[-1]


class Client(TestClient):
    """A client of an application with a fake worker, which is `worker`."""

    def __init__(self, *answers, tokenizer=TOKENIZER, settings=None, limit=4096, format=None):
        self.worker = FakeWorker(*answers)
        engine = Scripted(limit=limit)
        if tokenizer.vocab_size > engine.config.vocab_size:
            engine.config = replace(engine.config, vocab_size=tokenizer.vocab_size)

        def open():
            service = Service(engine, tokenizer, name="tiny", format=format)
            service.worker = self.worker
            return service

        self.served = App(open, settings or Settings(), wait=True)
        super().__init__(self.served.asgi)

    def reply(self, path, body, **options):
        """POST, and the reply's JSON; its status must be 200."""
        response = self.post(path, json=body, **options)
        assert response.status_code == 200, response.text
        return response.json()

    def events(self, path, body):
        """POST a request for a stream: (name or None, data) of each event."""
        response = self.post(path, json=body | {"stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(parsed(response.text))

    def chunks(self, path, body):
        """The data of OpenAI's older streams, without the last line."""
        *events, last = [data for _, data in self.events(path, body)]
        assert last == "[DONE]"
        return events


def parsed(text):
    """(name or None, data) of each server-sent event."""
    assert text.endswith("\n\n")
    for block in text[:-2].split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        data = lines["data"]
        yield lines.get("event"), data if data == "[DONE]" else json.loads(data)


def allows(request, text):
    """Whether the constraint of a request allows a text, and its end after it."""
    constraint = request.constraint.copy()
    try:
        for id in written(text, end=False):
            assert constraint.mask()[id]
            constraint.accept(id)
    except (AssertionError, GrammarError):
        return False
    return bool(constraint.mask()[END])
