"""Attention of one new token over the rolling cache, split over the keys.

    y = softmax(q k^T / sqrt(H)) v        over the last min(position + 1, W) positions of each row

Sources: Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html (the split);
Online normalizer calculation for softmax, https://arxiv.org/abs/1805.02867 (the running maximum).

One CTA takes one key/value head of one row and one of SPLITS parts of its keys, and does the G query heads that share
them together: they are the rows of one `tl.dot`, so every key is read once. Position p lives in slot p mod S; the
window is a run of consecutive positions, so its slots are a run that wraps at most once, and exactly the live ones are
read. How many there are follows from `positions` on the device: one CUDA graph serves every length.

The parts meet in the same kernel: each CTA writes its sum, its maximum and its weight, and counts itself; the one that
counts last adds all parts up, in their order, so the result has the same bits whoever comes last. It sets the counter
back to zero for the next call.

Bytes: 4 K H a live position and row in 16 bits (7B: 16.8 MB for 4,096 positions, 3.9 us at 4.3 TB/s).

Versions (times not measured; instructions a thread for 64 keys, read from the SASS for sm_90)
  vector units, 16 keys at a time                  6,000
  tl.dot, the G heads padded to 16 rows            350; loads pipelined in 3 stages of 64 keys
  combine in a second kernel                       one more launch, 1 to 2 us, for the 1 us that it takes here
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_kernels.matvec import MAX_BATCH
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

BLOCK = 64  # keys at a time
FULL_GPU = 264  # CTAs: two for each multiprocessor of an H100 or H200


def num_splits(batch: int, K: int) -> int:
    """How many parts the keys are cut into: a power of two up to 16, as many as the GPU has room for at once."""
    return max(n for n in (1, 2, 4, 8, 16) if n == 1 or batch * K * n <= FULL_GPU)


class Workspace:
    """What the CTAs of one `attend` tell each other; one serves all layers, since they run one after the other.

    splits  how many parts the keys are cut into; None: `num_splits`
    """

    def __init__(self, batch: int, N: int, K: int, H: int, device: torch.device | str, *, splits: int | None = None):
        self.splits = splits or num_splits(batch, K)
        self.sums = torch.empty(batch * N * self.splits * H, dtype=torch.float32, device=device)
        self.weights = torch.empty(batch * N * self.splits * 2, dtype=torch.float32, device=device)
        self.counters = torch.zeros(batch * K, dtype=torch.int32, device=device)


def attend_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    y: Tensor,
    workspace: Workspace,
    num_slots: int,
    window: int | None,
    *,
    pdl: bool = False,
) -> None:
    """`attend` in plain PyTorch: every slot is scored, and those that hold no live position are masked."""
    (B, N, H), K = q.shape, keys.shape[1]
    slots = torch.arange(num_slots, device=q.device)
    age = (positions[:, None] - slots) % num_slots  # [B, S]: how far behind the new token a slot's position is
    live = (age <= positions[:, None]) & (age < (window or num_slots))
    grouped = q.float().view(B, K, N // K, H)
    scores = grouped @ keys[:, :, :num_slots].float().transpose(-2, -1) * H**-0.5  # [B, K, G, S]
    weights = scores.masked_fill(~live[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    y.copy_(activation((weights @ values[:, :, :num_slots].float()).reshape(B, N * H), y.dtype))


@triton.jit
def combine(
    y, sums, weights, index, G: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """Add up the parts of one key/value head and row, and store its G heads of y."""
    g = tl.arange(0, GROUP)
    real = g < G
    head = g[:, None] * H + tl.arange(0, H)[None, :]
    top = tl.full([GROUP], -1e30, tl.float32)
    for part in tl.static_range(SPLITS):
        line = weights + (index * SPLITS + part) * 2 * G + g
        top = tl.maximum(top, tl.load(line, mask=real, other=-1e30, cache_modifier=".cg"))
    total = tl.zeros([GROUP], tl.float32)
    out = tl.zeros([GROUP, H], tl.float32)
    for part in tl.static_range(SPLITS):
        at = index * SPLITS + part
        line = weights + at * 2 * G + g
        factor = tl.exp2(tl.load(line, mask=real, other=-1e30, cache_modifier=".cg") - top)
        total += factor * tl.load(line + G, mask=real, other=0.0, cache_modifier=".cg")
        mine = tl.load(sums + at * G * H + head, mask=real[:, None], other=0.0, cache_modifier=".cg")
        out += factor[:, None] * mine
    out = out / tl.where(total > 0.0, total, 1.0)[:, None]  # a row that takes no part has no key, and gets 0
    tl.store(y + index * G * H + head, to_activation(out, y.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["num_slots", "window"])
def decode_attention_kernel(
    q, keys, values, positions, y, sums, weights, counters, num_slots, window, scale,
    K: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """One CTA: one row, one key/value head with its G query heads, one part of the keys."""
    index = tl.program_id(0)  # row * K + head
    split = tl.program_id(1)
    wait_for_producer(ARCH)
    position = tl.load(positions + index // K).to(tl.int32)
    live = tl.minimum(position + 1, window)
    start = (position + 1 - live) % num_slots  # the slot of the oldest
    share = tl.cdiv(live, SPLITS * BLOCK) * BLOCK
    low = split * share
    high = tl.minimum(low + share, live)

    d = tl.arange(0, H)
    m = tl.arange(0, 16)
    ring = index.to(tl.int64) * (num_slots + 1) * H
    heads = index * G + tl.minimum(m, G - 1)
    query = dot_operand(tl.load(q + heads[:, None] * H + d[None, :]), ARCH)
    top = tl.full([16], -1e30, tl.float32)
    total = tl.zeros([16], tl.float32)
    out = tl.zeros([16, H], tl.float32)
    for i in tl.range(low, high, BLOCK, num_stages=STAGES):
        j = i + tl.arange(0, BLOCK)
        slot = tl.where(start + j < num_slots, start + j, start + j - num_slots)
        k = tl.load(keys + ring + slot[None, :] * H + d[:, None], mask=(j < high)[None, :], other=0.0)
        v = tl.load(values + ring + slot[:, None] * H + d[None, :], mask=(j < high)[:, None], other=0.0)
        k, v = dot_operand(k, ARCH), dot_operand(v, ARCH)
        scores = tl.dot(query, k, input_precision="ieee") * scale
        scores = tl.where((j < high)[None, :], scores, -1e30)
        highest = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - highest[:, None])
        shrink = tl.exp2(top - highest)
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        top = highest

    part = index * SPLITS + split
    real = m < G
    tl.store(sums + (part * G + m[:, None]) * H + d[None, :], out, mask=real[:, None])
    tl.store(weights + part * 2 * G + m, top, mask=real)
    tl.store(weights + part * 2 * G + G + m, total, mask=real)
    tl.debug_barrier()  # one thread counts for all of them, so all must have stored
    before = tl.atomic_add(counters + index, 1, sem="acq_rel", scope="gpu")
    release_consumer(ARCH)
    if before == SPLITS - 1:
        combine(y, sums, weights, index, G, GROUP, H, SPLITS)
        tl.store(counters + index, 0)


def launch(batch: int, N: int, K: int, H: int, dtype: torch.dtype, arch: int, splits: int | None = None) -> Launch:
    """Shape of the launch. ValueError for sizes that the kernel cannot do."""
    require(1 <= batch <= MAX_BATCH, f"a batch of {batch} rows: the decode kernels take 1 to {MAX_BATCH}")
    require(dtype in TRITON_DTYPES, f"a cache in {dtype}: the decode kernels take bfloat16, float16 and float32")
    require(16 <= H <= 256 and H & (H - 1) == 0, f"head_dim is {H}; the decode kernels need 16, 32, 64, 128 or 256")
    G = N // K
    require(G <= 16, f"{G} query heads share a key/value head; the decode kernels take up to 16")
    splits = splits or num_splits(batch, K)
    stages = 3 if H * dtype.itemsize <= 256 else 1  # 72 KB of shared memory for a head of 128 in 16 bits
    group = triton.next_power_of_2(G)
    constants = dict(K=K, G=G, GROUP=group, H=H, SPLITS=splits, BLOCK=BLOCK, STAGES=stages, ARCH=arch)
    return Launch((batch * K, splits), constants, dict(num_warps=4, num_stages=stages), contiguous=True)


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    y: Tensor,
    workspace: Workspace,
    num_slots: int,
    window: int | None,
    *,
    pdl: bool = False,
) -> None:
    """Write each row's attention over what it remembers, the new token included (its key must be stored).

    q             [B, N, H] of the cache's dtype, rotated
    keys, values  [B, K, num_slots + 1, H]: one layer of a RollingCache
    positions     int64 [B]: where the new token stands; -1: the row takes no part, and its y is 0
    y             [B, N * H] of the cache's dtype, or fp16 ahead of packed weights; written
    window        a query sees so many positions, its own included; None: all in the cache

    Raises ValueError for head sizes that are no power of two from 16 to 256, for more than 16 query heads a key/value
    head, and B above 16.
    """
    (B, N, H), K = q.shape, keys.shape[1]
    shape = launch(B, N, K, H, keys.dtype, arch_of(q), workspace.splits)
    scratch = (workspace.sums, workspace.weights, workspace.counters)
    scale = H**-0.5 * 1.4426950408889634  # 1 / ln 2: exp2 is what the GPU has
    seen = min(window or num_slots, num_slots)
    shape.run(decode_attention_kernel, q, keys, values, positions, y, *scratch, num_slots, seen, scale, pdl=pdl)
