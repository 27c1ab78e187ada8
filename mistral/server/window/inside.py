"""Looks inside the model at a conversation, for the page."""

from starlette.requests import Request
from starlette.responses import Response

from mistral.sampling import Sampling
from mistral.server.http import read_body
from mistral.server.protocol.chat_completions import Message, Tool, tools_to_read
from mistral.server.protocol.errors import ApiError
from mistral.server.protocol.fields import Body, done
from mistral.server.protocol.task import ChatTask
from mistral.server.service import Service
from mistral.server.window.guard import check_token
from mistral.server.window.inside_pages import InsidePages

# The page runs its own script, with no right to this origin: it cannot read the page's token.
_HEADERS = {
    "Content-Security-Policy": "sandbox allow-scripts; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


class InsideBody(Body):
    """The body of a request to /page/inside."""

    messages: list[Message] = done("", ...)
    tools: list[Tool] | None = done()

    def tasks(self) -> tuple[ChatTask, ChatTask | None]:
        """The whole conversation, and what comes before its last answer, if it ends with one."""
        messages = [message.model_dump(exclude_none=True) for message in self.messages]
        tools = tools_to_read(self._given.get("tools"))
        whole = ChatTask(messages=messages, tools=tools, sampling=Sampling())
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            return whole, None
        return whole, ChatTask(messages=messages[:-1], tools=tools, sampling=Sampling())


async def make_inside(service: Service, request: Request, limit: int) -> Response:
    """POST /page/inside: the page, and as Content-Location the path under which it is kept."""
    check_token(request, service.window.token)
    body = InsideBody.parse(await read_body(request, limit))
    pages = _pages(service)
    whole, before = body.tasks()
    ids = await service.in_thread(service.jobs.chat_prompt, whole, before is None)
    begin = ids
    if before is not None:
        begin = await service.in_thread(service.jobs.chat_prompt, before)
    if ids[: len(begin)] != begin:  # the format writes an earlier turn in another way now
        begin = ids
    name = await pages.make(begin, ids[len(begin) :])
    return _html(pages.get(name), {"Content-Location": f"/page/inside/{name}"})


async def kept_inside(service: Service, request: Request, limit: int) -> Response:
    """GET /page/inside/NAME. Its name is a secret, so it needs no key: a new tab has none."""
    return _html(_pages(service).get(request.path_params["name"]), {})


def _pages(service: Service) -> InsidePages:
    if service.inside is None:
        raise ApiError(404, "this server has no model to look inside", code="not_found")
    return service.inside


def _html(page: str, headers: dict[str, str]) -> Response:
    return Response(page, media_type="text/html", headers=_HEADERS | headers)
