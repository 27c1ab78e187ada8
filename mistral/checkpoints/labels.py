"""What to call a checkpoint in a message: a name that a person knows, never a commit or a hash."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

_REPOSITORY = re.compile(r"models--[^/]+")  # a repository's folder in the hub's cache
_HASH = re.compile(r"(sha256[-:])?[0-9a-f]{32,}")  # of a commit or of a file
_OWNER_AND_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def checkpoint_name(path: Path, stored_name: str | None = None) -> str:
    """A checkpoint's name on the hub, or that of its folder or file.

        models--owner--name/snapshots/<commit>             owner/name
        models--owner--name/snapshots/<commit>/m.gguf      owner/name/m.gguf
        folder, folder/, . (in folder)                     folder
        folder/m.gguf                                      m.gguf, whatever it links to
        blobs/sha256-<hash>                                stored_name

    stored_name  the name in the file, for one whose own name is a hash
    """
    if (name := name_on_the_hub(path)) is not None:
        return name
    parts = _parts(path)
    if not parts or not _HASH.fullmatch(parts[-1]):
        return parts[-1] if parts else str(path)
    if stored_name is not None:
        return stored_name
    telling = _telling(parts)
    return telling[-1] if telling and path.is_dir() else parts[-1]


def name_on_the_hub(path: Path) -> str | None:
    """owner/name for a path into the hub's cache, and the file's name after it; None: elsewhere."""
    parts = _parts(path)
    for i, part in enumerate(parts):
        if _REPOSITORY.fullmatch(part):
            name = part.removeprefix("models--").replace("--", "/")
            return "/".join([name, *_telling(parts[i + 1 :])])
    return None


def is_owner_and_name(text: str) -> bool:
    """Whether a text has the form of a repository's name, owner/name."""
    return _OWNER_AND_NAME.fullmatch(text) is not None


def _parts(path: Path) -> tuple[str, ...]:
    # Not `resolve`: a link in the hub's cache has a name, and leads to a hash.
    return Path(os.path.abspath(path)).parts[1:]  # noqa: PTH100


def _telling(parts: Sequence[str]) -> list[str]:
    """The parts of a path that are neither a hash nor a folder of the hub's cache."""
    return [p for p in parts if p not in ("snapshots", "blobs") and not _HASH.fullmatch(p)]
