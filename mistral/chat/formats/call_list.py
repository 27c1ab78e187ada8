"""Calls in Mistral's own form: behind the token `[TOOL_CALLS]`, a whole answer is a list of calls
in JSON.

    [{"name": ..., "arguments": {...}, "id": nine letters or digits}, ...]

A model may leave out the "id". A call without one, or with one that the format does not take, gets
one here, for its result must name it.
"""

import json
from collections.abc import Sequence
from typing import Any

from mistral.chat.answer import Answer
from mistral.chat.events import Call, Error, Event, Text
from mistral.chat.formats.call_objects import call_of, flattened
from mistral.chat.formats.literals import read_literals
from mistral.chat.formats.mistral_instruct import CALL_ID


class CallListStream:
    """The events of an answer that is text or a list of calls; used like `ToolCallStream`.

    number  of the answer in the conversation, which the ids of its calls are made from
    """

    def __init__(self, answer: Answer, number: int):
        self._answer, self._number = answer, number

    def feed(self, piece: str) -> list[Event]:
        """Text as it comes; calls when all of them are there."""
        return [] if self._answer.is_calls else [Text(piece)]

    def finish(self) -> list[Event]:
        """The calls, if the answer is a list of them."""
        return read_call_list(self._answer.text, self._number) if self._answer.is_calls else []


def read_call_list(text: str, number: int) -> list[Event]:
    """All calls of a list, or one Error where a part of it cannot be read.

    No text makes it raise.
    """
    whole = 0, len(text)
    try:
        values = flattened(read_literals(text))
        named = [(*call_of(value), value.get("id")) for value in values]
    except ValueError as error:
        return [Error(str(error), whole, text)]
    calls: list[Event] = []
    taken: set[str] = set()
    for i, (name, arguments, id) in enumerate(named):
        if not isinstance(id, str) or not CALL_ID.fullmatch(id) or id in taken:
            id = f"{number:06d}{i:03d}"
        taken.add(id)
        calls.append(Call(name, arguments, whole, id))
    return calls or [Error("an empty list of calls", whole, text)]


def assistant_message(text: str, calls: Sequence[Call]) -> dict[str, Any]:
    """What the assistant said, as a message; calls with ids take the place of their text."""
    if not calls or calls[0].id is None:
        return {"role": "assistant", "content": text}
    written = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
        }
        for call in calls
    ]
    return {"role": "assistant", "content": "", "tool_calls": written}
