"""Which calls an answer may have: `tool_choice` as constraints."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from mistral.chat.formats import FORMATS, ChatFormat
from mistral.chat.grammar import (
    UnsupportedSchema,
    call_list_constraint,
    json_constraint,
    tool_call_constraint,
)
from mistral.chat.grammar.free_text import TextOnly, TextOrCalls
from mistral.chat.grammar.token_masks import GrammarConstraint
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
    text = TextOnly(decoder, tokenizer, chat.stop_ids(tokenizer))
    constraints: dict[str, Constraint] = {"auto": text, "none": text}
    if tools:
        constraints["auto"] = free_calls(tokenizer, chat, text)
    if tools and grammar:
        schemas = [tool.schema() for tool in tools.values()]
        try:
            constraints |= {  # all of them or none
                one: constraint_on_calls(decoder, tokenizer, chat, schemas, one, text)
                for one in {choice, "none" if choice == "none" else "auto"}
            }
        except UnsupportedSchema as error:
            warnings.warn(f"calls are checked only after they are written: {error}", stacklevel=3)
    if choice not in constraints:
        raise ConversationError(
            f"only a grammar can guarantee tool_choice {choice!r}: it needs grammar=True, and "
            "schemas that a grammar can express"
        )
    return constraints


def free_calls(tokenizer: Tokenizer, chat: ChatFormat, text: TextOnly) -> Constraint:
    """Any text, and the token before a list of calls in a format that has one."""
    if chat.call_token is None:
        return text
    return TextOrCalls(text, None, tokenizer.control_id(chat.call_token), required=False)


def constraint_on_calls(  # noqa: PLR0913
    decoder: Engine,
    tokenizer: Tokenizer,
    chat: ChatFormat,
    schemas: Sequence[Mapping[str, Any]],
    choice: str,
    text: TextOnly,
    *,
    parallel: bool = True,
    answer: Mapping[str, Any] | None = None,
) -> Constraint:
    """A grammar of text and calls in the form of the format.

    schemas   of the tools
    choice    "auto", "required", "none", or a tool's name
    text      the constraint on text that is not a call
    parallel  False: one call at most
    answer    a schema of text that is not a call; None: any text

    Raises the errors of `tool_call_constraint`.
    """
    vocab_size = decoder.config.vocab_size
    options: dict[str, Any] = {"choice": choice, "stop_tokens": chat.stop_ids(tokenizer)}
    if chat.call_token is None:
        return tool_call_constraint(
            tokenizer, vocab_size, schemas, parallel=parallel, answer=answer, **options
        )
    if choice == "none":
        return text
    calls = call_list_constraint(tokenizer, vocab_size, schemas, parallel=parallel, **options)
    other: TextOnly | GrammarConstraint = text
    if answer is not None:
        other = json_constraint(
            tokenizer,
            vocab_size,
            answer,
            stop_tokens=options["stop_tokens"],
            strip_leading_space=chat.strip_leading_space,
        )
    call_token = tokenizer.control_id(chat.call_token)
    return TextOrCalls(other, calls, call_token, required=choice != "auto")
