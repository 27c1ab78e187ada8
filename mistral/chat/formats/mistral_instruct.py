"""Mistral's own format, `[INST]` ... `[/INST]`, id for id as mistral-common encodes it; in two
versions.

v1 is for Mistral-7B-Instruct-v0.1 and v0.2. Its brackets are plain text, which a user can write as
well as anybody; it has no tools. v3 is for v0.3, whose brackets are control tokens, and which has
tools. (v2 is for none of the 7B models.)

System messages have no turn: their text stands before the first user's message in v1, before the
last one in v3, where the tools stand, too. So in v3 the ids of a longer conversation begin with
those of a shorter one only until the user speaks again. Messages of one role in a row are one turn;
of functions' results each is its own.

Source: https://github.com/mistralai/mistral-common, InstructTokenizerV1 and V3 and
InstructRequestNormalizer.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from mistral.chat.formats.messages import (
    PARAGRAPH,
    CheckedMessage,
    FunctionCall,
    Message,
    Tools,
    check_messages,
    tool_schemas,
)
from mistral.chat.formats.prompts import to_json
from mistral.tokenizer import Tokenizer

CALL_ID = re.compile("[A-Za-z0-9]{9}")  # what the model was trained with


class _MistralInstruct:
    """What both versions have in common. The methods are those of
    `mistral.chat.formats.choose.ChatFormat`.

    A version adds `_carrier`, the index of the user's turn that carries the system message and the
    tools, and the ids of the tools and of a turn, `_encode_tools` and `_encode_turn`.
    """

    reply_begins_text = True
    spelled_ends = ()
    has_tools = False
    call_token: str | None = None

    def begin(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Tools | None = None,
        generate: bool = True,
    ) -> list[int]:
        """Ids of a whole conversation.

        `generate` adds none: it demands that the last message can be answered.
        """
        system, turns = _system_and_turns(check_messages(messages))
        if not turns or turns[0].role != "user":  # mistral-common puts an empty one there, too
            turns.insert(0, CheckedMessage("the beginning", "user"))
        if generate and turns[-1].role == "assistant":
            raise ValueError(f"{turns[-1].where} is the last one: there is nothing to answer")
        tool_ids = self._encode_tools(tokenizer, tool_schemas(tools or ()))
        carrier = self._carrier([i for i, turn in enumerate(turns) if turn.role == "user"])
        ids = tokenizer.encode("")
        for i, turn in enumerate(turns):
            if i == carrier and system:
                turn = replace(turn, content=system + PARAGRAPH + turn.content)
            ids += (tool_ids if i == carrier else []) + self._encode_turn(tokenizer, turn)
        return ids

    def go_on(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """Ids behind content that the assistant has written: the end of its turn, and the new
        messages.
        """
        checked = check_messages(messages, answered=True)
        for message in checked:
            if message.role == "system":
                raise ValueError(
                    f"{message.where}: Mistral's format has a system message only from the "
                    f"beginning on"
                )
        _, turns = _system_and_turns(checked)
        if turns[0].role == "assistant" or turns[-1].role == "assistant":
            raise ValueError(
                f"{turns[0].where} to {turns[-1].where}: they must begin and end with others' "
                f"messages"
            )
        ids = [_control_id(tokenizer, "</s>")]
        for turn in turns:
            ids += self._encode_turn(tokenizer, turn)
        return ids

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """`</s>`, and the checkpoint's own."""
        return tuple(dict.fromkeys([_control_id(tokenizer, "</s>"), *tokenizer.stop_ids]))


class MistralInstructV1(_MistralInstruct):
    """The format of Mistral-7B-Instruct-v0.1 and v0.2."""

    def can_go_on(
        self, history: Sequence[Message], new: Sequence[Message], tools: Tools | None = None
    ) -> bool:
        """False with a new system message: it belongs to the first user's turn."""
        return not _has("system", new)

    def _carrier(self, users: list[int]) -> int:
        return users[0]

    def _encode_tools(self, tokenizer: Tokenizer, tools: list[dict]) -> list[int]:
        if tools:
            raise ValueError(
                "the format mistral_instruct_v1 has no tools; a model made for ChatML or v0.3 has"
            )
        return []

    def _encode_turn(self, tokenizer: Tokenizer, turn: CheckedMessage) -> list[int]:
        if turn.role == "tool" or turn.calls:
            raise ValueError(
                f"{turn.where}: the format mistral_instruct_v1 has no functions to call"
            )
        if turn.role == "user":
            return tokenizer.encode(f"[INST] {turn.content} [/INST]", bos=False)
        return [*tokenizer.encode(turn.content, bos=False), _control_id(tokenizer, "</s>")]


class MistralInstructV3(_MistralInstruct):
    """The format of Mistral-7B-Instruct-v0.3."""

    has_tools = True
    call_token = "[TOOL_CALLS]"

    def can_go_on(
        self, history: Sequence[Message], new: Sequence[Message], tools: Tools | None = None
    ) -> bool:
        """False with a new system message, and where the user speaks again while there is one, or
        tools: they move.
        """
        moves = bool(tools) or _has("system", history)
        return not _has("system", new) and not (
            moves and any(_is_users(message) for message in new)
        )

    def _carrier(self, users: list[int]) -> int:
        return users[-1]

    def _encode_tools(self, tokenizer: Tokenizer, tools: list[dict]) -> list[int]:
        if not tools:
            return []
        functions = [tool["function"] for tool in tools]
        listed = [
            {
                "type": "function",
                "function": {
                    "name": function["name"],
                    "description": function.get("description") or "",
                    "parameters": function.get("parameters") or {},
                },
            }
            for function in functions
        ]
        return _bracketed(tokenizer, "AVAILABLE_TOOLS", to_json(listed))

    def _encode_turn(self, tokenizer: Tokenizer, turn: CheckedMessage) -> list[int]:
        if turn.role == "user":
            return _bracketed(tokenizer, "INST", turn.content)
        if turn.role == "tool":
            # mistral-common takes an empty result for an empty object
            result = {} if turn.content == "" else turn.result()
            return _bracketed(
                tokenizer, "TOOL_RESULTS", to_json({"content": result, "call_id": _call_id(turn)})
            )
        end = _control_id(tokenizer, "</s>")
        if not turn.calls:  # mistral-common, too, leaves out spaces at the end
            return [*tokenizer.encode(turn.content.rstrip(" "), bos=False), end]
        if turn.content:
            raise ValueError(
                f"{turn.where} has text and calls; the format mistral_instruct_v3 has one or the "
                f"other"
            )
        calls = to_json([_call(turn.where, call) for call in turn.calls])
        return [_control_id(tokenizer, self.call_token), *tokenizer.encode(calls, bos=False), end]


def _system_and_turns(messages: Sequence[CheckedMessage]) -> tuple[str, list[CheckedMessage]]:
    """The system messages' text, and the other messages, those of one role in a row as one."""
    system = PARAGRAPH.join(
        message.content for message in messages if message.role == "system" and message.content
    )
    turns: list[CheckedMessage] = []
    for role, group in groupby(map(_by_the_user, messages), key=lambda message: message.role):
        row = list(group)
        if role == "tool":
            turns += row
        elif role != "system":
            content = PARAGRAPH.join(message.content for message in row if message.content)
            calls = tuple(call for message in row for call in message.calls or ())
            turns.append(replace(row[0], content=content, calls=calls))
    return system, turns


def _by_the_user(message: CheckedMessage) -> CheckedMessage:
    """An error that belongs to no call cannot be a result, which has a call's id: the user says
    it.
    """
    nameless = message.error is not None and not message.name and message.call_id is None
    return replace(message, role="user", content=message.error) if nameless else message


def _call(where: str, call: FunctionCall) -> dict[str, Any]:
    arguments = json.loads(call.arguments) if isinstance(call.arguments, str) else call.arguments
    written = {"name": call.name, "arguments": arguments}
    return written if call.id is None else written | {"id": _checked_id(where, call.id)}


def _call_id(turn: CheckedMessage) -> str:
    if turn.call_id is None:
        raise ValueError(
            f"{turn.where} has no tool_call_id, which the format mistral_instruct_v3 needs"
        )
    return _checked_id(turn.where, turn.call_id)


def _checked_id(where: str, id: str) -> str:
    if not CALL_ID.fullmatch(id):
        raise ValueError(
            f"{where}: a call's id has 9 letters a-z A-Z or digits in Mistral's format, unlike "
            f"{id!r}"
        )
    return id


def _bracketed(tokenizer: Tokenizer, name: str, text: str) -> list[int]:
    start, end = _control_id(tokenizer, f"[{name}]"), _control_id(tokenizer, f"[/{name}]")
    return [start, *tokenizer.encode(text, bos=False), end]


def _control_id(tokenizer: Tokenizer, text: str) -> int:
    id = tokenizer.control_id(text)
    if id is None:
        raise ValueError(
            f"the tokenizer has no {text}: this checkpoint was not made for this Mistral format"
        )
    return id


def _has(role: str, messages: Sequence[Message]) -> bool:
    return any(message.get("role") == role for message in messages)


def _is_users(message: Message) -> bool:
    """Whether the user says it: see `_by_the_user`."""
    return message.get("role") == "user" or not (message.get("name") or message.get("tool_call_id"))
