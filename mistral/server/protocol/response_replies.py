"""OpenAI's responses: answers to replies and events."""

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from mistral.chat.events import Call, Text
from mistral.server.choice import Choice, Delta
from mistral.server.protocol.chat_replies import arguments_json, call_id
from mistral.server.protocol.errors import ApiError
from mistral.server.protocol.reply import Event, Reply
from mistral.server.protocol.response_items import messages_of
from mistral.server.protocol.responses import ResponsesBody, Stored
from mistral.server.protocol.tokens_as_text import token_logprob
from mistral.server.protocol.usage import counts

Item = dict[str, Any]


class ResponsesReply(Reply):
    """The reply to one request. Its output is made while the answer comes, streamed or not.

    messages  of the conversation, without the instructions
    stored    where they go, with the answer
    """

    names_events: ClassVar[bool] = True
    last_line: ClassVar[str | None] = None

    def __init__(
        self,
        model: str,
        choices: Sequence[Choice],
        body: ResponsesBody,
        messages: Sequence[dict[str, Any]],
        stored: Stored,
    ):
        super().__init__(choices)
        self._messages = messages
        self._stored = stored
        self.id = f"resp_{secrets.token_hex(12)}"
        self._model = model
        self._body = body
        self._created = int(time.time())
        self._output: list[Item] = []
        self._in_text = False
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is not certain yet
        self._sequence = 0

    def whole(self) -> dict[str, Any]:
        """The reply when the answer has ended."""
        for _ in self._end_text():
            pass
        self._store()
        return self._response()

    def begin(self) -> Iterator[Event]:
        """The response without output."""
        yield self._event("response.created", response=self._response())
        yield self._event("response.in_progress", response=self._response())

    def note(self, delta: Delta) -> None:
        """Add to the output."""
        for _ in self.chunks(delta):
            pass

    def chunks(self, delta: Delta) -> Iterator[Event]:
        """Items, and their text."""
        tokenizer = self.choices[0].tokenizer
        self._logprobs += [token_logprob(tokenizer, token) for token in delta.tokens]
        for event in delta.events:
            if isinstance(event, Text):
                yield from self._text(event.text, self._logprobs)
            else:  # the API has no place for the log-probabilities of a call
                yield from self._end_text()
                yield from self._call(event)
            self._logprobs = []

    def end(self) -> Iterator[Event]:
        """The whole response."""
        yield from self._end_text()
        self._store()
        response = self._response()
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, error: ApiError) -> Iterator[Event]:
        """An error. OpenAI's own clients raise it because of the key "error"."""
        body = error.body()["error"]
        yield self._event("error", **{key: body[key] for key in ("code", "message", "param")}) | {
            "error": body
        }

    def _store(self) -> None:
        if self._body.store is not False:
            self._stored.put(self.id, [*self._messages, *messages_of(self._output)])

    def _text(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        if not self._in_text:
            self._in_text = True
            item = {
                "type": "message",
                "id": f"msg_{secrets.token_hex(12)}",
                "role": "assistant",
                "status": "in_progress",
                "content": [],
            }
            yield self._added(item)
            item["content"].append({"type": "output_text", "text": "", "annotations": []})
            part = dict(item["content"][0])
            yield self._event("response.content_part.added", part=part, **self._place())
        part = self._output[-1]["content"][0]
        part["text"] += text
        if self.choices[0].request.top_logprobs is not None:
            part["logprobs"] = [*part.get("logprobs", ()), *logprobs]
        yield self._event(
            "response.output_text.delta", delta=text, logprobs=logprobs, **self._place()
        )

    def _end_text(self) -> Iterator[Event]:
        if not self._in_text:
            return
        self._in_text = False
        item = self._output[-1]
        part = item["content"][0]
        item["status"] = "incomplete" if self.choices[0].finish == "length" else "completed"
        text = {"text": part["text"], "logprobs": part.get("logprobs", [])}
        yield self._event("response.output_text.done", **text, **self._place())
        yield self._event("response.content_part.done", part=part, **self._place())
        yield self._done()

    def _call(self, call: Call) -> Iterator[Event]:
        arguments = arguments_json(call)
        item = {
            "type": "function_call",
            "id": f"fc_{secrets.token_hex(12)}",
            "call_id": call_id(call),
            "name": call.name,
            "arguments": "",
            "status": "in_progress",
        }
        yield self._added(dict(item))
        self._output[-1] = item | {"arguments": arguments, "status": "completed"}
        place = {"item_id": item["id"], "output_index": len(self._output) - 1}
        kind = "response.function_call_arguments"
        yield self._event(f"{kind}.delta", delta=arguments, **place)
        yield self._event(f"{kind}.done", arguments=arguments, name=call.name, **place)
        yield self._done()

    def _added(self, item: Item) -> Event:
        self._output.append(item)
        index = len(self._output) - 1
        return self._event("response.output_item.added", item=dict(item), output_index=index)

    def _done(self) -> Event:
        index = len(self._output) - 1
        return self._event("response.output_item.done", item=self._output[-1], output_index=index)

    def _place(self) -> dict[str, Any]:
        """Where the text is that is being written."""
        return {
            "item_id": self._output[-1]["id"],
            "output_index": len(self._output) - 1,
            "content_index": 0,
        }

    def _event(self, type: str, **fields: Any) -> Event:
        self._sequence += 1
        return {"type": type, "sequence_number": self._sequence - 1, **fields}

    def _response(self) -> dict[str, Any]:
        body = self._body
        finish = self.choices[0].finish
        status = "in_progress" if finish is None else "completed"
        reason = None
        if finish == "length":
            status = "incomplete"
            reason = {"reason": "max_output_tokens"}
        choice = body.tool_choice or "auto"
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": reason,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._model,
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "store": body.store is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": _format(body)},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [{"parameters": None, "strict": None} | tool for tool in tools],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "metadata": body.metadata or {},
            "usage": None if finish is None else _usage(self.choices),
        }


def _format(body: ResponsesBody) -> dict[str, Any]:
    format = None if body.text is None else body.text.format
    if format is None:
        return {"type": "text"}
    return format.model_dump(by_alias=True, exclude_none=True)


def _usage(choices: Sequence[Choice]) -> dict[str, Any]:
    prompt, cached, generated = counts(choices)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + generated,
    }
