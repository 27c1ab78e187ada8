"""Just enough of the GGUF format to write a made-up file, without gguf-py.

    "GGUF", version 3, number of tensors, number of metadata entries
    metadata   key, type, value
    tensors    name, dimensions (the innermost first), ggml type, offset of the data
    data       each tensor at a multiple of 32 bytes

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mistral.quantization.ggml_types import GGML_TYPES

_ALIGNMENT = 32
_NUMBERS = {kind.name: number for number, kind in GGML_TYPES.items()}
_FORMATS = {"u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f")}
_STRING = 8
_ARRAY = 9


def write_file(
    path: Path,
    metadata: dict[str, tuple[str, object]],
    tensors: Sequence[tuple[str, tuple[int, ...], str]],
    blocks: dict[str, np.ndarray],
) -> None:
    """A file whose tensors repeat the same blocks.

    metadata  key -> type and value; types: u32, i32, f32, str, or one in brackets for an array
    tensors   name, shape (rows, columns) or (columns,), name of the ggml type
    blocks    ggml type -> uint8: what each tensor of it repeats
    """
    sizes = [_num_bytes(shape, kind) for _, shape, kind in tensors]
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, (kind, value) in metadata.items():
            file.write(_string(key) + _value(kind, value))
        offset = 0
        for (name, shape, kind), size in zip(tensors, sizes):
            dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            file.write(_string(name) + dimensions + struct.pack("<IQ", _NUMBERS[kind], offset))
            offset += size + -size % _ALIGNMENT
        _pad(file)
        for (_, _, kind), size in zip(tensors, sizes):
            np.resize(blocks[kind], size).tofile(file)
            _pad(file)


def _num_bytes(shape: tuple[int, ...], kind: str) -> int:
    ggml = GGML_TYPES[_NUMBERS[kind]]
    return int(np.prod(shape)) // ggml.block_weights * ggml.block_bytes


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(kind: str, value: object) -> bytes:
    if kind.startswith("["):
        kind = kind.strip("[]")
        number = _STRING if kind == "str" else _FORMATS[kind][0]
        items = b"".join(_bare(kind, item) for item in value)
        return struct.pack("<IIQ", _ARRAY, number, len(value)) + items
    return struct.pack("<I", _STRING if kind == "str" else _FORMATS[kind][0]) + _bare(kind, value)


def _bare(kind: str, value: object) -> bytes:
    return _string(value) if kind == "str" else struct.pack(_FORMATS[kind][1], value)


def _pad(file: BinaryIO) -> None:
    """To the next multiple of the alignment."""
    file.write(bytes(-file.tell() % _ALIGNMENT))
