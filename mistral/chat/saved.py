"""Conversations in files of JSON lines: the format and the tools first, then the messages."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mistral.errors import ConversationError
from mistral.files import expanded, read_text, write_text

_LARGEST = 64_000_000  # bytes


def write_lines(path: Path, lines: Sequence[Any]) -> None:
    """Write values as lines of JSON, the whole file or nothing.

    ConversationError for a value that JSON cannot hold, OSError if the file cannot be written.
    """
    try:
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConversationError(f"a message cannot be saved as JSON: {error}") from None
    write_text(expanded(path), text)


def without_descriptions(tools: Any) -> Any:
    """Schemas of tools without the texts for the model; a property of that name stays."""
    if isinstance(tools, list):
        return [without_descriptions(one) for one in tools]
    if not isinstance(tools, dict):
        return tools
    return {
        key: without_descriptions(one)
        for key, one in tools.items()
        if key != "description" or not isinstance(one, str)
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The first line and the messages.

    Raises ConversationError, naming file and line, for a file that is not a saved conversation,
    OSError if the file cannot be read.
    """
    try:
        text = read_text(path, _LARGEST)
    except ValueError as error:  # also what is not UTF-8
        raise ConversationError(f"{path} is not a saved conversation: {error}") from None
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ConversationError(f"{path}, line {number}, is not valid JSON: {error}") from None
        if not isinstance(lines[-1], dict):
            raise ConversationError(f"{path}, line {number}, is not a message")
    if not isinstance(lines[0].get("format"), str):
        raise ConversationError(
            f"{path} is not a saved conversation: its first line must name the format"
        )
    return lines
