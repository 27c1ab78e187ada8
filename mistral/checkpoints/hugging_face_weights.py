"""Which files hold the weights of a folder in Hugging Face's layout, and the tensors in them.

One file, or shards with an index. Files are never searched for by pattern: the folders of v0.3 hold
the weights a second time, in Mistral's own layout.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Container, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mistral.checkpoints.foreign import require_plain
from mistral.checkpoints.pickle_files import pickled_tensors
from mistral.checkpoints.reader import StoredTensor
from mistral.checkpoints.safetensors_files import tensors_in
from mistral.errors import CheckpointError, one_line
from mistral.files import read_json
from mistral.unreadable import is_there, unreadable

SAFETENSORS = "model.safetensors"
# In the order in which transformers looks for them
WEIGHTS = (
    SAFETENSORS,
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What torch.compile, DistributedDataParallel and PEFT put into the names of a model's tensors
_WRAPPERS = re.compile(r"^((_orig_mod|module|base_model\.model)\.)+|(?<=\.)_orig_mod\.")


def choose_weights(names: Container[str]) -> str | None:
    """The file of weights, or the index of its shards, that is read of these; None without any."""
    return next((name for name in WEIGHTS if name in names), None)


def stored_tensors(
    folder: Path, quantization: Any, ignores: Callable[[str], bool]
) -> dict[str, StoredTensor]:
    """The tensors of a folder by name, from the headers alone.

    quantization  `quantization_config` of config.json; None without it
    ignores       of a name: whether the tensor is left out

    Raises CheckpointError if files are missing or damaged, or hold a tensor that is not plain
    floating-point values. Warns of names and of a config that do not fit the tensors.
    """
    name = choose_weights([name for name in WEIGHTS if is_there(folder / name)])
    if name is None:
        raise CheckpointError(
            f"{folder} has neither model.safetensors nor pytorch_model.bin, nor an index of shards"
        )
    found = _sharded(folder / name) if name.endswith(".json") else _read(folder / name)
    tensors = {name: tensor for name, tensor in found.items() if not ignores(name)}
    require_plain(tensors, _method(quantization))
    if quantization:
        warnings.warn(
            f"{folder / 'config.json'} has a quantization_config, but the weights are plain; it is "
            "ignored",
            stacklevel=2,
        )
    return _unwrapped(folder, tensors)


def shards(index: Path) -> dict[str, set[str]]:
    """The names of the files that an index names -> the names of the tensors in each.

    Raises CheckpointError for an index that is damaged, or names something outside its folder.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise unreadable(index, ValueError("it has no weight_map of file names"))
    files = defaultdict(set)
    for name, file in places.items():
        if not isinstance(file, str) or not is_file_name(file):
            raise CheckpointError(
                f"{index} puts {one_line(name, 100)} into {one_line(repr(file), 100)}, which is "
                "not a file name"
            )
        files[file].add(name)
    return files


def is_file_name(text: str) -> bool:
    """Whether a string names a file in a folder on every system, without control characters."""
    is_alone = PureWindowsPath(text).name == text == PurePosixPath(text).name
    return is_alone and text not in ("", "..") and text.isprintable()


def _read(file: Path) -> Mapping[str, StoredTensor]:
    is_there(file)  # refuses a pipe, which would wait for ever
    return tensors_in(file) if file.suffix == ".safetensors" else pickled_tensors(file)


def _sharded(index: Path) -> dict[str, StoredTensor]:
    """All tensors of the shards, also those that the index does not name."""
    tensors: dict[str, StoredTensor] = {}
    for file, names in shards(index).items():
        path = index.with_name(file)
        part = _read(path)
        if missing := names - part.keys():
            raise CheckpointError(
                f"{path} lacks {one_line(min(missing), 100)}, which the index puts there"
            )
        if twice := part.keys() & tensors.keys():
            name = min(twice)
            raise CheckpointError(
                f"{one_line(name, 100)} is in two files, {tensors[name].path} and {path}; "
                "download them again"
            )
        tensors |= part
    return tensors


def _method(quantization: Any) -> str | None:
    """The method that a quantization_config names."""
    if not quantization:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if isinstance(method, str) else "an unknown method"


def _unwrapped(folder: Path, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by their names without what a wrapper of the model has put into them."""
    plain = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    first = next((name for name in tensors if name not in plain), None)
    if first is None:
        return tensors
    if len(plain) < len(tensors):
        raise CheckpointError(f"{folder} has {one_line(first, 100)} and the same without a wrapper")
    warnings.warn(
        f"{folder}: {one_line(first, 100)} and other names have what a wrapper of the model "
        f"puts there; reading it as {one_line(_WRAPPERS.sub('', first), 100)}",
        stacklevel=2,
    )
    return plain
