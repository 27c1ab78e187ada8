"""Layers whose weights stay packed in memory and are unpacked as they are used."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mistral.quantization.dequantize import dequantize
from mistral.quantization.ggml_types import GgmlType

# Weights that are unpacked at a time: 16 MB of float32, which leaves the packed model by far the largest thing
WEIGHTS_AT_ONCE = 1 << 22


class PackedLinear(nn.Module):
    """y = x W^T with W packed: x [..., in] -> [..., out] in x's dtype. Each weight is rounded to that dtype first.

    blocks  uint8 [out, bytes of a row]
    """

    def __init__(self, blocks: Tensor, kind: GgmlType):
        super().__init__()
        self.kind = kind
        self.register_buffer("blocks", blocks)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        rows = max(1, WEIGHTS_AT_ONCE // x.shape[-1])
        parts = [F.linear(x, dequantize(part, self.kind).to(x.dtype)) for part in self.blocks.split(rows)]
        return torch.cat(parts, dim=-1)

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
        return dequantize(self.blocks[tokens], self.kind).to(self.dtype_of_rows.dtype)

    def extra_repr(self) -> str:
        return f"rows={self.blocks.shape[0]}, {self.kind.name}"
