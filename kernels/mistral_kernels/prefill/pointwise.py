"""Three steps between the matrix products of a chunk of new tokens, each a single pass.

    rotate_chunk   queries and keys, rotated by their positions in place       mistral/rotary.py
    store_chunk    keys and values into their slots of the ring                mistral/cache.py
    swiglu         silu(gate) * up, written over the gate                      mistral/mlp.py

A tile is some rows of H elements, one head of one token each; one thread holds both elements of a
rotated pair. Results are rounded once, from float32. The keys are stored by a launch of its own
after the attention: they may overwrite keys that the chunk's first queries still see.

Queries, keys and values may be columns of the product that computed all three, and gate and up of
theirs: nothing is copied. A stride is the number of elements from a token to the next.

Bytes per layer (7B, bf16, 2,048 tokens): 42 MB, 17 MB and 176 MB; matrix products and attention
take 1.2 ms at best.

Versions (times not measured; launches and bytes are of one layer, by count)
  torch    rotation: 2 x 5 launches, 210 MB; ring: 2 launches with an index for each token; SwiGLU:
           2 launches, 294 MB
  these    one launch each; 235 MB in all
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_kernels.portable import (
    TRITON_DTYPES,
    Launch,
    activation,
    arch_of,
    require,
    spaced,
    to_activation,
)

_ROWS = 32  # of a tile
_BLOCK = 2048  # elements of one CTA of `swiglu`


def rotate_chunk_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`rotate_chunk` in plain PyTorch."""
    c = cos[:, :, None]
    s = sin[:, :, None]  # [B, T, 1, H/2] each
    for x in (q, k):
        first, second = x.float().chunk(2, dim=-1)
        rotated = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
        x.copy_(activation(rotated, x.dtype))


@triton.jit(do_not_specialize=["q_rows", "k_rows"])
def rotate_chunk_kernel(
    q, k, cos, sin, q_rows, k_rows, q_stride, k_stride, N: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """One CTA: ROWS heads of q, or of k; those of q come first in the grid."""
    HALF: tl.constexpr = H // 2
    tile = tl.program_id(0)
    q_tiles = tl.cdiv(q_rows, ROWS)
    of_q = tile < q_tiles
    x = tl.where(of_q, q, k)
    heads = tl.where(of_q, N, K)
    rows = tl.where(of_q, q_rows, k_rows)
    row = (tl.where(of_q, tile, tile - q_tiles) * ROWS + tl.arange(0, ROWS))[:, None]
    real = row < rows
    pair = tl.arange(0, HALF)[None, :]
    token = row // heads
    at = x + token.to(tl.int64) * tl.where(of_q, q_stride, k_stride) + row % heads * H + pair
    first = tl.load(at, mask=real).to(tl.float32)
    second = tl.load(at + HALF, mask=real).to(tl.float32)
    angle = token * HALF + pair
    c = tl.load(cos + angle, mask=real)
    s = tl.load(sin + angle, mask=real)
    tl.store(at, to_activation(first * c - second * s, q.dtype.element_ty), mask=real)
    tl.store(at + HALF, to_activation(second * c + first * s, q.dtype.element_ty), mask=real)


def rotate_launch(tokens: int, N: int, K: int, H: int) -> Launch:
    """Shape of the launch for this many tokens of all rows."""
    _check_heads(H)
    tiles = triton.cdiv(tokens * N, _ROWS) + triton.cdiv(tokens * K, _ROWS)
    return Launch((tiles,), dict(N=N, K=K, H=H, ROWS=_ROWS), dict(num_warps=4))


def rotate_chunk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate queries and keys by their tokens' positions, in place.

    q         [B, T, N, H] in bfloat16, float16 or float32
    k         [B, T, K, H] of the same dtype; the tokens of both are contiguous
    cos, sin  fp32 [B, T, H/2]

    Raises ValueError for head sizes that are not a power of two from 16 to 256, other dtypes and
    non-contiguous tensors, and if no kernel can run on this device.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    _check(q)
    q, q_stride = spaced("q", q, dims=2)
    k, k_stride = spaced("k", k, dims=2)
    rotate_launch(B * T, N, K, H).run(
        rotate_chunk_kernel, q, k, cos, sin, B * T * N, B * T * K, q_stride, k_stride
    )


def store_chunk_reference(
    k: Tensor, v: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> None:
    """`store_chunk` in plain PyTorch."""
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    keys[rows, :, slots] = k
    values[rows, :, slots] = v


@triton.jit(do_not_specialize=["rows", "T", "ring_size"])
def store_chunk_kernel(
    k, v, slots, keys, values, rows, T, ring_size, k_stride, v_stride, K: tl.constexpr,
    H: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """One CTA: ROWS heads of k and of v."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row // K
    head = row % K
    slot = tl.load(slots + token, mask=row < rows, other=0)
    place = (token // T * K + head) * ring_size + slot  # int64, as slots are
    real = (row < rows)[:, None]
    d = tl.arange(0, H)[None, :]
    mine = token.to(tl.int64)[:, None]
    at = head[:, None] * H + d
    to = place[:, None] * H + d
    tl.store(keys + to, tl.load(k + mine * k_stride + at, mask=real), mask=real)
    tl.store(values + to, tl.load(v + mine * v_stride + at, mask=real), mask=real)


def store_launch(tokens: int, K: int, H: int) -> Launch:
    """Shape of the launch for this many tokens of all rows."""
    _check_heads(H)
    return Launch((triton.cdiv(tokens * K, _ROWS),), dict(K=K, H=H, ROWS=_ROWS), dict(num_warps=4))


def store_chunk(k: Tensor, v: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Write a chunk's keys and values into the ring.

    k, v          [B, T, K, H] in bfloat16, float16 or float32, as all of them are; their tokens
                  are contiguous
    slots         int64 [B, T]: no two tokens of a row share one, except S, which is never read
    keys, values  [B, K, S + 1, H]: one layer of a RollingCache, written in the slots

    Raises ValueError for head sizes that are not a power of two from 16 to 256, other dtypes and
    non-contiguous tensors, and if no kernel can run on this device.
    """
    B, T, K, H = k.shape
    _check(k)
    k, k_stride = spaced("k", k, dims=2)
    v, v_stride = spaced("v", v, dims=2)
    tensors = (k, v, slots, keys, values)
    sizes = (B * T * K, T, keys.shape[2], k_stride, v_stride)
    store_launch(B * T, K, H).run(store_chunk_kernel, *tensors, *sizes)


def swiglu_reference(gate: Tensor, up: Tensor) -> None:
    """`swiglu` in plain PyTorch."""
    gate.copy_(activation(torch.nn.functional.silu(gate.float()) * up.float(), gate.dtype))


@triton.jit
def swiglu_kernel(gate, up, gate_stride, up_stride, F: tl.constexpr, BLOCK: tl.constexpr):
    """One CTA: BLOCK elements of one token."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < F
    token = tl.program_id(0).to(tl.int64)
    at = gate + token * gate_stride + column
    g = tl.load(at, mask=real).to(tl.float32)
    u = tl.load(up + token * up_stride + column, mask=real).to(tl.float32)
    tl.store(at, to_activation(g * tl.sigmoid(g) * u, gate.dtype.element_ty), mask=real)


def swiglu_launch(tokens: int, F: int) -> Launch:
    """Shape of the launch for this many tokens of all rows."""
    return Launch((tokens, triton.cdiv(F, _BLOCK)), dict(F=F, BLOCK=_BLOCK), dict(num_warps=4))


def swiglu(gate: Tensor, up: Tensor) -> None:
    """Write silu(gate) * up over the gate. In fp16 a value out of range becomes the largest one.

    gate, up  [..., F] in bfloat16, float16 or float32, both the same; their tokens are contiguous

    Raises ValueError for other dtypes and non-contiguous tensors, and if no kernel can run on this
    device.
    """
    _check(gate)
    F = gate.shape[-1]
    launch = swiglu_launch(gate.numel() // F, F)
    gate, gate_stride = spaced("gate", gate)
    up, up_stride = spaced("up", up)
    launch.run(swiglu_kernel, gate, up, gate_stride, up_stride)


def _check(x: Tensor) -> None:
    require(
        x.dtype in TRITON_DTYPES,
        f"activations in {x.dtype}: the kernels take bfloat16, float16 and float32",
    )
    arch_of(x)  # raises if no kernel can run on this device


def _check_heads(H: int) -> None:
    require(
        16 <= H <= 256 and H & (H - 1) == 0,
        f"head_dim is {H}; the prefill kernels need 16, 32, 64, 128 or 256",
    )
