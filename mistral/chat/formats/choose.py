"""The chat formats by name, and the one door to them: messages to ids."""

from collections.abc import Sequence
from typing import Protocol

from mistral.chat.formats.chatml import ChatML
from mistral.chat.formats.hermes_tool_use import HermesToolUse
from mistral.chat.formats.messages import Message, Tools
from mistral.chat.formats.mistral_instruct import MistralInstructV1, MistralInstructV3
from mistral.tokenizer import Tokenizer


class ChatFormat(Protocol):
    """How a conversation is written. Every method raises ValueError for what it cannot write, and
    names the message.

    reply_begins_text  the assistant's content is encoded as the beginning of a text, so that the
                       first token a model writes has a leading space which is not part of it:
                       decode with `tokenizer.stream(start=True)`
    spelled_ends       texts that end the assistant's turn as its stop tokens do: some fine-tunes
                       spell the end
    has_tools          whether there is a form for functions, their calls and their results
    call_token         the control token behind which an answer is a list of calls; None: calls
                       stand in the text, in `<tool_call>`
    """

    reply_begins_text: bool
    spelled_ends: tuple[str, ...]
    has_tools: bool
    call_token: str | None

    def begin(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Tools | None = None,
        generate: bool = True,
    ) -> list[int]:
        """Ids of a whole conversation; `generate`: up to where the assistant's content begins."""

    def go_on(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """Ids behind content that the assistant has written: the end of its turn, the new messages,
        its next turn.

        The content is without the token that ended it.
        """

    def can_go_on(
        self, history: Sequence[Message], new: Sequence[Message], tools: Tools | None = None
    ) -> bool:
        """Whether `begin` would have given the same ids as `go_on`.

        history  the messages before the assistant's
        new      those behind it

        True:  begin(history + [assistant's] + new) == begin(history) + its content's ids +
               go_on(new).
        False: `go_on` leaves the earlier turns as they were; the format itself would write them in
        another way now.
        """

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The tokens that end the assistant's turn."""


FORMATS: dict[str, ChatFormat] = {
    "chatml": ChatML(),
    "hermes_tool_use": HermesToolUse(),
    "mistral_instruct_v1": MistralInstructV1(),
    "mistral_instruct_v3": MistralInstructV3(),
}


def choose_format(tokenizer: Tokenizer) -> str:
    """The name of the format that the tokens of a checkpoint were made for.

    chatml where there are `<|im_start|>` and `<|im_end|>`, mistral_instruct_v3 where `[INST]` is a
    control token, otherwise mistral_instruct_v1. Models that are not for chat cannot be told from
    the last.
    """
    if all(tokenizer.control_id(text) is not None for text in ("<|im_start|>", "<|im_end|>")):
        return "chatml"
    return (
        "mistral_instruct_v1" if tokenizer.control_id("[INST]") is None else "mistral_instruct_v3"
    )


def chat_format(tokenizer: Tokenizer, name: str | None = None) -> ChatFormat:
    """The format of this name;

    None: the one that `choose_format` names. ValueError for a name that is none.
    """
    name = choose_format(tokenizer) if name is None else name
    if name not in FORMATS:
        raise ValueError(f"there is no chat format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Tools | None = None,
    format: str | None = None,
    generate: bool = True,
) -> list[int]:
    """Ids of a conversation.

    messages  {"role", "content"} each, as in OpenAI's interface: see
              `mistral.chat.formats.messages`
    tools     functions that the model may call, each a `Tool` or a schema of one
    format    a name in `FORMATS`; None: the one that `choose_format` names
    generate  end where the assistant's next content begins

    There is one begin-of-text token, and text that spells control tokens stays text, in every role.
    Raises ValueError for another format, for one that the tokenizer has no tokens for, and for
    messages that are malformed or that the format has no form for.
    """
    return chat_format(tokenizer, format).begin(tokenizer, messages, tools, generate)


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Tools | None = None,
    format: str | None = None,
    generate: bool = True,
) -> str:
    """What `encode_chat` encodes, as one string for people; in it, text that spells a control token
    looks like one.
    """
    ids = encode_chat(tokenizer, messages, tools=tools, format=format, generate=generate)
    return tokenizer.decode(ids, control=True)
