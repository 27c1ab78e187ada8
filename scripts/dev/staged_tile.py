"""projection_kernel with weights that pass through shared memory: a study, not in use.

The packed tile (kernels/mistral_kernels/packed/tile.py) loads half a group into registers, and
computes nothing until its last byte is there. Here a round of the loop is half a group, and the
compiler turns its loads into asynchronous copies (cp.async) that are issued rounds before their use
(`num_stages`): what a warp that only loads would do, in Triton's own language. The copies of the
first rounds are issued before `wait_for_producer`, although it is in the loop.

Two things are needed. Which half a round has is known at run time, so words of the head are chosen
by `tl.where`. And the loads of inputs stand under a condition that always holds: the compiler moves
only loads that always happen, and would copy the inputs to shared memory, too.

predict_kernels.py compares the two; the results have the same bits.
"""

import triton
import triton.language as tl

from mistral_kernels.decode.matvec import input_fragment, tile_rows, weight_fragment
from mistral_kernels.packed.tile import (
    _four_words,
    _high_shift,
    _load_once,
    _load_pieces,
    _low_half,
    _pointers,
    _spread,
    _unsigned_byte,
    body_bytes,
    guards_at,
    high_pieces,
    low_pieces,
    row_block_bytes,
)
from mistral_kernels.portable import (
    Launch,
    release_consumer,
    scaled_bits,
    scaled_joined_bits,
    to_activation,
    wait_for_producer,
)

KINDS = ("Q4_K", "Q6_K", "Q8_0")


@triton.jit
def _scale_and_offset(head, d, guard, late, k: tl.constexpr, n: tl.constexpr, KIND: tl.constexpr):
    """As the packed tile's, for piece k of the first half of a group; if `late`, of the second."""
    if KIND == "Q4_K":
        late_scales = (head[3] & 0x0F0F0F0F) | (head[1] >> 2 & 0x30303030)
        late_mins = (head[3] >> 4 & 0x0F0F0F0F) | (head[2] >> 2 & 0x30303030)
        scales = tl.where(late, late_scales, head[1] & 0x3F3F3F3F)
        mins = tl.where(late, late_mins, head[2] & 0x3F3F3F3F)
        scale = _low_half(head[0]) * (guard * 2.0**24) * _unsigned_byte(scales, k)
        offset = _low_half(head[0] >> 16) * -guard * _unsigned_byte(mins, k)
    elif KIND == "Q6_K":
        word = tl.where(late, head[2 + k // 2], head[k // 2])
        byte = _unsigned_byte(word ^ -0x7F7F7F80, k % 2 * 2 + n // 2)
        scale = d * (guard * 2.0**24) * (byte - 128.0)
        offset = scale * (-32 * 2.0**-24)
    else:
        word = tl.where(late, head[2 + k // 4], head[k // 4])
        scale = _low_half(word >> 16 * (k // 2 % 2)) * (guard * 2.0**24)
        offset = scale * (-128 * 2.0**-24)
    return scale, offset


@triton.jit
def _products(  # noqa: PLR0913
    y, low, high, head, d, guard, column, late, b, even, odd, KIND: tl.constexpr,
    COLUMNS: tl.constexpr, WARPS: tl.constexpr, M: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """The two sums, with the products of half a group."""
    for k in tl.static_range(low_pieces(KIND) // 2):
        for n in tl.static_range(2 if KIND == "Q8_0" else 4):
            at = column + (16 if KIND == "Q8_0" else 32) * k + 8 * n
            v = tl.load(y + b[:, None] * COLUMNS + at)
            scale, offset = _scale_and_offset(head, d, guard, late, k, n, KIND)
            offset = _spread(offset, v.dtype)
            scale = _spread(scale * (0.0625 if n % 2 and KIND != "Q8_0" else 1.0), v.dtype)
            if KIND == "Q8_0":
                w = scaled_bits(low[k], scale, offset, 8 * n, 0xFF, ARCH)
            elif KIND == "Q4_K":
                w = scaled_bits(low[k], scale, offset, n // 2 * 8, 0xF << 4 * (n % 2), ARCH)
            else:
                w = scaled_joined_bits(
                    low[k], high[k // 2], scale, offset, n // 2 * 8, 0xF << 4 * (n % 2),
                    _high_shift(KIND, k, n), 0x30 << 4 * (n % 2), ARCH,
                )  # fmt: skip
            w = weight_fragment(w, WARPS)
            v = input_fragment(v, WARPS, M)
            if n % 2 == 0:
                even = tl.dot(w, v, even, input_precision="ieee")
            else:
                odd = tl.dot(w, v, odd, input_precision="ieee")
    return even, odd


@triton.jit
def staged_kernel(  # noqa: PLR0913, PLR0915
    y, weight, norm, residual, x, sums, rounds,
    D: tl.constexpr, B: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr,
    M: tl.constexpr, ARCH: tl.constexpr, KIND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One CTA: 16 elements of the residual, all rows of the batch."""
    # 1. Sizes, and which row of weights and which row of y a line has.
    BLOCK: tl.constexpr = row_block_bytes(KIND, COLUMNS)
    BODY: tl.constexpr = body_bytes(KIND, COLUMNS)
    GROUPS: tl.constexpr = COLUMNS // 1024
    RAGGED: tl.constexpr = GROUPS % WARPS != 0
    LOW: tl.constexpr = low_pieces(KIND) // 2
    HIGH: tl.constexpr = high_pieces(KIND) // 2
    tile = tl.program_id(0)
    release_consumer(ARCH)
    rows = tile_rows(tile * 16, tile * 16 + 8, WARPS)
    line = tl.arange(0, 16 * WARPS)
    input_line = tl.arange(0, M * WARPS)
    b = tl.minimum(input_line // (8 * WARPS) * 8 + input_line % 8, B - 1)
    word = tl.arange(0, 32)[None, :]
    guard = tl.load(_pointers(weight, rows, 0, guards_at(KIND, COLUMNS), 0, 4, BLOCK, tl.float32))
    even = tl.zeros([WARPS, 16, M], tl.float32)
    odd = even
    for i in tl.range(0, (GROUPS + WARPS - 1) // WARPS * 2, num_stages=STAGES, disable_licm=True):
        # 2. Half a group for each warp.
        late = i % 2
        group = i // 2 * WARPS + line // 8 % WARPS
        here = (group < GROUPS)[:, None]
        head = _pointers(weight, rows, group, 0, BODY // GROUPS, 64, BLOCK, tl.int32)
        head = _load_once(head + tl.arange(0, 16)[None, :], here, RAGGED)
        d = 0.0
        if KIND == "Q6_K":
            d = _pointers(weight, rows, group, BODY, 64, 8, BLOCK, tl.float16)
            d = _load_once(d + tl.arange(0, 4)[None, :], here, RAGGED).to(tl.float32)
        words = _pointers(weight, rows, group, 512, BODY // GROUPS, 64, BLOCK, tl.int16) + word
        low = _load_pieces(words + late * (256 * LOW), here, 0, LOW, RAGGED)
        high = _load_pieces(words + late * (256 * HIGH), here, 2 * LOW, HIGH, RAGGED)
        wait_for_producer(ARCH)

        # 3. Unpack and multiply.
        input_group = tl.minimum(i // 2 * WARPS + input_line // 8 % WARPS, GROUPS - 1)
        column = (input_group * 1024 + late * 128)[:, None] + 256 * (word // 8) + word % 8
        if i < rounds:
            even, odd = _products(
                y, low, high, _four_words(head), d, guard, column, late > 0, b, even, odd, KIND,
                COLUMNS, WARPS, M, ARCH,
            )  # fmt: skip

    # 4. The rest is that of projection_kernel.
    unguard = tl.permute(tl.reshape(1.0 / guard, [2, WARPS, 8]), [1, 0, 2])
    out = tl.sum((even + odd) * tl.reshape(unguard, [WARPS, 16, 1]), 0)
    row = tile * 16 + tl.arange(0, 16)
    column = tl.arange(0, M)
    at = column[None, :] * D + row[:, None]
    real = column[None, :] < B
    new = out + tl.load(residual + at, mask=real, other=0.0)
    tl.debug_barrier()
    tl.store(residual + at, new, mask=real)
    scaled = new * tl.load(norm + row).to(tl.float32)[:, None]
    tl.store(x + at, to_activation(scaled, x.dtype.element_ty), mask=real)
    tl.store(sums + column * (D // 16) + tile, tl.sum(new * new, 0), mask=column < B)


def launch(base: Launch, warps: int, stages: int) -> Launch:
    """The shape of `projection.launch`, with other warps, and copies `stages` - 1 rounds ahead."""
    constants = base.constants | dict(WARPS=warps, STAGES=stages)
    constants.pop("CHUNKS")
    return Launch(base.grid, constants, dict(num_warps=warps, num_stages=1))


def rounds(launch: Launch) -> int:
    """Of the loop: two for each group of a warp."""
    return 2 * triton.cdiv(launch.constants["COLUMNS"] // 1024, launch.constants["WARPS"])
