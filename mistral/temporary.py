"""Temporary files and folders, locked while their process lives, and put on the disk at the end."""

import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_ENDING = re.compile(r"\.[0-9a-f]{16}\.unfinished")
_MOST_LETTERS = 50  # of the target's name: in UTF-8 at most 200 of the 255 bytes that a name has


def new_file(target: Path, mode: int) -> tuple[Path, int | None]:
    """A new empty file next to `target`, and a descriptor that locks it until `release`.

    Its name is NAME.<16 hex digits>.unfinished. Those of processes that were killed are deleted.

    mode  permissions, less those that the umask takes away
    """

    def make(path: Path) -> int | None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        if fcntl is not None:
            return descriptor
        os.close(descriptor)  # Windows: nothing could take the place of a file that is open
        return None

    return _new(target, make)


def new_folder(target: Path) -> tuple[Path, int | None]:
    """The same for an empty folder."""

    def make(path: Path) -> int | None:
        path.mkdir()
        return open_folder(path)

    return _new(target, make)


def open_folder(path: Path) -> int | None:
    """A descriptor of a folder, to lock it; None on Windows, which opens no folders."""
    return None if fcntl is None else os.open(path, os.O_RDONLY)


def release(descriptor: int | None) -> None:
    """Close the descriptor of a lock, if there is one."""
    if descriptor is not None:
        os.close(descriptor)


def _new(target: Path, make: Callable[[Path], int | None]) -> tuple[Path, int | None]:
    _delete_leftovers(target.parent, target.name)
    name = target.name[:_MOST_LETTERS]
    while True:
        path = target.with_name(f"{name}.{secrets.token_hex(8)}.unfinished")
        descriptor = make(path)
        if descriptor is None:
            return path, None
        if _lock(descriptor) is not False and path.exists():
            return path, descriptor
        os.close(descriptor)  # another process took it for a leftover before it was locked


def _lock(descriptor: int) -> bool | None:
    """Lock a file or folder until the descriptor is closed, or the process has ended.

    Returns False if another descriptor holds the lock, None if there are no locks here.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_temporary(entry: str, name: str) -> bool:
    """Whether a name in a folder is that of a temporary file or folder for `name`."""
    begin = name[:_MOST_LETTERS]
    return entry.startswith(begin) and bool(_ENDING.fullmatch(entry[len(begin) :]))


def _delete_leftovers(folder: Path, name: str) -> None:
    """Delete the temporary files and folders of processes that were killed."""
    with os.scandir(folder) as entries:
        leftovers = [Path(entry.path) for entry in entries if is_temporary(entry.name, name)]
    for path in leftovers:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            continue
        with suppress(OSError):  # another process deletes it, or it is another user's
            _delete_unless_locked(path)


def _delete_unless_locked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not _lock(descriptor):
            return
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    finally:
        os.close(descriptor)


def wait_for_lock(descriptor: int) -> None:
    """Lock a file or folder until the descriptor is closed, when others have released it."""
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def complete(file: Path, mode: int, earlier: os.stat_result | None) -> None:
    """Give a file its permissions, and wait until it is on the disk, not only in a cache of it.

    mode     its permissions if it is new
    earlier  the file that it will replace, whose permissions and owner it gets
    """
    with file.open("rb+") as opened:
        if earlier is not None and hasattr(os, "chown"):
            with suppress(OSError):  # only root may
                os.chown(file, earlier.st_uid, earlier.st_gid)
        file.chmod(stat.S_IMODE(mode if earlier is None else earlier.st_mode))
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: after a power cut they are the new ones."""
    with suppress(OSError):  # not every system and file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
