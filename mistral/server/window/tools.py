"""Runs a tool for the page, after the person allowed the call."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mistral.server.http import Json, read_body
from mistral.server.protocol.fields import Body, done
from mistral.server.service import Service
from mistral.server.window.guard import check_token


class ToolCallBody(Body):
    """The body of a request to /page/tools."""

    name: str = done("", ...)
    arguments: dict[str, Any] = done("", ...)


async def call_tool(service: Service, request: Request, limit: int) -> Response:
    """POST /page/tools."""
    check_token(request, service.window.token)
    body = ToolCallBody.parse(await read_body(request, limit))
    return Json(await service.window.tools.call(body.name, body.arguments))
