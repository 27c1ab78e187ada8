"""Attention of a chunk of new tokens over themselves and over what the rolling cache holds.

    y = softmax(q k^T / sqrt(H)) v        a query at position p sees the positions p - W < j <= p

Sources: FlashAttention-2, https://arxiv.org/abs/2307.08691 (tiles of queries, keys in blocks,
scores never stored); Mistral 7B, section 2, https://arxiv.org/abs/2310.06825 (the window).

One CTA handles a tile of queries of one head and walks over the keys that at least one of them
sees: first those in the ring, then those of the chunk. Keys outside the window are never read, so
the cost of a token is the same at every length beyond W. The chunk must not be in the ring yet: it
may overwrite keys that its own first queries see.

Positions are counted from the chunk's first token, so key r >= 0 is row r of the chunk, and key
r < 0 is in the ring, in slot (start + r) mod S. Only blocks at the borders of the window and on the
diagonal need a mask.

The G query heads of a key/value head are neighbours in the grid, so they find its keys in the L2
cache; nothing is repeated in memory. The heaviest tiles, the last ones, start first.

Work: 4 H per query head and visible pair (7B, 2,048 tokens from the start: 1.1 TFLOP of the
prefill's 29.7 in all).

Versions (times not measured)
  scaled_dot_product_attention with a mask   T x (S + T) scores for all, heads repeated 4 times,
                                             ring copied
  this one, all blocks masked                4 more instructions per score
  this one                                   masks at the borders only; sm_90, heads of 128: wgmma,
                                             213 registers
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_kernels.portable import TRITON_DTYPES, Launch, arch_of, dot_operand, require, spaced


def attend_chunk_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    y: Tensor,
    num_slots: int,
    window: int | None,
) -> None:
    """`attend_chunk` in plain PyTorch.

    All of the ring and the chunk is scored, and keys that are not visible are masked.
    """
    B, T, N, H = q.shape
    slots = torch.arange(num_slots, device=q.device)
    i = torch.arange(T, device=q.device)
    age = (starts[:, None] - 1 - slots) % num_slots  # [B, S]: the newest slot has 0
    empty = -num_slots - T - 1
    held = torch.where(age < starts[:, None], -1 - age, empty)  # [B, S]: the key's r
    r = torch.cat((held, i.expand(B, T)), dim=1)[:, None]  # [B, 1, S + T]
    in_window = r > i[:, None] - (window or num_slots + T)
    visible = (r <= i[:, None]) & in_window & (r >= -num_slots)  # [B, T, S + T]
    k = torch.cat((keys[:, :, :num_slots], k.transpose(1, 2)), dim=2).float()  # [B, K, S + T, H]
    v = torch.cat((values[:, :, :num_slots], v.transpose(1, 2)), dim=2).float()
    grouped = q.float().transpose(1, 2).unflatten(1, (k.shape[1], -1))  # [B, K, G, T, H]
    scores = grouped @ k[:, :, None].transpose(-2, -1) * H**-0.5  # [B, K, G, T, S + T]
    weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    y.copy_((weights @ v[:, :, None]).flatten(1, 2).transpose(1, 2))


@triton.jit
def walk(
    query, positions, top, total, out, keys, values, first, wrap, low, high, i, window, scale,
    stride, H: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys low <= r < high. Returns the new (top, total, out).

    The queries are at `positions`, all of them in i .. i + QUERIES - 1.

    Key r is in row (first + r) mod wrap, and rows are `stride` elements apart. top, total and out
    are the maximum, the sum of weights and the weighted sum of values so far.

    Source: Online normalizer calculation for softmax, https://arxiv.org/abs/1805.02867
    """
    d = tl.arange(0, H)
    for block in tl.range(low, high, BLOCK, num_stages=STAGES):
        # 1. A block of keys, [H, BLOCK], and values, [BLOCK, H]. first + r is below 2 * wrap.
        r = block + tl.arange(0, BLOCK)
        row = first + r
        row = tl.where(row < wrap, row, row - wrap)
        real = r < high
        k = tl.load(keys + row[None, :] * stride + d[:, None], mask=real[None, :], other=0.0)
        v = tl.load(values + row[:, None] * stride + d[None, :], mask=real[:, None], other=0.0)
        k = dot_operand(k, ARCH)
        v = dot_operand(v, ARCH)

        # 2. Scores, [queries, BLOCK]. A mask only if the block crosses the end, the diagonal of the
        # first query or the window of the last.
        scores = tl.dot(query, k, input_precision="ieee") * scale
        if (block + BLOCK > high) | (block + BLOCK - 1 > i) | (block <= i + QUERIES - 1 - window):
            seen = (
                (r[None, :] <= positions[:, None])
                & (r[None, :] > positions[:, None] - window)
                & real[None, :]
            )
            scores = tl.where(seen, scores, -1e30)

        # 3. The sums, which were relative to the old maximum.
        highest = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - highest[:, None])
        shrink = tl.exp2(top - highest)
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        top = highest
    return top, total, out


@triton.jit(do_not_specialize=["T", "num_slots", "window"])
def prefill_attention_kernel(
    q, k, v, keys, values, starts, lengths, y, T, num_slots, window, scale, q_stride, kv_stride,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """One CTA: one row, one query head, QUERIES consecutive tokens from token i on."""
    # 1. Row, head and tokens; the last tokens first, because they see the most keys.
    b = (tl.program_id(0) // N).to(tl.int64)
    n = tl.program_id(0) % N
    head = n // (N // K)
    i = (tl.num_programs(1) - 1 - tl.program_id(1)) * QUERIES
    start = tl.load(starts + b).to(tl.int32)
    length = tl.load(lengths + b).to(tl.int32)
    m = i + tl.arange(0, QUERIES)
    d = tl.arange(0, H)
    inside = (m < T)[:, None]
    token = (b * T + m)[:, None]
    column = n * H + d[None, :]
    out = tl.zeros([QUERIES, H], tl.float32)
    if i < length:  # else all are padding, and y is 0
        query = tl.load(q + token * q_stride + column, mask=inside, other=0.0)  # [QUERIES, H]
        query = dot_operand(query, ARCH)
        top = tl.full([QUERIES], -1e30, tl.float32)
        total = tl.zeros([QUERIES], tl.float32)

        # 2. The keys in the ring: low .. -1.
        low = tl.maximum(i - window + 1, -start)  # the first key that any of these queries sees
        oldest = (start + tl.minimum(low, 0)) % num_slots  # its slot
        ring = (b * K + head) * (num_slots + 1) * H
        top, total, out = walk(
            query, m, top, total, out, keys + ring, values + ring, oldest - low, num_slots, low, 0,
            i, window, scale, H, H, QUERIES, BLOCK, STAGES, ARCH,
        )  # fmt: skip

        # 3. The keys of the chunk, up to the tile's own last token.
        chunk = b * T * kv_stride + head * H
        top, total, out = walk(
            query, m, top, total, out, k + chunk, v + chunk, 0, T, tl.maximum(low, 0),
            tl.minimum(i + QUERIES, length), i, window, scale, kv_stride, H, QUERIES, BLOCK,
            STAGES, ARCH,
        )  # fmt: skip
        out = out / total[:, None]
    tl.store(y + token * (N * H) + column, out.to(y.dtype.element_ty), mask=inside)


def launch(
    batch: int,
    T: int,
    N: int,
    K: int,
    H: int,
    dtype: torch.dtype,
    arch: int,
    queries: int | None = None,
) -> Launch:
    """Shape of the launch; `queries` per tile, None: chosen by dtype and T.

    ValueError for sizes that the kernel does not support.
    """
    require(
        dtype in TRITON_DTYPES,
        f"activations in {dtype}: the prefill kernel takes bfloat16, float16 and float32",
    )
    require(
        16 <= H <= 256 and H & (H - 1) == 0,
        f"head_dim is {H}; the prefill kernel needs 16, 32, 64, 128 or 256",
    )
    # Three stages must fit into shared memory: 128 KB for a head of 128.
    small = H <= 128 and dtype != torch.float32
    queries = queries or (128 if small and T > 64 else 32)
    block = 64 if small and arch >= 90 else 32
    stages = 3 if small else 1
    constants = dict(N=N, K=K, H=H, QUERIES=queries, BLOCK=block, STAGES=stages, ARCH=arch)
    options = dict(num_warps=8 if queries == 128 else 4, num_stages=stages)
    return Launch((batch * N, triton.cdiv(T, queries)), constants, options)


def attend_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    y: Tensor,
    num_slots: int,
    window: int | None,
    queries: int | None = None,
) -> None:
    """Write the attention of T new tokens of each row over themselves and over the ring.

    q             [B, T, N, H], rotated, in bfloat16, float16 or float32, as all of them are
    k, v          [B, T, K, H]; k rotated. The tokens of q, k and v are contiguous
    keys, values  [B, K, S + 1, H]: one layer of a RollingCache, without the chunk
    starts        int64 [B]: the position of each row's first new token, which is the row's length
                  so far
    lengths       int64 [B]: how many of a row's T tokens are real; y of the others is undefined,
                  but finite
    y             [B, T, N, H], written
    num_slots     S of the RollingCache
    window        how many positions a query sees, its own included; None: all
    queries       per tile; None: chosen by dtype and T

    Raises ValueError for head sizes that are not a power of two from 16 to 256, other dtypes and
    non-contiguous tensors, and if no kernel can run on this device.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    shape = launch(B, T, N, K, H, q.dtype, arch_of(q), queries)
    scale = H**-0.5 * math.log2(math.e)  # a GPU has exp2: e^x is 2^(x log2 e)
    *chunk, q_stride, kv_stride = spaced_heads(q, k, v)
    tensors = (*chunk, keys, values, starts, lengths, y)
    sizes = (T, num_slots, window or 2**30, scale, q_stride, kv_stride)
    shape.run(prefill_attention_kernel, *tensors, *sizes)


def spaced_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """A chunk's q, k and v, the stride of q, and that of k and v, as `spaced` returns them.

    Raises ValueError if k and v have two strides, and for rows whose elements int32 cannot count.
    """
    q, q_stride = spaced("q", q, dims=2)
    tokens = k.shape[1]
    k, k_stride = spaced("k", k, dims=2)
    v, v_stride = spaced("v", v, dims=2)
    require(k_stride == v_stride, f"k and v have two strides, {k_stride} and {v_stride}")
    require(
        tokens * k_stride < 2**31,
        f"{tokens} tokens in steps of {k_stride} elements; the kernels count to 2^31",
    )
    return q, k, v, q_stride, k_stride
