"""Functions that a model may call: described by JSON schemas, checked, run."""

from mistral.chat.tools.functions import ArgumentError, Tool, ToolError, tool, tool_table

__all__ = ["ArgumentError", "Tool", "ToolError", "tool", "tool_table"]
