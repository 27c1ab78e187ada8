"""Calls in Mistral's own form: after the token `[TOOL_CALLS]` the answer is a list in JSON.

    [{"name": ..., "arguments": {...}, "id": nine letters or digits}, ...]

A model may leave out the "id". A call without a valid one gets one here, because its result must
name it.
"""

import json
from collections.abc import Sequence
from typing import Any

from mistral.chat.events import Call, Error
from mistral.chat.formats.call_objects import CALL_ID, call_of, written_lists
from mistral.chat.formats.literals import read_literals


def read_call_list(text: str, number: int) -> list[Call] | list[Error]:
    """All calls of a list, or one Error if a part of it cannot be parsed. No text makes it raise.

    number  of the answer in the conversation: part of the ids that are created here
    """
    whole = (0, len(text))
    try:
        named = [(*call_of(value), value.get("id")) for value in _flattened(read_literals(text))]
    except ValueError as error:
        return [Error(str(error), whole, text)]
    written = written_lists(text)
    if len(written) != len(named):
        written = [None] * len(named)
    calls: list[Call] = []
    taken: set[str] = set()
    for i, (name, arguments, id) in enumerate(named):
        if not isinstance(id, str) or not CALL_ID.fullmatch(id) or id in taken:
            id = f"{number:06d}{i:03d}"
        taken.add(id)
        calls.append(Call(name, arguments, whole, id, written[i]))
    return calls or [Error("an empty list of calls", whole, text)]


def call_list_message(calls: Sequence[Call]) -> dict[str, Any]:
    """An assistant's message of calls with ids."""
    written = []
    for call in calls:
        function = {"name": call.name, "arguments": json.dumps(call.arguments)}
        written.append({"id": call.id, "type": "function", "function": function})
    return {"role": "assistant", "content": "", "tool_calls": written}


def _flattened(values: list[Any]) -> list[Any]:
    """The values, with the items of lists among them one by one."""
    return [item for value in values for item in (value if isinstance(value, list) else [value])]
