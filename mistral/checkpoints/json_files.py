"""JSON objects on disk, read as untrusted input and written whole or not at all."""

import json
from pathlib import Path
from typing import Any

from mistral.errors import CheckpointError
from mistral.whole_file import whole_file


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`. CheckpointError where there is no such file, or no JSON object in it."""
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
    """Write `value` to `path`, replacing it in one step."""
    with whole_file(path) as file:
        file.write_text(json.dumps(value, indent=2) + "\n")
