"""The output matrix: the last residual, normalised, to a logit for every token.

    logits = norm(x) W^T        fp32 [B, V]

Bytes: those of W (7B, bf16: 262 MB, 1.8% of a step; Q6_K: 108 MB) and 4 per logit. V need not be a
multiple of 16: the last tile repeats the last row and stores only tokens below V.

Versions (times not measured)
  torch: norm, matmul      2 kernels, logits rounded to 16 bits
  this one                 V/16 CTAs (2,000 for 32,000 tokens); logits stay fp32
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_kernels.decode.matvec import (
    DENSE,
    TILE,
    inverse_rms,
    inverse_rms_reference,
    require_multiple,
    tile_launch,
    tile_rows,
)
from mistral_kernels.packed.planes import Planes, dense
from mistral_kernels.packed.tile import matrix_tile, operands
from mistral_kernels.portable import Launch, arch_of, release_consumer, require, row_width


def head_reference(
    x: Tensor,
    sums: Tensor,
    weight: Tensor | Planes,
    logits: Tensor,
    eps: float,
    gain: float = 1.0,
) -> None:
    """`head` in plain PyTorch."""
    V, D = weight.shape
    out = (x.float() @ dense(weight).T) * inverse_rms_reference(sums, D, eps, gain)
    logits[:, :V].copy_(out)


@triton.jit
def head_kernel(
    x, sums, weight, logits, eps, gain,
    V: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr, COLUMNS: tl.constexpr,
    WARPS: tl.constexpr, CHUNKS: tl.constexpr, M: tl.constexpr, ARCH: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """One CTA: 16 tokens of the vocabulary, all rows of the batch. A row of logits has WIDTH."""
    first = tl.program_id(0) * 16
    rows = tl.minimum(tile_rows(first, first + 8, WARPS), V - 1)
    out = matrix_tile(x, weight, rows, KIND, B, COLUMNS, WARPS, CHUNKS, M, ARCH)  # [16, M]
    release_consumer(ARCH)
    out = out * inverse_rms(sums, eps, gain, COLUMNS, B, M)[None, :]
    token = first + tl.arange(0, 16)[:, None]
    b = tl.arange(0, M)[None, :]
    tl.store(logits + b * WIDTH + token, out, mask=(b < B) & (token < V))


def launch(
    batch: int,
    D: int,
    V: int,
    dtype: torch.dtype,
    arch: int,
    kind: str = DENSE,
    width: int | None = None,
) -> Launch:
    """Shape of the launch; `width` None: `row_width(V)`.

    ValueError for sizes that the kernel does not support.
    """
    width = row_width(V) if width is None else width
    require(width >= V, f"rows of {width} logits for a vocabulary of {V}")
    require_multiple("hidden_size", D, 32)
    tile = tile_launch(triton.cdiv(V, TILE), batch, D, dtype, arch, (kind,))
    return tile._replace(constants=tile.constants | dict(V=V, WIDTH=width, KIND=kind))


def head(
    x: Tensor,
    sums: Tensor,
    weight: Tensor | Planes,
    logits: Tensor,
    eps: float,
    gain: float = 1.0,
    *,
    pdl: bool = False,
) -> None:
    """Write the logits.

    x          [B, D]: gain * residual * weight of the final norm; of the weights' dtype, or if
               the model has packed weights fp16 (fp32, if the model is in fp32)
    sums       fp32 [B, D/16]: partial sums of residual^2
    weight     [V, D], plain or packed
    logits     fp32 [B, V or more]: the first V columns are written
    eps, gain  of the norm; gain is from `scaled_norm`
    pdl        see `Launch.run`

    Raises ValueError if D is not a multiple of 32 or B is above 16, for too few columns of
    logits, other dtypes and non-contiguous tensors, and if no kernel can run on this device.
    """
    V, D = weight.shape
    (matrix,), (kind,), dtype = operands(x, weight)
    shape = launch(x.shape[0], D, V, dtype, arch_of(x), kind, logits.shape[1])
    shape.run(head_kernel, x, sums, matrix, logits, eps, gain, pdl=pdl)
