"""The first half of the MLP: both matrices, the gate's nonlinearity and the product.

    h = silu(g) * u,   g = norm(x) W_gate^T,   u = norm(x) W_up^T,   silu(z) = z * sigmoid(z)

Source: GLU Variants Improve Transformer, equation 6, https://arxiv.org/abs/2002.05202

A tile is 8 rows of each matrix, so one thread holds g and u of an element, and neither is stored.
x is residual * norm weight; it is divided by the root mean square here, on 16 results instead of D
inputs. In fp16, h is clamped to the largest finite value.

Bytes: those of W (7B, bf16: 234.9 MB, half of a layer; Q4_K: 66.5 MB).

Versions (times not measured)
  torch: norm, two matmuls, silu, multiply    5 kernels; g and u written and read
  this one                                    F/8 CTAs (7B: 1792, 13.6 per multiprocessor, started
                                              as others end)
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mistral_kernels.decode.matvec import (
    DENSE,
    by_half,
    halves,
    inverse_rms,
    inverse_rms_reference,
    require_multiple,
    tile_launch,
    tile_rows,
)
from mistral_kernels.packed.planes import Planes, dense
from mistral_kernels.packed.tile import matrix_tile, operands
from mistral_kernels.portable import (
    Launch,
    activation,
    arch_of,
    release_consumer,
    require,
    to_activation,
)


def gate_up_reference(
    x: Tensor,
    sums: Tensor,
    weight: Tensor | tuple[Planes, Planes],
    h: Tensor,
    eps: float,
    gain: float = 1.0,
) -> None:
    """`gate_up` in plain PyTorch."""
    scale = inverse_rms_reference(sums, x.shape[1], eps, gain)
    both = (x.float() @ dense(weight).T) * scale  # [B, 2F]
    gate, up = both.chunk(2, dim=-1)
    h.copy_(activation(F.silu(gate) * up, h.dtype))


@triton.jit
def gate_up_kernel(
    x, sums, gate_proj, up_proj, h, eps, gain,
    F: tl.constexpr, B: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr,
    CHUNKS: tl.constexpr, M: tl.constexpr, ARCH: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One CTA: 8 elements of h, all rows of the batch."""
    first = tl.program_id(0) * 8
    weight = by_half(gate_proj, up_proj, WARPS)
    out = matrix_tile(
        x, weight, tile_rows(first, first, WARPS), KIND, B, COLUMNS, WARPS, CHUNKS, M, ARCH
    )
    release_consumer(ARCH)
    gate, up = halves(out * inverse_rms(sums, eps, gain, COLUMNS, B, M)[None, :], M)  # [8, M] each
    b = tl.arange(0, M)[None, :]
    at = b * F + first + tl.arange(0, 8)[:, None]
    tl.store(h + at, to_activation(gate * tl.sigmoid(gate) * up, h.dtype.element_ty), mask=b < B)


def launch(batch: int, D: int, F: int, dtype: torch.dtype, arch: int, kind: str = DENSE) -> Launch:
    """Shape of the launch. ValueError for sizes that the kernel does not support."""
    require_multiple("hidden_size", D, 32)
    require_multiple("intermediate_size", F, 32)
    tile = tile_launch(F // 8, batch, D, dtype, arch, (kind,))
    return tile._replace(constants=tile.constants | dict(F=F, KIND=kind))


def gate_up(
    x: Tensor,
    sums: Tensor,
    weight: Tensor | tuple[Planes, Planes],
    h: Tensor,
    eps: float,
    gain: float = 1.0,
    *,
    pdl: bool = False,
) -> None:
    """Write silu(gate) * up.

    x          [B, D]: gain * residual * norm weight; of the weights' dtype, or if the model has
               packed weights fp16 (fp32, if the model is in fp32)
    sums       fp32 [B, D/16]: partial sums of residual^2
    weight     [2F, D]: gate_proj and up_proj stacked; or the two, packed
    h          [B, F] of x's dtype, written
    eps, gain  of the norm; gain is from `scaled_norm`
    pdl        see `Launch.run`

    Raises ValueError if D or F is not a multiple of 32, B is above 16 or the two are of different
    quantization types, for other dtypes and non-contiguous tensors, and if no kernel can run on
    this device.
    """
    gate, up = weight if isinstance(weight, tuple) else weight.chunk(2)
    F, D = gate.shape
    matrices, (kind, other), dtype = operands(x, gate, up)
    require(
        kind == other,
        f"gate_proj is {kind} and up_proj {other}: a tile has rows of both and needs one type",
    )
    shape = launch(x.shape[0], D, F, dtype, arch_of(x), kind)
    shape.run(gate_up_kernel, x, sums, *matrices, h, eps, gain, pdl=pdl)
