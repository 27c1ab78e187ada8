"""Files: written whole or not at all, and JSON objects read as untrusted input."""

import errno
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mistral.errors import CheckpointError
from mistral.unreadable import is_there, unreadable, what_is

_FULL = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "no space left on the disk for this user (its quota is used up)",
    errno.EFBIG: "the file is too large for the file system, or for a limit on the size of files",
}
# How libraries report it without an errno: safetensors; numpy and torch.save, which say no reason.
_OS_ERROR = re.compile(r"os error (\d+)")
_WITHOUT_REASON = re.compile(
    r"\d+ requested and \d+ written|PytorchStreamWriter failed|unexpected pos \d+ vs \d+"
)
_ALMOST_NOTHING = 1_000_000  # bytes: with less space left it is the disk that is full


@contextmanager
def whole_file(path: Path, size: int = 0) -> Iterator[Path]:
    """Yields a temporary path next to `path` to write to.

    It replaces `path` at the end; if writing fails it is deleted.

    size  bytes that will be written, if that is known: checked against the free space before

    Raises OSError, in one line that names the file, if the disk is full.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        if size > _free_space(path):
            raise OSError(errno.ENOSPC, "")
        yield unfinished
        unfinished.replace(path)
    except Exception as error:
        if (number := _full_disk(error, path)) is None:
            raise
        unfinished.unlink(missing_ok=True)  # its space counts as free
        raise _no_space(path, number, size) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _free_space(path: Path) -> int:
    return shutil.disk_usage(path.absolute().parent).free


def _full_disk(error: Exception, path: Path) -> int | None:
    """The errno, one of `_FULL`, of an error that means that `path` cannot grow; None: another."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _OS_ERROR.search(str(error))):
        number = int(found[1])
    elif number is None and _WITHOUT_REASON.search(str(error)):
        number = errno.ENOSPC if _free_space(path) < _ALMOST_NOTHING else errno.EFBIG
    return number if number in _FULL else None


def _no_space(path: Path, number: int, size: int) -> OSError:
    needs = f"{format_bytes(size)} needed, " if size else ""
    free = format_bytes(_free_space(path))
    error = OSError(f"cannot write {path}: {_FULL[number]} ({needs}{free} free)")
    error.errno = number
    return error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises CheckpointError if the file does not exist or does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, or not JSON
        reason = ValueError(f"cannot be read as JSON: {error}; download it again")
        raise unreadable(path, reason) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object")
    if value.keys() == {"error"}:
        raise CheckpointError(f"{path} {what_is(path)}")
    return value


def optional_json(path: Path) -> dict[str, Any]:
    """`read_json`, or {} if there is no such file."""
    return read_json(path) if is_there(path) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` to `path`, replacing the file in one step."""
    with whole_file(path) as file:
        file.write_text(json.dumps(value, indent=2) + "\n")


def format_bytes(count: float) -> str:
    """4367704064 -> '4.37 GB'; decimal units, as disks and download pages count."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.2f} {unit}"
