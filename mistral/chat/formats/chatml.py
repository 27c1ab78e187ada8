"""Messages to ids, in ChatML: `<|im_start|>` role, newline, content, `<|im_end|>`, newline.

A conversation is first a list of segments, each the id of a control token or a string, and every
string is encoded by itself. It never is one string that is searched for control tokens: text that
a user, a tool or the model writes stays text.
"""

from collections.abc import Sequence

from mistral.chat.formats.base import ChatFormat, begin_ids
from mistral.chat.formats.messages import (
    CheckedMessage,
    Message,
    Tools,
    check_messages,
    tool_schemas,
)
from mistral.chat.formats.prompts import tool_prompt, write_call, write_error, write_json_result
from mistral.tokenizer import Tokenizer


class ChatML(ChatFormat):
    """The default format: tools and results are valid JSON, the results of several calls one turn.

    No turn depends on the turns after it, so the ids of a longer conversation always begin with
    those of a shorter one.
    """

    has_tools = True
    spelled_ends = ("<|im_end|>", "<|im_start|>")
    tool_style = "json"  # see `prompts.tool_prompt`

    def begin(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Tools | None = None,
        generate: bool = True,
    ) -> list[int]:
        """Ids of a whole conversation; a system turn before it describes the tools."""
        checked = check_messages(messages)
        ids = begin_ids(tokenizer)
        if tools:
            prompt = tool_prompt(tool_schemas(tools), self.tool_style)
            ids += encode_turn(tokenizer, "system", prompt)
        ids += self._encode_turns(tokenizer, checked)
        return ids + begin_turn(tokenizer, "assistant") if generate else ids

    def extend(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """Ids that follow the assistant's content: see `ChatFormat`."""
        turns = self._encode_turns(tokenizer, check_messages(messages, answered=True))
        return end_turn(tokenizer) + turns + begin_turn(tokenizer, "assistant")

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """`<|im_end|>`, the checkpoint's own, `</s>`, and `<|im_start|>`, which begins a turn."""
        start, end = _control_tokens(tokenizer)
        ids = dict.fromkeys([end, *tokenizer.stop_ids, start, tokenizer.control_id("</s>")])
        return tuple(id for id in ids if id is not None)

    def _encode_turns(self, tokenizer: Tokenizer, messages: Sequence[CheckedMessage]) -> list[int]:
        ids: list[int] = []
        results = ""  # of the calls of one answer, in one turn
        for message, following in zip(messages, [*messages[1:], None]):
            if message.role == "tool":
                results += _result(message)
                if following is None or following.role != "tool":
                    ids += encode_turn(tokenizer, "tool", results)
                    results = ""
            else:
                parts = [message.content] if message.content else []
                parts += [write_call(call.name, call.arguments) for call in message.calls or ()]
                ids += encode_turn(tokenizer, message.role, "\n".join(parts))
        return ids


def encode_turn(tokenizer: Tokenizer, role: str, content: str) -> list[int]:
    """Ids of one whole turn."""
    turn = between_control_tokens(tokenizer, f"{role}\n{content}")
    # With the tokenizer of Hermes every text after a control token has the leading space of a word,
    # the newline included: Hugging Face calls it legacy.
    return turn + tokenizer.encode_after_control("\n")


def between_control_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of text between the two control tokens of a turn."""
    start, end = _control_tokens(tokenizer)
    return [start, *tokenizer.encode_after_control(text), end]


def begin_turn(tokenizer: Tokenizer, role: str) -> list[int]:
    """Ids of the beginning of a turn, up to its content."""
    return [_control_tokens(tokenizer)[0], *tokenizer.encode_after_control(f"{role}\n")]


def end_turn(tokenizer: Tokenizer) -> list[int]:
    """Ids that end a turn after its content."""
    return [_control_tokens(tokenizer)[1], *tokenizer.encode_after_control("\n")]


def _control_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    start = tokenizer.control_id("<|im_start|>")
    end = tokenizer.control_id("<|im_end|>")
    if start is None or end is None:
        raise ValueError(
            "the tokenizer has no <|im_start|> and <|im_end|>: this checkpoint was not made for "
            "ChatML; choose another chat format"
        )
    return start, end


def _result(message: CheckedMessage) -> str:
    """A function's result, or its error, in a tag."""
    if message.error is not None:
        return write_error(message.error)
    if message.name is None and "<tool_response>" in str(message.content):
        return message.content  # in its tag already, as the makers' own programs send it
    if message.name is None:
        raise ValueError(
            f"{message.where} has no name, and no earlier call has its tool_call_id: name it"
        )
    return write_json_result(message.name, message.result_json())
