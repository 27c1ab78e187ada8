"""Layers whose weights stay packed in memory and are unpacked as they are used."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mistral.quantization.dequantize import dequantize
from mistral.quantization.ggml_types import GgmlType


def weights_at_once(device: torch.device) -> int:
    """How many weights to unpack at a time, so that the packed ones remain by far the largest thing in memory.

    On a CPU 1 MB of float32, which its caches hold: twice as fast as 16 MB. A GPU wants fewer and larger pieces.
    """
    return 1 << 18 if device.type == "cpu" else 1 << 24


def packed_linear(x: Tensor, blocks: Tensor, kind: GgmlType) -> Tensor:
    """x W^T with W packed: x [..., in], blocks uint8 [out, bytes of a row] -> [..., out] in x's dtype.

    Each weight is rounded to that dtype first. Formats that are left to gguf-py go through the CPU wherever they are.
    """
    rows = max(1, weights_at_once(x.device) // x.shape[-1])
    return torch.cat([F.linear(x, dequantize(part, kind).to(x.dtype)) for part in blocks.split(rows)], dim=-1)


class PackedLinear(nn.Module):
    """A linear layer with packed weights, blocks uint8 [out, bytes of a row]."""

    def __init__(self, blocks: Tensor, kind: GgmlType):
        super().__init__()
        self.kind = kind
        self.register_buffer("blocks", blocks)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return packed_linear(x, self.blocks, self.kind)

    def extra_repr(self) -> str:
        return f"rows={self.blocks.shape[0]}, {self.kind.name}"


class PackedEmbedding(nn.Module):
    """Rows of a packed matrix: tokens [B, T] -> [B, T, D] in `dtype`, which follows the model's.

    blocks  uint8 [V, bytes of a row]
    """

    def __init__(self, blocks: Tensor, kind: GgmlType, dtype: torch.dtype):
        super().__init__()
        self.kind = kind
        self.register_buffer("blocks", blocks)
        # No number, but a dtype: packed bytes keep theirs when model.to(float16) changes everything else's.
        self.register_buffer("dtype_of_rows", torch.empty(0, dtype=dtype, device=blocks.device), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, D]
        width = self.blocks.shape[1] // self.kind.block_bytes * self.kind.block_weights  # D
        at_once = max(1, weights_at_once(tokens.device) // width)
        dtype = self.dtype_of_rows.dtype
        parts = [dequantize(self.blocks[part], self.kind).to(dtype) for part in tokens.flatten().split(at_once)]
        return torch.cat(parts).view(*tokens.shape, width)

    def extra_repr(self) -> str:
        return f"rows={self.blocks.shape[0]}, {self.kind.name}"


class TiedOutput(nn.Module):
    """The output matrix of a tied model whose embedding is packed: it has no bytes of its own."""

    def __init__(self, embedding: PackedEmbedding):
        super().__init__()
        self._embedding = (embedding,)  # in a tuple it is no submodule, so nothing moves or saves it twice

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., V]
        return packed_linear(x, self._embedding[0].blocks, self._embedding[0].kind)
