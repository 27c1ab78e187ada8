"""A server whose answers are scripts, for the tests of the page: real HTTP, no model."""

import asyncio
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mistral.server.protocol.errors import ApiError
from mistral.server.window.files import page_file
from mistral.server.window.guard import secure

TOOLS = [
    {
        "name": "stock_price",
        "description": "The price of a stock.",
        "parameters": {
            "type": "object",
            "properties": {"symbol": {"type": "string"}},
            "required": ["symbol"],
        },
        "source": "my_tools.py",
    }
]
ABOUT = {
    "name": "Hermes-2-Pro-Mistral-7B",
    "format": "chatml",
    "engine": "compiled",
    "quantization": "Q4_K_M",
    "window": 4096,
    "slots": 4,
    "limit": 8192,
    "vocab_size": 32032,
    "parameters": 7_241_000_000,
    "bytes": 4_370_000_000,
    "chat": {"has_tools": True},
    "sampling": {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
    "needs_key": False,
    "token": "the-token",
    "tools": [],
    "inside": False,
}


@dataclass
class Said:
    """An answer of the model.

    text    in pieces, each a chunk; a string is cut at its spaces
    calls   (name, arguments as JSON)
    hold    after so many pieces, wait until `PageServer.release` is set
    breaks  the connection is cut after the text
    error   an error in the stream, after the text
    """

    text: str | list[str] = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    finish: str | None = None
    hold: int | None = None
    breaks: bool = False
    error: str | None = None

    @property
    def pieces(self) -> list[str]:
        if isinstance(self.text, list):
            return self.text
        return [part + " " for part in self.text.split(" ")][:-1] + [self.text.split(" ")[-1]]


class PageServer:
    """The page and its routes, on a port of its own, in a thread.

    about     what GET /page/about returns
    answers   the next answers of the model; an empty list: "Hello!"
    bodies    what was sent to /v1/chat/completions
    called    what was sent to /page/tools
    results   name of a tool -> what POST /page/tools returns
    runs      how many streams of /page/run were opened; `run` is what each sends
    """

    def __init__(self) -> None:
        self.reset()
        routes = [
            Route("/", self._file),
            Route("/page/about", self._about),
            Route("/page/run", self._run),
            Route("/page/tools", self._tool, methods=["POST"]),
            Route("/page/inside", self._inside, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/page/{file:path}", self._file),
        ]
        self.app = Starlette(routes=routes)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.start()

    def reset(self) -> None:
        self.about: dict[str, Any] = ABOUT | {"tools": list(TOOLS)}
        self.answers: list[Said | str] = []
        self.bodies: list[dict[str, Any]] = []
        self.called: list[dict[str, Any]] = []
        self.results: dict[str, Any] = {}
        self.refused: tuple[int, str] | None = None  # status and message for a chat request
        self.key: str | None = None
        self.runs = 0
        self.run: dict[str, Any] = {"slots": [], "waiting": 0}
        self.release = threading.Event()
        self.inside = "/page/icon.svg"

    def start(self) -> None:
        config = uvicorn.Config(
            self.app, port=self.port, log_level="critical", timeout_graceful_shutdown=0
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    def stop(self) -> None:
        """Like a server that is killed: its connections are cut."""
        self._server.force_exit = True
        self._server.should_exit = True
        self._thread.join()

    async def _file(self, request: Request) -> Response:
        try:
            response = await page_file(request)
        except ApiError as error:
            return _error(error.status, error.message)
        secure(response, request.url.path)
        return response

    async def _about(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, "the API key is missing or wrong")
        return JSONResponse(self.about)

    async def _run(self, request: Request) -> Response:
        self.runs += 1

        async def events():
            while not await request.is_disconnected():
                yield f"data: {json.dumps(self.run)}\n\n"
                await asyncio.sleep(0.05)

        return StreamingResponse(events(), media_type="text/event-stream")

    async def _tool(self, request: Request) -> Response:
        if not self._has_token(request):
            return _error(403, "the token is wrong")
        body = await request.json()
        self.called.append(body)
        return JSONResponse(self.results.get(body["name"], {"result": "1"}))

    async def _inside(self, request: Request) -> Response:
        if not self._has_token(request):
            return _error(403, "the token is wrong")
        self.called.append(await request.json())
        return Response("<p>", media_type="text/html", headers={"Content-Location": self.inside})

    def _has_token(self, request: Request) -> bool:
        return request.headers.get("x-page-token") == self.about["token"]

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if self.refused:
            status, message = self.refused
            self.refused = None
            return _error(status, message)
        said = self.answers.pop(0) if self.answers else Said("Hello!")
        said = Said(said) if isinstance(said, str) else said
        return StreamingResponse(self._chunks(said, body, request), media_type="text/event-stream")

    async def _chunks(self, said: Said, body: dict[str, Any], request: Request):
        has_details = body.get("details", False)
        yield _chunk(
            {"role": "assistant", "content": ""},
            details=prompt_details(body) if has_details else None,
        )
        for i, piece in enumerate(said.pieces):
            if i == said.hold:
                while not self.release.is_set():
                    if await request.is_disconnected():
                        return
                    await asyncio.sleep(0.01)
            details = token_details(i, piece) if has_details else None
            yield _chunk({"content": piece}, details=details)
        if said.breaks:
            await asyncio.sleep(0.1)  # what was sent arrives
            raise ConnectionError("cut")
        if said.error:
            yield f"data: {json.dumps({'error': {'message': said.error}})}\n\n"
            return
        for i, (name, arguments) in enumerate(said.calls):
            call = {"index": i, "id": f"call_{len(self.bodies)}_{i}", "type": "function"}
            yield _chunk(
                {"tool_calls": [call | {"function": {"name": name, "arguments": arguments}}]}
            )
        finish = said.finish or ("tool_calls" if said.calls else "stop")
        end = {"end": {"position": 99, "window": self.about["window"], "rolled": 0}}
        yield _chunk({}, finish, details=end if has_details else None)
        count = max(len(said.pieces), 1)
        usage = {
            "prompt_tokens": 40,
            "completion_tokens": count,
            "total_tokens": 40 + count,
            "prompt_tokens_details": {"cached_tokens": 12},
        }
        yield f"data: {json.dumps({'choices': [], 'usage': usage, 'timings': {'predicted_per_second': 41.7}})}\n\n"
        yield "data: [DONE]\n\n"


def prompt_details(body: dict[str, Any]) -> dict[str, Any]:
    """The prompt as if each word were a token."""
    words = [
        f" {word}" for message in body["messages"] for word in str(message.get("content")).split()
    ]
    tokens = [[i + 3, word] for i, word in enumerate(words)]
    forward = {"n": 0, "ms": 85.0, "rows": 1, "tokens": len(tokens), "kind": "prompt"}
    return {
        "prompt": {"tokens": tokens, "cached": len(tokens) // 2, "slot": 0},
        "forwards": [forward],
        "tokens": [],
    }


def token_details(i: int, text: str) -> dict[str, Any]:
    """One token; every fifth is forced, every seventh drafted."""
    origin = "forced" if i % 5 == 4 else "drafted" if i % 7 == 6 else "sampled"
    p = None if origin == "forced" else round(0.99 - (i * 37 % 90) / 100, 3)
    top = (
        []
        if p is None
        else [[text, p], [" other", round((1 - p) * 0.7, 3)], ["\n", round((1 - p) * 0.1, 3)]]
    )
    token = {"id": 300 + i, "text": text, "origin": origin, "p": p, "top": top, "forward": i + 1}
    kind = {"forced": "forced", "drafted": "verify"}.get(origin, "step")
    forward = {
        "n": i + 1,
        "ms": 22 + i * 13 % 9,
        "rows": 1 + i % 3,
        "tokens": 1 + i % 3,
        "kind": kind,
    }
    return {"tokens": [token], "forwards": [forward]}


def _chunk(delta: dict[str, Any], finish: str | None = None, details: Any = None) -> str:
    chunk: dict[str, Any] = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    if details is not None:
        chunk["details"] = details
    return f"data: {json.dumps(chunk)}\n\n"


def _error(status: int, message: str) -> Response:
    return JSONResponse(
        {"error": {"message": message, "type": "error", "param": None, "code": None}}, status
    )
