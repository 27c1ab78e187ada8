"""Elements of a packed row as numbers, one by one: what the embedding needs.

The arithmetic is ggml's own, in float32, so infinite and NaN scales come out as there. A row is a few KB: how long the
code takes does not matter.

Sources: the formats are drawn in mistral/quantization/dequantize.py, the order of the bytes in planes.py.
"""

import triton
import triton.language as tl

from mistral_kernels.packed_tile import body_bytes, high_pieces, row_block_bytes
from mistral_kernels.planes import HIGH_BITS


@triton.constexpr_function
def high_bit(kind, v, n):
    """At which bit of a word the upper bits of number n begin, in the v-th of the pieces that it serves."""
    return HIGH_BITS[kind][v][n]


@triton.jit
def high_number(start, piece, n, word, here, KIND: tl.constexpr):
    """The upper bits of number n of the words of a piece of nibbles, where they belong in the number."""
    PER: tl.constexpr = 8 // high_pieces(KIND)
    words = start + (9 + piece // PER) * 256 + word
    bits = tl.load(words, mask=here, other=0).to(tl.int32) & 0xFFFF
    shift = n * 0
    for v in tl.static_range(PER):
        for i in tl.static_range(4):
            shift = tl.where((piece % PER == v) & (n == i), high_bit(KIND, v, i), shift)
    return (bits >> shift & (1 if KIND == "Q5_K" else 3)) << 4


@triton.jit
def k_scales(head, piece, here):
    """Scale and min, 6 bits each, of a group of 32 weights: see `_scales_and_mins` in dequantize.py."""
    g = piece % 4
    first = tl.load(head + 4 + g, mask=here, other=0).to(tl.int32)
    second = tl.load(head + 8 + g, mask=here, other=0).to(tl.int32)
    third = tl.load(head + 12 + g, mask=here, other=0).to(tl.int32)
    scale = tl.where(piece < 4, first & 63, third & 15 | first >> 6 << 4)
    low = tl.where(piece < 4, second & 63, third >> 4 | second >> 6 << 4)
    return scale.to(tl.float32), low.to(tl.float32)


@triton.jit
def half_at(pointer, here):
    """The fp16 numbers there, as fp32."""
    return tl.load(pointer.to(tl.pointer_type(tl.float16)), mask=here, other=0.0).to(tl.float32)


@triton.jit
def packed_elements(data, row, d, here, KIND: tl.constexpr, COLUMNS: tl.constexpr):
    """Elements d of a row of planes [., COLUMNS], fp32, 0 where not `here`; row and d of one shape, or row a scalar."""
    BODY: tl.constexpr = body_bytes(KIND, COLUMNS)
    GROUPS: tl.constexpr = (COLUMNS + 1023) // 1024
    NUMBERS: tl.constexpr = 2 if KIND == "Q8_0" else 4  # of a word
    group, quarter, piece = d // 1024, d // 256 % 4, d % 256 // (8 * NUMBERS)
    n, word = d // 8 % NUMBERS, d % 8
    block = data + row // 8 * row_block_bytes(KIND, COLUMNS)
    head = block + group * (BODY // GROUPS) + row % 8 * 64 + quarter * 16
    words = head.to(tl.pointer_type(tl.int16))
    bits = tl.load(words + (1 + piece) * 256 + word, mask=here, other=0).to(tl.int32) & 0xFFFF
    number = bits >> n * (16 // NUMBERS) & (0xFF if KIND == "Q8_0" else 0xF)
    if high_pieces(KIND) > 0:
        number = number | high_number(words, piece, n, word, here, KIND)
    number = number.to(tl.float32)
    if KIND == "Q4_K" or KIND == "Q5_K":
        scale, low = k_scales(head, piece, here)
        out = half_at(head, here) * scale * number - half_at(head + 2, here) * low
    elif KIND == "Q6_K":
        scale = tl.load(head.to(tl.pointer_type(tl.int8)) + 2 * piece + n // 2, mask=here, other=0).to(tl.float32)
        out = half_at(block + BODY + group * 64 + row % 8 * 8 + quarter * 2, here) * scale * (number - 32.0)
    elif KIND == "Q8_0":
        out = half_at(head + piece // 2 * 2, here) * (number - 128.0)
    else:
        out = half_at(head + piece * 2, here) * (number - 8.0)
    return out
