"""Functions that a model may call: their description, the check of arguments, the call."""

from mistral.chat.tools.functions import ArgumentError, Tool, ToolError, tool, tool_table, wrapped

__all__ = ["ArgumentError", "Tool", "ToolError", "tool", "tool_table", "wrapped"]
