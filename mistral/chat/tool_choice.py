"""Which calls an answer may hold: `tool_choice` as constraints for the decoder."""

import warnings
from collections.abc import Mapping

from mistral.chat.formats import FORMATS, ChatFormat
from mistral.chat.grammar import UnsupportedSchema, call_list_constraint, tool_call_constraint
from mistral.chat.grammar.free_text import TextOnly, TextOrCalls
from mistral.chat.saved import ConversationError
from mistral.chat.tools import Tool
from mistral.engine.constraints import Constraint
from mistral.engine.decoder import Engine
from mistral.tokenizer import Tokenizer


def check_tool_choice(choice: str, tools: Mapping[str, Tool], format: str) -> None:
    """Raises ConversationError for tools that the format has no form for, and for a choice that
    there is not.
    """
    if tools and not FORMATS[format].has_tools:
        able = ", ".join(name for name, one in FORMATS.items() if one.has_tools)
        raise ConversationError(f"functions need a format of {able}, not {format}")
    if choice not in ("auto", "none", "required", *tools):
        raise ConversationError(
            f"there is no tool {choice!r} to choose; there are {', '.join(tools) or 'none'}"
        )
    if choice == "required" and not tools:
        raise ConversationError("tool_choice 'required' needs tools")


def call_constraints(
    decoder: Engine,
    tokenizer: Tokenizer,
    chat: ChatFormat,
    tools: Mapping[str, Tool],
    choice: str,
    grammar: bool,
) -> dict[str, Constraint]:
    """The constraints for `choice`, "auto" and "none"; copy one for each answer.

    Where there is no grammar, or none for a schema (that is a warning), calls are checked after
    they are written. Raises ConversationError for a choice that demands a call then, which only a
    grammar can promise.
    """
    stop_tokens = chat.stop_ids(tokenizer)
    text = TextOnly(decoder, tokenizer, stop_tokens)
    constraints: dict[str, Constraint] = {"auto": text, "none": text}
    call_token = None if chat.call_token is None else tokenizer.control_id(chat.call_token)
    if tools and call_token is not None:
        constraints["auto"] = TextOrCalls(text, None, call_token, required=False)
    if tools and grammar:
        given = tokenizer, decoder.config.vocab_size, [tool.schema() for tool in tools.values()]
        made: dict[str, Constraint] = {}  # all of them or none
        try:
            for one in {choice, "none" if choice == "none" else "auto"}:
                if call_token is None:
                    made[one] = tool_call_constraint(*given, choice=one, stop_tokens=stop_tokens)
                elif one != "none":
                    calls = call_list_constraint(*given, choice=one, stop_tokens=stop_tokens)
                    made[one] = TextOrCalls(text, calls, call_token, required=one != "auto")
            constraints |= made
        except UnsupportedSchema as error:
            warnings.warn(f"calls are checked only after they are written: {error}", stacklevel=3)
    if choice not in constraints:
        raise ConversationError(
            f"tool_choice {choice!r} is a promise that only a grammar keeps: it needs "
            f"grammar=True, and schemas that a "
            "grammar can express"
        )
    return constraints
