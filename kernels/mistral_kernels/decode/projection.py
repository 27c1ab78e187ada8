"""Output projection of attention and down projection of the MLP.

Each kernel also adds the residual and does its part of the next norm:

    residual += y W^T              fp32 [B, D]
    x         = residual * norm    the input of the next matrix, not yet divided by its root mean
                                   square: a factor of a whole row can wait until after the product
    sums      = partial sums of residual^2, one per 16 elements; the next kernel adds them up

So x is normalised once, and the norm needs no kernel of its own. Source of the norm:
mistral/rms_norm.py.

Bytes: those of W (7B, bf16: O 33.6 MB, down 117.4 MB; Q4_K: 9.5 and 33.1 MB); everything else is
below 0.1 MB per row.

Versions (times not measured)
  torch: matmul, add, norm              3 kernels
  this one, a CTA for 16 rows           256 CTAs, two per multiprocessor: 97% of the places on 132
                                        are used
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_kernels.decode.matvec import DENSE, TILE, require_multiple, tile_launch, tile_rows
from mistral_kernels.packed.planes import Planes, dense
from mistral_kernels.packed.tile import matrix_tile, operands
from mistral_kernels.portable import Launch, activation, arch_of, release_consumer, to_activation


def project_reference(
    y: Tensor,
    weight: Tensor | Planes,
    norm: Tensor,
    residual: Tensor,
    x: Tensor,
    sums: Tensor,
) -> None:
    """`project` in plain PyTorch."""
    residual += y.float() @ dense(weight).T
    x.copy_(activation(residual * norm.float(), x.dtype))
    sums.copy_(residual.square().unflatten(-1, (-1, TILE)).sum(-1))


@triton.jit
def projection_kernel(
    y, weight, norm, residual, x, sums,
    D: tl.constexpr, B: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr,
    CHUNKS: tl.constexpr, M: tl.constexpr, ARCH: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One CTA: 16 elements of the residual, all rows of the batch."""
    tile = tl.program_id(0)
    # Once all of these CTAs have begun, those of the next kernel may take the places that are left.
    release_consumer(ARCH)
    rows = tile_rows(tile * 16, tile * 16 + 8, WARPS)
    out = matrix_tile(y, weight, rows, KIND, B, COLUMNS, WARPS, CHUNKS, M, ARCH)  # [16, M]
    d = tile * 16 + tl.arange(0, 16)
    b = tl.arange(0, M)
    at = b[None, :] * D + d[:, None]
    real = b[None, :] < B
    new = out + tl.load(residual + at, mask=real, other=0.0)  # [16, M]
    # Several threads may hold, and so load, the same element: all before one of them stores it.
    tl.debug_barrier()
    tl.store(residual + at, new, mask=real)
    scaled = new * tl.load(norm + d).to(tl.float32)[:, None]
    tl.store(x + at, to_activation(scaled, x.dtype.element_ty), mask=real)
    tl.store(sums + b * (D // 16) + tile, tl.sum(new * new, 0), mask=b < B)


def launch(
    batch: int, D: int, columns: int, dtype: torch.dtype, arch: int, kind: str = DENSE
) -> Launch:
    """Shape of the launch. ValueError for sizes that the kernel does not support."""
    require_multiple("hidden_size", D, 32)
    require_multiple("the projection's input", columns, 32)
    tile = tile_launch(D // TILE, batch, columns, dtype, arch, (kind,))
    return tile._replace(constants=tile.constants | dict(D=D, KIND=kind))


def project(
    y: Tensor,
    weight: Tensor | Planes,
    norm: Tensor,
    residual: Tensor,
    x: Tensor,
    sums: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Add y W^T to the residual, and prepare the input of the next matrix.

    y         [B, in]: heads of the attention, or the MLP's h; of the weights' dtype, or if the
              model has packed weights fp16 (fp32, if the model is in fp32)
    weight    [D, in], plain or packed
    norm      [D]: the norm before the next matrix, from `scaled_norm`
    residual  fp32 [B, D], read and written
    x, sums   [B, D] of y's dtype and fp32 [B, D/16], written
    pdl       see `Launch.run`

    Raises ValueError if D or in is not a multiple of 32 or B is above 16, for other dtypes and
    non-contiguous tensors, and if no kernel can run on this device.
    """
    D, columns = weight.shape
    (matrix,), (kind,), dtype = operands(y, weight)
    shape = launch(y.shape[0], D, columns, dtype, arch_of(y), kind)
    shape.run(projection_kernel, y, matrix, norm, residual, x, sums, pdl=pdl)
