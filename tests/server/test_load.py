"""Many clients at the same time, over real sockets: nobody starves, and nothing is left behind."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
import small
import uvicorn

import mistral
from mistral.engine.decoder import Decoder
from mistral.server.app import App, Settings
from mistral.server.service import Service

TEXT = "/v1/completions"
SLOTS = 4


@pytest.fixture(scope="module")
def demo():
    return mistral.load("demo", device="cpu", sliding_window=None)


class Watched:
    """What happens to the slots of a service: its runs, and how late cancels are carried out."""

    def __init__(self, service):
        self.service = service
        self.runs = []  # in the order of their submission
        self.turns = 0
        self.late = []  # for each cancelled run, the turns that began after its cancel was ordered
        self._ordered = {}
        slots = service.worker._slots
        self._watch(slots, "submit", after=self.runs.append)
        self._watch(slots, "turn", before=self._begin_turn)
        self._watch(slots, "cancel", before=self._cancelled)
        self._watch(service.worker, "cancel", before=self._order)

    def _begin_turn(self):
        self.turns += 1

    def _order(self, stream):
        self._ordered[stream.run] = self.turns

    def _cancelled(self, run):
        if run in self._ordered:  # not at the server's end
            self.late.append(self.turns - self._ordered[run])

    @staticmethod
    def _watch(owner, name, before=lambda *_: None, after=lambda _: None):
        function = getattr(owner, name)

        def watched(*arguments):
            before(*arguments)
            result = function(*arguments)
            after(result)
            return result

        setattr(owner, name, watched)

    @property
    def busy(self):
        return [row for row in self.service.worker.snapshot.rows if row["state"] != "free"]


@contextmanager
def serving(model, tokenizer, queue):
    """(what is watched, the address) of a server of the demo on a socket."""
    service = Service(Decoder(model, SLOTS, 1024, slack=32), tokenizer, queue=queue)
    watched = Watched(service)
    app = App(lambda: service, Settings(), wait=True)
    config = uvicorn.Config(app.asgi, port=0, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started, 60)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield watched, f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def wait_for(what, seconds):
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def endless(tokenizer, new):
    """A request that gets exactly `new` tokens."""
    [*_, id] = tokenizer.encode("a", bos=False)
    return {"max_tokens": new, "temperature": 0, "logit_bias": {str(id): 100}}


def many_clients(demo, clients, queue, new):
    """Each client gets its answer, with retries after 429; returns figures about it."""
    tokenizer = demo[1]
    refused = []

    def client(number):
        body = endless(tokenizer, new) | {"prompt": f"{number} is a number of many"}
        start = time.monotonic()
        while True:
            response = httpx2.post(address + TEXT, json=body, timeout=120)
            if response.status_code == 200:
                assert response.json()["usage"]["completion_tokens"] == new
                return time.monotonic() - start
            assert response.status_code == 429, response.text
            assert response.json()["error"]["code"] == "rate_limit_exceeded"
            refused.append(number)
            time.sleep(int(response.headers["Retry-After"]))

    with serving(*demo, queue) as (watched, address), ThreadPoolExecutor(clients) as pool:
        waits = list(pool.map(client, range(clients)))
        wait_for(lambda: not watched.busy, 60)
        runs = watched.runs
        # First come, first served: nobody is overtaken.
        assert len(runs) == clients
        admitted = [run.times["admitted"] for run in runs]
        assert admitted == sorted(admitted)
        whole = runs[-1].times["ended"] - runs[0].times["queued"]
        slot_waits = [run.times["admitted"] - run.times["queued"] for run in runs]
        longest = max(run.times["ended"] - run.times["admitted"] for run in runs)
        # Before a request there are at most so many rounds of the slots as requests wait.
        assert max(slot_waits) <= longest * (queue / SLOTS + 1) + 1
    return {
        "clients": clients,
        "queue": queue,
        "refused": len(refused),
        "worst wait for a slot, s": round(max(slot_waits), 3),
        "worst answer, s": round(max(waits), 3),
        "all, s": round(whole, 3),
    }


def test_clients_beyond_the_queue_get_429_and_then_their_turn(demo):
    figures = many_clients(demo, 8, queue=2, new=16)
    assert figures["refused"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("queue", [64, 16])
def test_none_of_50_clients_on_4_slots_starves(demo, queue):
    figures = many_clients(demo, 50, queue, new=64)
    print(figures)
    assert (figures["refused"] > 0) == (queue == 16)


def killed_clients(demo, clients):
    """Clients vanish in mid-stream, or while they wait; returns figures about it."""
    tokenizer = demo[1]
    body = endless(tokenizer, 900) | {"prompt": "So", "stream": True}
    with serving(*demo, queue=64) as (watched, address):
        with httpx2.Client(base_url=address, timeout=60) as http:
            streams = []
            for _ in range(clients):
                request = http.build_request("POST", TEXT, json=body)
                streams.append(http.send(request, stream=True))
            for stream in streams[:SLOTS]:
                lines = stream.iter_lines()
                while not next(lines).startswith("data: {"):
                    pass
            assert len(watched.busy) == SLOTS
            start = time.monotonic()
            for stream in streams:
                stream.close()  # of a response that was not read to its end: the socket is closed
        wait_for(lambda: not watched.busy and not watched.service.worker.snapshot.waiting, 60)
        seconds = time.monotonic() - start
        # The turn that is being computed ends, and no other one begins.
        assert len(watched.late) == clients and max(watched.late) <= 1
        assert {run.reason for run in watched.runs} == {"cancelled"}
        assert httpx2.post(address + TEXT, json=endless(tokenizer, 4) | {"prompt": "So"}).json()
    return {"clients": clients, "turns until free": max(watched.late), "s": round(seconds, 3)}


def test_clients_that_vanish_free_their_slots_within_a_step(demo):
    killed_clients(demo, 6)


@pytest.mark.slow
def test_20_clients_that_vanish_free_their_slots_within_a_step(demo):
    print(killed_clients(demo, 20))


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


def mixed(n):
    """(path, body) of the n-th request: all endpoints, tools, JSON, streams, errors."""
    messages = [{"role": "user", "content": f"What is {n} plus one?"}]
    chat = {"messages": messages, "max_tokens": 8, "seed": n}
    bodies = [
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", chat | {"stream": True, "logprobs": True, "top_logprobs": 3}),
        ("/v1/chat/completions", chat | {"tools": [TOOL], "tool_choice": "required"}),
        ("/v1/chat/completions", chat | {"response_format": FORMAT, "stream": True}),
        ("/v1/completions", {"prompt": f"{n} and", "max_tokens": 8, "n": 2, "stop": "."}),
        ("/v1/messages", {"messages": messages, "max_tokens": 8}),
        ("/v1/responses", {"input": f"What is {n}?", "max_output_tokens": 16, "store": False}),
        ("/v1/chat/completions", chat | {"temperature": "hot"}),
    ]
    return bodies[n % len(bodies)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_2000_requests_leave_no_memory_behind():
    command = [sys.executable, "scripts/serve.py", "demo", "--port", "0", "--slots", str(SLOTS)]
    paths = f"{small.ROOT}:{small.ROOT}/kernels"
    process = subprocess.Popen(
        command,
        cwd=small.ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    try:
        lines = iter(process.stderr.readline, "")
        found = (re.search(r"serving at (http:\S+)", line) for line in lines)
        address = next(match[1] for match in found if match)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        wait_for(lambda: httpx2.get(f"{address}/health").status_code == 200, 60)
        with httpx2.Client(base_url=address, timeout=120) as http:
            sizes = [resident(process.pid)]
            for start in range(0, 2400, 400):
                ask_mixed(http, range(start, start + 400))
                sizes.append(resident(process.pid))
            assert all(row["state"] == "free" for row in http.get("/slots").json())
    finally:
        process.terminate()
        process.wait()
    # The first 400 fill what is kept: compiled grammars, cached formats, 4 connections' buffers.
    growth = sizes[-1] - sizes[1]
    print(json.dumps({"requests": 2000, "resident_MB": [round(s / 2**20, 1) for s in sizes]}))
    assert growth < 8 << 20, sizes


def ask_mixed(http, numbers):
    """Send these requests, four at the same time."""

    def ask(n):
        path, body = mixed(n)
        response = http.post(path, json=body)
        assert response.status_code == (400 if body.get("temperature") == "hot" else 200), (
            response.text
        )

    with ThreadPoolExecutor(SLOTS) as pool:
        list(pool.map(ask, numbers))


def resident(pid):
    """Bytes of a process in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) << 10
