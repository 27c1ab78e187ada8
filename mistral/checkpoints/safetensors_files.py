"""The tensors of a folder's safetensors files: one `model.safetensors`, or shards named by an
index.

Never a glob: the folders of v0.3 hold the weights a second time, in Mistral's own layout.
"""

from collections import defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mistral.errors import CheckpointError
from mistral.files import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk, as the file's header describes it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The data, on the CPU. CheckpointError if the file cannot be read."""
        # The file is mapped into memory, and its pages count as ours until it is closed: one
        # opening per tensor keeps that at one tensor's worth.
        try:
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: cannot read {self.name}: {error}") from error


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by name, from the headers alone.

    CheckpointError where files are missing or damaged, or hold what is not a plain floating-point
    tensor.
    """
    if (folder / WEIGHTS).is_file():  # transformers, too, prefers it to an index
        return headers(folder / WEIGHTS, None)
    if not (folder / INDEX).is_file():
        found = sorted(path.name for path in folder.glob("*.bin"))
        hint = (
            f"; {found[0]} is a pickle, which is not read: convert it to safetensors"
            if found
            else ""
        )
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}{hint}")
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{folder / INDEX} has no weight_map")
    shards = defaultdict(set)
    for name, file in places.items():
        if not is_file_name(file):
            raise CheckpointError(
                f"{folder / INDEX} puts {name} into {file!r}, which is no file name"
            )
        shards[file].add(name)
    tensors: dict[str, StoredTensor] = {}
    for file, names in shards.items():
        tensors |= headers(folder / file, names)
    return tensors


def is_file_name(value: object) -> bool:
    """Whether a value from an index names a file in the same folder, and nothing outside of it."""
    return isinstance(value, str) and Path(value).name == value


def headers(path: Path, names: set[str] | None) -> dict[str, StoredTensor]:
    """The tensors in one file, from its header (`names` of them; None: all).

    CheckpointError where it is missing or damaged, lacks one of `names`, or holds what is not
    floating-point.
    """
    try:
        with safe_open(path, framework="pt") as file:
            present = set(file.keys())
            if missing := sorted((names or set()) - present):
                raise CheckpointError(f"{path} lacks {missing[0]}, which the index puts there")
            slices = {name: file.get_slice(name) for name in sorted(names or present)}
            kinds = {
                name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()
            }
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the download is not complete") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or not complete ({error}); download it again"
        ) from error
    for name, (_, kind) in kinds.items():
        if kind not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} is stored as {kind}; only {', '.join(DTYPES)} are read"
            )
    return {
        name: StoredTensor(path, name, shape, DTYPES[kind]) for name, (shape, kind) in kinds.items()
    }
