"""32 columns in each encoding (tiles.py): of a tile, times a row of activations; of two, unpacked.

The sums do not unpack weights to their values. Bits 4 to 7 of a lane are 16 times a nibble, so the
sum is divided by 16, not each of its terms; int32 has room, 31 * 256 * 32767 * 8 < 2^31. A vector
costs a load, a mask and a product for every two columns of 8 rows.
"""

import numpy as np

from mistral_kernels.cpu.blocks import IQ4_VALUES
from mistral_kernels.cpu.compiler import part
from mistral_kernels.cpu.lanes import (
    Words,
    as_floats,
    bytes_at,
    high_bytes,
    low_bytes,
    pair_at,
    pair_products,
    sums_of,
    table_of,
    words_at,
    words_of_bytes_at,
)
from mistral_kernels.cpu.wide import (
    WideWords,
    store_wide_words,
    wide_high_bytes,
    wide_low_bytes,
    wide_words_at,
    wide_words_of_bytes_at,
)

_iq4_values = table_of(IQ4_VALUES, Words)
_wide_iq4_values = table_of(IQ4_VALUES, WideWords)

# ---- 32 columns of each encoding, times one row of activations: int32 sums of 8 rows ----
# x: the address of 32 int16


@part
def nibble_sums(vectors, x):
    """Int32 sums of 8 rows: 32 columns in nibbles times 32 int16 at x."""
    low = sums_of(np.int32(0))
    middle = sums_of(np.int32(0))  # 16 times the sum
    high = sums_of(np.int32(0))  # 256 times the sum
    for i in range(4):
        w = words_at(vectors + 32 * i)
        low = low + pair_products(w & 0xF, pair_at(x + 16 * i))
        middle = middle + pair_products(w & 0xF0, pair_at(x + 16 * i + 4))
        high = high + pair_products(w & 0xF00, pair_at(x + 16 * i + 8))
        low = low + pair_products(w >> 12, pair_at(x + 16 * i + 12))
    return low + (middle >> 4) + (high >> 8)


@part
def five_bit_sums(vectors, x):
    """The vector of fifth bits comes first."""
    low = sums_of(np.int32(0))
    middle = sums_of(np.int32(0))
    high = sums_of(np.int32(0))
    fifth = words_at(vectors)
    for i in range(4):
        w = words_at(vectors + 32 + 32 * i)
        f = fifth >> i
        low = low + pair_products((w & 0xF) | (f & 0x10), pair_at(x + 16 * i))
        middle = middle + pair_products((w & 0xF0) | (f & 0x100), pair_at(x + 16 * i + 4))
        high = high + pair_products((w & 0xF00) | (f & 0x1000), pair_at(x + 16 * i + 8))
        low = low + pair_products((w >> 12) | ((f & 1) << 4), pair_at(x + 16 * i + 12))
    return low + (middle >> 4) + (high >> 8)


@part
def six_bit_sums(vectors, x):
    """16 columns: the vector of fifth and sixth bits, and two of nibbles."""
    low = sums_of(np.int32(0))
    middle = sums_of(np.int32(0))
    high = sums_of(np.int32(0))
    upper = words_at(vectors)
    for i in range(2):
        w = words_at(vectors + 32 + 32 * i)
        u = upper >> (2 * i)
        low = low + pair_products((w & 0xF) | (u & 0x30), pair_at(x + 16 * i))
        middle = middle + pair_products((w & 0xF0) | (u & 0x300), pair_at(x + 16 * i + 4))
        high = high + pair_products((w & 0xF00) | (u & 0x3000), pair_at(x + 16 * i + 8))
        low = low + pair_products((w >> 12) | ((u & 3) << 4), pair_at(x + 16 * i + 12))
    return low + (middle >> 4) + (high >> 8)


@part
def byte_sums(vectors, x):
    """The same for signed bytes."""
    sums = sums_of(np.int32(0))
    for j in range(16):
        sums = sums + pair_products(words_of_bytes_at(vectors + 16 * j), pair_at(x + 4 * j))
    return sums


@part
def two_bit_sums(vector, x):
    """16 columns in one vector."""
    ones = sums_of(np.int32(0))
    fours = sums_of(np.int32(0))  # 4 times the sum
    sixteens = sums_of(np.int32(0))
    last = sums_of(np.int32(0))  # 64 times the sum
    for i in range(2):
        w = words_at(vector) >> (8 * i)
        ones = ones + pair_products(w & 0x3, pair_at(x + 16 * i))
        fours = fours + pair_products(w & 0xC, pair_at(x + 16 * i + 4))
        sixteens = sixteens + pair_products(w & 0x30, pair_at(x + 16 * i + 8))
        last = last + pair_products(w & 0xC0, pair_at(x + 16 * i + 12))
    return ones + (fours >> 2) + (sixteens >> 4) + (last >> 6)


@part
def three_bit_sums(vectors, half, x):
    """16 columns, half 0 or 1 of 32: the vector of third bits, and two of two bits."""
    ones = sums_of(np.int32(0))
    fours = sums_of(np.int32(0))
    sixteens = sums_of(np.int32(0))
    last = sums_of(np.int32(0))
    words = words_at(vectors + 32 + 32 * half)
    third = words_at(vectors) >> half
    for i in range(2):
        w = words >> (8 * i)
        t = third >> (8 * i)
        above = t & 0x100 if i == 0 else (third & 1) << 8  # bit 16 is bit 0
        ones = ones + pair_products((w & 0x3) | (t & 0x4), pair_at(x + 16 * i))
        fours = fours + pair_products((w & 0xC) | (t & 0x10), pair_at(x + 16 * i + 4))
        sixteens = sixteens + pair_products((w & 0x30) | (t & 0x40), pair_at(x + 16 * i + 8))
        last = last + pair_products((w & 0xC0) | above, pair_at(x + 16 * i + 12))
    return ones + (fours >> 2) + (sixteens >> 4) + (last >> 6)


@part
def iq4_sums(vectors, x):
    """32 columns in nibbles that stand for other values."""
    sums = sums_of(np.int32(0))
    for i in range(4):
        w = words_at(vectors + 32 * i)
        even = _iq4_values(w & 0x0F0F)  # pairs 0 and 2
        odd = _iq4_values((w >> 4) & 0x0F0F)  # pairs 1 and 3
        sums = sums + pair_products(low_bytes(even), pair_at(x + 16 * i))
        sums = sums + pair_products(low_bytes(odd), pair_at(x + 16 * i + 4))
        sums = sums + pair_products(high_bytes(even), pair_at(x + 16 * i + 8))
        sums = sums + pair_products(high_bytes(odd), pair_at(x + 16 * i + 12))
    return sums


@part
def sixteen_byte_sums(vectors, x):
    """16 columns of signed bytes."""
    sums = sums_of(np.int32(0))
    for j in range(8):
        sums = sums + pair_products(words_of_bytes_at(vectors + 16 * j), pair_at(x + 4 * j))
    return sums


# ---- 32 columns of two tiles unpacked: 16 vectors, one for each pair of columns (groups.py) ----
# left, right: addresses in the two tiles; to: the address of the vectors


@part
def unpack_nibbles(left, right, zero, to):
    """Nibbles, less `zero`."""
    for i in range(4):
        w = wide_words_at(left + 32 * i, right + 32 * i)
        for p in range(4):
            store_wide_words(to + 256 * i + 64 * p, ((w >> (4 * p)) & 0xF) - zero)


@part
def unpack_five_bits(left, right, zero, to):
    """The same for five bits."""
    fifth = wide_words_at(left, right)
    for i in range(4):
        w = wide_words_at(left + 32 + 32 * i, right + 32 + 32 * i)
        f = fifth >> i
        at = to + 256 * i
        store_wide_words(at, ((w & 0xF) | (f & 0x10)) - zero)
        store_wide_words(at + 64, (((w >> 4) & 0xF) | ((f >> 4) & 0x10)) - zero)
        store_wide_words(at + 128, (((w >> 8) & 0xF) | ((f >> 8) & 0x10)) - zero)
        store_wide_words(at + 192, ((w >> 12) | ((f & 1) << 4)) - zero)


@part
def unpack_six_bits(left, right, scale, to):
    """16 columns, less 32, times a scale (WideWords): 8 vectors."""
    upper = wide_words_at(left, right)
    for i in range(2):
        w = wide_words_at(left + 32 + 32 * i, right + 32 + 32 * i)
        u = upper >> (2 * i)
        at = to + 256 * i
        store_wide_words(at, (((w & 0xF) | (u & 0x30)) - 32) * scale)
        store_wide_words(at + 64, ((((w >> 4) & 0xF) | ((u >> 4) & 0x30)) - 32) * scale)
        store_wide_words(at + 128, ((((w >> 8) & 0xF) | ((u >> 8) & 0x30)) - 32) * scale)
        store_wide_words(at + 192, (((w >> 12) | ((u & 3) << 4)) - 32) * scale)


@part
def unpack_bytes(left, right, to):
    """Signed bytes."""
    for j in range(16):
        store_wide_words(to + 64 * j, wide_words_of_bytes_at(left + 16 * j, right + 16 * j))


@part
def unpack_iq4(left, right, to):
    """Nibbles that stand for other values."""
    for i in range(4):
        w = wide_words_at(left + 32 * i, right + 32 * i)
        even = _wide_iq4_values(w & 0x0F0F)
        odd = _wide_iq4_values((w >> 4) & 0x0F0F)
        store_wide_words(to + 256 * i, wide_low_bytes(even))
        store_wide_words(to + 256 * i + 64, wide_low_bytes(odd))
        store_wide_words(to + 256 * i + 128, wide_high_bytes(even))
        store_wide_words(to + 256 * i + 192, wide_high_bytes(odd))


@part
def unpack_two_bits(left, right, scale, to):
    """16 columns, times a scale (WideWords): 8 vectors."""
    w = wide_words_at(left, right)
    for j in range(8):
        store_wide_words(to + 64 * j, ((w >> (2 * j)) & 0x3) * scale)


@part
def unpack_three_bits(left, right, half, scale, to):
    """16 columns, half 0 or 1 of 32, less 4, times a scale (WideWords): 8 vectors."""
    w = wide_words_at(left + 32 + 32 * half, right + 32 + 32 * half)
    third = wide_words_at(left, right)
    for j in range(8):
        above = (third >> ((2 * j + 2 + half) & 15)) & 0x1
        store_wide_words(to + 64 * j, ((((w >> (2 * j)) & 0x3) | (above << 2)) - 4) * scale)


# ---- Scales of groups ----


@part
def low_and_high(both):
    """Scale and min of Q2_K, as Sums: 8 bytes at an address hold one in each nibble."""
    held = bytes_at(both)
    return held & 15, held >> 4


@part
def six_bit_scale(six_bits, group):
    """The scale of a group of 16 columns of Q3_K, 0 to 15, less 32, as Sums.

    six_bits is the address of 12 x 8 bytes; see `_q3_k` in dequantize.py.
    """
    low = bytes_at(six_bits + 8 * (group & 7)) >> (4 * (group >> 3))
    high = bytes_at(six_bits + 64 + 8 * (group & 3)) >> (2 * (group >> 2))
    return ((low & 15) | ((high & 3) << 4)) - 32


@part
def scale_and_min(six_bits, group):
    """The 6-bit scale and min of a group of 32 columns, 0 to 7, as Floats.

    six_bits is the address of 3 x 4 x 8 bytes; see `_scales_and_mins` in dequantize.py.
    """
    first = bytes_at(six_bits + 8 * (group & 3))
    second = bytes_at(six_bits + 32 + 8 * (group & 3))
    if group < 4:
        return as_floats(first & 63), as_floats(second & 63)
    third = bytes_at(six_bits + 64 + 8 * (group & 3))
    scale = (third & 15) | ((first >> 6) << 4)
    low = (third >> 4) | ((second >> 6) << 4)
    return as_floats(scale), as_floats(low)


@part
def iq4_xs_scale(six_bits, group):
    """The scale of a group of 32 columns of IQ4_XS, 0 to 7, less 32, as Floats.

    six_bits is the address of 2 x 8 bytes with the upper two bits, and 4 x 8 with the lower four;
    see `_iq4_xs` in dequantize.py.
    """
    high = bytes_at(six_bits + 8 * (group >> 2)) >> (2 * (group & 3))
    low = bytes_at(six_bits + 16 + 8 * (group >> 1)) >> (4 * (group & 1))
    return as_floats(((low & 15) | ((high & 3) << 4)) - 32)
