"""32 columns of a tile in each encoding (tiles.py): their sum with activations, or their values.

The sums do not unpack weights to their values. Bits 4 to 7 of a lane are 16 times a nibble, so the
sum is divided by 16, not each of its terms; int32 has room, 31 * 256 * 32767 * 8 < 2^31. A vector
costs a load, a mask and a product for every two columns of 8 rows.
"""

import numpy as np

from mistral_kernels.cpu.compiler import part
from mistral_kernels.cpu.lanes import (
    as_floats,
    bytes_at,
    pair_at,
    pair_products,
    store_words,
    sums_of,
    words_at,
    words_of_bytes_at,
)

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


# ---- The same 32 columns unpacked: 16 vectors of int16, one for each pair of columns ----
# 64 bytes apart: the vectors of another tile lie between them (groups.py)


@part
def unpack_nibbles(vectors, to):
    """32 columns as 16 vectors of int16 at `to`, one for each pair of columns."""
    for i in range(4):
        w = words_at(vectors + 32 * i)
        for p in range(4):
            store_words(to + 256 * i + 64 * p, (w >> (4 * p)) & 0xF)


@part
def unpack_five_bits(vectors, to):
    """The same for five bits."""
    fifth = words_at(vectors)
    for i in range(4):
        w = words_at(vectors + 32 + 32 * i)
        f = fifth >> i
        store_words(to + 256 * i, (w & 0xF) | (f & 0x10))
        store_words(to + 256 * i + 64, ((w >> 4) & 0xF) | ((f >> 4) & 0x10))
        store_words(to + 256 * i + 128, ((w >> 8) & 0xF) | ((f >> 8) & 0x10))
        store_words(to + 256 * i + 192, (w >> 12) | ((f & 1) << 4))


@part
def unpack_six_bits(vectors, to):
    """16 columns, less 32: 8 vectors."""
    upper = words_at(vectors)
    for i in range(2):
        w = words_at(vectors + 32 + 32 * i)
        u = upper >> (2 * i)
        store_words(to + 256 * i, ((w & 0xF) | (u & 0x30)) - 32)
        store_words(to + 256 * i + 64, (((w >> 4) & 0xF) | ((u >> 4) & 0x30)) - 32)
        store_words(to + 256 * i + 128, (((w >> 8) & 0xF) | ((u >> 8) & 0x30)) - 32)
        store_words(to + 256 * i + 192, ((w >> 12) | ((u & 3) << 4)) - 32)


@part
def unpack_bytes(vectors, to):
    """The same for signed bytes."""
    for j in range(16):
        store_words(to + 64 * j, words_of_bytes_at(vectors + 16 * j))


# ---- Scales of Q4_K and Q5_K ----


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
