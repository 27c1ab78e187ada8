"""Logits to the next id on the GPU: one kernel, whose settings live on the device, so that one CUDA
graph serves all.

The rules, their order and their treatment of ties are those of mistral/sampling.py: repetition
penalty, mask, temperature, top-k, top-p, min-p. (Typical-p and banned n-grams are left to it: see
`Sampler.supports`.)

One CTA takes one row and holds it in registers. What a token must pass to be drawn:

  top-k   at most k - 1 scores are higher (what ties with the k-th stays). The k-th score is found
          by bisection on the bits of a float, whose order is that of the floats; it ends as soon as
          a border has exactly k above it.
  top-p   the tokens above it have less than p of the mass that top-k left; of equal ones the higher
          id stands above (the reference leaves that to its sort), and the uppermost always passes.
          No sorting: draw a token, ask how much stands above it, and if that is p or more, reject
          it and draw again from what stands above. This draws from the kept tokens exactly, since a
          rejected token takes along only what is rejected too. p or more of the mass is kept, so it
          seldom takes more than two rounds.
  min-p   at least min_p times as probable as the best: the others are cut off before the draw. They
          do not change what stands above a token that is kept, so top-p comes out the same.

A draw takes a group of 32 neighbours by the groups' sums, then one of them by a second random
number. The random numbers are Philox of (seed, how many ids the row has drawn, row, round).

Source: Parallel random numbers: as easy as 1, 2, 3, https://doi.org/10.1145/2063384.2063405
(Philox)

Bytes: 4 a logit; 10 more where ids are penalised or forbidden (32,000 tokens: 128 KB, and 320 KB
more, a row).
Logits are loaded 16 bytes at a time. Where V is no multiple of 4 a row may begin and end inside
such 16 bytes: what comes along with its first and last logits is its neighbours', or lies up to 12
bytes behind the tensor, and is dropped.

Versions (times not measured)
  torch: topk, sort, softmax, cumsum, scatter, ...   about 20 kernels, two sorts of the vocabulary
  top-p by bisection on the mass                     some 20 passes over the row where this takes
                                                     about two
  a random number for every token                    two thirds of all instructions
  flags read where the row is in registers           spills 224 bytes a thread; through memory: none
  each row loaded from its first logit on            spills 128 bytes a thread where V is no
  multiple of 4
  this one                                           1 kernel; a pass over the row for each round
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral.engine.decoder import NO_NUMBERS, NOTHING_LEFT
from mistral.sampling import Sampling, processed_scores
from mistral_kernels.portable import Launch, arch_of, release_consumer, require, wait_for_producer

LARGEST = tl.constexpr(3.4028234663852886e38)
BROKEN, EMPTY = tl.constexpr(NO_NUMBERS), tl.constexpr(NOTHING_LEFT)
LOWEST_KEY = tl.constexpr(-2139095041)  # `float_of` of it is -infinity


def sample_reference(
    logits: Tensor,
    allowed: Tensor,
    seen: Tensor,
    scores: Tensor,
    floats: Tensor,
    integers: Tensor,
    counts: Tensor,
    ids: Tensor,
    problems: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """`sample` in plain PyTorch: the same ids can come, with the same probabilities, by other
    random numbers.
    """
    (temperature, top_p, min_p, penalty), (top_k, seed, masked) = floats.tolist(), integers.tolist()
    # As float32 the least temperature that `Sampling` takes, 1e-5, is a little smaller.
    sampling = Sampling(
        temperature=temperature and max(temperature, 1e-5), top_k=top_k, top_p=top_p, min_p=min_p
    )
    z = torch.where(logits.isnan(), -math.inf, logits)
    z = z.clamp(max=1e28)  # finite still when penalty and temperature have divided it
    z = torch.where(seen, torch.where(z < 0, z * penalty, z / penalty), z)
    nothing = counts.new_zeros(z.shape[0], 0)
    scores.copy_(processed_scores(z, sampling, nothing, nothing, allowed if masked else None))
    none_left = scores.amax(dim=-1) == -math.inf
    problems.copy_(
        torch.where(logits.isnan().any(dim=-1), NO_NUMBERS, torch.where(none_left, NOTHING_LEFT, 0))
    )
    weights = scores
    if temperature:
        noise = torch.ones_like(scores)
        for b, count in enumerate(counts.tolist()):
            numbers = torch.Generator(scores.device).manual_seed(
                (seed + 1_000_003 * count + b) % 2**63
            )
            noise[b].exponential_(1, generator=numbers)
        weights = scores.softmax(dim=-1).nan_to_num(0.0) / noise
    ids.copy_(weights.argmax(dim=-1))
    seen.scatter_(1, ids[:, None], True)
    counts += 1


@triton.jit
def float_of(key):
    """The float that stands at `key` in the order of all floats; floats and their keys have the
    same order.
    """
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def kth_highest(z, top, k):
    """A border that the k highest of z, what ties with the k-th, and no others reach;

    `top` is the maximum of z.
    """
    low = tl.full([], LOWEST_KEY, tl.int32)
    bits = top.to(tl.int32, bitcast=True)
    high = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # halfway, rounded up; their sum could overflow
        count = tl.sum((z >= float_of(middle)).to(tl.int32))
        low = tl.where(count >= k, middle, low)
        high = tl.where(count == k, middle, tl.where(count > k, high, middle - 1))
    return float_of(low)


@triton.jit
def pick(weights, u, SIZE: tl.constexpr):
    """An index drawn in proportion to weights [SIZE] >= 0 by u in [0, 1); never one of weight 0, if
    one is above 0.
    """
    ends = tl.where(
        weights > 0.0, tl.cumsum(weights, 0), 0.0
    )  # a parallel sum need not rise at a weight of 0
    total = tl.max(ends, 0)
    target = tl.minimum(
        u * total, total * (1.0 - 2.0**-23)
    )  # rounded up to the total, nothing would lie above it
    return tl.min(tl.where(ends > target, tl.arange(0, SIZE), SIZE - 1), 0)


@triton.jit
def load_row(numbers, i, before, V: tl.constexpr):
    """numbers[i], and -infinity for every i outside of the row, which is V numbers from number
    `before` on.
    """
    z = tl.load(numbers + i, mask=i < (before + V + 3) // 4 * 4)
    return tl.where((i >= before) & (i < before + V), z, float("-inf"))


@triton.jit
def apply_flags(
    logits, allowed, seen, scores, before, penalty, masked, V: tl.constexpr, BLOCK: tl.constexpr
):
    """Write a row's scores after penalty and mask; as in `load_row` it begins at number
    `before`.
    """
    end = (before + V + 3) // 4 * 4
    for start in range(0, V + 3 if V % 4 else V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        z = load_row(logits, i, before, V)
        again = tl.load(seen + i, mask=i < tl.where(penalty != 1.0, end, 0), other=0) != 0
        may = tl.load(allowed + i, mask=i < tl.where(masked, end, 0), other=1) != 0
        z = tl.where(again, z * tl.where(z < 0.0, penalty, tl.div_rn(1.0, penalty)), z)
        z = tl.where(
            may | (z != z), z, float("-inf")
        )  # what is no number is reported, forbidden or not
        tl.store(scores + i, z, mask=(i >= before) & (i < before + V))
    tl.debug_barrier()  # who reads a score did not write it


@triton.jit
def draw(z, top, i, floats, integers, counts, b, V: tl.constexpr, GROUPS: tl.constexpr):
    """An index i in proportion to exp(z), of those that the rules keep; z [GROUPS, 32].

    0 where none is left.
    """
    k, count = tl.load(integers).to(tl.int32), tl.load(counts + b).to(tl.int32)
    if (k > 0) & (k < V):
        z = tl.where(z >= kth_highest(z, top, k), z, float("-inf"))
    p = tl.exp(z - tl.maximum(top, -LARGEST))
    total = tl.sum(p)
    # Probabilities, of which min-p has cut off some. Where a token is left the total is 1 or more:
    # the best alone is 1.
    p = tl.where(p >= tl.load(floats + 2), p, 0.0) * (1.0 / tl.maximum(total, 1.0))
    chosen = tl.full([], 0, tl.int32)
    round = chosen
    trying = total > 0.0
    while trying:
        top_p, seed = (
            tl.load(floats + 1, volatile=True),
            tl.load(integers + 1),
        )  # each time: p needs the registers
        first, second, _, _ = tl.philox(seed, count, b, round, round * 0)
        group = pick(tl.sum(p, 1), tl.uint_to_uniform_float(first), GROUPS)
        inside = tl.where(tl.arange(0, GROUPS)[:, None] == group, p, 0.0)
        chosen = group * 32 + pick(tl.sum(inside, 0), tl.uint_to_uniform_float(second), 32)
        mine = tl.sum(tl.where(i == chosen, p, 0.0))
        p = tl.where((p > mine) | ((p == mine) & (i > chosen)), p, 0.0)  # what stands above it
        above = tl.sum(p)
        trying = (above > 0.0) & (above >= top_p) & (top_p < 1.0)
        round += 1
    return chosen


@triton.jit
def sample_kernel(
    logits, allowed, seen, scores, floats, integers, counts, ids, problems,
    V: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """One CTA: one row."""
    b = tl.program_id(0)
    i = tl.arange(0, GROUPS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    before = (
        b * V % 4 if V % 4 else 0
    )  # numbers of the row ahead in the 16 bytes where this one begins
    first = b * V // 4 * 4
    wait_for_producer(ARCH)
    release_consumer(ARCH)
    temperature, penalty, masked = tl.load(floats), tl.load(floats + 3), tl.load(integers + 2) != 0
    if masked | (penalty != 1.0):
        apply_flags(
            logits + first,
            allowed + first,
            seen + first,
            scores + first,
            before,
            penalty,
            masked,
            V,
            BLOCK,
        )
        z = load_row(scores + first, i, before, V)
    else:
        z = load_row(logits + first, i, before, V)
    if temperature != 0.0:
        z = z * tl.div_rn(
            1.0, temperature
        )  # as torch divides on a GPU, so that the same scores tie
    broken = tl.max(tl.where(z == z, 0, 1)) > 0
    z = tl.minimum(tl.where(z == z, z, float("-inf")), LARGEST)
    top = tl.max(z)
    problem = tl.where(broken, BROKEN, tl.where(top == float("-inf"), EMPTY, 0))
    tl.store(problems + b, problem.to(tl.int64))
    chosen = tl.min(tl.where(z == top, i, 32 * GROUPS))
    if temperature != 0.0:
        chosen = draw(z, top, i, floats, integers, counts, b, V, GROUPS)
    chosen = tl.maximum(chosen - before, 0)  # below 0 only where no token is left
    tl.store(ids + b, chosen.to(tl.int64))
    tl.store(seen + b * V + chosen, True)
    tl.store(counts + b, tl.load(counts + b) + 1)


def launch(batch: int, V: int, arch: int) -> Launch:
    """Shape of the launch. ValueError for a vocabulary that does not fit into registers."""
    room = V + 3 if V % 4 else V
    require(room <= 2**17, f"a vocabulary of {V}; the sampling kernel takes up to {2**17}")
    groups = triton.next_power_of_2(triton.cdiv(room, 32))
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
    problems: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Choose each row's next id. `Sampler` owns what lies between the logits and the ids.

    logits    fp32 [B, V]
    allowed   bool [B, V]: the mask; read only if there is one
    seen      bool [B, V]: which ids occurred in a row; the chosen one is added
    scores    fp32 [B, V]: overwritten
    floats    fp32 [4]: temperature, top_p, min_p, repetition_penalty
    integers  int64 [3]: top_k (0: all), seed, whether there is a mask
    counts    int64 [B]: how many ids each row has drawn; one more afterwards
    ids       int64 [B], written; in range, whatever the problem
    problems  int64 [B], written: NO_NUMBERS where a logit is NaN (it counts as -inf), NOTHING_LEFT
              where no id can be drawn (it is 0 then), else 0
    pdl       see `Launch.run`

    Raises ValueError for logits of another dtype, for more than 131,072 tokens, for tensors with
    gaps, and where no kernel can run.
    """
    require(
        logits.dtype == torch.float32,
        f"logits in {logits.dtype}: the sampling kernel takes float32",
    )
    shape = launch(*logits.shape, arch_of(logits))
    shape.run(
        sample_kernel,
        logits,
        allowed,
        seen,
        scores,
        floats,
        integers,
        counts,
        ids,
        problems,
        pdl=pdl,
    )
