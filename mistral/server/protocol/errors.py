"""Errors as clients expect them: a status, and a body in the form of the API that was called."""

import logging
from typing import Any

from mistral.errors import MistralError

_log = logging.getLogger(__name__)


class ApiError(MistralError):
    """A request that is refused, or an answer that cannot be given.

    status   of HTTP
    type     OpenAI's word for the class of errors
    param    the field of the request that is wrong, if it is one
    code     a word for programs; clients have exceptions of their own for some
    headers  of the reply
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """OpenAI's form."""
        return {
            "error": {
                "message": str(self),
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def anthropic_body(self) -> dict[str, Any]:
        """Anthropic's form."""
        type = _ANTHROPIC_TYPES.get(self.status, "api_error")
        return {"type": "error", "error": {"type": type, "message": str(self)}}


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is not as it must be: 400."""
    return ApiError(400, message, param=param, code=code)


def too_long(prompt_tokens: int, limit: int) -> ApiError:
    """The prompt leaves no room for an answer: 400, with the code that clients look for."""
    return invalid(
        f"the prompt has {prompt_tokens} tokens, and the maximum context length is {limit} tokens, "
        "the answer included: shorten it",
        "messages",
        "context_length_exceeded",
    )


def queue_full() -> ApiError:
    """As many requests wait as may wait: 429."""
    return ApiError(
        429,
        "all slots are busy and the queue is full: try again later",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": "1"},
    )


def unavailable(reason: str) -> ApiError:
    """The server is starting or ending: 503."""
    return ApiError(
        503,
        reason,
        type="server_error",
        code="service_unavailable",
        headers={"Retry-After": "1"},
    )


def internal(message: str = "an error of the server; its log has the details") -> ApiError:
    """An error that is not the client's: 500."""
    return ApiError(500, message, type="server_error", code="internal_error")


def as_api_error(error: Exception) -> ApiError:
    """The error itself, or one that says nothing about it; then it is logged."""
    if isinstance(error, ApiError):
        return error
    _log.error("an error of the server", exc_info=error)
    return internal()


def invalid_answer(problem: str) -> ApiError:
    """The model wrote an answer that is not valid for the schema that it had to follow: 500."""
    return ApiError(
        500,
        f"the answer is not valid for the schema: {problem}",
        type="server_error",
        code="invalid_answer",
    )
