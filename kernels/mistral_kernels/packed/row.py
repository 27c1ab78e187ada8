"""Single weights of packed rows: for the embedding, and (in packed/dequantize.py) for matrices.

The arithmetic is ggml's own, in float32, so infinite and NaN scales give the same results.

Sources: the formats are drawn in mistral/quantization/dequantize.py, the order of the bytes in
packed/planes.py.

Symbols: u is a piece of low bits, n the place of a value in the words of a piece (nibble or byte).
"""

import triton
import triton.language as tl

from mistral_kernels.packed.planes import HIGH_BITS
from mistral_kernels.packed.tile import body_bytes, high_pieces, low_pieces, row_block_bytes


@triton.constexpr_function
def zero_point(kind):
    """The value of weight 0."""
    return {"Q4_0": 8, "Q6_K": 32, "Q8_0": 128}.get(kind, 0)


@triton.constexpr_function
def high_mask(kind):
    """The mask of the high bits of one value, at bit 0."""
    return {"Q5_K": 1, "Q6_K": 3}.get(kind, 0)


@triton.constexpr_function
def _high_shifts(kind, half):
    """Elements 8 * half .. 8 * half + 7 of `HIGH_BITS` as a table that a kernel can index.

    They are the digits of one int32, in base 16, lowest first.
    """
    digits = sum(HIGH_BITS[kind], ())[8 * half : 8 * half + 8]
    number = sum(digit << 4 * i for i, digit in enumerate(digits))
    return number - 2**32 if number >= 2**31 else number


@triton.jit
def high_place(u, n, KIND: tl.constexpr):
    """The piece with the high bits of value n of piece u, and the bit of a word they begin at."""
    SERVES: tl.constexpr = low_pieces(KIND) // high_pieces(KIND)  # pieces of low bits
    at = u % SERVES * 4 + n
    shift = tl.where(at < 8, _high_shifts(KIND, 0), _high_shifts(KIND, 1)) >> at % 8 * 4 & 15
    return 1 + low_pieces(KIND) + u // SERVES, shift


@triton.jit
def scale_and_low(data, head, tail, u, n, KIND: tl.constexpr):
    """For value n of the words of piece u, weight = value * scale - low: fp32 each.

    head, tail  the byte of the quarter's head, and of its d (Q6_K)
    """
    halves = data.to(tl.pointer_type(tl.float16))
    low = 0.0
    if KIND == "Q4_K" or KIND == "Q5_K":
        # d, dmin, then 8 scales and 8 mins of 6 bits in 12 bytes, as drawn at `_scales_and_mins` in
        # mistral/quantization/dequantize.py
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

    Columns from COLUMNS up to the next multiple of 1,024 are zeros.
    """
    # 1. Where the value is: group, quarter, piece u, word, and place n in it.
    BODY: tl.constexpr = body_bytes(KIND, COLUMNS)
    GROUP_BYTES: tl.constexpr = 512 * (1 + low_pieces(KIND) + high_pieces(KIND))
    BITS: tl.constexpr = low_pieces(KIND) // 2  # 8 pieces of 4 bits, 16 of 8
    VALUES: tl.constexpr = 16 // BITS  # of a word
    group = column // 1024
    quarter = column // 256 % 4
    u = column % 256 // (8 * VALUES)
    n = column // 8 % VALUES
    word = column % 8
    block = row // 8 * row_block_bytes(KIND, COLUMNS)
    head = block + group * GROUP_BYTES + row % 8 * 64 + quarter * 16
    words = data.to(tl.pointer_type(tl.int16)) + head // 2 + word

    # 2. Its bits. Piece 0 is the head.
    value = tl.load(words + 256 * (u + 1)).to(tl.int32) >> BITS * n & (1 << BITS) - 1
    if high_pieces(KIND) > 0:
        piece, shift = high_place(u, n, KIND)
        value |= (tl.load(words + 256 * piece).to(tl.int32) >> shift & high_mask(KIND)) << 4

    # 3. The weight.
    tail = block + BODY + group * 64 + row % 8 * 8 + quarter * 2
    scale, low = scale_and_low(data, head, tail, u, n, KIND)
    out = scale * (value - zero_point(KIND)).to(tl.float32)
    if KIND == "Q4_K" or KIND == "Q5_K":
        out -= low
    return out
