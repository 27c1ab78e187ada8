"""The run, live: the states of the slots and the last forward pass, while a page shows them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from mistral.cache import cache_slots
from mistral.server.protocol.errors import ApiError
from mistral.server.protocol.reply import to_json
from mistral.server.service import Service

_EVERY = 0.1  # seconds from one event to the next
_SILENCE = 50  # events without a change until a comment shows that the connection lives
_MOST_LISTENERS = 16


async def run(service: Service, request: Request, limit: int) -> Response:
    """GET /page/run: server-sent events. ApiError (429) for one listener too many."""
    if service.passes.listeners >= _MOST_LISTENERS:
        raise ApiError(429, f"{_MOST_LISTENERS} pages show the run already")
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        _events(service, request), media_type="text/event-stream", headers=headers
    )


async def _events(service: Service, request: Request) -> AsyncIterator[str]:
    """An event whenever something has changed, until the client or the server ends."""
    app = request.app.state.app
    passes = service.passes
    if not passes.listeners:
        passes.last = None  # of an earlier listener
    passes.listeners += 1
    shown = None
    silent = 0
    try:
        while not app.is_draining and not await request.is_disconnected():
            state = state_of(service)
            silent = silent + 1 if state == shown else 0
            if silent == 0:
                yield f"data: {to_json(state)}\n\n"
            elif silent % _SILENCE == 0:
                yield ": nothing has changed\n\n"
            shown = state
            await asyncio.sleep(_EVERY)
    finally:
        passes.listeners -= 1


def state_of(service: Service) -> dict[str, Any]:
    """The slots after the last turn, and the last recorded forward pass.

    capacity  of a slot: keys and values of so many tokens, the last ones, are kept
    rolled    how many tokens of it have left the window
    """
    engine = service.engine
    window = engine.config.sliding_window
    capacity = cache_slots(window, engine.limit, engine.slack)
    snapshot = service.worker.snapshot
    slots = []
    for row in snapshot.rows:
        rolled = 0 if window is None else max(0, row["held_tokens"] - window)
        sizes = {"rolled": rolled, "capacity": capacity, "window": window}
        slots.append(row | sizes)
    last = service.passes.last
    turn = None
    if last is not None:
        turn = {
            "n": last.n,
            "ms": round(1000 * last.seconds, 3),
            "kind": last.kind,
            "rows": last.rows,
            "tokens": last.tokens,
        }
    return {"slots": slots, "waiting": snapshot.waiting, "turn": turn}
