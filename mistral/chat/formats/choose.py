"""The chat formats by name, and the functions that encode messages with one of them."""

import warnings
import weakref
from collections.abc import Sequence

from mistral.chat.formats.base import ChatFormat
from mistral.chat.formats.chatml import ChatML
from mistral.chat.formats.hermes_tool_use import HermesToolUse
from mistral.chat.formats.messages import Message, Tools
from mistral.chat.formats.mistral_instruct import MistralInstructV1, MistralInstructV3
from mistral.tokenizer import Tokenizer

FORMATS: dict[str, ChatFormat] = {
    "chatml": ChatML(),
    "hermes_tool_use": HermesToolUse(),
    "mistral_instruct_v1": MistralInstructV1(),
    "mistral_instruct_v3": MistralInstructV3(),
}


_CHATML = ("<|im_start|>", "<|im_end|>")
# What a chat template of another format contains
_MARKS = {
    "<|start_header_id|>": "Llama 3's",
    "<<SYS>>": "Llama 2's",
    "<start_of_turn>": "Gemma's",
    "GPT4 Correct": "OpenChat's",
    "<|user|>": "Zephyr's",
    "### Instruction": "Alpaca's",
    "USER:": "Vicuna's",
    "<|im_start|>": "ChatML, whose control tokens the tokenizer lacks",
}
_WARNED: weakref.WeakSet[Tokenizer] = weakref.WeakSet()


def choose_format(tokenizer: Tokenizer) -> str:
    """The name of the format of the checkpoint's chat template, or else of its control tokens.

    Template: chatml if it writes `<|im_start|>` and the tokenizer has that, mistral_instruct_v3 or
    v1 if it writes `[INST]`. A template of another format is not followed: one warning says which
    format is used in its place.

    Control tokens: chatml if the checkpoint has `<|im_start|>` and `<|im_end|>`,
    mistral_instruct_v3 if it has `[INST]`, otherwise mistral_instruct_v1: a base model, which has
    no format, looks the same as v1.
    """
    is_chatml = all(tokenizer.control_id(text) is not None for text in _CHATML)
    instruct = "mistral_instruct_v1"
    if tokenizer.control_id("[INST]") is not None:
        instruct = "mistral_instruct_v3"
    by_tokens = "chatml" if is_chatml else instruct
    template = tokenizer.chat_templates.get("default")
    if template is None:
        return by_tokens
    if is_chatml and _CHATML[0] in template:
        return "chatml"
    if "[INST]" in template and "<<SYS>>" not in template:
        return instruct
    if tokenizer not in _WARNED:
        _WARNED.add(tokenizer)
        looks = next((what for mark, what in _MARKS.items() if mark in template), "unknown")
        warnings.warn(
            f"the format of the checkpoint's chat template ({looks}) is not one of "
            f"{', '.join(FORMATS)}; {by_tokens} is used. format= (--format) chooses another",
            stacklevel=3,
        )
    return by_tokens


def chat_format(tokenizer: Tokenizer, name: str | None = None) -> ChatFormat:
    """The format of this name; None: chosen by `choose_format`. ValueError for an unknown name."""
    name = choose_format(tokenizer) if name is None else name
    if name not in FORMATS:
        raise ValueError(f"there is no chat format {name!r}; choose one of {', '.join(FORMATS)}")
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
    format    a name in `FORMATS`; None: chosen by `choose_format`
    generate  end where the assistant's next content begins

    The ids have one begin-of-text token. Text that spells a control token stays text, in every
    role. Raises ValueError for an unknown format, for one whose control tokens the tokenizer
    lacks, and for messages that are malformed or that the format cannot express.
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
    """The ids of `encode_chat` as one string, for people to read.

    In it, text that spells a control token looks like one: do not encode it again.
    """
    ids = encode_chat(tokenizer, messages, tools=tools, format=format, generate=generate)
    return tokenizer.decode(ids, control=True)
