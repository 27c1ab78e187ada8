"""The ASGI application: routes, and what all of them have in common."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from mistral.chat.answer import SLACK
from mistral.chat.tools import Tool, tool_table
from mistral.engine.base import Engine
from mistral.engine.decoder import Decoder
from mistral.model import Mistral
from mistral.server import routes
from mistral.server.http import check_key, error_response
from mistral.server.memory import plan_slots
from mistral.server.protocol.errors import ApiError, as_api_error, unavailable
from mistral.server.service import Service
from mistral.server.window import routes as window_routes
from mistral.server.window.files import page_file
from mistral.server.window.guard import check_host, check_origin, is_of_the_window, secure
from mistral.server.window.toolbox import ServedTool, Toolbox
from mistral.server.window.window import Window
from mistral.tokenizer import Tokenizer

_log = logging.getLogger("mistral.server")
Handler = Callable[[Service, Request, int], Awaitable[Response]]
Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the application does around its model.

    api_key       that clients must send; None: none
    host_names    under which browsers reach the page, besides addresses and localhost
    cors_origins  of pages in a browser that may use it; ("*",): all
    max_body      bytes of a request
    drain         seconds that running requests may take after the server is told to end
    """

    api_key: str | None = None
    host_names: Sequence[str] = ()
    cors_origins: Sequence[str] = ()
    max_body: int = 16 << 20
    drain: float = 30.0


class App:
    """An application whose model may still be loading.

    open      returns the service; it is called in a thread when the server starts
    service   None: it is not loaded yet
    failure   why it was not loaded; None: it was, or it is loading
    """

    def __init__(self, open: Callable[[], Service], settings: Settings, wait: bool = False):
        self.service: Service | None = None
        self.failure: Exception | None = None
        self.is_draining = False
        self.settings = settings
        self._open = open
        self._wait = wait
        middleware = []
        if settings.cors_origins:
            allowed = {"allow_origins": settings.cors_origins, "allow_headers": ["*"]}
            middleware.append(Middleware(CORSMiddleware, allow_methods=["*"], **allowed))
        self.asgi = Starlette(
            routes=[
                Route(path, self._endpoint(path, self._with_service(handler)), methods=[method])
                for method, path, handler in (*routes.ROUTES, *window_routes.ROUTES)
            ]
            + [
                # After the other routes of the window, which are not files.
                Route(path, self._endpoint(path, page_file), methods=["GET"])
                for path in window_routes.FILES
            ],
            middleware=middleware,
            exception_handlers={HTTPException: self._http_error},
            lifespan=self._lifespan,
        )
        self.asgi.state.app = self

    async def cancel_all(self) -> None:
        """Cancel every request; each is told."""
        self.is_draining = True
        if self.service is not None:
            await self.service.worker.stop(0)

    @contextlib.asynccontextmanager
    async def _lifespan(self, asgi: Starlette) -> AsyncIterator[None]:
        # A daemon: the server can end while weights are read.
        loading = threading.Thread(target=self._load, name="loading", daemon=True)
        loading.start()
        if self._wait:
            await asyncio.to_thread(loading.join)
            if self.failure is not None:
                raise self.failure
        yield
        await self.cancel_all()
        if self.service is not None:
            await asyncio.to_thread(self.service.window.close)

    def _load(self) -> None:
        try:
            service = self._open()
            service.worker.start()
            self.service = service
        except Exception as error:
            self.failure = error

    def _with_service(self, handler: Handler) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            return await handler(self._ready(), request, self.settings.max_body)

        return endpoint

    def _endpoint(self, path: str, reply: Endpoint) -> Endpoint:
        """What all routes have in common."""

        async def endpoint(request: Request) -> Response:
            start = time.monotonic()
            try:
                if is_of_the_window(path):
                    check_host(request, self.settings.host_names)
                if is_of_the_window(path) and path not in window_routes.FILES:
                    check_origin(request)
                if path not in (*routes.OPEN, *window_routes.OPEN):
                    check_key(request, self.settings.api_key)
                response = await reply(request)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception as error:
                response = _error(as_api_error(error), path)
            secure(response, path)
            self._note(request.method, path, response.status_code, time.monotonic() - start)
            return response

        return endpoint

    def _ready(self) -> Service:
        """The service. ApiError while it is loading, and when the server ends."""
        if self.is_draining:
            raise unavailable("the server is shutting down")
        if self.service is None:
            raise unavailable("the model is loading")
        if self.service.worker.failure is not None:
            raise unavailable("the engine has failed; the server's log has the details")
        return self.service

    def _note(self, method: str, path: str, status: int, seconds: float) -> None:
        """Log a request, and count it. The log has none of its contents."""
        level = logging.DEBUG if method == "GET" and status < 500 else logging.INFO
        _log.log(level, "%s %s %d %.3f s", method, path, status, seconds)
        if self.service is not None:
            self.service.metrics.count_request(path, status)

    async def _http_error(self, request: Request, error: Exception) -> Response:
        """Starlette's own errors: a path or a method that does not exist."""
        assert isinstance(error, HTTPException)
        path = request.url.path
        message = f"{request.method} {path}: {error.detail}"
        code = "not_found" if error.status_code == 404 else None
        failure = ApiError(error.status_code, message, code=code, headers=dict(error.headers or {}))
        response = _error(failure, path)
        secure(response, path)
        return response


def _error(error: ApiError, path: str) -> Response:
    return error_response(error, in_anthropics_form=path.startswith("/v1/messages"))


def create_app(  # noqa: PLR0913
    model: Mistral,
    tokenizer: Tokenizer,
    *,
    slots: int = 4,
    engine: Engine | None = None,
    max_tokens: int | None = None,
    name: str = "model",
    format: str | None = None,
    max_new_tokens: int | None = None,
    chunk: int = 128,
    queue: int = 64,
    same_bits: bool = False,
    tools: Sequence[Tool] = (),
    settings: Settings | None = None,
) -> Starlette:
    """An ASGI application that serves a model.

    slots       how many requests are answered at the same time; the others wait
    engine      of `slots` rows, all of them empty; None: a `mistral.Decoder`
    max_tokens  room of a slot of a model without a window; None: max_position_embeddings
    name        of the model in replies
    tools       that the page at / runs, after the person allowed each call
    The other arguments are those of `Service` and `Settings`.

    NotEnoughMemory, when the application starts, if the cache does not fit.
    """

    toolbox = Toolbox([ServedTool(tool, "tools") for tool in tool_table(tools).values()])

    def open() -> Service:
        rows = engine
        if rows is None:
            room = max_tokens
            if model.config.sliding_window is None and room is None:
                room = model.config.max_position_embeddings
            plan_slots(model, slots, room, SLACK)
            rows = Decoder(model, slots, room, slack=SLACK)
        return Service(
            rows,
            tokenizer,
            name=name,
            format=format,
            max_new_tokens=max_new_tokens,
            chunk=chunk,
            queue=queue,
            same_bits=same_bits,
            window=Window(model=model, tools=toolbox),
        )

    return App(open, settings or Settings(), wait=True).asgi
