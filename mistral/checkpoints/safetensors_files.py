"""The tensors in a safetensors file."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mistral.checkpoints.reader import MappedTensor, blaming, dtype_name
from mistral.errors import CheckpointError, one_line
from mistral.files import format_bytes
from mistral.unreadable import is_there

_LARGEST_HEADER = 16 << 20  # bytes; that of a 7B has 35 kB. Memory is some 15 times as much
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _SafetensorsTensor(MappedTensor):
    """A tensor in a safetensors file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: str  # as the file spells the type

    @property
    def dtype(self) -> torch.dtype | None:
        """None for types that are not read."""
        return _DTYPES.get(self.kind)

    @property
    def type_name(self) -> str:
        return self.kind if self.dtype is None else dtype_name(self.dtype)

    @property
    def num_bytes(self) -> int:
        """The size of its data; for types that are not read, the number of values."""
        return prod(self.shape) * (1 if self.dtype is None else self.dtype.itemsize)

    def mapped(self) -> Tensor:
        # The file is mapped into memory, and its pages count as ours until it is closed. Opening it
        # for each tensor keeps that at the size of one tensor.
        is_there(self.path)  # refuses a pipe in its place, which would wait for ever
        with (
            blaming(self.path, SafetensorError),
            safe_open(self.path, framework="pt") as file,
        ):
            return file.get_tensor(self.name)


def tensors_in(path: Path) -> dict[str, _SafetensorsTensor]:
    """The tensors in a file by name, from its header; of any type.

    Raises CheckpointError if the file is missing or damaged, or has a header larger than any.
    """
    tensors = {}
    with blaming(path, SafetensorError):
        _require_header(path)
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                for name in names:
                    part = file.get_slice(name)
                    shape = tuple(part.get_shape())
                    tensors[name] = _SafetensorsTensor(path, name, shape, part.get_dtype())
        except SafetensorError as error:
            if "unknown variant" not in str(error):
                raise
            reason = one_line(str(error))
            raise CheckpointError(
                f"{path} has a type that safetensors does not know ({reason}); "
                "use a plain checkpoint"
            ) from error
    return tensors


def _require_header(path: Path) -> None:
    """ValueError for a header that would fill the memory, and a path that the library refuses."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            "its path is not valid UTF-8, and safetensors needs that: rename it"
        ) from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")  # the file begins with it
    if _LARGEST_HEADER < size <= path.stat().st_size:  # of another size the library says more
        raise ValueError(
            f"its header has {format_bytes(size)}, and that of a checkpoint at most "
            f"{format_bytes(_LARGEST_HEADER)}: name a checkpoint that `save_file` has written"
        )
