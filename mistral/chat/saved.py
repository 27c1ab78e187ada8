"""Conversations in files: JSON lines, the first names the format and the tools, each other one is a
message.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mistral.errors import MistralError
from mistral.files import whole_file


class ConversationError(MistralError, ValueError):
    """A conversation that cannot go on as asked; it is as it was before."""


def write_lines(path: Path, lines: Sequence[Any]) -> None:
    """Write one line of JSON each, the file whole or not at all.

    OSError where it cannot be written.
    """
    with whole_file(path) as file:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The first line and the messages.

    Raises ConversationError, naming file and line, for what is no saved conversation, OSError where
    there is no file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConversationError(f"{path} holds no saved conversation: {error}") from None
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ConversationError(f"{path}, line {number}, is no JSON: {error}") from None
        if not isinstance(lines[-1], dict):
            raise ConversationError(f"{path}, line {number}, is no message")
    if not isinstance(lines[0].get("format"), str):
        raise ConversationError(
            f"{path} holds no saved conversation: its first line must name the format"
        )
    return lines
