"""What is wrong with a file that cannot be read, and what to do.

All files are untrusted input: only CheckpointError leaves a reader.
"""

import errno
import os
import re
import stat
from pathlib import Path

from mistral.errors import CheckpointError, one_line, shown

_DOWNLOAD_ITSELF = "download the file itself (`hf download OWNER/REPO` does)"
_SERVER_MESSAGE = f"holds a server's message ({{text}}), not the file: {_DOWNLOAD_ITSELF}"

# Files that take the place of another: (the first bytes, the endings of names that must not begin
# so, what such a file is and what to do).
_STAND_INS = [
    (rb"\Z", r"", "is empty: the download did not finish; download it again"),
    (
        rb"version https?://(git-lfs|hawser|git-media)|# xet version",
        r"",
        "is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder",
    ),
    (rb"(/|\.\./)*(\.git/)?annex/objects/", r"", "is a git-annex pointer: run `git annex get .`"),
    (
        rb"(\.\./)+blobs/",
        r"",
        "holds the text of a link ({text}), not the file: copy its folder with `cp -rL`, "
        "which follows links",
    ),
    (
        rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype|!--|html|head|body|\?xml)",
        r"",
        f"is a web page, not the file: {_DOWNLOAD_ITSELF}",
    ),
    (rb'\s*\{\s*"(error|detail|message)"\s*:', r"", _SERVER_MESSAGE),
    (
        rb"(?i)(entry|repository|404|file)[: ]*not found|invalid (username|credentials)|not found"
        rb"|access (to model|denied)|forbidden|unauthorized|too many requests|rate limit",
        r"",
        _SERVER_MESSAGE,
    ),
    (rb"\x00{16}", r"", "begins with zeros: the download did not finish; download it again"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", r"", "is compressed: unpack it"),
    (
        rb"MZqFpD",
        r"",
        "is a llamafile, a program with a GGUF file in it: `unzip` it, and name the .gguf",
    ),
    (
        rb"algg",
        r"",
        "is a LoRA adapter in ggml's old format: merge the original adapter into its base model",
    ),
    (
        rb"lmgg|fmgg|tjgg",
        r"",
        "is a model in ggml's old format: convert it with llama.cpp's "
        "convert_llama_ggml_to_gguf.py, or download a GGUF file",
    ),
    (
        rb"GGUF",
        r"\.(safetensors|json|model|bin|pth)",
        "is a GGUF file: rename it to .gguf, and name it instead of a folder",
    ),
    (
        rb"(?s).{2}[\x00-\x05]\x00{5}\{",
        r"\.(gguf|json|model|bin|pth)",
        "is a safetensors file: give it that ending",
    ),
    (rb"PK\x03\x04", r"\.(gguf|safetensors|json|model)", "is a ZIP archive: unpack it"),
    (
        rb"\x80[\x02-\x05]",
        r"\.(gguf|safetensors|json|model)",
        "is a pickle, as PyTorch writes them: give it the ending .bin or .pth",
    ),
]
_START = 512  # bytes that are enough to recognise these

# The endings of downloads in progress; aria2 writes its file beside the other, which looks whole.
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".opdownload", ".download")
ARIA2 = ".aria2"

_CHMOD = "ask its owner, or `chmod a+r` it and `chmod a+rx` its folders"
_OS_ERRORS = {
    errno.EACCES: f"permission denied: this user may not read it; {_CHMOD}",
    errno.EPERM: f"permission denied: this user may not read it; {_CHMOD}",
    errno.EISDIR: "is a folder, and a file is needed; remove it and download the file",
    errno.ENOTDIR: "a part of this path is a file, not a folder; correct the path",
    errno.ENAMETOOLONG: "the name is too long for a file; correct the path",
    errno.ELOOP: "is a link that leads to itself; remove it and download the file",
}


def unreadable(what: str | Path, error: Exception) -> CheckpointError:
    """The error to raise if a file cannot be opened or its content is not as it must be.

    what   the file; or a text for the beginning of the message
    error  an OSError; a ValueError whose text says what is wrong; or a parser's own error

    The message says what the file is instead, if its first bytes tell.
    """
    path = what if isinstance(what, Path) else Path()
    if isinstance(error, OSError):
        return CheckpointError(_cannot_open(path, error))
    if reason := what_is(path):
        return CheckpointError(f"{path} {reason}")
    if isinstance(error, ValueError):
        return CheckpointError(f"{what}: {error}")
    reason = one_line(str(error)) or type(error).__name__
    remedy = unfinished(path) or "download it again"
    return CheckpointError(f"{path} is damaged or not complete ({reason}); {remedy}")


def what_is(path: Path) -> str | None:
    """What a file is whose first bytes are not those of its name, and what to do; None: unknown."""
    try:
        with path.open("rb") as file:
            start = file.read(_START)
    except OSError:
        return None
    text = one_line(start.decode("utf-8", "replace"), 100)
    for pattern, endings, sentence in _STAND_INS:
        if re.match(pattern, start) and re.search(f"({endings})$", path.name):
            return sentence.format(text=text)
    return None


def unfinished(path: Path) -> str | None:
    """What to say if a download into the folder of `path` has not ended."""
    for folder in (path.parent, path.parent / ".cache/huggingface/download"):
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.endswith((*_UNFINISHED, ARIA2)):
                        name = one_line(entry.name, 100)
                        return f"{name} is a download that has not ended: continue it"
        except OSError:
            continue
    return None


def is_there(path: Path) -> bool:
    """Whether there is a file or folder.

    Raises CheckpointError if that cannot be told, for a link to something that does not exist, and
    for a pipe or a device: reading it might never end.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if reason := _broken_link(path):
            raise CheckpointError(reason) from None
        return False
    except OSError as error:
        raise CheckpointError(_cannot_open(path, error)) from error
    except ValueError as error:  # a zero byte in the name
        raise CheckpointError(f"{shown(str(path))} cannot be a path: {error}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise CheckpointError(
            f"{one_line(str(path))} is a pipe, a socket or a device, not a file: download the file"
        )
    return True


def _cannot_open(path: Path, error: OSError) -> str:
    if isinstance(error.filename, str):
        path = Path(error.filename)
    if error.errno is None:  # safetensors says "not found" for everything
        try:
            path.open("rb").close()
        except OSError as cause:
            error = cause
    number = error.errno
    if isinstance(error, FileNotFoundError):
        remedy = unfinished(path) or "download it again, or into this folder"
        return _broken_link(path) or f"{path} is missing: the download is not complete; {remedy}"
    if number not in _OS_ERRORS and os.path.isdir(path):  # noqa: PTH112 (never raises)
        number = errno.EISDIR
    reason = _OS_ERRORS.get(number, f"cannot be read: {error.strerror or error}")
    return f"{one_line(str(path))}: {reason}"


def _broken_link(path: Path) -> str | None:
    """What to say if the path, or a folder in it, is a link to something that does not exist."""
    for link in (path, *path.parents):
        if link.is_symlink() and not link.exists():
            remedy = "restore the target, or put the file itself there"
            if link.parent.parent.name == "snapshots":
                repository = link.parent.parent.parent
                remedy = f"the hub's cache is not complete: delete {repository} and download again"
            return f"{link} is a link to {link.readlink()}, which does not exist; {remedy}"
    return None
