"""JSON schemas and calls as constraints on the next token. Needs the extra `chat`."""

from mistral.chat.grammar.constraints import (
    call_list_constraint,
    json_constraint,
    tool_call_constraint,
)
from mistral.chat.grammar.token_masks import GrammarError, UnsupportedSchema

__all__ = [
    "GrammarError",
    "UnsupportedSchema",
    "call_list_constraint",
    "json_constraint",
    "tool_call_constraint",
]
