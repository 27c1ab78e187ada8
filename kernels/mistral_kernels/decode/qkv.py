"""Queries, keys and values of the new token: one matrix, the rotation, and the write into the
rolling cache.

    q, k, v = norm(x) W^T;  q, k turned by the token's position;  k, v stored in the row's slot of
                            the ring

Sources: mistral/rotary.py (the rotation), mistral/cache.py (the ring).

Plain weights are one tensor, queries above keys above values. Packed ones are three, since a file
may pack values with more bits than the others; each kind of its own is a branch of its own in the
kernel. A tile is 8 rows i .. i+7 of a head and the 8 rows that stand H/2 below, so both elements of
a rotated pair meet in one thread. Cosines and sines come from the step's first kernel: all layers
turn by the same angles.

Bytes: those of W (7B, bf16: 50.3 MB; Q4_K: 14.3 MB).

Versions (times not measured)
  torch: norm, three matmuls, rotations, two writes     about 20 kernels
  this one                      (N + 2K) H / 16 CTAs (7B: 384; K and V alone would leave the GPU
                                half empty)
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_kernels.decode.matvec import (
    DENSE,
    TILE,
    halves,
    inverse_rms,
    inverse_rms_reference,
    require_multiple,
    tile_launch,
    tile_rows,
)
from mistral_kernels.packed.planes import Planes, dense
from mistral_kernels.packed.tile import matrix_tile, operands
from mistral_kernels.portable import Launch, activation, arch_of, release_consumer, to_activation

KIND_NAMES = ("Q_KIND", "K_KIND", "V_KIND")


def qkv_reference(
    x: Tensor,
    sums: Tensor,
    weight: Tensor | tuple[Planes, Planes, Planes],
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    eps: float,
    gain: float = 1.0,
    *,
    pdl: bool = False,
) -> None:
    """`qkv` in plain PyTorch."""
    (B, N, H), K = q.shape, keys.shape[1]
    out = (x.float() @ dense(weight).T) * inverse_rms_reference(sums, x.shape[1], eps, gain)
    out = out.view(B, N + 2 * K, H)
    first, second = out[:, : N + K].chunk(2, dim=-1)  # [B, N + K, H/2] each
    c, s = cos[:, None], sin[:, None]  # [B, 1, H/2] each
    turned = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    q.copy_(activation(turned[:, :N], q.dtype))
    rows = torch.arange(B, device=slots.device)
    keys[rows, :, slots] = activation(turned[:, N:], keys.dtype)
    values[rows, :, slots] = activation(out[:, N + K :], values.dtype)


@triton.jit
def one_of(
    takes_second, x, first, second, rows, KIND: tl.constexpr, SECOND_KIND: tl.constexpr,
    B: tl.constexpr,
    COLUMNS: tl.constexpr, WARPS: tl.constexpr, CHUNKS: tl.constexpr, M: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    """A tile of one of two matrices; if both are of one kind, it is one piece of code with one of
    two addresses.
    """
    if KIND == SECOND_KIND:
        weight = tl.where(takes_second, second, first)
        out = matrix_tile(x, weight, rows, KIND, B, COLUMNS, WARPS, CHUNKS, M, ARCH)
    elif takes_second:
        out = matrix_tile(x, second, rows, SECOND_KIND, B, COLUMNS, WARPS, CHUNKS, M, ARCH)
    else:
        out = matrix_tile(x, first, rows, KIND, B, COLUMNS, WARPS, CHUNKS, M, ARCH)
    return out


@triton.jit(do_not_specialize=["ring_size"])
def qkv_kernel(
    x, sums, q_proj, k_proj, v_proj, cos, sin, slots, q, keys, values, eps, gain, ring_size,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, B: tl.constexpr, COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
    CHUNKS: tl.constexpr, M: tl.constexpr, ARCH: tl.constexpr, Q_KIND: tl.constexpr,
    K_KIND: tl.constexpr,
    V_KIND: tl.constexpr,
):  # fmt: skip
    """One CTA: 8 pairs of one head, all rows of the batch."""
    HALF: tl.constexpr = H // 2
    head = tl.program_id(0) // (HALF // 8)
    pair = tl.program_id(0) % (HALF // 8) * 8
    row = (head if head < N else (head - N) % K) * H + pair
    rows = tile_rows(row, row + HALF, WARPS)
    if Q_KIND == K_KIND:
        first = tl.where(head < N, q_proj, k_proj)
        out = one_of(
            head >= N + K,
            x,
            first,
            v_proj,
            rows,
            Q_KIND,
            V_KIND,
            B,
            COLUMNS,
            WARPS,
            CHUNKS,
            M,
            ARCH,
        )
    elif head < N:
        out = matrix_tile(x, q_proj, rows, Q_KIND, B, COLUMNS, WARPS, CHUNKS, M, ARCH)
    else:
        out = one_of(
            head >= N + K,
            x,
            k_proj,
            v_proj,
            rows,
            K_KIND,
            V_KIND,
            B,
            COLUMNS,
            WARPS,
            CHUNKS,
            M,
            ARCH,
        )
    release_consumer(ARCH)
    first, second = halves(
        out * inverse_rms(sums, eps, gain, COLUMNS, B, M)[None, :], M
    )  # [8, M] each
    b = tl.arange(0, M)
    real = b < B
    i = (pair + tl.arange(0, 8))[:, None]
    at = b[None, :] * HALF + i
    turns = real[None, :] & (head < N + K)  # values are not turned: cosine 1, sine 0
    c = tl.load(cos + at, mask=turns, other=1.0)
    s = tl.load(sin + at, mask=turns, other=0.0)
    first, second = first * c - second * s, second * c + first * s
    if head < N:
        to = q + (b * N + head)[None, :] * H + i
    else:
        slot = tl.load(slots + b, mask=real, other=0)
        place = (
            b * K + (head - N) % K
        ) * ring_size + slot  # int64, as slots are: the ring of a long cache needs it
        to = (keys if head < N + K else values) + place[None, :] * H + i
    tl.store(to, to_activation(first, q.dtype.element_ty), mask=real[None, :])
    tl.store(to + HALF, to_activation(second, q.dtype.element_ty), mask=real[None, :])


def launch(
    batch: int,
    D: int,
    N: int,
    K: int,
    H: int,
    dtype: torch.dtype,
    arch: int,
    kinds: Sequence[str] = (DENSE,) * 3,
) -> Launch:
    """Shape of the launch. ValueError for sizes that the kernel cannot do."""
    require_multiple("hidden_size", D, 32)
    require_multiple("head_dim", H, TILE)
    tile = tile_launch((N + 2 * K) * H // TILE, batch, D, dtype, arch, kinds)
    return tile._replace(
        constants=tile.constants | dict(N=N, K=K, H=H) | dict(zip(KIND_NAMES, kinds))
    )


def qkv(
    x: Tensor,
    sums: Tensor,
    weight: Tensor | tuple[Planes, Planes, Planes],
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    eps: float,
    gain: float = 1.0,
    *,
    pdl: bool = False,
) -> None:
    """Write the rotated queries, and the rotated key and the value of each row into its slot.

    x             [B, D]: gain * residual * norm weight; of the weights' dtype, or where the model
                  has packed weights fp16 (fp32, if the model is in fp32)
    sums          fp32 [B, D/16]: partial sums of residual^2
    weight        [(N + 2K) H, D]: q_proj above k_proj above v_proj; or the three, packed
    cos, sin      fp32 [B, H/2] of each row's position
    slots         int64 [B]: the slot for each row's key and value; S: the one that nobody reads
    q             [B, N, H] of the cache's dtype, written
    keys, values  [B, K, S + 1, H]: one layer of a RollingCache, written in one slot a row
    eps, gain     of the norm; gain is from `scaled_norm`
    pdl           see `Launch.run`

    Raises ValueError where D is no multiple of 32, H none of 16 or B above 16, for other dtypes,
    for tensors with gaps, and where no kernel can run.
    """
    (B, N, H), K = q.shape, keys.shape[1]
    parts = weight if isinstance(weight, tuple) else weight.split((N * H, K * H, K * H))
    matrices, kinds, dtype = operands(x, *parts)
    shape = launch(B, x.shape[1], N, K, H, dtype, arch_of(x), kinds)
    shape.run(
        qkv_kernel,
        x,
        sums,
        *matrices,
        cos,
        sin,
        slots,
        q,
        keys,
        values,
        eps,
        gain,
        keys.shape[2],
        pdl=pdl,
    )
