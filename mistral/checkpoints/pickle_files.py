"""The tensors in a file of `torch.save`: consolidated.00.pth, pytorch_model.bin.

Such a file is a ZIP archive of entries that are stored as they are: a pickle that describes the
tensors, and one entry for the values of each storage. Before PyTorch 1.6 it was five pickles, then
the storages. Nothing in it is executed (pickle_machine.py), and values are read when they are used.
"""

import io
import struct
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mistral.checkpoints.pickle_machine import PickleMachine, View
from mistral.checkpoints.reader import MappedTensor, blaming
from mistral.errors import one_line
from mistral.unreadable import is_there

# Bytes of a pickle, and of a ZIP archive's directory: a 7B has 100 kB and 30 kB.
_MAX_BYTES = 4 << 20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_BIG_ENDIAN = "the values are big-endian; save it again on a little-endian machine"
_DAMAGED = "damaged or not complete; download it again"


@dataclass(frozen=True)
class PickledTensor(MappedTensor):
    """A tensor whose values are in the file as they are."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]  # in values
    start: int  # bytes from the beginning of the file

    @property
    def num_bytes(self) -> int:
        """The size of its values."""
        return prod(self.shape) * self.dtype.itemsize

    def mapped(self) -> Tensor:
        size = _span(self.shape, self.strides) * self.dtype.itemsize
        is_there(self.path)  # refuses a pipe in its place, which would wait for ever
        with blaming(self.path):
            # "c", copy on write: a write to the tensor never reaches the file
            values = np.memmap(self.path, np.uint8, "c", self.start, (size,))
        tensor = torch.from_numpy(values).view(self.dtype)
        return tensor.as_strided(self.shape, self.strides).contiguous()


def pickled_tensors(path: Path) -> dict[str, PickledTensor]:
    """The tensors of the dictionary in a file, by name; of any dtype.

    Raises CheckpointError for a file that is missing or damaged, or holds anything but a dictionary
    of dense tensors.
    """
    with blaming(path), _CappedFile(path) as file:
        size = path.stat().st_size
        is_zip = file.read(4) == b"PK\3\4"
        file.seek(0)
        state, places = _read_zip(file, size) if is_zip else _read_legacy(file, size)
        return _tensors(path, size, state, places)


class _CappedFile(io.FileIO):
    """A file that refuses a large read: zipfile reads the whole directory in one call."""

    def read(self, size: int = -1, /) -> bytes:
        if size > _MAX_BYTES:
            raise ValueError(f"a part of {size:,} bytes describes the tensors; no Mistral needs it")
        return super().read(size)


# Where the values of each storage are: its key -> (start, size) in bytes
_Places = dict[str, tuple[int, int]]


def _read_zip(file: io.FileIO, size: int) -> tuple[Any, _Places]:
    try:
        entries = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, struct.error, OSError) as error:
        raise ValueError(_DAMAGED) from error
    by_name = {entry.filename: entry for entry in entries}
    pickles = [name for name in by_name if name.endswith("/data.pkl")]
    if len(pickles) != 1 or len(by_name) < len(entries):
        raise ValueError("a ZIP archive, but not one that torch.save has written")
    for entry in entries:
        encrypted = entry.flag_bits & 1
        if entry.compress_type or encrypted or entry.compress_size != entry.file_size:
            raise ValueError(
                f"{one_line(entry.filename, 100)} is compressed, which torch.save never does; "
                "load it with torch.load and save it again"
            )
    root = pickles[0].removesuffix("data.pkl")

    def place(name: str) -> tuple[int, int]:
        if name not in by_name:
            raise ValueError(f"{one_line(name, 100)} is not in the archive: {_DAMAGED}")
        return _place(file, size, by_name[name])

    def content(name: str) -> bytes:
        start, length = place(name)
        file.seek(start)
        return file.read(length)

    order = content(root + "byteorder") if root + "byteorder" in by_name else b"little"
    if order != b"little":
        raise ValueError(_BIG_ENDIAN if order == b"big" else _DAMAGED)
    machine = PickleMachine()
    state = machine.run(io.BytesIO(content(pickles[0])))
    places = {key: place(f"{root}data/{key}") for key in machine.storages}
    in_order = sorted(places.values())
    for (start, length), (following, _) in zip(in_order, in_order[1:]):
        if start + length > following:
            raise ValueError(f"two of its storages are in the same bytes: {_DAMAGED}")
    return state, places


def _place(file: io.FileIO, size: int, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Start and size of an entry's bytes, which follow a header of its own."""
    header = b""
    if 0 <= entry.header_offset <= size:
        file.seek(entry.header_offset)
        header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\3\4":
        raise ValueError(_DAMAGED)
    name_length, extra_length = struct.unpack("<26xHH", header)
    start = entry.header_offset + 30 + name_length + extra_length
    if start + entry.file_size > size:
        raise ValueError(_DAMAGED)
    return start, entry.file_size


def _read_legacy(file: io.FileIO, size: int) -> tuple[Any, _Places]:
    """Five pickles, then each storage: its number of values (int64) and the values."""
    pickles = io.BytesIO(file.read(_MAX_BYTES))
    machine = PickleMachine()
    try:
        is_ours = machine.run(pickles) == _LEGACY_MAGIC
    except ValueError:
        is_ours = False
    if not is_ours:
        raise ValueError(f"not a file of torch.save, or {_DAMAGED}")
    machine.run(pickles)  # the version of the format; there is one
    system = machine.run(pickles)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise ValueError(_BIG_ENDIAN)
    state = machine.run(pickles)
    keys = machine.run(pickles)
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise ValueError(_DAMAGED)
    position = pickles.tell()
    places = {}
    for key in keys:
        storage = machine.storages.get(key)
        file.seek(position)
        count = file.read(8)
        if storage is None or count != storage.num_values.to_bytes(8, "little"):
            raise ValueError(_DAMAGED)
        places[key] = (position + 8, storage.num_values * storage.dtype.itemsize)
        position += 8 + places[key][1]
    if position > size or places.keys() != machine.storages.keys():
        raise ValueError(_DAMAGED)
    return state, places


def _tensors(path: Path, size: int, state: Any, places: _Places) -> dict[str, PickledTensor]:
    """The entries of the dictionary. ValueError for one that is not a tensor inside its storage."""
    if type(state) is not dict:
        raise ValueError(f"it holds a {type(state).__name__}, not a dictionary of tensors")
    tensors = {}
    for name, view in state.items():
        label = one_line(name, 100)
        if type(view) is not View:
            raise ValueError(
                f"{label} is of type {type(view).__name__}, not a tensor; "
                "save the dictionary of the weights alone"
            )
        start, storage_bytes = places[view.storage.key]
        itemsize = view.storage.dtype.itemsize
        span = _span(view.shape, view.strides)
        is_whole = view.storage.num_values * itemsize <= storage_bytes
        if not is_whole or view.offset + span > view.storage.num_values:
            raise ValueError(f"{label} reaches beyond its storage: {_DAMAGED}")
        if _overlaps(view.shape, view.strides):
            raise ValueError(f"{label} is an expanded view; save a copy (tensor.clone())")
        tensors[name] = PickledTensor(
            path=path,
            name=name,
            shape=view.shape,
            dtype=view.storage.dtype,
            strides=view.strides,
            start=start + view.offset * itemsize,
        )
    # A tied matrix has two names. If all values had several, a small file would take much memory.
    if sum(tensor.num_bytes for tensor in tensors.values()) > 2 * size:
        raise ValueError("its tensors share their values; save copies (tensor.clone())")
    return tensors


def _overlaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether an axis steps into the values of the axes inside it."""
    reach = 1  # values from the first to the last of the axes so far
    for stride, n in sorted(zip(strides, shape)):
        if n > 1 and stride < reach:
            return True
        reach += (n - 1) * stride
    return False


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many values there are from the first to the last of a tensor, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
