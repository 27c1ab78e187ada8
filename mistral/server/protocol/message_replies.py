"""Anthropic's messages: answers to replies and events."""

import secrets
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from mistral.chat.events import Call, Text
from mistral.server.choice import Choice, Delta
from mistral.server.protocol.chat_replies import arguments_json
from mistral.server.protocol.errors import ApiError
from mistral.server.protocol.reply import Event, Reply
from mistral.server.protocol.usage import counts

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesReply(Reply):
    """The reply to one request. Text and calls are blocks, in the order of the answer."""

    names_events: ClassVar[bool] = True
    last_line: ClassVar[str | None] = None

    def __init__(self, model: str, choices: Sequence[Choice]):
        super().__init__(choices)
        self._model = model
        self._id = f"msg_{secrets.token_hex(12)}"
        self._blocks = 0  # that have begun
        self._in_text = False

    def whole(self) -> dict[str, Any]:
        """The reply when the answer has ended."""
        choice = self.choices[0]
        content = [
            _tool_use(part) if isinstance(part, Call) else {"type": "text", "text": part.text}
            for part in choice.parts
        ]
        return self._message(content) | _reason(choice) | {"usage": self._usage()}

    def begin(self) -> Iterator[Event]:
        """The message without content."""
        numbers = {"input_tokens": counts(self.choices).prompt, "output_tokens": 0}
        message = self._message([]) | {"usage": numbers}
        yield {"type": "message_start", "message": message}

    def chunks(self, delta: Delta) -> Iterator[Event]:
        """Blocks."""
        for event in delta.events:
            if isinstance(event, Text):
                if not self._in_text:
                    yield self._start({"type": "text", "text": ""})
                    self._in_text = True
                yield self._delta({"type": "text_delta", "text": event.text})
            else:
                yield from self._end_text()
                yield self._start(_tool_use(event) | {"input": {}})
                written = {"type": "input_json_delta", "partial_json": arguments_json(event)}
                yield self._delta(written)
                yield self._stop()

    def end(self) -> Iterator[Event]:
        """Why the answer ended."""
        yield from self._end_text()
        reason = _reason(self.choices[0])
        yield {"type": "message_delta", "delta": reason, "usage": self._usage()}
        yield {"type": "message_stop"}

    def failed(self, error: ApiError) -> Iterator[Event]:
        """An error."""
        yield error.anthropic_body()

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _usage(self) -> dict[str, int]:
        prompt, cached, generated = counts(self.choices)
        return {
            "input_tokens": prompt - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": generated,
        }

    def _end_text(self) -> Iterator[Event]:
        if self._in_text:
            self._in_text = False
            yield self._stop()

    def _start(self, block: dict[str, Any]) -> Event:
        self._blocks += 1
        return {
            "type": "content_block_start",
            "index": self._blocks - 1,
            "content_block": block,
        }

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._blocks - 1, "delta": delta}

    def _stop(self) -> Event:
        return {"type": "content_block_stop", "index": self._blocks - 1}


def _reason(choice: Choice) -> dict[str, Any]:
    if choice.finish == "stop" and choice.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_string}
    return {"stop_reason": _REASONS[choice.finish], "stop_sequence": None}


def _tool_use(call: Call) -> dict[str, Any]:
    id = call.id or f"toolu_{secrets.token_hex(12)}"
    return {"type": "tool_use", "id": id, "name": call.name, "input": call.arguments}
