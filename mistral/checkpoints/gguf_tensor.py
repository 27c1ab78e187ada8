"""A tensor in a GGUF file: its rows are read in pieces, unpacked or as they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mistral.checkpoints.names import interleaved_rows
from mistral.checkpoints.reader import StoredTensor
from mistral.errors import CheckpointError
from mistral.quantization.dequantize import dequantize
from mistral.quantization.ggml_types import GgmlType
from mistral.quantization.packed import weights_at_once
from mistral.unreadable import is_there, unreadable

# Types that are plain values
PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# How many weights are read at a time if they stay packed: 9 MB of Q4_K. Few pieces, since each
# costs a wait for PyTorch's other threads, which is long on a busy CPU.
_PACKED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class GgufTensor(StoredTensor):
    """One tensor of a file."""

    path: Path
    name: str
    shape: tuple[int, ...]  # as in PyTorch: the last axis is contiguous
    kind: GgmlType
    start: int  # bytes from the beginning of the file

    @property
    def num_rows(self) -> int:
        """All axes but the last; 1 for a vector."""
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is of the last axis."""
        return self.shape[-1] // self.kind.block_weights * self.kind.block_bytes

    @property
    def num_bytes(self) -> int:
        """The size of its data."""
        return self.num_rows * self.row_bytes

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of plain values; None for others."""
        return PLAIN_DTYPES.get(self.kind.name)

    @property
    def block_type(self) -> GgmlType | None:
        """The type of quantized blocks; None for others."""
        return self.kind if self.kind.block_weights > 1 else None

    @property
    def type_name(self) -> str:
        """ggml's name of the type."""
        return self.kind.name

    def read(self, device: torch.device, dtype: torch.dtype, heads: int | None = None) -> Tensor:
        size = (self.num_rows, self.shape[-1])
        values = torch.empty(size, dtype=dtype, device=device)
        for places, rows in self._pieces(weights_at_once(device), heads, device):
            values[places] = dequantize(rows, self.kind).to(dtype)
        return values.view(self.shape)

    def read_blocks(self, device: torch.device, heads: int | None = None) -> Tensor:
        size = (self.num_rows, self.row_bytes)
        blocks = torch.empty(size, dtype=torch.uint8, device=device)
        if heads is None and device.type == "cpu":
            self._read_rows(0, blocks)  # into place, without a buffer
            return blocks
        for places, rows in self._pieces(_PACKED_AT_ONCE, heads, device):
            blocks[places] = rows
        return blocks

    def _pieces(
        self, weights: int, heads: int | None, device: torch.device
    ) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """Some rows at a time, and their places in the result: (places, rows).

        The rows are uint8 [n, bytes of a row] on `device`, about `weights` weights of them: they
        pass through a buffer, so that little memory is used in addition to the result.
        """
        rows_at_once = min(max(1, weights // self.shape[-1]), self.num_rows)
        buffer = torch.empty((rows_at_once, self.row_bytes), dtype=torch.uint8)
        # Row f of the file is our row order[f]: writing there has the same effect as reading in the
        # order of `half_split_rows`.
        order = None if heads is None else interleaved_rows(self.num_rows, heads).to(device)
        for start in range(0, self.num_rows, rows_at_once):
            rows = buffer[: self.num_rows - start]
            self._read_rows(start, rows)
            places = slice(start, start + len(rows))
            yield places if order is None else order[places], rows.to(device)

    def _read_rows(self, first: int, into: Tensor) -> None:
        """Fill contiguous memory on the CPU, uint8 [n, bytes of a row], with rows from `first`."""
        is_there(self.path)  # refuses a pipe in its place, which would wait for ever
        try:
            with self.path.open("rb") as file:
                file.seek(self.start + first * self.row_bytes)
                size = file.readinto(into.numpy())
        except OSError as error:
            raise unreadable(self.path, error) from error
        if size != into.numel():
            raise CheckpointError(f"{self.path} ends inside {self.name}: it is not complete")
