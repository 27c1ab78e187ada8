"""Which calls an answer may have: `tool_choice` as constraints."""

import warnings
from collections.abc import Mapping

from mistral.chat.formats import FORMATS, ChatFormat
from mistral.chat.grammar import UnsupportedSchema, call_list_constraint, tool_call_constraint
from mistral.chat.grammar.free_text import TextOnly, TextOrCalls
from mistral.chat.tools import Tool
from mistral.engine.base import Constraint, Engine
from mistral.errors import ConversationError
from mistral.tokenizer import Tokenizer


def check_tool_choice(choice: str, tools: Mapping[str, Tool], format: str) -> None:
    """Raises ConversationError for tools that the format cannot express, and an unknown choice."""
    if tools and not FORMATS[format].has_tools:
        able = ", ".join(name for name, one in FORMATS.items() if one.has_tools)
        raise ConversationError(f"the format {format} has no functions; use one of {able}")
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

    Without a grammar calls are checked after they are written; with one, what it cannot express of
    a tool's schema (a warning). Raises ConversationError without one for a choice that demands a
    call: only a grammar can guarantee one.
    """
    stop_tokens = chat.stop_ids(tokenizer)
    text = TextOnly(decoder, tokenizer, stop_tokens)
    constraints: dict[str, Constraint] = {"auto": text, "none": text}
    call_token = None if chat.call_token is None else tokenizer.control_id(chat.call_token)
    if tools and call_token is not None:
        constraints["auto"] = TextOrCalls(text, None, call_token, required=False)
    if tools and grammar:
        vocab_size = decoder.config.vocab_size
        schemas = [tool.schema() for tool in tools.values()]
        with_grammar: dict[str, Constraint] = {}  # all of them or none
        try:
            for one in {choice, "none" if choice == "none" else "auto"}:
                options = {"choice": one, "stop_tokens": stop_tokens}
                if call_token is None:
                    with_grammar[one] = tool_call_constraint(
                        tokenizer, vocab_size, schemas, **options
                    )
                elif one != "none":
                    calls = call_list_constraint(tokenizer, vocab_size, schemas, **options)
                    with_grammar[one] = TextOrCalls(text, calls, call_token, required=one != "auto")
            constraints |= with_grammar
        except UnsupportedSchema as error:
            warnings.warn(f"calls are checked only after they are written: {error}", stacklevel=3)
    if choice not in constraints:
        raise ConversationError(
            f"only a grammar can guarantee tool_choice {choice!r}: it needs grammar=True, and "
            "schemas that a grammar can express"
        )
    return constraints
