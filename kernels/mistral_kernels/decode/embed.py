"""The first kernel of a step: the token's embedding, and its position's values for all layers.

    residual = row of the table          fp32 [B, D]
    x, sums  = residual * norm, and partial sums of residual^2: the input of the first layer, as
               `project` writes that of the others
    cos, sin = of position * frequency of the pair, times the attention factor (mistral/rotary.py),
               fp32
    slot     = position mod S, the slot of this position in the ring of S slots; S itself, which is
               never read, for an idle row (position -1)

Bytes: some 40 KB per row (7B). The launch is nearly all of its cost, so there is only one.

Versions (times not measured)
  torch: gather, square, sum, cosine, sine, ...   about 10 kernels
  this one                                        a CTA for 256 elements of a row
"""

import triton
import triton.language as tl
from torch import Tensor

from mistral.quantization.dequantize import dequantize
from mistral_kernels.decode.matvec import DENSE, TILE, require_multiple, require_rows
from mistral_kernels.packed.planes import Planes, restore_rows
from mistral_kernels.packed.row import packed_elements
from mistral_kernels.packed.tile import operands
from mistral_kernels.portable import (
    Launch,
    activation,
    arch_of,
    release_consumer,
    to_activation,
    wait_for_producer,
)

BLOCK = 256  # elements of one CTA


def embed_reference(
    tokens: Tensor,
    positions: Tensor,
    table: Tensor | Planes,
    norm: Tensor,
    frequencies: Tensor,
    residual: Tensor,
    x: Tensor,
    sums: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    num_slots: int,
    attention_factor: float = 1.0,
) -> None:
    """`embed` in plain PyTorch."""
    if isinstance(table, Planes):
        residual.copy_(dequantize(restore_rows(table, tokens), table.kind))
    else:
        residual.copy_(table[tokens])
    x.copy_(activation(residual * norm.float(), x.dtype))
    sums.copy_(residual.square().unflatten(-1, (-1, TILE)).sum(-1))
    angles = positions[:, None].float() * frequencies  # [B, H/2]
    cos.copy_(angles.cos() * attention_factor)
    sin.copy_(angles.sin() * attention_factor)
    slots.copy_((positions % num_slots).masked_fill(positions < 0, num_slots))


@triton.jit(do_not_specialize=["num_slots"])
def embed_kernel(
    tokens, positions, table, norm, frequencies, residual, x, sums, cos, sin, slots, num_slots,
    attention_factor,
    D: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """One CTA: BLOCK elements of one row; the row's first CTA also handles its position."""
    b = tl.program_id(0)
    block = tl.program_id(1)
    wait_for_producer(ARCH)
    release_consumer(ARCH)
    token = tl.load(tokens + b)
    part = block * (BLOCK // 16) + tl.arange(0, BLOCK // 16)
    d = part[:, None] * 16 + tl.arange(0, 16)[None, :]
    here = d < D
    if KIND == "dense":
        row = tl.load(table + token * D + d, mask=here, other=0.0).to(tl.float32)
    else:
        row = packed_elements(table, token, d, KIND, D)  # zeros from D on
    scaled = row * tl.load(norm + d, mask=here, other=0.0).to(tl.float32)
    tl.store(residual + b * D + d, row, mask=here)
    tl.store(x + b * D + d, to_activation(scaled, x.dtype.element_ty), mask=here)
    tl.store(sums + b * (D // 16) + part, tl.sum(row * row, 1), mask=part < D // 16)
    if block == 0:
        position = tl.load(positions + b)
        i = tl.arange(0, triton.next_power_of_2(H // 2))
        pair = i < H // 2
        angle = position.to(tl.float32) * tl.load(frequencies + i, mask=pair, other=0.0)
        tl.store(cos + b * (H // 2) + i, tl.cos(angle) * attention_factor, mask=pair)
        tl.store(sin + b * (H // 2) + i, tl.sin(angle) * attention_factor, mask=pair)
        tl.store(slots + b, tl.where(position < 0, num_slots, position % num_slots))


def launch(batch: int, D: int, H: int, arch: int, kind: str = DENSE) -> Launch:
    """Shape of the launch. ValueError for sizes that the kernel does not support."""
    require_rows(batch)
    require_multiple("hidden_size", D, 32)
    require_multiple("head_dim", H, 2)
    constants = dict(D=D, H=H, BLOCK=BLOCK, KIND=kind, ARCH=arch)
    return Launch((batch, triton.cdiv(D, BLOCK)), constants, dict(num_warps=2))


def embed(
    tokens: Tensor,
    positions: Tensor,
    table: Tensor | Planes,
    norm: Tensor,
    frequencies: Tensor,
    residual: Tensor,
    x: Tensor,
    sums: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    num_slots: int,
    attention_factor: float = 1.0,
) -> None:
    """Begin a step.

    tokens, positions  int64 [B]: the new tokens and their positions; -1: the row is idle
    table              [V, D]: the embedding, plain or packed
    norm               [D]: the first layer's input norm, from `scaled_norm`
    frequencies        fp32 [H/2]: of Rotary (mistral/rotary.py)
    residual, sums     fp32 [B, D] and [B, D/16], written
    x                  [B, D] of the weights' dtype, or if the model has packed weights fp16
                       (fp32, if the model is in fp32); written
    cos, sin           fp32 [B, H/2], written
    slots              int64 [B], written
    num_slots          S of the RollingCache
    attention_factor   of Rotary: 1 unless the angles are scaled by YaRN

    Raises ValueError if D is not a multiple of 32 or B is above 64, for non-contiguous tensors, and
    if no kernel can run on this device.
    """
    (memory,), (kind,), _ = operands(x, table)
    shape = launch(tokens.shape[0], table.shape[1], 2 * frequencies.shape[0], arch_of(x), kind)
    written = (residual, x, sums, cos, sin, slots)
    read = (tokens, positions, memory, norm, frequencies)
    shape.run(embed_kernel, *read, *written, num_slots, attention_factor)
