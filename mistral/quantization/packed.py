"""Layers whose weights stay packed in memory and are unpacked at each use."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mistral.quantization.dequantize import dequantize
from mistral.quantization.ggml_types import GgmlType


def weights_at_once(device: torch.device) -> int:
    """How many weights to unpack at a time, so that the packed ones dominate the memory.

    On a CPU 1 MB of float32, which fits its caches: twice as fast as 16 MB. A GPU wants fewer and
    larger pieces.
    """
    return 1 << 18 if device.type == "cpu" else 1 << 24


class Keeper:
    """Stores the blocks of a layer in another form, and restores them on request.

    Subclass it and override `blocks` and `rows`; and `linear`, if the form has a faster product.
    """

    def blocks(self) -> Tensor:
        """All blocks: uint8 [rows, bytes of a row]."""
        raise NotImplementedError

    def rows(self, which: Tensor) -> Tensor:
        """The blocks of some rows: int64 [n] -> uint8 [n, bytes of a row]."""
        raise NotImplementedError

    def linear(self, x: Tensor, kind: GgmlType) -> Tensor:
        """x W^T: [..., in] -> [..., out] in the dtype of x. Here from the restored blocks."""
        return _packed_linear(x, self.blocks(), kind)


class Packed(nn.Module):
    """Rows of packed weights: `blocks` uint8 [rows, bytes of a row], or None after `hand_over`."""

    def __init__(self, blocks: Tensor, kind: GgmlType):
        super().__init__()
        self.kind = kind
        self.num_rows, self.row_bytes = blocks.shape
        self.register_buffer("blocks", blocks)
        self.keeper: Keeper | None = None

    def hand_over(self, keeper: Keeper) -> None:
        """Drop the blocks, which `keeper` now stores, so that they are not in memory twice."""
        self.blocks = None
        self.keeper = keeper

    def take_back(self) -> None:
        """Restore the blocks from the keeper."""
        self.blocks = self.all_blocks()
        self.keeper = None

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        # `model.to(...)` moves the registered tensors, and a keeper's are not registered.
        if self.keeper is not None:
            self.take_back()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.keeper is not None:
            destination[prefix + "blocks"] = self.keeper.blocks()

    def all_blocks(self) -> Tensor:
        """The blocks, restored if a keeper has them: uint8 [rows, bytes of a row]."""
        return self.blocks if self.keeper is None else self.keeper.blocks()

    def _linear(self, x: Tensor) -> Tensor:
        """x W^T: [..., in] -> [..., out]."""
        if self.keeper is not None:
            return self.keeper.linear(x, self.kind)
        return _packed_linear(x, self.blocks, self.kind)

    def extra_repr(self) -> str:
        return f"rows={self.num_rows}, {self.kind.name}"


class PackedLinear(Packed):
    """A linear layer with packed weights."""

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return self._linear(x)


class PackedEmbedding(Packed):
    """Rows of a packed matrix: tokens [B, T] -> [B, T, D] in `dtype`, which follows the model's."""

    def __init__(self, blocks: Tensor, kind: GgmlType, dtype: torch.dtype):
        super().__init__(blocks, kind)
        # Empty, but its dtype changes with `model.to(torch.float16)`. That of the blocks does not.
        self.register_buffer(
            "dtype_of_rows", torch.empty(0, dtype=dtype, device=blocks.device), persistent=False
        )

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, D]
        width = self.row_bytes // self.kind.block_bytes * self.kind.block_weights  # D
        at_once = max(1, weights_at_once(tokens.device) // width)
        parts = [
            dequantize(self._rows(part), self.kind).to(self.dtype)
            for part in tokens.flatten().split(at_once)
        ]
        return torch.cat(parts).view(*tokens.shape, width)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that `forward` returns."""
        return self.dtype_of_rows.dtype

    def _rows(self, which: Tensor) -> Tensor:
        if self.keeper is not None:
            return self.keeper.rows(which)
        return self.blocks.index_select(0, which)  # indexing would accept -1, the last row


class TiedOutput(nn.Module):
    """The output matrix of a tied model whose embedding is packed; it has no blocks of its own."""

    def __init__(self, embedding: PackedEmbedding):
        super().__init__()
        # In a tuple it is not a submodule, so it is not moved or saved twice.
        self._embedding = (embedding,)

    @property
    def embedding(self) -> PackedEmbedding:
        """The embedding whose blocks are used."""
        return self._embedding[0]

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., V]
        return self.embedding._linear(x)


def _packed_linear(x: Tensor, blocks: Tensor, kind: GgmlType) -> Tensor:
    """x W^T with packed W: x [..., in], blocks uint8 [out, bytes of a row] -> [..., out].

    Each weight is rounded to the dtype of x, and that is the dtype of the result.
    """
    rows = max(1, weights_at_once(x.device) // x.shape[-1])
    parts = [F.linear(x, dequantize(part, kind).to(x.dtype)) for part in blocks.split(rows)]
    return torch.cat(parts, dim=-1)
