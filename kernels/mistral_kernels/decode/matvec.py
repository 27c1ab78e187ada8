"""The tile that every matrix-vector kernel here is made of: 16 rows of a weight matrix times the
batch.

    out[r, b] = sum_k  W[rows[r], k] * x[b, k]        16 rows, 1 to 16 columns b, the whole of k in
                       one CTA

One pass over the weights serves the whole batch, so the bytes are those of 16 weight rows whatever
B is. The tensor cores do the sum (`tl.dot`, weights as the left operand), because a vector unit
would pay B times. Three choices:

* The columns k are split over the warps of the CTA by the batch axis of a 3-D dot, and summed once
  at the end. Never over CTAs: no atomics, nothing to zero, the same bits in every run.
* Weights go from memory straight into the registers of the matrix instruction, 16 bytes a lane and
  load. A lane of the instruction holds columns {2t, 2t+1, 2t+8, 2t+9} of 16, a wide load gives it 8
  neighbours; the two become the same by renaming the columns inside each group of 32, in W and x
  alike (`weight_fragment`, `input_fragment`). A load must be exactly 32 elements wide for that;
  wider ones are shuffled between lanes or go through shared memory.
* All loads of a round are issued before the first use (`wait_for_producer`), up to 8 chunks of 32
  columns a warp: 64 KB in flight a CTA of 8 warps, where about 30 KB a multiprocessor keep an
  H200's memory busy.

A lane is one of the 32 threads of a warp, a CTA a block of threads. A line is what 4 lanes load
together: 32 columns of one row. A tile is loaded in 16 * WARPS lines, in the order (half of the
tile, warp, row of 8): every warp has lines for all 16 rows, in columns of its own.

Packed weights have a tile of their own with the same result (packed_tile.py, whose `matrix_tile`
takes either kind).

Versions, by instructions a weight in the steady loop (read from the SASS for sm_90, bf16; times not
measured):
  vector units, tile [8, 1024]         3.6, B times as much for a batch
  tl.dot of 2-D tiles, cp.async        1.6 to 2.3, through shared memory
  this one                             about 1, of the 13 that there is time for while the bytes
                                       arrive
Only a GPU can tell whether 4 chunks (68 registers, 3 CTAs and 96 KB a multiprocessor) beat 8 (102,
2 and 128 KB).
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_kernels.portable import TRITON_DTYPES, Launch, dot_operand, require, wait_for_producer

TILE = 16  # weight rows of one CTA
MAX_BATCH = 16
DENSE = "dense"  # the KIND of weights that are no blocks


def tile_launch(
    num_tiles: int,
    batch: int,
    columns: int,
    dtype: torch.dtype,
    arch: int,
    kinds: Sequence[str] = (DENSE,),
) -> Launch:
    """Grid, warps and the constants that a tile needs, for `num_tiles` CTAs and `columns` input
    columns.

    dtype  of plain weights; for packed ones that of x, which they are multiplied in
    kinds  of the matrices in one kernel: DENSE, or names of ggml types

    Raises ValueError for a batch or a dtype that the tile cannot do.
    """
    require(
        1 <= batch <= MAX_BATCH,
        f"a batch of {batch} rows: the decode kernels take 1 to {MAX_BATCH}",
    )
    require(
        dtype in TRITON_DTYPES,
        f"weights in {dtype}: the decode kernels take bfloat16, float16 and float32",
    )
    M = 8 if batch <= 8 else 16  # columns of the product: the matrix instruction makes 8
    if set(kinds) == {DENSE}:
        warps = math.gcd(columns // 32, 8)
        rounds = columns // 32 // warps
        # 8 chunks in flight for 16 columns take 136 registers, and then one CTA fits where two
        # should.
        chunks = max(n for n in range(1, 9 if M == 8 else 5) if rounds % n == 0)
        options = dict(num_warps=warps, num_stages=1)
    else:
        chunks = 0  # a packed tile has none: its warps take groups of 1,024 columns
        # 8 warps of more than 128 registers would be alone on a multiprocessor; the other kinds
        # need up to 180.
        most_warps = 8 if M == 8 and set(kinds) <= {"Q4_0", "Q4_K"} else 4
        warps = min(triton.next_power_of_2(triton.cdiv(columns, 1024)), most_warps)
        options = dict(num_warps=warps, num_stages=1) | (dict(maxnreg=128) if warps == 8 else {})
    constants = dict(B=batch, COLUMNS=columns, WARPS=warps, CHUNKS=chunks, M=M, ARCH=arch)
    return Launch((num_tiles,), constants, options)


def require_multiple(name: str, size: int, of: int) -> None:
    """ValueError naming the dimension unless `size` is a multiple of `of`."""
    require(
        size > 0 and size % of == 0, f"{name} is {size}; the decode kernels need a multiple of {of}"
    )


def scaled_norm(weight: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, float]:
    """A norm's weight [D] for whoever writes x = residual * norm, and the gain in it for whoever
    reads x.

    dtype  of x; None: the weight's

    x is not normalised yet (that happens behind the matrix product), so in fp16 tiny weights would
    cost digits. There the weight is multiplied by its gain: the power of two that brings its
    largest entry to between 1 and 2. That reads `weight` on the host, once. For other dtypes: the
    weight itself, and 1.
    """
    largest = (
        weight.detach().abs().max().item() if (dtype or weight.dtype) == torch.float16 else 0.0
    )
    if not 0.0 < largest < math.inf:
        return weight, 1.0
    gain = 2.0 ** -math.floor(math.log2(largest))
    return (weight.float() * gain).to(weight.dtype), gain


def inverse_rms_reference(sums: Tensor, D: int, eps: float, gain: float) -> Tensor:
    """`inverse_rms` in plain PyTorch: sums fp32 [B, D/16] -> [B, 1]."""
    return torch.rsqrt(sums.sum(-1, keepdim=True) / D + eps) / gain


@triton.jit
def tile_rows(first, second, WARPS: tl.constexpr):
    """The weight row of each line of a tile, [16 * WARPS]: for every warp first .. first + 7,
    second .. second + 7.
    """
    return by_half(first, second, WARPS) + tl.arange(0, 16 * WARPS) % 8


@triton.jit
def by_half(first, second, WARPS: tl.constexpr):
    """`first` for the lines of the tile's first half, `second` for the others: [16 * WARPS]."""
    return tl.where(tl.arange(0, 16 * WARPS) < 8 * WARPS, first, second)


@triton.jit
def weight_fragment(w, WARPS: tl.constexpr):
    """[16 * WARPS, 32] as loaded -> [WARPS, 16, 32] as the matrix instruction holds it; moves
    nothing.

    Column 8 t + 4 s + 2 h + e, which lane t of 4 has loaded, becomes column 16 s + 8 h + 2 t + e:
    the instruction takes 16 columns, and wants 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of them in lane t.
    """
    w = tl.reshape(w, [2, WARPS, 8, 4, 2, 2, 2])  # (half, warp, row of 8), (t, s, h, e)
    return tl.reshape(tl.permute(w, [1, 0, 2, 4, 5, 3, 6]), [WARPS, 16, 32])


@triton.jit
def input_fragment(x, WARPS: tl.constexpr, M: tl.constexpr):
    """[M * WARPS, 32] as loaded -> [WARPS, 32, M], its columns renamed like those of
    `weight_fragment`.
    """
    x = tl.reshape(x, [M // 8, WARPS, 8, 4, 2, 2, 2])  # (b // 8, warp, b % 8), (t, s, h, e)
    return tl.reshape(tl.permute(x, [1, 4, 5, 3, 6, 0, 2]), [WARPS, 32, M])


@triton.jit
def dense_tile(
    x, weight, rows, B: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    M: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Rows `rows` (see `tile_rows`) of weight [., COLUMNS] times x [B, COLUMNS]: fp32 [16, M]; B
    columns are real.

    weight  one pointer, or one for each line of the tile
    """
    line = tl.arange(0, 16 * WARPS)
    input_line = tl.arange(0, M * WARPS)
    b = tl.minimum(
        input_line // (8 * WARPS) * 8 + input_line % 8, B - 1
    )  # row B - 1 stands in for rows >= B
    column = tl.arange(0, 32)
    STEP: tl.constexpr = (
        32 * CHUNKS
    )  # columns of a warp in one round; the CTA walks along a row, warp beside warp
    weights = (weight + (rows * COLUMNS + line // 8 % WARPS * STEP))[:, None] + column[None, :]
    inputs = x + (b * COLUMNS + input_line // 8 % WARPS * STEP)[:, None] + column[None, :]
    even = tl.zeros(
        [WARPS, 16, M], tl.float32
    )  # two sums, so that an instruction need not wait for the one before
    odd = even
    for i in range(0, COLUMNS, STEP * WARPS):
        chunks = ()
        for u in tl.static_range(CHUNKS):
            chunks = chunks + (tl.load(weights + i + 32 * u, eviction_policy="evict_first"),)
        wait_for_producer(ARCH)
        for u in tl.static_range(CHUNKS):
            w = weight_fragment(dot_operand(chunks[u], ARCH), WARPS)
            # Where other matrices of the model are packed, x is fp16, whatever this one is.
            v = tl.load(inputs + i + 32 * u).to(chunks[u].dtype)
            v = input_fragment(dot_operand(v, ARCH), WARPS, M)
            if u % 2 == 0:
                even = tl.dot(w, v, even, input_precision="ieee")
            else:
                odd = tl.dot(w, v, odd, input_precision="ieee")
    return tl.sum(even + odd, 0)


@triton.jit
def inverse_rms(sums, eps, gain, D: tl.constexpr, B: tl.constexpr, M: tl.constexpr):
    """1 / (gain * rms) of each row, fp32 [M], from the partial sums of squares [B, D/16] that x's
    producer left.
    """
    b = tl.minimum(tl.arange(0, M), B - 1)
    part = tl.arange(0, triton.next_power_of_2(D // 16))
    squares = tl.load(
        sums + b[:, None] * (D // 16) + part[None, :], mask=part[None, :] < D // 16, other=0.0
    )
    return tl.rsqrt(tl.sum(squares, 1) / D + eps) / gain


@triton.jit
def halves(out, M: tl.constexpr):
    """Rows 0 .. 7 and 8 .. 15 of a product [16, M] as two [8, M]; what stands at the same place is
    in one thread.
    """
    return tl.split(tl.permute(tl.reshape(out, [2, 8, M]), [1, 2, 0]))
