"""Queries, keys and values of the new token.

One kernel: the matrix product, the rotation, and the write into the rolling cache.

    q, k, v = norm(x) W^T
    q, k      rotated by the token's position
    k, v      stored in the row's slot of the ring

Sources: mistral/rotary.py (the rotation), mistral/cache.py (the ring).

Plain weights are one tensor: the rows of queries, then keys, then values. Packed weights are three,
because a file may pack values with more bits than the others; each quantization type is a branch of
its own in the kernel. A tile is 8 rows i .. i+7 of a head and the 8 rows H/2 after them, so one
thread holds both elements of a rotated pair. Cosines and sines come from the first kernel of the
step: all layers rotate by the same angles.

Bytes: those of W (7B, bf16: 50.3 MB; Q4_K: 14.3 MB).

Versions (times not measured)
  torch: norm, three matmuls, rotations, two writes     about 20 kernels
  this one                                              (N + 2K) H / 16 CTAs (7B: 384; K and V
                                                        alone would leave the GPU half empty)
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
from mistral_kernels.packed.tile import operands, tile_of_three
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
) -> None:
    """`qkv` in plain PyTorch."""
    B, N, H = q.shape
    K = keys.shape[1]
    out = (x.float() @ dense(weight).T) * inverse_rms_reference(sums, x.shape[1], eps, gain)
    out = out.view(B, N + 2 * K, H)
    first, second = out[:, : N + K].chunk(2, dim=-1)  # [B, N + K, H/2] each
    c = cos[:, None]
    s = sin[:, None]  # [B, 1, H/2] each
    rotated = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    q.copy_(activation(rotated[:, :N], q.dtype))
    rows = torch.arange(B, device=slots.device)
    keys[rows, :, slots] = activation(rotated[:, N:], keys.dtype)
    values[rows, :, slots] = activation(out[:, N + K :], values.dtype)


@triton.jit(do_not_specialize=["ring_size"])
def qkv_kernel(
    x, sums, q_proj, k_proj, v_proj, cos, sin, slots, q, keys, values, eps, gain, ring_size,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, B: tl.constexpr, COLUMNS: tl.constexpr,
    WARPS: tl.constexpr, CHUNKS: tl.constexpr, M: tl.constexpr, ARCH: tl.constexpr,
    Q_KIND: tl.constexpr, K_KIND: tl.constexpr, V_KIND: tl.constexpr,
):  # fmt: skip
    """One CTA: 8 rotated pairs of one head, all B rows of the batch (padded to M)."""
    # Once all of these CTAs have begun, those of the next kernel may take the places that are left.
    release_consumer(ARCH)

    # 1. The tile's weight rows. Heads are numbered queries first, then keys, then values.
    HALF: tl.constexpr = H // 2
    head = tl.program_id(0) // (HALF // 8)
    pair = tl.program_id(0) % (HALF // 8) * 8
    row = (head if head < N else (head - N) % K) * H + pair
    rows = tile_rows(row, row + HALF, WARPS)

    # 2. The product, of up to three types of weights: fp32 [16, M].
    out = tile_of_three(
        head < N, head >= N + K, x, q_proj, k_proj, v_proj, rows, Q_KIND, K_KIND, V_KIND, B,
        COLUMNS, WARPS, CHUNKS, M, ARCH,
    )  # fmt: skip

    # 3. The norm's division, on 16 results instead of D inputs.
    out = out * inverse_rms(sums, eps, gain, COLUMNS, B, M)[None, :]

    # 4. The rotation. Values are not rotated: cosine 1, sine 0.
    first, second = halves(out, M)  # [8, M] each
    b = tl.arange(0, M)
    real = b < B
    i = (pair + tl.arange(0, 8))[:, None]
    at = b[None, :] * HALF + i
    rotates = real[None, :] & (head < N + K)
    c = tl.load(cos + at, mask=rotates, other=1.0)
    s = tl.load(sin + at, mask=rotates, other=0.0)
    first, second = first * c - second * s, second * c + first * s

    # 5. The store: queries into q, keys and values into the ring.
    if head < N:
        to = q + (b * N + head)[None, :] * H + i
    else:
        slot = tl.load(slots + b, mask=real, other=0)
        # int64, as slots are: a long cache has more than 2^31 elements
        place = (b * K + (head - N) % K) * ring_size + slot
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
    """Shape of the launch. ValueError for sizes that the kernel does not support."""
    require_multiple("hidden_size", D, 32)
    require_multiple("head_dim", H, TILE)
    tile = tile_launch((N + 2 * K) * H // TILE, batch, D, dtype, arch, kinds)
    constants = tile.constants | dict(N=N, K=K, H=H) | dict(zip(KIND_NAMES, kinds))
    return tile._replace(constants=constants)


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

    x             [B, D]: gain * residual * norm weight; of the weights' dtype, or if the model has
                  packed weights fp16 (fp32, if the model is in fp32)
    sums          fp32 [B, D/16]: partial sums of residual^2
    weight        [(N + 2K) H, D]: q_proj, k_proj and v_proj stacked; or the three, packed
    cos, sin      fp32 [B, H/2] of each row's position
    slots         int64 [B]: the slot for each row's key and value; S: the one that is never read
    q             [B, N, H] of the cache's dtype, written
    keys, values  [B, K, S + 1, H]: one layer of a RollingCache, written in one slot per row
    eps, gain     of the norm; gain is from `scaled_norm`
    pdl           see `Launch.run`

    Raises ValueError if D is not a multiple of 32, H not of 16 or B is above 16, for other dtypes
    and non-contiguous tensors, and if no kernel can run on this device.
    """
    B, N, H = q.shape
    K = keys.shape[1]
    parts = weight if isinstance(weight, tuple) else weight.split((N * H, K * H, K * H))
    matrices, kinds, dtype = operands(x, *parts)
    shape = launch(B, x.shape[1], N, K, H, dtype, arch_of(x), kinds)
    tensors = (x, sums, *matrices, cos, sin, slots, q, keys, values)
    shape.run(qkv_kernel, *tensors, eps, gain, keys.shape[2], pdl=pdl)
