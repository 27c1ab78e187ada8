"""OpenAI's chat completions: answers to replies and chunks."""

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from mistral.chat.events import Call, Text
from mistral.server.choice import Choice, Delta
from mistral.server.protocol.details import AnswerDetails
from mistral.server.protocol.reply import Reply
from mistral.server.protocol.tokens_as_text import token_logprob
from mistral.server.protocol.usage import timings, usage
from mistral.server.request import Chosen


class ChatReply(Reply):
    """The reply to one request of a chat completion.

    model         its name
    choices       the answers
    with_usage    whether the stream ends with a chunk that has the usage
    details       of the only answer; None: not asked for
    """

    def __init__(
        self,
        model: str,
        choices: Sequence[Choice],
        with_usage: bool = False,
        details: AnswerDetails | None = None,
    ):
        super().__init__(choices)
        self._model = model
        self._with_usage = with_usage
        self._details = details
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._calls = [0] * len(choices)  # how many were sent

    def whole(self) -> dict[str, Any]:
        """The reply when all answers have ended."""
        details = {} if self._details is None else {"details": self._details.whole()}
        return details | {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(choice) for choice in self.choices],
            "usage": usage(self.choices),
            "timings": timings(self.choices),
        }

    def begin(self) -> Iterator[dict[str, Any]]:
        """The first chunks: each answer's role."""
        for choice in self.choices:
            yield self._chunk(choice.index, {"role": "assistant", "content": ""})

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """The chunks of one delta; its log-probabilities and details are in the first."""
        chunks = list(self._chunks(delta))
        if self._details is not None and (details := self._details.of(delta)):
            chunks = chunks or [self._chunk(delta.index, {})]
            chunks[0]["details"] = details
        yield from chunks

    def _chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        logprobs = self._logprobs(self.choices[delta.index], delta.tokens) or None
        for event in delta.events:
            if isinstance(event, Text):
                yield self._chunk(delta.index, {"content": event.text}, logprobs)
            else:
                call = tool_call(event) | {"index": self._calls[delta.index]}
                self._calls[delta.index] += 1
                yield self._chunk(delta.index, {"tool_calls": [call]}, logprobs)
            logprobs = None
        if logprobs is not None:
            yield self._chunk(delta.index, {}, logprobs)
        if delta.finish is not None:
            yield self._chunk(delta.index, {}, finish=delta.finish)

    def end(self) -> Iterator[dict[str, Any]]:
        """The last chunks."""
        if self._with_usage:
            numbers = {"usage": usage(self.choices), "timings": timings(self.choices)}
            yield self._envelope([]) | numbers

    def _choice(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": choice.text or (None if choice.calls else ""),
            "refusal": None,
        }
        if choice.calls:
            message["tool_calls"] = [tool_call(call) for call in choice.calls]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice, choice.tokens),
            "finish_reason": choice.finish,
        }

    def _logprobs(self, choice: Choice, tokens: Sequence[Chosen]) -> dict[str, Any] | None:
        if choice.request.top_logprobs is None or not tokens:
            return None
        most = choice.request.top_logprobs
        shown = [token._replace(top=token.top[:most]) for token in tokens]
        content = [token_logprob(choice.tokenizer, token) for token in shown]
        return {"content": content, "refusal": None}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._envelope([choice])

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }


def tool_call(call: Call) -> dict[str, Any]:
    """A call in a message; its arguments are JSON as text."""
    return {
        "id": call_id(call),
        "type": "function",
        "function": {"name": call.name, "arguments": arguments_json(call)},
    }


def call_id(call: Call) -> str:
    """The model's own id in formats that have one, or a new one."""
    return call.id or f"call_{secrets.token_hex(12)}"


def arguments_json(call: Call) -> str:
    """The arguments as JSON, as the model wrote them if that is JSON."""
    return call.written or json.dumps(call.arguments, ensure_ascii=False)
