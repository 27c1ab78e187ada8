"""A folder takes the place of another in one step, if the system can do that: Linux can."""

import ctypes
import os
import shutil
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

_EXCHANGE = 2  # RENAME_EXCHANGE: the two names change places
_IN_CURRENT_FOLDER = -100  # AT_FDCWD


def take_place(new: Path, target: Path, names: Collection[str]) -> bool:
    """`new`, with its files `names` and links to all other files of `target`, becomes `target`.

    `new` is next to `target`, and becomes the earlier folder. Returns False, with `target`
    unchanged, if that cannot be: on another system or file system, if a folder is in `target`, or
    if this process works in it.
    """
    if not sys.platform.startswith("linux") or Path.cwd().is_relative_to(target):
        return False
    try:
        others = [path.name for path in target.iterdir() if path.name not in names]
        for name in others:
            os.link(target / name, new / name, follow_symlinks=False)  # OSError for a folder
        shutil.copystat(target, new)
        if hasattr(os, "chown"):
            earlier = target.stat()
            with suppress(OSError):  # only root may
                os.chown(new, earlier.st_uid, earlier.st_gid)
        _exchange(new, target)
    except OSError:
        return False
    for entry in os.scandir(new):  # what another process has written or replaced meanwhile
        is_known = entry.name in names or (entry.name in others and _is_same(target, entry))
        if not is_known:
            Path(entry.path).replace(target / entry.name)
    return True


def _exchange(a: Path, b: Path) -> None:
    """Let two names change places. OSError if the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # an old C library
        raise OSError from None
    here = _IN_CURRENT_FOLDER
    if rename(here, os.fsencode(a), here, os.fsencode(b), _EXCHANGE):
        raise OSError(ctypes.get_errno(), "")


def _is_same(target: Path, entry: os.DirEntry[str]) -> bool:
    try:
        return (target / entry.name).lstat().st_ino == entry.inode()
    except FileNotFoundError:  # deleted meanwhile: both names were one file
        return True
