"""Between starlette and the protocol: bodies, replies, streams, and clients who leave."""

import asyncio
import hmac
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mistral.server.answering import Answering
from mistral.server.protocol.errors import ApiError, as_api_error
from mistral.server.protocol.reply import Reply, to_json
from mistral.server.service import Service


class Json(JSONResponse):
    """A reply in JSON."""

    def render(self, content: Any) -> bytes:
        """The same form as in a stream."""
        return to_json(content).encode()


class Events(StreamingResponse):
    """The events of a reply. If the client leaves, the answers are cancelled."""

    def __init__(self, service: Service, answering: Answering, reply: Reply):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        events = _events(service, answering, reply)
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answering.close()


async def _events(service: Service, answering: Answering, reply: Reply) -> AsyncIterator[bytes]:
    try:
        for event in reply.begin():
            yield reply.encoded(event)
        async for delta in answering.deltas():
            for event in reply.chunks(delta):
                yield reply.encoded(event)
        for event in reply.end():
            yield reply.encoded(event)
        yield reply.encoded_end()
    except Exception as error:
        for event in reply.failed(as_api_error(error)):
            yield reply.encoded(event)
    finally:
        service.metrics.count_answers(answering.choices)


async def whole(service: Service, answering: Answering, reply: Reply, request: Request) -> Response:
    """The reply when all answers have ended."""
    try:
        await unless_left(request, _finish(answering, reply))
        return Json(reply.whole())
    finally:
        await answering.close()
        service.metrics.count_answers(answering.choices)


async def _finish(answering: Answering, reply: Reply) -> None:
    async for delta in answering.deltas():
        reply.note(delta)


async def unless_left(request: Request, work: Coroutine[Any, Any, None]) -> None:
    """Wait for `work`. ClientDisconnect if the client leaves; the work is cancelled then."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, limit: int) -> bytes:
    """The body. ApiError for one that is too large or not JSON by its own account."""
    kind = request.headers.get("content-type", "")
    if "json" not in kind.lower():
        # A page in a browser can send other types to a server on localhost without asking it.
        raise ApiError(415, "the body must be JSON: send Content-Type: application/json")
    parts = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise ApiError(
                413, f"the body is larger than {limit:,} bytes", code="request_too_large"
            )
        parts.append(part)
    return b"".join(parts)


def check_key(request: Request, key: str | None) -> None:
    """ApiError unless the request has the key, as OpenAI's or as Anthropic's clients send it."""
    if key is None:
        return
    bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
    given = bearer or request.headers.get("x-api-key", "")
    if not hmac.compare_digest(given.encode(), key.encode()):
        raise ApiError(
            401,
            "the API key is missing or wrong: send Authorization: Bearer KEY",
            type="authentication_error",
            code="invalid_api_key",
        )


def error_response(error: ApiError, in_anthropics_form: bool) -> Response:
    """An error as its client expects it."""
    body = error.anthropic_body() if in_anthropics_form else error.body()
    return Json(body, error.status, error.headers)
