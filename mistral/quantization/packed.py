"""Layers whose weights stay packed in memory and are unpacked as they are used."""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mistral.quantization.dequantize import dequantize
from mistral.quantization.ggml_types import GgmlType


def weights_at_once(device: torch.device) -> int:
    """How many weights to unpack at a time, so that the packed ones remain by far the largest thing
    in memory.

    On a CPU 1 MB of float32, which its caches hold: twice as fast as 16 MB. A GPU wants fewer and
    larger pieces.
    """
    return 1 << 18 if device.type == "cpu" else 1 << 24


def packed_linear(x: Tensor, blocks: Tensor, kind: GgmlType) -> Tensor:
    """x W^T with W packed: x [..., in], blocks uint8 [out, bytes of a row] -> [..., out] in x's
    dtype.

    Each weight is rounded to that dtype first.
    """
    rows = max(1, weights_at_once(x.device) // x.shape[-1])
    return torch.cat(
        [F.linear(x, dequantize(part, kind).to(x.dtype)) for part in blocks.split(rows)], dim=-1
    )


class Keeper(Protocol):
    """Keeps the blocks of a layer in another form, and makes them again when they are asked for."""

    def blocks(self) -> Tensor: ...  # uint8 [rows, bytes of a row]
    def rows(self, which: Tensor) -> Tensor: ...  # int64 [n] -> uint8 [n, bytes of a row]


class Packed(nn.Module):
    """Rows of packed weights: `blocks` uint8 [rows, bytes of a row], or None after `hand_over`."""

    def __init__(self, blocks: Tensor, kind: GgmlType):
        super().__init__()
        self.kind = kind
        self.num_rows, self.row_bytes = blocks.shape
        self.register_buffer("blocks", blocks)
        self.keeper: Keeper | None = None

    def hand_over(self, keeper: Keeper) -> None:
        """Give up the blocks to a keeper, so that they are not in memory twice."""
        self.blocks, self.keeper = None, keeper

    def take_back(self) -> None:
        """Have the blocks here again."""
        self.blocks, self.keeper = self.all_blocks(), None

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        # `model.to(...)` moves what is registered here, and knows nothing of a keeper.
        if self.keeper is not None:
            self.take_back()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.keeper is not None:
            destination[prefix + "blocks"] = self.keeper.blocks()

    def all_blocks(self) -> Tensor:
        """uint8 [rows, bytes of a row]."""
        return self.blocks if self.keeper is None else self.keeper.blocks()

    def extra_repr(self) -> str:
        return f"rows={self.num_rows}, {self.kind.name}"


class PackedLinear(Packed):
    """A linear layer with packed weights."""

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return packed_linear(x, self.all_blocks(), self.kind)


class PackedEmbedding(Packed):
    """Rows of a packed matrix: tokens [B, T] -> [B, T, D] in `dtype`, which follows the model's."""

    def __init__(self, blocks: Tensor, kind: GgmlType, dtype: torch.dtype):
        super().__init__(blocks, kind)
        # No number, but a dtype: packed bytes keep theirs when model.to(float16) changes everything
        # else's.
        self.register_buffer(
            "dtype_of_rows", torch.empty(0, dtype=dtype, device=blocks.device), persistent=False
        )

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, D]
        width = self.row_bytes // self.kind.block_bytes * self.kind.block_weights  # D
        at_once, rows = max(1, weights_at_once(tokens.device) // width), self._rows
        parts = [
            dequantize(rows(part), self.kind).to(self.dtype)
            for part in tokens.flatten().split(at_once)
        ]
        return torch.cat(parts).view(*tokens.shape, width)

    @property
    def dtype(self) -> torch.dtype:
        """Of what `forward` returns."""
        return self.dtype_of_rows.dtype

    def _rows(self, which: Tensor) -> Tensor:
        if self.keeper is not None:
            return self.keeper.rows(which)
        return self.blocks.index_select(0, which)  # indexing would take -1 for the last row


class TiedOutput(nn.Module):
    """The output matrix of a tied model whose embedding is packed: it has no bytes of its own."""

    def __init__(self, embedding: PackedEmbedding):
        super().__init__()
        self._embedding = (
            embedding,
        )  # in a tuple it is no submodule, so nothing moves or saves it twice

    @property
    def embedding(self) -> PackedEmbedding:
        """Whose bytes they are."""
        return self._embedding[0]

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., V]
        return packed_linear(x, self.embedding.all_blocks(), self.embedding.kind)
