"""The tensors of a folder's safetensors files: one `model.safetensors`, or shards with an index.

Files are never searched for by pattern: the folders of v0.3 hold the weights a second time, in
Mistral's own layout.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mistral.checkpoints.reader import MappedTensor
from mistral.errors import CheckpointError
from mistral.files import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _SafetensorsTensor(MappedTensor):
    """A tensor in a safetensors file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The size of its data."""
        return prod(self.shape) * self.dtype.itemsize

    def mapped(self) -> Tensor:
        # The file is mapped into memory, and its pages count as ours until it is closed. Opening it
        # for each tensor keeps that at the size of one tensor.
        try:
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: cannot read {self.name}: {error}") from error


def stored_tensors(folder: Path) -> dict[str, _SafetensorsTensor]:
    """All tensors of a checkpoint by name, from the headers alone.

    Raises CheckpointError if files are missing or damaged, or hold a tensor that is not plain
    floating-point values.
    """
    if (folder / WEIGHTS).is_file():  # transformers, too, prefers it to an index
        return tensors_in(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = ""
        if pickles:
            hint = f"; {pickles[0]} is a pickle, which is not read: convert it to safetensors"
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}{hint}")
    tensors: dict[str, _SafetensorsTensor] = {}
    for file, names in shards(folder / INDEX).items():
        tensors |= tensors_in(folder / file, names)
    return tensors


def shards(index: Path) -> dict[str, set[str]]:
    """The names of the files that an index names -> the names of the tensors in each.

    Raises CheckpointError for an index that is damaged, or names something outside its folder.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map of file names")
    files = defaultdict(set)
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index} puts {name} into {file!r}, which is not a file name")
        files[file].add(name)
    return files


def tensors_in(path: Path, names: Iterable[str] = ()) -> dict[str, _SafetensorsTensor]:
    """The tensors in one file, from its header: those of `names`, or all if that is empty.

    Raises CheckpointError if the file is missing or damaged, lacks one of `names`, or holds values
    that are not floating-point.
    """
    try:
        with safe_open(path, framework="pt") as file:
            present = set(file.keys())
            if missing := sorted(set(names) - present):
                raise CheckpointError(f"{path} lacks {missing[0]}, which the index puts there")
            slices = {name: file.get_slice(name) for name in sorted(names or present)}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            types = {name: part.get_dtype() for name, part in slices.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the download is not complete") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or not complete ({error}); download it again"
        ) from error
    for name, kind in types.items():
        if kind not in _DTYPES:
            raise CheckpointError(
                f"{path}: {name} is stored as {kind}; only {', '.join(_DTYPES)} are read"
            )
    return {
        name: _SafetensorsTensor(path, name, shape, _DTYPES[types[name]])
        for name, shape in shapes.items()
    }
