"""The tile of every matrix-vector kernel here: 16 rows of a weight matrix times the batch.

    out[r, b] = sum_k  W[rows[r], k] * x[b, k]        16 rows, 1 to 16 columns b, all k in one CTA

One pass over the weights serves the whole batch, so the bytes are those of 16 weight rows for every
B. The tensor cores compute the sum (`tl.dot`, weights as the left operand), because vector units
would take B times as long. Three choices:

* The columns k are split over the warps of the CTA by the batch axis of a 3-D dot, and summed once
  at the end. Never over CTAs: no atomics, nothing to zero, the same bits in every run.
* Weights are loaded from memory straight into the registers of the matrix instruction, 16 bytes per
  lane and load. A lane of the instruction holds columns {2t, 2t+1, 2t+8, 2t+9} of 16, a wide load
  gives it 8 neighbours; the two become the same if the columns inside each group of 32 are renamed,
  in W and x alike (`weight_fragment`, `input_fragment`). A load must be exactly 32 elements wide:
  wider ones are shuffled between lanes or pass through shared memory.
* All loads of a round are issued before the first use (`wait_for_producer`), up to 8 chunks of 32
  columns per warp: 64 KB in flight for a CTA of 8 warps. About 30 KB per multiprocessor keep an
  H200's memory busy.

A lane is one of the 32 threads of a warp, a CTA a block of threads. A line is what 4 lanes load
together: 32 columns of one row. A tile is loaded in 16 * WARPS lines, in the order (half of the
tile, warp, row of 8): every warp has lines of all 16 rows, in columns of its own.

Packed weights have a tile of their own with the same result (packed/tile.py, whose `matrix_tile`
takes either).

Versions, by instructions per weight in the steady loop (read from the SASS for sm_90, bf16; times
not measured)
  vector units, tile [8, 1024]         3.6; for a batch B times as many
  tl.dot of 2-D tiles, cp.async        1.6 to 2.3, through shared memory
  this one                             about 1, of the 13 that there is time for while the bytes
                                       arrive
Only a GPU can tell whether 4 chunks (68 registers, 3 CTAs and 96 KB per multiprocessor) are faster
than 8 (102 registers, 2 CTAs and 128 KB).
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_kernels.portable import TRITON_DTYPES, Launch, dot_operand, require, wait_for_producer

TILE = 16  # weight rows of one CTA
MAX_BATCH = 16  # rows of one pass over the weights
MAX_ROWS = 4 * MAX_BATCH  # of a step, and of a short chunk; see many_rows.py, short_linear.py
DENSE = "dense"  # the KIND of weights that are not quantized


def tile_launch(
    num_tiles: int,
    batch: int,
    columns: int,
    dtype: torch.dtype,
    arch: int,
    kinds: Sequence[str] = (DENSE,),
) -> Launch:
    """The grid, warps and constants for `num_tiles` CTAs and `columns` input columns.

    dtype  of plain weights; for packed ones that of x, in which they are multiplied
    kinds  of the matrices in one kernel: DENSE, or names of ggml types

    Raises ValueError for a batch or a dtype that the tile does not support.
    """
    require(
        1 <= batch <= MAX_BATCH,
        f"a batch of {batch} rows: a pass over the weights takes 1 to {MAX_BATCH}",
    )
    require(
        dtype in TRITON_DTYPES,
        f"weights in {dtype}: the decode kernels take bfloat16, float16 and float32",
    )
    M = 8 if batch <= 8 else 16  # columns of the product: the matrix instruction has 8
    if set(kinds) == {DENSE}:
        warps = math.gcd(columns // 32, 8)
        rounds = columns // 32 // warps
        # 8 chunks in flight for 16 columns take 136 registers: then only one CTA fits, not two.
        chunks = max(n for n in range(1, 9 if M == 8 else 5) if rounds % n == 0)
        options = dict(num_warps=warps, num_stages=1)
    else:
        chunks = 0  # of dense tiles alone: the warps of a packed tile take groups of 1,024 columns
        groups = triton.next_power_of_2(triton.cdiv(columns, 1024))
        most_warps = 8 if M == 8 and "Q8_0" not in kinds else 4
        warps = min(groups, most_warps)
        options = dict(num_warps=warps, num_stages=1)
        # With 128 registers, 2 CTAs of 8 warps or 4 of 4 share a multiprocessor. Q8_0 would take
        # 140, but spills with 128 if its warps take several groups.
        if warps == 8 or (M == 8 and "Q8_0" in kinds and groups <= warps):
            options["maxnreg"] = 128
    constants = dict(B=batch, COLUMNS=columns, WARPS=warps, CHUNKS=chunks, M=M, ARCH=arch)
    return Launch((num_tiles,), constants, options)


def require_rows(batch: int) -> None:
    """ValueError unless a step can have so many rows."""
    require(
        1 <= batch <= MAX_ROWS,
        f"a batch of {batch} rows: the decode kernels take 1 to {MAX_ROWS}",
    )


def require_multiple(name: str, size: int, of: int) -> None:
    """ValueError naming the dimension unless `size` is a multiple of `of`."""
    valid = size > 0 and size % of == 0
    require(valid, f"{name} is {size}; the decode kernels need a multiple of {of}")


def scaled_norm(weight: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, float]:
    """A norm's weight [D], multiplied by a gain, and that gain.

    The weight is for the kernel that writes x = residual * norm, the gain for the one that reads x.

    dtype  of x; None: the weight's

    x is not normalised yet (the division comes after the matrix product), so in fp16 tiny weights
    would lose digits. So for fp16 the weight is multiplied by its gain: the power of two that
    brings its largest entry to between 1 and 2. This reads `weight` back to the host, once. For
    other dtypes: the weight itself, and 1.
    """
    is_fp16 = (dtype or weight.dtype) == torch.float16
    largest = weight.detach().abs().max().item() if is_fp16 else 0.0
    if not 0.0 < largest < math.inf:
        return weight, 1.0
    gain = 2.0 ** -math.floor(math.log2(largest))
    return (weight.float() * gain).to(weight.dtype), gain


def inverse_rms_reference(sums: Tensor, D: int, eps: float, gain: float) -> Tensor:
    """`inverse_rms` in plain PyTorch: sums fp32 [B, D/16] -> [B, 1]."""
    return torch.rsqrt(sums.sum(-1, keepdim=True) / D + eps) / gain


@triton.jit
def tile_rows(first, second, WARPS: tl.constexpr):
    """The weight row of each line of a tile, [16 * WARPS].

    Every warp has the rows first .. first + 7 and second .. second + 7.
    """
    return by_half(first, second, WARPS) + tl.arange(0, 16 * WARPS) % 8


@triton.jit
def by_half(first, second, WARPS: tl.constexpr):
    """`first` for the lines of the tile's first half, `second` for the others: [16 * WARPS]."""
    return tl.where(tl.arange(0, 16 * WARPS) < 8 * WARPS, first, second)


@triton.jit
def weight_fragment(w, WARPS: tl.constexpr):
    """[16 * WARPS, 32] as loaded -> [WARPS, 16, 32] as the matrix instruction holds it.

    No data moves. Column 8 t + 4 s + 2 h + e, loaded by lane t of 4, becomes column
    16 s + 8 h + 2 t + e: of its 16 columns the instruction needs 2 t, 2 t + 1, 2 t + 8 and 2 t + 9
    in lane t.
    """
    w = tl.reshape(w, [2, WARPS, 8, 4, 2, 2, 2])  # (half, warp, row of 8), (t, s, h, e)
    return tl.reshape(tl.permute(w, [1, 0, 2, 4, 5, 3, 6]), [WARPS, 16, 32])


@triton.jit
def input_fragment(x, WARPS: tl.constexpr, M: tl.constexpr):
    """[M * WARPS, 32] as loaded -> [WARPS, 32, M], with the columns of `weight_fragment`."""
    x = tl.reshape(x, [M // 8, WARPS, 8, 4, 2, 2, 2])  # (b // 8, warp, b % 8), (t, s, h, e)
    return tl.reshape(tl.permute(x, [1, 4, 5, 3, 6, 0, 2]), [WARPS, 32, M])


@triton.jit
def dense_tile(
    x, weight, rows, B: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr,
    CHUNKS: tl.constexpr, M: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Rows `rows` (see `tile_rows`) of weight [., COLUMNS] times x [B, COLUMNS]: fp32 [16, M].

    Only the first B columns are defined.

    weight  one pointer, or one for each line of the tile
    """
    # 1. The address of each line in the first round.
    line = tl.arange(0, 16 * WARPS)
    input_line = tl.arange(0, M * WARPS)
    # Row B - 1 replaces the rows >= B.
    b = tl.minimum(input_line // (8 * WARPS) * 8 + input_line % 8, B - 1)
    column = tl.arange(0, 32)
    # Columns of a warp in one round. The warps of the CTA are adjacent.
    STEP: tl.constexpr = 32 * CHUNKS
    weights = (weight + (rows * COLUMNS + line // 8 % WARPS * STEP))[:, None] + column[None, :]
    inputs = x + (b * COLUMNS + input_line // 8 % WARPS * STEP)[:, None] + column[None, :]
    # Two sums, so that one product need not wait for the one before.
    even = tl.zeros([WARPS, 16, M], tl.float32)
    odd = even
    for i in range(0, COLUMNS, STEP * WARPS):
        # 2. Issue all loads of weights; keep them before the first use of x.
        chunks = ()
        for u in tl.static_range(CHUNKS):
            chunks = chunks + (tl.load(weights + i + 32 * u, eviction_policy="evict_first"),)
        wait_for_producer(ARCH)

        # 3. Multiply.
        for u in tl.static_range(CHUNKS):
            w = weight_fragment(dot_operand(chunks[u], ARCH), WARPS)
            # If other matrices of the model are packed, x is fp16, whatever this one is.
            v = tl.load(inputs + i + 32 * u).to(chunks[u].dtype)
            v = input_fragment(dot_operand(v, ARCH), WARPS, M)
            if u % 2 == 0:
                even = tl.dot(w, v, even, input_precision="ieee")
            else:
                odd = tl.dot(w, v, odd, input_precision="ieee")
    return tl.sum(even + odd, 0)  # over the warps


@triton.jit
def inverse_rms(sums, eps, gain, D: tl.constexpr, B: tl.constexpr, M: tl.constexpr):
    """1 / (gain * rms) of each row, fp32 [M].

    Computed from the partial sums of squares [B, D/16] that the producer of x wrote.
    """
    b = tl.minimum(tl.arange(0, M), B - 1)
    part = tl.arange(0, triton.next_power_of_2(D // 16))
    squares = tl.load(
        sums + b[:, None] * (D // 16) + part[None, :], mask=part[None, :] < D // 16, other=0.0
    )
    return tl.rsqrt(tl.sum(squares, 1) / D + eps) / gain


@triton.jit
def halves(out, M: tl.constexpr):
    """Rows 0 .. 7 and 8 .. 15 of a product [16, M] as two [8, M].

    One thread holds both values of a place.
    """
    return tl.split(tl.permute(tl.reshape(out, [2, 8, M]), [1, 2, 0]))
