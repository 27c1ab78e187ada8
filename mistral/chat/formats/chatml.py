"""Messages to ids, in ChatML: `<|im_start|>` role, newline, content, `<|im_end|>`, newline.

A conversation becomes segments first, each a control token's id or text, and every text is encoded
on its own. It is never one string that is searched for control tokens: whatever a user, a tool or
the model writes, text stays text.
"""

from collections.abc import Sequence

from mistral.chat.formats.messages import (
    CheckedMessage,
    Message,
    Tools,
    check_messages,
    tool_schemas,
)
from mistral.chat.formats.prompts import tool_prompt, write_call, write_error, write_result
from mistral.tokenizer import Tokenizer


class ChatML:
    """The default format, well-formed: tools and results as JSON, the results of several calls in
    one turn.

    The methods are those of `mistral.chat.formats.choose.ChatFormat`. What was written stays: the
    ids of a longer conversation always begin with those of a shorter one.
    """

    tool_style = "json"  # see `prompts.tool_prompt`
    reply_begins_text = False
    spelled_ends = ("<|im_end|>", "<|im_start|>")
    has_tools = True
    call_token = None

    def begin(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Tools | None = None,
        generate: bool = True,
    ) -> list[int]:
        """Ids of a whole conversation; tools are described in a system turn of their own before the
        messages.
        """
        checked = check_messages(messages)
        ids = tokenizer.encode("")
        if tools:
            ids += encode_turn(
                tokenizer, "system", tool_prompt(tool_schemas(tools), self.tool_style)
            )
        ids += self._encode_turns(tokenizer, checked)
        return ids + begin_turn(tokenizer, "assistant") if generate else ids

    def go_on(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """Ids behind content that the assistant has written: the end of its turn, the new messages,
        its next turn.
        """
        turns = self._encode_turns(tokenizer, check_messages(messages, answered=True))
        return end_turn(tokenizer) + turns + begin_turn(tokenizer, "assistant")

    def can_go_on(
        self, history: Sequence[Message], new: Sequence[Message], tools: Tools | None = None
    ) -> bool:
        """True: no turn depends on what follows it."""
        return True

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """`<|im_end|>`, the checkpoint's own, `</s>`, and `<|im_start|>`: to begin a turn is to end
        the one before.
        """
        start, end = _control_tokens(tokenizer)
        ids = dict.fromkeys([end, *tokenizer.stop_ids, start, tokenizer.control_id("</s>")])
        return tuple(id for id in ids if id is not None)

    def _encode_turns(self, tokenizer: Tokenizer, messages: Sequence[CheckedMessage]) -> list[int]:
        ids: list[int] = []
        results = ""
        for message, following in zip(messages, [*messages[1:], None]):
            if message.role == "tool":
                results += _result(message)
                if following is None or following.role != "tool":
                    ids += encode_turn(tokenizer, "tool", results)
                    results = ""
            else:
                calls = [write_call(call.name, call.arguments) for call in message.calls or ()]
                parts = [message.content] if message.content else []
                ids += encode_turn(tokenizer, message.role, "\n".join(parts + calls))
        return ids


def encode_turn(tokenizer: Tokenizer, role: str, content: str) -> list[int]:
    """Ids of one whole turn."""
    # Behind a control token every text has the leading space that words have, the newline included:
    # Hermes was trained with Hugging Face's legacy tokenizer.
    return between_control_tokens(tokenizer, f"{role}\n{content}") + tokenizer.encode(
        "\n", bos=False
    )


def between_control_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of text between the two control tokens of a turn."""
    start, end = _control_tokens(tokenizer)
    return [start, *tokenizer.encode(text, bos=False), end]


def begin_turn(tokenizer: Tokenizer, role: str) -> list[int]:
    """Ids of the beginning of a turn whose content is still to come."""
    return [_control_tokens(tokenizer)[0], *tokenizer.encode(f"{role}\n", bos=False)]


def end_turn(tokenizer: Tokenizer) -> list[int]:
    """Ids that complete a turn behind its content."""
    return [_control_tokens(tokenizer)[1], *tokenizer.encode("\n", bos=False)]


def _control_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    start, end = (tokenizer.control_id(text) for text in ("<|im_start|>", "<|im_end|>"))
    if start is None or end is None:
        raise ValueError(
            "the tokenizer has no <|im_start|> and <|im_end|>: this checkpoint was not made for "
            "ChatML"
        )
    return start, end


def _result(message: CheckedMessage) -> str:
    """The text of a function's result, or of what went wrong, in its tag."""
    if message.error is not None:
        return write_error(message.error)
    if message.name is None:
        raise ValueError(f"{message.where} has no name, and no call before it has its tool_call_id")
    return write_result(message.name, message.result())
