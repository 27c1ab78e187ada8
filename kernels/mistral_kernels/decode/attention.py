"""Attention of one new token over the rolling cache, split over the keys.

    y = softmax(q k^T / sqrt(H)) v        over the last min(position + 1, W) positions of each row

Sources: Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html (the split);
Online normalizer calculation for softmax, https://arxiv.org/abs/1805.02867 (the running maximum).

One CTA handles one key/value head of one row and one of SPLITS parts of its keys. The G query heads
that share these keys are the rows of one `tl.dot`, so every key is read once. Position p is in slot
p mod S; the window is a run of consecutive positions, so its slots are a run that wraps at most
once, and only those are read. Their number follows from `positions` on the device: one CUDA graph
serves every length.

The parts are combined in the same kernel: each CTA stores its weighted sum of values, its maximum
and its sum of weights, and increments a counter. The CTA that increments it last adds up all parts
in index order, so the result has the same bits whichever CTA is last, and resets the counter for
the next call.

Bytes: 4 K H per live position and row in 16 bits (7B: 16.8 MB for 4,096 positions, 3.9 us at 4.3
TB/s).

Versions (times not measured; instructions per thread for 64 keys, read from the SASS for sm_90)
  vector units, 16 keys at a time       6,000
  tl.dot, the G heads padded to 16 rows 350; loads pipelined in 3 stages of 64 keys
  combine in a second kernel            one more launch, 1 to 2 us, for the 1 us that it takes here
  first block before the wait           with dependent launch alone: it takes 128 registers instead
                                        of 96, and a few more instructions
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_kernels.decode.matvec import require_rows
from mistral_kernels.portable import (
    TRITON_DTYPES,
    Launch,
    activation,
    arch_of,
    dot_operand,
    release_consumer,
    require,
    to_activation,
    wait_for_producer,
)

_BLOCK = 64  # keys at a time
_FULL_GPU = 264  # CTAs: two for each multiprocessor of an H100 or H200


def num_splits(batch: int, K: int) -> int:
    """How many parts the keys are split into.

    A power of two up to 16: as many parts as the GPU has room for at once.
    """
    return max(n for n in (1, 2, 4, 8, 16) if n == 1 or batch * K * n <= _FULL_GPU)


class Partials:
    """The buffers of one `attend` for the results of its parts.

    One serves all layers, because they run one after the other.

    tokens  how many queries per row and head
    splits  how many parts the keys are split into; None: `num_splits`
    """

    def __init__(
        self,
        batch: int,
        N: int,
        K: int,
        H: int,
        device: torch.device | str,
        *,
        tokens: int = 1,
        splits: int | None = None,
    ):
        self.splits = splits or num_splits(batch, K)
        M = tokens * N // K  # queries of a key/value head
        parts = (batch * K, self.splits)
        # Weighted sums of values; maxima and sums of weights; how many parts are finished.
        self.outputs = torch.empty(*parts, M, H, dtype=torch.float32, device=device)
        self.stats = torch.empty(*parts, 2, M, dtype=torch.float32, device=device)
        self.counters = torch.zeros(batch * K, dtype=torch.int32, device=device)


def attend_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    y: Tensor,
    partials: Partials,
    num_slots: int,
    window: int | None,
) -> None:
    """`attend` in plain PyTorch.

    Every slot is scored, and slots without a live position are masked.
    """
    B, N, H = q.shape
    K = keys.shape[1]
    slots = torch.arange(num_slots, device=q.device)
    age = (positions[:, None] - slots) % num_slots  # [B, S]: the slot's distance to the new token
    live = (age <= positions[:, None]) & (age < (window or num_slots))
    grouped = q.float().view(B, K, N // K, H)
    scores = grouped @ keys[:, :, :num_slots].float().transpose(-2, -1) * H**-0.5  # [B, K, G, S]
    weights = scores.masked_fill(~live[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    y.copy_(activation((weights @ values[:, :, :num_slots].float()).reshape(B, N * H), y.dtype))


@triton.jit
def store_part(
    partial_outputs, stats, part, top, total, out, M, ROWS: tl.constexpr, H: tl.constexpr
):  # fmt: skip
    """Store one CTA's partial result for its M queries.

    The tile is padded to ROWS rows; rows >= M are not stored.
    """
    m = tl.arange(0, ROWS)
    real = m < M
    d = tl.arange(0, H)
    tl.store(partial_outputs + (part * M + m[:, None]) * H + d[None, :], out, mask=real[:, None])
    tl.store(stats + part * 2 * M + m, top, mask=real)
    tl.store(stats + part * 2 * M + M + m, total, mask=real)
    tl.debug_barrier()  # one thread increments the counter for all, so all must have stored


@triton.jit
def combine(
    y, places, partial_outputs, stats, index, M, ROWS: tl.constexpr, H: tl.constexpr,
    SPLITS: tl.constexpr
):  # fmt: skip
    """Add up the parts of one key/value head and row, and store y of its M queries.

    The y of query m begins at y[places[m]].

        y = sum_s 2^(top_s - top) out_s / sum_s 2^(top_s - top) total_s        top = max_s top_s
    """
    m = tl.arange(0, ROWS)
    real = m < M
    d = tl.arange(0, H)[None, :]

    # 1. The maximum of all parts. ".cg" bypasses the L1 cache, which may hold stale values of what
    # other CTAs have stored.
    top = tl.full([ROWS], -1e30, tl.float32)
    for part in tl.static_range(SPLITS):
        stat = stats + (index * SPLITS + part) * 2 * M + m
        top = tl.maximum(top, tl.load(stat, mask=real, other=-1e30, cache_modifier=".cg"))

    # 2. The sums, in index order.
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, H], tl.float32)
    # With few rows the registers hold all parts: then all loads are issued at once.
    AT_ONCE: tl.constexpr = SPLITS if ROWS <= 16 else 1
    for first in range(0, SPLITS, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            at = index * SPLITS + first + i
            stat = stats + at * 2 * M + m
            factor = tl.exp2(tl.load(stat, mask=real, other=-1e30, cache_modifier=".cg") - top)
            total += factor * tl.load(stat + M, mask=real, other=0.0, cache_modifier=".cg")
            row = partial_outputs + (at * M + m[:, None]) * H + d
            out += factor[:, None] * tl.load(
                row, mask=real[:, None], other=0.0, cache_modifier=".cg"
            )

    # 3. The division. An idle row has no key, so its total is 0, and it gets 0.
    out = out / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(y + places[:, None] + d, to_activation(out, y.dtype.element_ty), mask=real[:, None])


@triton.jit
def _slots_at(keys, values, j, start, num_slots, H: tl.constexpr):
    """Pointers to the keys [H, BLOCK] and values [BLOCK, H] of the live positions j, oldest first.

    start  the slot of the oldest
    """
    slot = tl.where(start + j < num_slots, start + j, start + j - num_slots)
    d = tl.arange(0, H)
    return keys + slot[None, :] * H + d[:, None], values + slot[:, None] * H + d[None, :]


@triton.jit
def _add_block(query, k, v, real, top, total, out, scale, ARCH: tl.constexpr):
    """The online softmax after BLOCK more keys, of which `real` says which exist.

    In a block without any, each key weighs 1 next to a maximum of -1e30, which is nothing next to
    another part's; its values are 0.
    """
    k = dot_operand(k, ARCH)
    v = dot_operand(v, ARCH)
    scores = tl.dot(query, k, input_precision="ieee") * scale  # [16, BLOCK]
    scores = tl.where(real[None, :], scores, -1e30)
    highest = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - highest[:, None])
    shrink = tl.exp2(top - highest)  # the sums so far are relative to the old maximum
    total = total * shrink + tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    return highest, total, out


@triton.jit(do_not_specialize=["num_slots", "window"])
def decode_attention_kernel(  # noqa: PLR0915
    q, keys, values, positions, y, partial_outputs, stats, counters, num_slots, window, scale,
    K: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """One CTA: one row, one key/value head with its G query heads, one part of the keys.

    GROUP is G rounded up to a power of two. `scale` includes log2(e), since weights are powers of
    2. AHEAD: the first block is loaded before the kernel that writes q and the newest key has
    ended.
    """
    index = tl.program_id(0)  # row * K + head
    split = tl.program_id(1)

    # 1. The part: of the live positions, oldest first, low .. high - 1. The positions are those of
    # the whole step, so they can be read before the kernel that writes q and the key has ended.
    position = tl.load(positions + index // K).to(tl.int32)  # -1: idle, no live position
    live = tl.minimum(position + 1, window)
    start = (position + 1 - live) % num_slots  # the slot of the oldest
    share = tl.cdiv(live, SPLITS * BLOCK) * BLOCK  # whole blocks: the last parts may be empty
    low = split * share
    high = tl.minimum(low + share, live)

    # 2. Keys and values of earlier steps can be read before as well: the first block, but for the
    # newest position, which that kernel writes.
    d = tl.arange(0, H)
    ring = index.to(tl.int64) * (num_slots + 1) * H
    first = low
    if AHEAD:
        j = low + tl.arange(0, BLOCK)
        k_at, v_at = _slots_at(keys + ring, values + ring, j, start, num_slots, H)
        older = j < tl.minimum(high, live - 1)
        k = tl.load(k_at, mask=older[None, :], other=0.0)
        v = tl.load(v_at, mask=older[:, None], other=0.0)
    wait_for_producer(ARCH)

    # 3. The queries: G heads, padded to the 16 rows that `tl.dot` needs at least.
    m = tl.arange(0, 16)
    heads = index * G + tl.minimum(m, G - 1)
    query = dot_operand(tl.load(q + heads[:, None] * H + d[None, :]), ARCH)  # [16, H]

    # 4. The online softmax: maximum, sum of weights and weighted sum of values so far.
    top = tl.full([16], -1e30, tl.float32)
    total = tl.zeros([16], tl.float32)
    out = tl.zeros([16, H], tl.float32)
    if AHEAD:
        newest = (j < high) & (j == live - 1)
        # Not from the L1 cache, into which the loads before the wait may have brought its line.
        k = tl.load(k_at, mask=newest[None, :], other=k, cache_modifier=".cg")
        v = tl.load(v_at, mask=newest[:, None], other=v, cache_modifier=".cg")
        top, total, out = _add_block(query, k, v, j < high, top, total, out, scale, ARCH)
        first = low + BLOCK
    for i in tl.range(first, high, BLOCK, num_stages=STAGES):
        j = i + tl.arange(0, BLOCK)
        k_at, v_at = _slots_at(keys + ring, values + ring, j, start, num_slots, H)
        k = tl.load(k_at, mask=(j < high)[None, :], other=0.0)
        v = tl.load(v_at, mask=(j < high)[:, None], other=0.0)
        top, total, out = _add_block(query, k, v, j < high, top, total, out, scale, ARCH)

    # 5. The last CTA of a head combines all parts. The atomic's acq_rel makes their stores visible.
    store_part(partial_outputs, stats, index * SPLITS + split, top, total, out, G, 16, H)
    before = tl.atomic_add(counters + index, 1, sem="acq_rel", scope="gpu")
    release_consumer(ARCH)
    if before == SPLITS - 1:
        places = (index * G + tl.arange(0, GROUP)) * H
        combine(y, places, partial_outputs, stats, index, G, GROUP, H, SPLITS)
        tl.store(counters + index, 0)


def launch(
    batch: int,
    N: int,
    K: int,
    H: int,
    dtype: torch.dtype,
    arch: int,
    splits: int | None = None,
    ahead: bool = False,
) -> Launch:
    """Shape of the launch. ValueError for sizes that the kernel does not support."""
    require_rows(batch)
    require(
        dtype in TRITON_DTYPES,
        f"a cache in {dtype}: the decode kernels take bfloat16, float16 and float32",
    )
    require(
        16 <= H <= 256 and H & (H - 1) == 0,
        f"head_dim is {H}; the decode kernels need 16, 32, 64, 128 or 256",
    )
    G = N // K
    require(G <= 16, f"{G} query heads share a key/value head; the decode kernels take up to 16")
    # Three stages take 70 KB of shared memory for a head of 128 in 16 bits. A block of larger heads
    # that waits in registers would not fit.
    fits = H * dtype.itemsize <= 256
    stages = 3 if fits else 1
    constants = dict(
        K=K,
        G=G,
        GROUP=triton.next_power_of_2(G),
        H=H,
        SPLITS=splits or num_splits(batch, K),
        BLOCK=_BLOCK,
        STAGES=stages,
        AHEAD=ahead and fits,
        ARCH=arch,
    )
    grid = (batch * K, constants["SPLITS"])
    return Launch(grid, constants, dict(num_warps=4, num_stages=stages))


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    y: Tensor,
    partials: Partials,
    num_slots: int,
    window: int | None,
    *,
    pdl: bool = False,
) -> None:
    """Write each row's attention over the cache, whose last entry is the new token itself.

    q             [B, N, H] of the cache's dtype, rotated
    keys, values  [B, K, num_slots + 1, H]: one layer of a RollingCache, with the new token's
    positions     int64 [B] of the new tokens; -1: the row is idle, and its y is 0
    y             [B, N * H] of the cache's dtype, or fp16 if the model has packed weights; written
    partials      for these B, N, K and H
    num_slots     S of the RollingCache
    window        how many positions a query sees, its own included; None: all in the cache
    pdl           see `Launch.run`

    Raises ValueError for head sizes that are not a power of two from 16 to 256, more than 16 query
    heads per key/value head, B above 64, other dtypes and non-contiguous tensors, and if no kernel
    can run on this device.
    """
    B, N, H = q.shape
    K = keys.shape[1]
    # Without `pdl` nothing would be gained.
    shape = launch(B, N, K, H, keys.dtype, arch_of(q), partials.splits, ahead=pdl)
    tensors = (q, keys, values, positions, y, partials.outputs, partials.stats, partials.counters)
    scale = H**-0.5 * math.log2(math.e)  # a GPU has exp2: e^x is 2^(x log2 e)
    seen = min(window or num_slots, num_slots)
    shape.run(decode_attention_kernel, *tensors, num_slots, seen, scale, pdl=pdl)
