"""Attention of a few new tokens over themselves and the rolling cache, split over the keys.

The same as prefill/attention.py, for so few queries that its tiles would leave most of the GPU
idle: one CTA would walk over the whole window, 4,096 keys, for a guess of 9 tokens. So the keys of
the ring are split into parts as in decode/attention.py, and the parts are combined in the same way.
The queries of all G heads that share a key/value head are rows of one product, so every key is read
once.

Bytes: 4 K H per live position and row in 16 bits, as in a decode step (7B: 16.8 MB for a window of
4,096).

Versions (times not measured; a 7B, one row, 9 tokens, a full window)
  tiles of prefill/attention.py    32 CTAs that read 4,096 keys each: 4 times the bytes, one block
                                   after another
  this one                         128 CTAs that read 256 keys each; the last of a head 255 and the
                                   chunk
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_kernels.decode.attention import Partials, combine, store_part
from mistral_kernels.portable import TRITON_DTYPES, Launch, arch_of, dot_operand, require
from mistral_kernels.prefill.attention import attend_chunk_reference, spaced_heads, walk

MAX_QUERIES = 64  # of a key/value head: 16 tokens of a Mistral, whose key/value heads serve 4


def attend_short_reference(*arguments: Tensor | int | None, partials: Partials) -> None:
    """`attend_short` in plain PyTorch; it does not use `partials`."""
    attend_chunk_reference(*arguments)


@triton.jit(do_not_specialize=["T", "num_slots", "window"])
def short_attention_kernel(
    q, k, v, keys, values, starts, lengths, y, partial_outputs, stats, counters, T, num_slots,
    window, scale, q_stride, kv_stride,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """One CTA: one row, one key/value head with all its queries, one part of the ring.

    The last CTA of a head also takes the chunk. Positions are counted from the chunk's first token,
    as in prefill/attention.py. Query m is token m // G of head m % G; the T * G queries are padded
    to ROWS.
    """
    # 1. The queries.
    G: tl.constexpr = N // K
    QUERIES: tl.constexpr = (ROWS + G - 1) // G  # tokens, padding included
    index = tl.program_id(0)  # row * K + head
    split = tl.program_id(1)
    b = (index // K).to(tl.int64)
    head = index % K
    start = tl.load(starts + b).to(tl.int32)
    length = tl.load(lengths + b).to(tl.int32)
    m = tl.arange(0, ROWS)
    t = m // G
    d = tl.arange(0, H)
    token = b * T + tl.minimum(t, T - 1)
    column = (head * G + m % G) * H
    places = token * (N * H) + column  # of their y
    query = tl.load(q + (token * q_stride + column)[:, None] + d[None, :])  # [ROWS, H]
    query = dot_operand(query, ARCH)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, H], tl.float32)

    # 2. This CTA's part of the ring: keys low .. low + share - 1, all of them below 0.
    oldest = tl.maximum(1 - window, -start)  # the first key that the first query sees
    share = tl.cdiv(-oldest, SPLITS * BLOCK) * BLOCK
    low = oldest + split * share
    slot = (start + oldest) % num_slots
    ring = index.to(tl.int64) * (num_slots + 1) * H
    top, total, out = walk(
        query, t, top, total, out, keys + ring, values + ring, slot - oldest, num_slots, low,
        tl.minimum(low + share, 0), 0, window, scale, H, H, QUERIES, BLOCK, STAGES, ARCH,
    )  # fmt: skip

    # 3. The chunk, by the last CTA.
    if split == SPLITS - 1:
        chunk = b * T * kv_stride + head * H
        top, total, out = walk(
            query, t, top, total, out, k + chunk, v + chunk, 0, T, 0, tl.minimum(T, length), 0,
            window, scale, kv_stride, H, QUERIES, BLOCK, STAGES, ARCH,
        )  # fmt: skip

    # 4. The last to arrive combines all parts. A part of which a query sees nothing has the weight
    # exp(-1e30) = 0 next to the part with the query itself.
    store_part(partial_outputs, stats, index * SPLITS + split, top, total, out, T * G, ROWS, H)
    before = tl.atomic_add(counters + index, 1, sem="acq_rel", scope="gpu")
    if before == SPLITS - 1:
        combine(y, places, partial_outputs, stats, index, T * G, ROWS, H, SPLITS)
        tl.store(counters + index, 0)


def launch(
    batch: int, T: int, N: int, K: int, H: int, dtype: torch.dtype, arch: int, splits: int
) -> Launch:
    """Shape of the launch. ValueError for sizes that the kernel does not support."""
    require(
        dtype in TRITON_DTYPES,
        f"activations in {dtype}: the kernel takes bfloat16, float16 and float32",
    )
    require(
        16 <= H <= 256 and H & (H - 1) == 0,
        f"head_dim is {H}; the kernel needs 16, 32, 64, 128 or 256",
    )
    queries = T * N // K
    require(
        1 <= queries <= MAX_QUERIES,
        f"{queries} queries of a key/value head; the kernel takes 1 to {MAX_QUERIES}",
    )
    rows = 16 if queries <= 16 else MAX_QUERIES  # two kernels, not one per power of two
    # Three stages must fit into shared memory.
    stages = 3 if H <= 128 and dtype != torch.float32 else 1
    constants = dict(N=N, K=K, H=H, ROWS=rows, SPLITS=splits, BLOCK=32, STAGES=stages, ARCH=arch)
    options = dict(num_warps=8 if rows == MAX_QUERIES else 4, num_stages=stages)
    return Launch((batch * K, splits), constants, options)


def attend_short(
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
    *,
    partials: Partials,
) -> None:
    """`attend_chunk` for so few new tokens per row that a key/value head has at most 64 queries.

    partials  for these B, N, K and H, and for T tokens

    The other arguments are those of `attend_chunk`. Raises ValueError for head sizes that are not a
    power of two from 16 to 256, more queries, other dtypes and non-contiguous tensors, and if no
    kernel can run on this device.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    shape = launch(B, T, N, K, H, q.dtype, arch_of(q), partials.splits)
    scale = H**-0.5 * math.log2(math.e)  # a GPU has exp2: e^x is 2^(x log2 e)
    *chunk, q_stride, kv_stride = spaced_heads(q, k, v)
    tensors = (*chunk, keys, values, starts, lengths, y)
    parts = (partials.outputs, partials.stats, partials.counters)
    sizes = (T, num_slots, window or 2**30, scale, q_stride, kv_stride)
    shape.run(short_attention_kernel, *tensors, *parts, *sizes)
