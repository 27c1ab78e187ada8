"""From logits to the next id on the GPU: one kernel. Its settings are tensors on the device, one
row each, so one CUDA graph serves all settings.

The rules, their order and their treatment of ties are those of mistral/sampling.py: repetition
penalty, mask, temperature, top-k, top-p, min-p. (It lacks typical-p and banned n-grams: see
`Sampler.supports`.)

One CTA handles one row and holds it in registers. A token can be drawn if it passes:

  top-k   At most k - 1 scores are higher (a score that ties with the k-th stays). The k-th score is
          found by bisection on the bits of a float, because they have the order of the floats; it
          ends as soon as exactly k scores reach the border.
  top-p   The tokens ranked above it have less than p of the mass that top-k left. Of equal scores
          the higher id ranks first (the reference leaves that to its sort); the first token always
          passes. No sorting: draw a token and sum the mass ranked above it. If that is p or more,
          reject the token and draw again from the mass ranked above it. The draw is exact, because
          whatever is discarded with a rejected token would be rejected too. At least p of the mass
          passes, so more than two rounds are rare.
  min-p   It is at least min_p times as probable as the best token: the others are cut off before
          the draw. They do not change the mass ranked above a token that stays, so top-p gives the
          same result.

A draw selects a group of 32 neighbours by the groups' sums, then a token of the group by a second
random number. The random numbers are Philox of (seed; ids that the row has drawn, stream, round).
The stream is the row's index if all rows share one seed, else 0: then a row's ids do not depend on
the other rows.

Source: Parallel random numbers: as easy as 1, 2, 3, https://doi.org/10.1145/2063384.2063405
(Philox)

Bytes: 4 per logit; 10 more if ids are penalised or forbidden (32,000 tokens: 128 KB per row, and
320 KB more). Logits are loaded 16 bytes at a time, so every row begins at a multiple of 16 bytes:
rows have `row_width(V)` columns, of which those from V on are never used.

Versions (times not measured)
  torch: topk, sort, softmax, cumsum, scatter, ...   about 20 kernels, two sorts of the vocabulary
  top-p by bisection on the mass                     some 20 passes over the row instead of two
  a random number for every token                    two thirds of all instructions
  flags read while the row is in registers           224 bytes spilled per thread; via memory: none
  rows of V columns, loaded from any address         128 bytes spilled per thread if V % 4 != 0
  this one                                           1 kernel; a pass over the row for each round
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral.engine.base import IDLE, NO_NUMBERS, NOTHING_LEFT
from mistral.sampling import Sampling, processed_scores
from mistral_kernels.portable import (
    Launch,
    arch_of,
    release_consumer,
    require,
    row_width,
    wait_for_producer,
)

FLOATS = 4  # of a row: temperature, top_p, min_p, repetition_penalty
INTEGERS = 5  # of a row: top_k, seed, whether it has a mask, stream, whether it is active

_ROW_FLOATS = tl.constexpr(FLOATS)
_ROW_INTEGERS = tl.constexpr(INTEGERS)
_LARGEST = tl.constexpr(3.4028234663852886e38)
_NO_NUMBERS = tl.constexpr(NO_NUMBERS)
_NOTHING_LEFT = tl.constexpr(NOTHING_LEFT)
_IDLE = tl.constexpr(IDLE)
_LOWEST_KEY = tl.constexpr(-2139095041)  # `_float_of` of it is -infinity


def sample_reference(
    logits: Tensor,
    allowed: Tensor,
    seen: Tensor,
    scores: Tensor,
    floats: Tensor,
    integers: Tensor,
    counts: Tensor,
    ids: Tensor,
    answers: Tensor,
    *,
    V: int,
) -> None:
    """`sample` in plain PyTorch: the same ids with the same probabilities, from other random
    numbers. It does not use `scores`.
    """
    logits = logits[:, :V]
    allowed = allowed[:, :V]
    seen = seen[:, :V]
    for b, (top_k, seed, masked, stream, active) in enumerate(integers.tolist()):
        if not active:
            answers[b] = IDLE
            continue
        temperature, top_p, min_p, penalty = floats[b].tolist()
        # As float32 the lowest temperature that `Sampling` accepts, 1e-5, is a little lower.
        sampling = Sampling(
            temperature=temperature and max(temperature, 1e-5),
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
        # 1. Penalty, mask and warpers.
        z = torch.where(logits[b].isnan(), -math.inf, logits[b])
        z = z.clamp(max=1e28)  # finite even after the division by penalty and temperature
        z = torch.where(seen[b], torch.where(z < 0, z * penalty, z / penalty), z)
        no_history = ids.new_zeros(1, 0)
        mask = allowed[b : b + 1] if masked else None
        weights = processed_scores(z[None], sampling, no_history, no_history, mask)[0]
        # 2. Problems: a NaN or an infinite score before an empty row.
        nothing_left = torch.where(weights.amax() == -math.inf, NOTHING_LEFT, 0)
        infinite = (logits[b] == math.inf) & (allowed[b] if masked else True)
        broken = logits[b].isnan() | infinite
        problem = torch.where(broken.any(), NO_NUMBERS, nothing_left)
        # 3. The choice: the first of the best, or a draw as in `next_ids`.
        if temperature:
            generator = torch.Generator(ids.device).manual_seed(
                (seed + 1_000_003 * int(counts[b]) + stream) % 2**63
            )
            noise = torch.empty_like(weights).exponential_(1, generator=generator)
            weights = weights.softmax(dim=-1).nan_to_num(0.0) / noise
        ids[b] = weights.argmax()
        answers[b] = torch.where(problem < 0, problem, ids[b])
        seen[b, ids[b]] = True
        counts[b] += 1


@triton.jit
def _float_of(key):
    """The float with rank `key`: keys, as integers, have the order of the floats."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def kth_highest(z, top, k):
    """A border that the k highest of z reach, with those that tie with the k-th, and no others.

    `top` is the maximum of z.
    """
    low = tl.full([], _LOWEST_KEY, tl.int32)
    bits = top.to(tl.int32, bitcast=True)
    high = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # halfway, rounded up; low + high may overflow
        count = tl.sum((z >= _float_of(middle)).to(tl.int32))
        low = tl.where(count >= k, middle, low)
        high = tl.where(count == k, middle, tl.where(count > k, high, middle - 1))
    return _float_of(low)


@triton.jit
def _pick(weights, u, SIZE: tl.constexpr):
    """An index drawn in proportion to weights [SIZE] >= 0 by u in [0, 1).

    Its weight is above 0 unless all are 0.
    """
    # The sums of a parallel scan may drop at a weight of 0.
    ends = tl.where(weights > 0.0, tl.cumsum(weights, 0), 0.0)
    total = tl.max(ends, 0)
    # If u * total rounded up to the total, no end would be above it.
    target = tl.minimum(u * total, total * (1.0 - 2.0**-23))
    return tl.min(tl.where(ends > target, tl.arange(0, SIZE), SIZE - 1), 0)


@triton.jit
def _load_row(numbers, i, V: tl.constexpr):
    """A row's V values, and -infinity at every other i."""
    z = tl.load(numbers + i, mask=i < row_width(V))
    return tl.where(i < V, z, float("-inf"))


@triton.jit
def _apply_flags(
    logits, allowed, seen, scores, penalty, masked, V: tl.constexpr, BLOCK: tl.constexpr
):
    """Write a row's logits after penalty and mask."""
    width: tl.constexpr = row_width(V)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        z = _load_row(logits, i, V)
        again = tl.load(seen + i, mask=i < tl.where(penalty != 1.0, width, 0), other=0) != 0
        may = tl.load(allowed + i, mask=i < tl.where(masked, width, 0), other=1) != 0
        z = tl.where(again, z * tl.where(z < 0.0, penalty, tl.div_rn(1.0, penalty)), z)
        # A NaN is reported, forbidden or not.
        z = tl.where(may | (z != z), z, float("-inf"))
        tl.store(scores + i, z, mask=i < width)
    tl.debug_barrier()  # other threads read these scores


@triton.jit
def _draw(z, top, i, floats, integers, count, V: tl.constexpr, GROUPS: tl.constexpr):
    """An index i in proportion to exp(z) among those that the rules keep; z and i [GROUPS, 32].

    0 if none is left.
    """
    # 1. top-k
    k = tl.load(integers).to(tl.int32)
    if (k > 0) & (k < V):
        z = tl.where(z >= kth_highest(z, top, k), z, float("-inf"))

    # 2. Probabilities; min-p cuts off some. The total is 1 or more if a token is left: the best
    # alone adds 1.
    p = tl.exp(z - tl.maximum(top, -_LARGEST))
    total = tl.sum(p)
    p = tl.where(p >= tl.load(floats + 2), p, 0.0) * (1.0 / tl.maximum(total, 1.0))

    # 3. Draw, and reject while p or more of the mass ranks above the chosen token (top-p).
    chosen = tl.full([], 0, tl.int32)
    round = chosen
    trying = total > 0.0
    while trying:
        # Loaded again in each round: the registers are needed for p.
        top_p = tl.load(floats + 1, volatile=True)
        seed = tl.load(integers + 1, volatile=True)
        stream = tl.load(integers + 3, volatile=True).to(tl.int32)
        first, second, _, _ = tl.philox(seed, count, stream, round, round * 0)
        group = _pick(tl.sum(p, 1), tl.uint_to_uniform_float(first), GROUPS)
        inside = tl.where(tl.arange(0, GROUPS)[:, None] == group, p, 0.0)
        chosen = group * 32 + _pick(tl.sum(inside, 0), tl.uint_to_uniform_float(second), 32)
        mine = tl.sum(tl.where(i == chosen, p, 0.0))
        p = tl.where((p > mine) | ((p == mine) & (i > chosen)), p, 0.0)  # ranked above it
        above = tl.sum(p)
        trying = (above > 0.0) & (above >= top_p) & (top_p < 1.0)
        round += 1
    return chosen


@triton.jit
def sample_kernel(  # noqa: PLR0915
    logits, allowed, seen, scores, floats, integers, counts, ids, answers,
    V: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """One CTA: one row."""
    b = tl.program_id(0)
    floats += b * _ROW_FLOATS
    integers += b * _ROW_INTEGERS
    i = tl.arange(0, GROUPS)[:, None] * 32 + tl.arange(0, 32)[None, :]  # tokens
    logits += b * row_width(V)
    allowed += b * row_width(V)
    seen += b * row_width(V)
    scores += b * row_width(V)
    wait_for_producer(ARCH)
    release_consumer(ARCH)
    if tl.load(integers + 4) == 0:
        tl.store(answers + b, tl.full([], _IDLE, tl.int64))
        return

    # 1. Scores after penalty, mask and temperature, in registers.
    temperature = tl.load(floats)
    penalty = tl.load(floats + 3)
    masked = tl.load(integers + 2) != 0
    if masked | (penalty != 1.0):
        _apply_flags(logits, allowed, seen, scores, penalty, masked, V, BLOCK)
        z = _load_row(scores, i, V)
    else:
        z = _load_row(logits, i, V)
    if temperature != 0.0:
        # As torch divides on a GPU, so that the same scores tie.
        z = z * tl.div_rn(1.0, temperature)

    # 2. Problems. From here on a NaN counts as -infinity, and +infinity as the largest number.
    broken = tl.max(tl.where(z < float("inf"), 0, 1)) > 0
    z = tl.minimum(tl.where(z == z, z, float("-inf")), _LARGEST)
    top = tl.max(z)
    problem = tl.where(broken, _NO_NUMBERS, tl.where(top == float("-inf"), _NOTHING_LEFT, 0))

    # 3. The choice: the first of the best, or a draw.
    chosen = tl.min(tl.where(z == top, i, 32 * GROUPS))
    if temperature != 0.0:
        count = tl.load(counts + b).to(tl.int32)
        chosen = _draw(z, top, i, floats, integers, count, V, GROUPS)

    # 4. Its consequences.
    tl.store(ids + b, chosen.to(tl.int64))
    tl.store(answers + b, tl.where(problem < 0, problem, chosen).to(tl.int64))
    tl.store(seen + chosen, True)
    tl.store(counts + b, tl.load(counts + b) + 1)


def launch(batch: int, V: int, arch: int) -> Launch:
    """Shape of the launch. ValueError for a vocabulary that does not fit into registers."""
    require(V <= 2**17, f"a vocabulary of {V}; the sampling kernel takes up to {2**17}")
    groups = triton.next_power_of_2(triton.cdiv(V, 32))
    warps = 16 if groups >= 512 else 4
    constants = dict(V=V, GROUPS=groups, BLOCK=128 * warps, ARCH=arch)
    return Launch((batch,), constants, dict(num_warps=warps))


def sample(
    logits: Tensor,
    allowed: Tensor,
    seen: Tensor,
    scores: Tensor,
    floats: Tensor,
    integers: Tensor,
    counts: Tensor,
    ids: Tensor,
    answers: Tensor,
    *,
    V: int,
) -> None:
    """Choose the next id of each active row. `Sampler` owns all tensors but the logits and ids.

    Of W = `row_width(V)` columns, those from V on are not used.

    logits    fp32 [B, W]
    allowed   bool [B, W]: the mask; read only if there is one
    seen      bool [B, W]: the ids that occurred in a row; the chosen one is added
    scores    fp32 [B, W]: overwritten
    floats    fp32 [B, 4]: temperature, top_p, min_p, repetition_penalty
    integers  int64 [B, 5]: top_k (0: all), seed, whether there is a mask, the number of the row's
              random stream, whether the row is active
    counts    int64 [B]: how many ids each row has drawn; incremented
    ids       int64 [B], written; in range even if there is a problem
    answers   int64 [B], written: NO_NUMBERS if a logit is NaN, or +inf and allowed; NOTHING_LEFT
              if no id can be drawn; else the id

    A row that is not active keeps its seen, counts and ids, and its answer is IDLE.

    Raises ValueError for logits of another dtype or width, more than 131,072 tokens and
    non-contiguous tensors, and if no kernel can run on this device.
    """
    require(
        logits.dtype == torch.float32,
        f"logits in {logits.dtype}: the sampling kernel takes float32",
    )
    B, width = logits.shape
    require(
        width == row_width(V),
        f"logits of {width} columns: rows for {V} tokens have {row_width(V)}",
    )
    settings = (floats, integers)
    written = (counts, ids, answers)
    shape = launch(B, V, arch_of(logits))
    shape.run(sample_kernel, logits, allowed, seen, scores, *settings, *written)
