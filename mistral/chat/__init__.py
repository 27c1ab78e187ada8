"""Chat: messages to ids, function calling, answers in JSON."""

from mistral.chat.conversation import Conversation
from mistral.chat.events import Altered, Call, End, Error, Result, Text, Trimmed, Unfinished
from mistral.chat.formats import encode_chat
from mistral.chat.formats.tool_calls import ToolCallStream, parse_tool_calls
from mistral.chat.structured import generate_json
from mistral.chat.tools import Tool, tool

__all__ = [
    "Altered",
    "Call",
    "Conversation",
    "End",
    "Error",
    "Result",
    "Text",
    "Tool",
    "ToolCallStream",
    "Trimmed",
    "Unfinished",
    "encode_chat",
    "generate_json",
    "parse_tool_calls",
    "tool",
]
