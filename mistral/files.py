"""Files: written whole or not at all, and JSON objects read as untrusted input."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mistral.errors import CheckpointError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path` to write to.

    It replaces `path` at the end; if writing fails it is deleted.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises CheckpointError if the file does not exist or does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or not JSON
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` to `path`, replacing the file in one step."""
    with whole_file(path) as file:
        file.write_text(json.dumps(value, indent=2) + "\n")
