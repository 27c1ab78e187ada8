"""Files: written whole or not at all, and JSON objects read as untrusted input."""

import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mistral.errors import CheckpointError, shown
from mistral.exchange import take_place
from mistral.printable import on_one_line
from mistral.temporary import (
    complete,
    new_file,
    new_folder,
    open_folder,
    release,
    sync_folder,
    wait_for_lock,
)
from mistral.unreadable import is_there, unreadable, what_is

_FULL = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "no space left on the disk for this user (its quota is used up)",
    errno.EFBIG: "the file is too large for the file system, or for a limit on the size of files",
}
_REASONS = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOENT: "its folder does not exist",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EISDIR: "it is a folder; name a file",
    errno.ENAMETOOLONG: "its name is too long",
    errno.ELOOP: "it is a link that leads to itself",
}
# How libraries report it without an errno: safetensors; numpy and torch.save, which say no reason.
_OS_ERROR = re.compile(r"os error (\d+)")
_WITHOUT_REASON = re.compile(
    r"\d+ requested and \d+ written|PytorchStreamWriter failed|unexpected pos \d+ vs \d+"
)
_LARGEST_JSON = 64 << 20  # bytes; the largest vocabularies in use take 40 MB
_DEEPEST_JSON = 64  # objects and arrays in each other
# Values and keys: a vocabulary of 256,000 pieces with 514,000 merges, the largest in use, has 2.1
# million. In memory an empty array takes 64 bytes, a key with a number 200.
_MOST_JSON_PARTS = 3_000_000
_ALMOST_NOTHING = 1_000_000  # bytes: with less space left it is the disk that is full


@contextmanager
def whole_file(path: Path, size: int = 0) -> Iterator[Path]:
    """Yields a temporary path to write to; at the end it replaces `path` in one step.

    Until then, and if writing fails, `path` stays as it was. Of two that write it at once the last
    to finish wins. A process that is killed leaves a file NAME.<16 hex digits>.unfinished, which
    the next one that writes `path` deletes.

    A link stays, and its target is replaced. The permissions of an earlier file are kept; one that
    is read-only is refused. A pipe or a device (/dev/stdout) gets the file when it is finished.

    size  bytes that will be written, if that is known: checked against the free space before

    Raises OSError, in one line that names the file, if it cannot be written.
    """
    target = Path(os.path.realpath(path))
    with _naming(path, target, size):
        earlier = _earlier(path)
        if earlier is not None and not _is_replaceable(path, earlier):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "finished"
                yield file
                with file.open("rb") as source, path.open("ab") as stream:
                    shutil.copyfileobj(source, stream)
            return
        _require_space(target.parent, size)
        unfinished, lock = new_file(target, 0o666 if earlier is None else 0o600)
        mode = unfinished.stat().st_mode if earlier is None else earlier.st_mode
        try:
            yield unfinished
            complete(unfinished, mode, earlier)
            unfinished.replace(target)
            sync_folder(target.parent)
        finally:
            unfinished.unlink(missing_ok=True)
            release(lock)


@contextmanager
def whole_folder(folder: Path, last: str, size: int = 0) -> Iterator[Path]:
    """Yields a temporary folder to write files to; at the end they are in `folder`.

    A new folder appears in one step, with all of its files. In one that exists they replace the
    files of the same names after all are written; its other files stay. On Linux that is one step,
    too, unless a folder is in it, or the file system cannot. Then `last` is removed, the others are
    replaced one by one, `last` at the end.

    last  the file without which no reader takes the folder for complete
    size  bytes that will be written, if that is known: checked against the free space before

    Raises OSError, in one line that names the folder, if they cannot be written. Then nothing is
    changed. A process that is killed leaves a folder NAME.<16 hex digits>.unfinished next to the
    folder, or in it if nothing may be written there; the next one that writes there deletes it.
    """
    target = Path(os.path.realpath(folder))
    with _naming(folder, target, size):
        is_new = not target.exists()
        if is_new:
            target.parent.mkdir(parents=True, exist_ok=True)
        # In the folder itself if it cannot be next to it; then files are replaced one by one.
        is_inside = not os.access(target.parent, os.W_OK) or os.path.ismount(target)
        _require_space(target if is_inside else target.parent, size)
        unfinished, lock = new_folder(target / target.name if is_inside else target)
        mode = unfinished.stat().st_mode & 0o666
        try:
            yield unfinished
            names = [file.name for file in unfinished.iterdir()]
            names.sort(key=lambda name: name == last)
            for name in names:
                complete(unfinished / name, mode, _earlier(target / name))
            sync_folder(unfinished)
            _publish(unfinished, names, target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            release(lock)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all, as `whole_file` does."""
    with whole_file(path) as file:
        file.write_text(text, encoding="utf-8")


def append_line(path: Path, line: bytes) -> None:
    """Add a line at the end of a file, whole or not at all. Raises OSError as `whole_file`."""
    with _naming(path, path), path.open("ab", buffering=0) as file:
        wait_for_lock(file.fileno())
        before = file.seek(0, os.SEEK_END)
        rest = memoryview(line + b"\n")
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except BaseException:
            file.truncate(before)
            raise


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path that a person named, with ~ and ~user as the folders that they stand for.

    Raises FileNotFoundError if there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        reason = str(error).rstrip(".")
        raise FileNotFoundError(
            f"{on_one_line(path)}: {reason}; write the path without ~, or begin it with ./~"
        ) from None


def _earlier(path: Path) -> os.stat_result | None:
    """The file that will be replaced; None: there is none yet.

    Raises OSError for a folder and for a file that is read-only.
    """
    try:
        earlier = path.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(earlier.st_mode):
        raise IsADirectoryError(errno.EISDIR, "", str(path))
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "", str(path))
    return earlier


def _is_replaceable(path: Path, earlier: os.stat_result) -> bool:
    """Whether a path is that of a file, not of a pipe or a device.

    /dev/stdout can be a file, too: one that a shell has opened, and whose content stays.
    """
    is_open = path.absolute().parts[1:2] in (("dev",), ("proc",))
    return stat.S_ISREG(earlier.st_mode) and (not is_open or "shm" in path.parts)


def _publish(unfinished: Path, names: list[str], target: Path) -> None:
    """Make `target` of a finished folder, or move its files there if `target` exists."""
    is_outside = unfinished.parent == target.parent
    if is_outside:
        try:
            unfinished.rename(target)
        except OSError as error:  # there is one with files in it
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        else:
            return sync_folder(target.parent)
    with _locked(target):  # first the files of one process, then those of another
        if is_outside and take_place(unfinished, target, names):
            return sync_folder(target.parent)
        _replace_files(unfinished, names, target)
    return sync_folder(target)


def _replace_files(unfinished: Path, names: list[str], target: Path) -> None:
    """Move the files of a finished folder to `target`, one by one."""
    last = names[-1]
    earlier = unfinished / f"earlier {last}"
    # Without `last` the folder is not taken for complete if the process is killed from here on.
    with suppress(FileNotFoundError):
        (target / last).rename(earlier)
    try:
        for name in names:
            (unfinished / name).replace(target / name)
    except OSError:
        if (unfinished / names[0]).exists() and earlier.exists():  # nothing is replaced yet
            earlier.rename(target / last)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Waits until no other process writes to a folder, and lets none until the end."""
    while True:
        descriptor = open_folder(folder)
        if descriptor is None:
            break
        wait_for_lock(descriptor)
        if os.path.samestat(os.fstat(descriptor), folder.stat()):
            break
        os.close(descriptor)  # another folder has taken its place meanwhile
    try:
        yield
    finally:
        release(descriptor)


@contextmanager
def _naming(path: Path, target: Path, size: int = 0) -> Iterator[None]:
    """Says of an OSError about `path`, its folder or its temporary file which file it is about."""
    try:
        yield
    except Exception as error:
        number = _full_disk(error, target)
        if number is not None:
            raise _no_space(path, target, number, size) from error
        if not isinstance(error, OSError) or not _is_about(error.filename, path, target):
            raise
        reason = _REASONS.get(error.errno, error.strerror or "the system does not say why")
        message = f"cannot write {on_one_line(path)}: {reason}"
        raise _with_number(type(error), message, error.errno) from error


def _is_about(name: object, path: Path, target: Path) -> bool:
    """Whether the file name in an error is that of `path`, or of its temporary file."""
    return isinstance(name, str) and (
        name.startswith((str(path), str(target)))
        or name == str(target.parent)
        or name.endswith(".unfinished")
    )


def _with_number(kind: type[OSError], message: str, number: int | None) -> OSError:
    error = kind(message)  # with the number among the arguments it would write "[Errno 28]"
    error.errno = number
    return error


def _require_space(folder: Path, size: int) -> None:
    if size and size > _free_space(folder):
        raise OSError(errno.ENOSPC, "")


def _free_space(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _full_disk(error: Exception, target: Path) -> int | None:
    """The errno, one of `_FULL`, of an error that says that `target` cannot grow; None: another."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _OS_ERROR.search(str(error))):
        number = int(found[1])
    elif number is None and _WITHOUT_REASON.search(str(error)):
        is_full = _free_space(target.parent) < _ALMOST_NOTHING
        number = errno.ENOSPC if is_full else errno.EFBIG
    return number if number in _FULL else None


def _no_space(path: Path, target: Path, number: int, size: int) -> OSError:
    needs = f"{format_bytes(size)} needed, " if size else ""
    free = format_bytes(_free_space(target.parent))
    message = f"cannot write {on_one_line(path)}: {_FULL[number]} ({needs}{free} free)"
    return _with_number(OSError, message, number)


def read_file(path: Path, largest: int) -> bytes:
    """The content of a file of at most `largest` bytes.

    Raises CheckpointError for a larger one, for a pipe or a device, and if it cannot be read.
    """
    is_there(path)  # refuses what is not a file before it is opened, which might wait for ever
    try:
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(data) > largest:
        raise CheckpointError(
            f"{path} is too large ({format_bytes(path.stat().st_size)}; such files have at most "
            f"{format_bytes(largest)}): download it again"
        )
    return data


def read_text(path: str | os.PathLike[str], largest: int) -> str:
    """The UTF-8 text of a file or a pipe of at most `largest` bytes; "~" is the home.

    Raises OSError if it cannot be read, ValueError if it is longer or not UTF-8.
    """
    with expanded(path).open("rb") as file:
        data = file.read(largest + 1)  # a device may never end
    if len(data) > largest:
        raise ValueError(f"it has more than {format_bytes(largest)}")
    return data.decode("utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises CheckpointError if the file does not exist or does not hold a JSON object, and for one
    that is larger, or has deeper nesting, than any of a checkpoint, or a key twice in an object.
    """
    data = read_file(path, _LARGEST_JSON)
    parts = sum(map(data.count, (b",", b":", b"[", b"{")))  # at least as many as it has
    if parts > _MOST_JSON_PARTS:
        raise CheckpointError(
            f"{path} has {parts:,} values and keys; such files have at most {_MOST_JSON_PARTS:,}: "
            "download it again"
        )
    try:
        value = json.loads(data, object_pairs_hook=_once)
        if _is_deeper(value, _DEEPEST_JSON):
            raise RecursionError(f"it is nested more than {_DEEPEST_JSON} deep")
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, or not JSON
        reason = ValueError(f"cannot be read as JSON: {error}; download it again")
        raise unreadable(path, reason) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object")
    if value.keys() == {"error"}:
        raise CheckpointError(f"{path} {what_is(path)}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key, count in Counter(keys).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} occurs twice in one object")
    return value


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether a JSON value has more than `limit` objects and arrays in each other."""
    level = [value] if isinstance(value, (dict, list)) else []  # all containers of one depth
    for _ in range(limit):
        inside = []
        for part in level:
            parts = part.values() if isinstance(part, dict) else part
            inside += [value for value in parts if isinstance(value, (dict, list))]
        if not inside:
            return False
        level = inside
    return True


def optional_json(path: Path) -> dict[str, Any]:
    """`read_json`, or {} if there is no such file."""
    return read_json(path) if is_there(path) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` to `path`, replacing the file in one step."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def format_bytes(count: float) -> str:
    """4367704064 -> '4.37 GB'; decimal units, as disks and download pages count."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.2f} {unit}"
