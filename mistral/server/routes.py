"""The endpoints: which function replies to which path."""

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from mistral.server.answering import Answering
from mistral.server.http import Events, Json, read_body, whole
from mistral.server.protocol.chat_completions import ChatBody
from mistral.server.protocol.chat_replies import ChatReply
from mistral.server.protocol.completions import CompletionBody, CompletionReply
from mistral.server.protocol.details import AnswerDetails
from mistral.server.protocol.errors import ApiError
from mistral.server.protocol.message_replies import MessagesReply
from mistral.server.protocol.messages import CountBody, MessagesBody
from mistral.server.protocol.reply import Reply
from mistral.server.protocol.response_items import messages_of
from mistral.server.protocol.response_replies import ResponsesReply
from mistral.server.protocol.responses import ResponsesBody
from mistral.server.protocol.tokens import DetokenizeBody, TokenizeBody
from mistral.server.service import Service


async def chat_completions(service: Service, request: Request, limit: int) -> Response:
    """POST /v1/chat/completions."""
    body = ChatBody.parse(await read_body(request, limit))
    answering = await service.answer(body.task())
    details = None
    if body.details:
        details = AnswerDetails(answering.choices[0], service.engine.config.sliding_window)
    reply = ChatReply(
        service.name,
        answering.choices,
        with_usage=body.wants_usage,
        details=details,
    )
    return await _reply(service, request, answering, reply, bool(body.stream))


async def completions(service: Service, request: Request, limit: int) -> Response:
    """POST /v1/completions."""
    body = CompletionBody.parse(await read_body(request, limit))
    answering = await service.answer(body.task())
    reply = CompletionReply(
        service.name,
        answering.choices,
        with_usage=body.wants_usage,
        echo=body.prompts() if body.echo else None,
    )
    return await _reply(service, request, answering, reply, bool(body.stream))


async def responses(service: Service, request: Request, limit: int) -> Response:
    """POST /v1/responses."""
    body = ResponsesBody.parse(await read_body(request, limit))
    conversation = service.stored.get(body.previous_response_id) + messages_of(body.input)
    answering = await service.answer(body.task(conversation))
    reply = ResponsesReply(service.name, answering.choices, body, conversation, service.stored)
    return await _reply(service, request, answering, reply, bool(body.stream))


async def messages(service: Service, request: Request, limit: int) -> Response:
    """POST /v1/messages."""
    body = MessagesBody.parse(await read_body(request, limit))
    answering = await service.answer(body.task())
    reply = MessagesReply(service.name, answering.choices)
    return await _reply(service, request, answering, reply, bool(body.stream))


async def count_tokens(service: Service, request: Request, limit: int) -> Response:
    """POST /v1/messages/count_tokens."""
    body = CountBody.parse(await read_body(request, limit))
    ids = await service.in_thread(service.jobs.chat_prompt, body.task())
    return Json({"input_tokens": len(ids)})


async def tokenize(service: Service, request: Request, limit: int) -> Response:
    """POST /tokenize."""
    body = TokenizeBody.parse(await read_body(request, limit))
    task = body.task()
    if task is None:
        ids = await service.in_thread(body.ids, service.tokenizer)
    else:
        ids = await service.in_thread(service.jobs.chat_prompt, task)
    return Json(body.reply(ids, service.tokenizer, service.engine.limit))


async def detokenize(service: Service, request: Request, limit: int) -> Response:
    """POST /detokenize."""
    body = DetokenizeBody.parse(await read_body(request, limit))
    return Json(body.reply(service.tokenizer, service.engine.config.vocab_size))


async def models(service: Service, request: Request, limit: int) -> Response:
    """GET /v1/models."""
    listed = _model(service, request)
    if "anthropic-version" in request.headers:
        ends = {"has_more": False, "first_id": service.name, "last_id": service.name}
        return Json({"data": [listed], **ends})
    return Json({"object": "list", "data": [listed]})


async def one_model(service: Service, request: Request, limit: int) -> Response:
    """GET /v1/models/NAME."""
    name = request.path_params["name"]
    if name != service.name:
        raise ApiError(404, f"there is no model {name!r}", param="model", code="model_not_found")
    return Json(_model(service, request))


async def health(service: Service, request: Request, limit: int) -> Response:
    """GET /health: 200 when requests are served, else 503."""
    return Json({"status": "ok"})


async def metrics(service: Service, request: Request, limit: int) -> Response:
    """GET /metrics."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def slots(service: Service, request: Request, limit: int) -> Response:
    """GET /slots: a row for each slot, without contents."""
    return Json(service.worker.snapshot.rows)


async def props(service: Service, request: Request, limit: int) -> Response:
    """GET /props: facts about the model and the slots."""
    config = service.engine.config
    return Json(
        {
            "model": service.name,
            "total_slots": service.engine.batch_size,
            "max_tokens": service.engine.limit,
            "sliding_window": config.sliding_window,
            "vocab_size": config.vocab_size,
            "engine": type(service.engine).__name__,
        }
    )


async def _reply(
    service: Service, request: Request, answering: Answering, reply: Reply, stream: bool
) -> Response:
    if stream:
        return Events(service, answering, reply)
    return await whole(service, answering, reply, request)


def _model(service: Service, request: Request) -> dict[str, Any]:
    if "anthropic-version" in request.headers:
        created = _date(service.created)
        return {
            "type": "model",
            "id": service.name,
            "display_name": service.name,
            "created_at": created,
        }
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "mistral-from-scratch",
        "max_model_len": service.engine.limit,
    }


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


ROUTES = (
    ("POST", "/v1/chat/completions", chat_completions),
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/responses", responses),
    ("POST", "/v1/messages", messages),
    ("POST", "/v1/messages/count_tokens", count_tokens),
    ("POST", "/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
    ("GET", "/v1/models", models),
    ("GET", "/v1/models/{name:path}", one_model),
    ("GET", "/health", health),
    ("GET", "/metrics", metrics),
    ("GET", "/slots", slots),
    ("GET", "/props", props),
)
# What needs no key
OPEN = ("/health",)
