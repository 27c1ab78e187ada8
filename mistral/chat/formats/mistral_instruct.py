"""Mistral's own format, `[INST]` ... `[/INST]`, id for id as mistral-common encodes it.

v1 is for Mistral-7B-Instruct-v0.1 and v0.2. Its brackets are plain text, which a user can write,
too; it has no tools. v3 is for v0.3. Its brackets are control tokens, and it has tools. (No 7B
model uses v2.)

System messages have no turn of their own. v1 puts their text before the first user's message. v3
puts it, like the tools, before the last one, so in v3 the ids of a longer conversation begin with
those of a shorter one only until the user speaks again. Consecutive messages of one role are one
turn; each function's result is a turn of its own.

Source: https://github.com/mistralai/mistral-common, InstructTokenizerV1 and V3 and
InstructRequestNormalizer.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import groupby
from typing import Any

from mistral.chat.formats.base import ChatFormat, begin_ids
from mistral.chat.formats.call_objects import CALL_ID
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


class _MistralInstruct(ChatFormat):
    """Both versions in common."""

    strip_leading_space = True

    @abstractmethod
    def _carrier(self, users: list[int]) -> int:
        """Which of the users' turns carries the system message and the tools."""

    @abstractmethod
    def _encode_tools(self, tokenizer: Tokenizer, tools: list[dict]) -> list[int]:
        """Ids of the tools."""

    @abstractmethod
    def _encode_turn(self, tokenizer: Tokenizer, turn: CheckedMessage) -> list[int]:
        """Ids of one turn."""

    def begin(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Tools | None = None,
        generate: bool = True,
    ) -> list[int]:
        """Ids of a whole conversation.

        generate  adds no ids: it requires that the last message is not the assistant's
        """
        system, turns = _system_and_turns(check_messages(messages))
        if not turns or turns[0].role != "user":  # mistral-common adds an empty one, too
            turns.insert(0, CheckedMessage("the beginning", "user"))
        if generate and turns[-1].role == "assistant":
            raise ValueError(f"{turns[-1].where} is the last one: there is nothing to answer")
        tool_ids = self._encode_tools(tokenizer, tool_schemas(tools or ()))
        carrier = self._carrier([i for i, turn in enumerate(turns) if turn.role == "user"])
        ids = begin_ids(tokenizer)
        for i, turn in enumerate(turns):
            if i == carrier:
                ids += tool_ids
                if system:
                    turn = replace(turn, content=system + PARAGRAPH + turn.content)
            ids += self._encode_turn(tokenizer, turn)
        return ids

    def extend(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """Ids that follow the assistant's content: see `ChatFormat`."""
        checked = check_messages(messages, answered=True)
        for message in checked:
            if message.role == "system":
                raise ValueError(
                    f"{message.where}: in Mistral's format a system message cannot be added later; "
                    "encode the whole conversation"
                )
        _, turns = _system_and_turns(checked)
        if turns[0].role == "assistant" or turns[-1].role == "assistant":
            raise ValueError(
                f"{turns[0].where} to {turns[-1].where}: "
                "the first and the last must not be the assistant's"
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

    def can_extend(
        self, history: Sequence[Message], new: Sequence[Message], tools: Tools | None = None
    ) -> bool:
        """False with a new system message: it belongs to the first user's turn."""
        return not _has("system", new)

    def _carrier(self, users: list[int]) -> int:
        return users[0]

    def _encode_tools(self, tokenizer: Tokenizer, tools: list[dict]) -> list[int]:
        if tools:
            raise ValueError(
                "the format mistral_instruct_v1 has no tools; use a model made for ChatML or v0.3"
            )
        return []

    def _encode_turn(self, tokenizer: Tokenizer, turn: CheckedMessage) -> list[int]:
        if turn.role == "tool" or turn.calls:
            raise ValueError(
                f"{turn.where}: the format mistral_instruct_v1 has no calls and no results"
            )
        if turn.role == "user":
            return tokenizer.encode(f"[INST] {turn.content} [/INST]", bos=False)
        return [*tokenizer.encode(turn.content, bos=False), _control_id(tokenizer, "</s>")]


class MistralInstructV3(_MistralInstruct):
    """The format of Mistral-7B-Instruct-v0.3."""

    has_tools = True
    call_token = "[TOOL_CALLS]"

    def can_extend(
        self, history: Sequence[Message], new: Sequence[Message], tools: Tools | None = None
    ) -> bool:
        """False with a new system message, and if a new user's turn takes the old one or tools."""
        moves = bool(tools) or _has("system", history)
        user_speaks = any(_is_users(message) for message in new)
        return not _has("system", new) and not (moves and user_speaks)

    def _carrier(self, users: list[int]) -> int:
        return users[-1]

    def _encode_tools(self, tokenizer: Tokenizer, tools: list[dict]) -> list[int]:
        if not tools:
            return []
        listed = []
        for tool in tools:
            function = {
                "name": tool["function"]["name"],
                "description": tool["function"].get("description") or "",
                "parameters": tool["function"].get("parameters") or {},
            }
            listed.append({"type": "function", "function": function})
        return _bracketed(tokenizer, "AVAILABLE_TOOLS", to_json(listed))

    def _encode_turn(self, tokenizer: Tokenizer, turn: CheckedMessage) -> list[int]:
        if turn.role == "user":
            return _bracketed(tokenizer, "INST", turn.content)
        if turn.role == "tool":
            # mistral-common, too, writes an empty result as an empty object
            content = "{}" if turn.content == "" else _result_json(turn)
            result = f'{{"content": {content}, "call_id": {to_json(_call_id(turn))}}}'
            return _bracketed(tokenizer, "TOOL_RESULTS", result)
        # mistral-common, too, drops spaces at the end
        ids = tokenizer.encode(turn.content.rstrip(" "), bos=False)
        if turn.calls:  # next to text they are not mistral-common's, which refuses that
            calls = f"[{', '.join(map(_call_json, turn.calls))}]"
            ids += [_control_id(tokenizer, self.call_token), *tokenizer.encode(calls, bos=False)]
        return [*ids, _control_id(tokenizer, "</s>")]


def _system_and_turns(messages: Sequence[CheckedMessage]) -> tuple[str, list[CheckedMessage]]:
    """The system messages' text, and the turns: consecutive messages of one role are joined."""
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
    """The message; the user says an error that belongs to no call, because a result needs an id."""
    nameless = message.error is not None and not message.name and message.call_id is None
    return replace(message, role="user", content=message.error) if nameless else message


def _call_json(call: FunctionCall) -> str:
    arguments = call.arguments
    arguments = _on_one_line(arguments) if isinstance(arguments, str) else to_json(arguments)
    id = "" if call.id is None else f', "id": {to_json(_short_id(call.id))}'
    return f'{{"name": {to_json(call.name)}, "arguments": {arguments}{id}}}'


def _result_json(turn: CheckedMessage) -> str:
    return to_json(turn.error) if turn.error is not None else _on_one_line(turn.result_json())


def _on_one_line(text: str) -> str:
    """JSON as mistral-common writes it, unless that would lose digits: then as it is."""

    def exact(written: str) -> Any:
        return json.loads(written, parse_float=Decimal)

    written = to_json(json.loads(text))
    is_number = isinstance(exact(text), Decimal)
    return text if is_number or exact(written) != exact(text) else written


def _call_id(turn: CheckedMessage) -> str:
    if turn.call_id is None:
        raise ValueError(
            f"{turn.where} has no tool_call_id, which the format mistral_instruct_v3 needs"
        )
    return _short_id(turn.call_id)


def _short_id(id: str) -> str:
    """The id, if it has nine letters or digits, as Mistral's models expect; or nine for it."""
    return id if CALL_ID.fullmatch(id) else hashlib.sha256(id.encode()).hexdigest()[:9]


def _bracketed(tokenizer: Tokenizer, name: str, text: str) -> list[int]:
    start = _control_id(tokenizer, f"[{name}]")
    end = _control_id(tokenizer, f"[/{name}]")
    return [start, *tokenizer.encode(text, bos=False), end]


def _control_id(tokenizer: Tokenizer, text: str) -> int:
    id = tokenizer.control_id(text)
    if id is None:
        raise ValueError(
            f"the tokenizer has no {text}: this checkpoint was not made for this Mistral format; "
            "choose another chat format"
        )
    return id


def _has(role: str, messages: Sequence[Message]) -> bool:
    return any(message.get("role") == role for message in messages)


def _is_users(message: Message) -> bool:
    """Whether the user says it: see `_by_the_user`."""
    return message.get("role") == "user" or not (message.get("name") or message.get("tool_call_id"))
