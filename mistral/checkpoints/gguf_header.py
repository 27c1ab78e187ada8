"""The header of a GGUF file: the metadata, and where the tensors are.

    magic "GGUF" | version u32 | number of tensors u64 | number of keys u64
    keys      name string | type u32 | value                           (string: length u64, bytes)
    tensors   name string | number of dimensions u32 | dimensions u64 ... | type u32 | offset u64
    padding to `general.alignment`, then the data that the offsets count from

The file is untrusted: every length is compared with the bytes that are left before it is used.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mistral.checkpoints.gguf_tensor import GgufTensor
from mistral.config import whole_number
from mistral.errors import CheckpointError, shown
from mistral.quantization.ggml_types import GgmlType, ggml_type
from mistral.unreadable import unfinished, unreadable

# The types of numbers, in the letters that struct and numpy share
_NUMBERS = {
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
_STRING = 8
_ARRAY = 9
# More than any model has. A tensor, a key or a string takes 50 to 500 bytes of memory, up to ten
# times as much as in the file.
_MOST_TENSORS = 1 << 17
_MOST_KEYS = 1 << 19
_MOST_STRINGS = 3 << 20  # of all arrays; the largest vocabulary with its merges has 0.8 million
_MAX_DIMENSIONS = 4
_MAX_NAME = 256


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key, tensors by name."""

    metadata: dict[str, Any]  # arrays of numbers are numpy arrays, arrays of strings lists
    tensors: dict[str, GgufTensor]


def whole(
    metadata: Mapping[str, Any], key: str, default: int | None = None, least: int = 0
) -> int | None:
    """The whole number at `key`, or the default if the key is absent.

    Raises ValueError, naming the key, for any other value.
    """
    return whole_number(key, metadata[key], least) if key in metadata else default


def array(metadata: Mapping[str, Any], key: str, length: int) -> list | None:
    """The numbers at `key`, or None if the key is absent.

    Raises ValueError for anything but `length` finite numbers.
    """
    value = metadata.get(key)
    if value is None:
        return None
    # Of strings NumPy would make a table as wide as the longest.
    is_plain = isinstance(value, list) and all(type(entry) in (int, float) for entry in value)
    numbers = np.asarray(value) if is_plain or isinstance(value, np.ndarray) else np.empty(0)
    is_numeric = numbers.shape == (length,) and numbers.dtype.kind in "iuf"
    if not is_numeric or not np.isfinite(numbers).all():
        raise ValueError(f"{key} is not a list of {length} numbers")
    return numbers.tolist()


def read_header(path: Path) -> GgufHeader:
    """The header of one file.

    Raises CheckpointError for anything but a whole little-endian GGUF of version 2 or 3.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise unreadable(path, error) from error


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = 0
        self.strings = 0  # read in arrays

    def header(self) -> GgufHeader:
        magic = self.take(4)
        version = self.number("<I")
        if magic != b"GGUF":
            reason = ValueError(
                f"it is not a GGUF file: it begins with {magic!r}; download it again"
            )
            raise unreadable(self.path, reason)
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{self.path} is a big-endian GGUF file; only little-endian ones are read"
            )
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.path} is GGUF version {version}; versions 2 and 3 are read"
            )
        num_tensors = self.count(least=24)
        num_keys = self.count(least=13)
        if num_tensors > _MOST_TENSORS or num_keys > _MOST_KEYS:
            raise self.bad(f"has {num_tensors:,} tensors and {num_keys:,} keys, too many")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.name()
            if key in metadata:
                raise self.bad(f"has the key {key} twice")
            metadata[key] = self.value(self.number("<I"))
        alignment = metadata.get("general.alignment", 32)
        powers_of_two = [1 << i for i in range(21)]
        if not isinstance(alignment, int) or alignment not in powers_of_two:
            raise self.bad(f"has the impossible alignment {shown(alignment)}")
        return GgufHeader(metadata, self.tensors(num_tensors, alignment))

    def tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        """The tensors by name, from the last part of the header."""
        found = [self.tensor() for _ in range(count)]
        data_start = -(-self.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in found:
            if name in tensors:
                raise self.bad(f"has the tensor {name} twice")
            tensor = GgufTensor(
                path=self.path, name=name, shape=shape, kind=kind, start=data_start + offset
            )
            if offset % alignment or tensor.start + tensor.num_bytes > self.size:
                raise self.bad(
                    f"is not complete: {name} would end after its {self.size:,} bytes, "
                    "or is not aligned"
                )
            tensors[name] = tensor
        self.require_apart(tensors)
        return tensors

    def require_apart(self, tensors: Mapping[str, GgufTensor]) -> None:
        """CheckpointError if two tensors share bytes."""
        in_order = sorted(tensors.values(), key=lambda tensor: tensor.start)
        for tensor, following in zip(in_order, in_order[1:]):
            if tensor.start + tensor.num_bytes > following.start:
                raise self.bad(f"has {tensor.name} and {following.name} in the same bytes")

    def tensor(self) -> tuple[str, tuple[int, ...], GgmlType, int]:
        """Name, shape, type, and offset from the beginning of the data."""
        name = self.name()
        dimensions = self.number("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.bad(f"declares {dimensions} dimensions for {name}")
        shape = tuple(self.number("<Q") for _ in range(dimensions))[::-1]
        kind = ggml_type(self.number("<I"), f"{self.path}: {name}")
        offset = self.number("<Q")
        if not all(0 < n < 1 << 40 for n in shape) or shape[-1] % kind.block_weights:
            raise self.bad(f"declares {name} as {list(shape)}, impossible for {kind.name}")
        return name, shape, kind, offset

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        inner = self.number("<I") if kind == _ARRAY else None
        if inner in _NUMBERS:
            dtype = np.dtype(_NUMBERS[inner])
            length = self.count(least=dtype.itemsize)
            return np.frombuffer(self.take(length * dtype.itemsize), dtype)
        if inner == _STRING:
            length = self.count(least=8)
            self.strings += length
            if self.strings > _MOST_STRINGS:
                raise self.bad(f"has {self.strings:,} strings in arrays, too many")
            return [self.string() for _ in range(length)]
        # Arrays of arrays are possible too. No model has any, and with them a small file could take
        # much memory.
        raise self.bad(f"has a value of type {kind}, {inner}, which is not read")

    def name(self) -> str:
        """A key or a tensor's name: short and printable, so that it can stand in a message."""
        name = self.string()
        if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
            raise self.bad(f"has the impossible name {name[:_MAX_NAME]!r}")
        return name

    def string(self) -> str:
        # Some vocabularies hold bytes that are not valid UTF-8; they become U+FFFD.
        return self.take(self.count(least=1)).decode("utf-8", "replace")

    def count(self, least: int) -> int:
        """A number of entries of at least `least` bytes each."""
        number = self.number("<Q")
        if number > (self.size - self.at) // least:
            left = self.size - self.at
            raise self.bad(f"declares {number:,} entries, and only {left:,} bytes remain")
        return number

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def take(self, length: int) -> bytes:
        if length > self.size - self.at:
            raise self.bad("ends inside its header")
        self.at += length
        return self.data[self.at - length : self.at]

    def bad(self, what: str) -> CheckpointError:
        remedy = unfinished(self.path) or "it is damaged, download it again"
        return CheckpointError(f"{self.path} {what} (at byte {self.at:,}); {remedy}")
