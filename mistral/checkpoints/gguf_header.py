"""The header of a GGUF file: metadata and where the tensors lie.

    magic "GGUF" | version u32 | number of tensors u64 | number of keys u64
    keys      name string | type u32 | value                           (string: length u64, bytes)
    tensors   name string | number of dimensions u32 | dimensions u64 ... | ggml type u32 | offset
              u64
    padding to `general.alignment`, then the data that the offsets count from

The file is untrusted: every length is held against the bytes that are left before it is believed.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mistral.config import whole_number
from mistral.errors import CheckpointError
from mistral.quantization.ggml_types import GgmlType, ggml_type

# GGUF's numbers, in the letters that struct and numpy share
NUMBERS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS, MAX_NAME = 4, 256


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file."""

    path: Path
    name: str
    shape: tuple[int, ...]  # as PyTorch counts: the last axis is the one that lies together
    kind: GgmlType
    start: int  # bytes from the beginning of the file

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is of the last axis."""
        return self.shape[-1] // self.kind.block_weights * self.kind.block_bytes

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key, tensors by name."""

    metadata: dict[str, Any]  # arrays of numbers are numpy arrays, arrays of strings lists
    tensors: dict[str, GgufTensor]


def whole(
    metadata: Mapping[str, Any], key: str, default: int | None = None, least: int = 0
) -> int | None:
    """The whole number at `key`, or the default.

    ValueError, naming the key, where something else is there.
    """
    return whole_number(key, metadata[key], least) if key in metadata else default


def array(metadata: Mapping[str, Any], key: str, length: int) -> list | None:
    """The numbers at `key`, None where it is absent.

    ValueError for anything but finite numbers of that length.
    """
    value = metadata.get(key)
    if value is None:
        return None
    numbers = np.asarray(value) if isinstance(value, (list, np.ndarray)) else np.empty(0, object)
    if (
        numbers.shape != (length,)
        or numbers.dtype.kind not in "iuf"
        or not np.isfinite(numbers).all()
    ):
        raise ValueError(f"{key} is not a list of {length} numbers")
    return numbers.tolist()


def read_header(path: Path) -> GgufHeader:
    """The header of one file.

    CheckpointError for anything that is not a whole little-endian GGUF of version 2 or 3.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error}") from error


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.size, self.at = path, data, len(data), 0

    def header(self) -> GgufHeader:
        magic, version = self.take(4), self.number("<I")
        if magic != b"GGUF":
            raise CheckpointError(f"{self.path} is no GGUF file: it begins with {magic!r}")
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{self.path} is a big-endian GGUF file; only little-endian ones are read"
            )
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.path} is GGUF version {version}; versions 2 and 3 are read"
            )
        num_tensors, num_keys = self.count(least=24), self.count(least=13)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.name()
            if key in metadata:
                raise self.bad(f"has the key {key} twice")
            metadata[key] = self.value(self.number("<I"))
        alignment = metadata.get("general.alignment", 32)
        if (
            not isinstance(alignment, int)
            or alignment < 1
            or alignment & (alignment - 1)
            or alignment > 1 << 20
        ):
            raise self.bad(f"has the impossible alignment {alignment!r}")
        found = [self.tensor() for _ in range(num_tensors)]
        data_start = -(-self.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in found:
            tensor = GgufTensor(self.path, name, shape, kind, data_start + offset)
            if name in tensors:
                raise self.bad(f"has the tensor {name} twice")
            if offset % alignment or tensor.start + tensor.num_bytes > self.size:
                raise self.bad(
                    f"is not complete: {name} would lie beyond its {self.size:,} bytes, or is not "
                    f"aligned"
                )
            tensors[name] = tensor
        return GgufHeader(metadata, tensors)

    def tensor(self) -> tuple[str, tuple[int, ...], GgmlType, int]:
        name, dimensions = self.name(), self.number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.bad(f"gives {name} {dimensions} dimensions")
        shape = tuple(self.number("<Q") for _ in range(dimensions))[::-1]
        kind, offset = ggml_type(self.number("<I"), f"{self.path}: {name}"), self.number("<Q")
        if not all(0 < n < 1 << 40 for n in shape) or shape[-1] % kind.block_weights:
            raise self.bad(f"gives {name} the shape {list(shape)}, impossible for {kind.name}")
        return name, shape, kind, offset

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.string()
        inner = self.number("<I") if kind == ARRAY else None
        if inner in NUMBERS:
            dtype = np.dtype(NUMBERS[inner])
            length = self.count(least=dtype.itemsize)
            return np.frombuffer(self.take(length * dtype.itemsize), dtype)
        if inner == STRING:
            return [self.string() for _ in range(self.count(least=8))]
        # Arrays of arrays are possible too; no model has any, and they could make a small file take
        # much memory.
        raise self.bad(f"has a value of type {kind}, {inner}, which is not read")

    def name(self) -> str:
        """A key or a tensor's name: short and printable, so that it can stand in a message."""
        name = self.string()
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise self.bad(f"has the impossible name {name[:MAX_NAME]!r}")
        return name

    def string(self) -> str:
        # Some vocabularies hold bytes that are no UTF-8; they become U+FFFD.
        return self.take(self.count(least=1)).decode("utf-8", "replace")

    def count(self, least: int) -> int:
        """A number of things of at least `least` bytes each."""
        number = self.number("<Q")
        if number > (self.size - self.at) // least:
            raise self.bad(
                f"speaks of {number:,} things where {self.size - self.at:,} bytes are left"
            )
        return number

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def take(self, length: int) -> bytes:
        if length > self.size - self.at:
            raise self.bad("ends inside its header")
        self.at += length
        return self.data[self.at - length : self.at]

    def bad(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} {what} (at byte {self.at:,}); it is damaged, download it again"
        )
