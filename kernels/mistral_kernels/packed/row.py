"""The weights of packed rows one by one: for the embedding, and (in dequantize.py) for whole
matrices.

The arithmetic is ggml's own, in float32, so infinite and NaN scales give what they give there.

Sources: the formats are drawn in mistral/quantization/dequantize.py, the order of the bytes in
planes.py.
"""

import triton
import triton.language as tl

from mistral_kernels.packed.planes import HIGH_BITS
from mistral_kernels.packed.tile import body_bytes, high_pieces, low_pieces, row_block_bytes


@triton.constexpr_function
def zero_point(kind):
    """The number that stands for weight 0."""
    return {"Q4_0": 8, "Q6_K": 32, "Q8_0": 128}.get(kind, 0)


@triton.constexpr_function
def high_mask(kind):
    """The high bits of one number, moved down to bit 0."""
    return {"Q5_K": 1, "Q6_K": 3}.get(kind, 0)


@triton.constexpr_function
def high_shifts(kind, half):
    """`HIGH_BITS` 8 * half to 8 * half + 7 as the digits, to base 16 and lowest first, of one
    int32.
    """
    digits = sum(HIGH_BITS[kind], ())[8 * half : 8 * half + 8]
    number = sum(digit << 4 * i for i, digit in enumerate(digits))
    return number - 2**32 if number >= 2**31 else number


@triton.jit
def high_place(u, n, KIND: tl.constexpr):
    """Of number n of the words of piece u: the piece that has its high bits, and at which bit of a
    word they begin.
    """
    SERVES: tl.constexpr = low_pieces(KIND) // high_pieces(KIND)  # so many pieces of low bits
    at = u % SERVES * 4 + n
    shift = tl.where(at < 8, high_shifts(KIND, 0), high_shifts(KIND, 1)) >> at % 8 * 4 & 15
    return 1 + low_pieces(KIND) + u // SERVES, shift


@triton.jit
def scale_and_low(data, head, tail, u, n, KIND: tl.constexpr):
    """What number n of the words of piece u is multiplied by, and what is then taken off: fp32.

    head, tail  at which byte the head of the quarter is, and the d of Q6_K
    """
    halves = data.to(tl.pointer_type(tl.float16))
    low = 0.0
    if KIND == "Q4_K" or KIND == "Q5_K":
        # d, dmin, then scales and mins as drawn at `_scales_and_mins` in dequantize.py
        first = tl.load(data + head + 4 + u % 4).to(tl.int32)
        second = tl.load(data + head + 8 + u % 4).to(tl.int32)
        third = tl.load(data + head + 12 + u % 4).to(tl.int32)
        scale = tl.where(u < 4, first & 63, (third & 15) | (first >> 6 << 4)).to(tl.float32)
        low = tl.where(u < 4, second & 63, (third >> 4) | (second >> 6 << 4)).to(tl.float32)
        scale *= tl.load(halves + head // 2).to(tl.float32)
        low *= tl.load(halves + head // 2 + 1).to(tl.float32)
    elif KIND == "Q6_K":
        scale = tl.load(data.to(tl.pointer_type(tl.int8)) + head + 2 * u + n // 2).to(tl.float32)
        scale *= tl.load(halves + tail // 2).to(tl.float32)
    else:
        block = u // 2 if KIND == "Q8_0" else u
        scale = tl.load(halves + head // 2 + block).to(tl.float32)
    return scale, low


@triton.jit
def packed_elements(data, row, column, KIND: tl.constexpr, COLUMNS: tl.constexpr):
    """Some columns of a row of planes [., COLUMNS]: fp32, of the shape of `column`.

    Behind the row's end are zeros, up to a multiple of 1,024 columns.
    """
    BODY: tl.constexpr = body_bytes(KIND, COLUMNS)
    GROUP_BYTES: tl.constexpr = 512 * (1 + low_pieces(KIND) + high_pieces(KIND))
    BITS: tl.constexpr = low_pieces(KIND) // 2  # 8 pieces of 4 bits, 16 of 8
    NUMBERS: tl.constexpr = 16 // BITS  # of a word
    group, quarter = column // 1024, column // 256 % 4
    u, n, word = column % 256 // (8 * NUMBERS), column // 8 % NUMBERS, column % 8
    block = row // 8 * row_block_bytes(KIND, COLUMNS)
    head = block + group * GROUP_BYTES + row % 8 * 64 + quarter * 16
    words = data.to(tl.pointer_type(tl.int16)) + head // 2 + word
    number = (
        tl.load(words + 256 * (u + 1)).to(tl.int32) >> BITS * n & (1 << BITS) - 1
    )  # piece 0 is the head
    if high_pieces(KIND) > 0:
        piece, shift = high_place(u, n, KIND)
        number |= (tl.load(words + 256 * piece).to(tl.int32) >> shift & high_mask(KIND)) << 4
    scale, low = scale_and_low(
        data, head, block + BODY + group * 64 + row % 8 * 8 + quarter * 2, u, n, KIND
    )
    out = scale * (number - zero_point(KIND)).to(tl.float32)
    if KIND == "Q4_K" or KIND == "Q5_K":
        out -= low
    return out
