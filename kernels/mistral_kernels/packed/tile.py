"""The tile of decode/matvec.py for packed weights: 16 rows times the batch.

Weights are unpacked on the way to the tensor cores.

A decode step waits for the bytes of its weights, so they stay packed up to the registers. While the
bytes of a 4-bit weight arrive there is time for about 4 instructions; written plainly (shift, mask,
convert, scale, subtract) a weight takes 6. Three things reduce it to 2, or 3 for 5 and 6 bits:

* The bits of a weight are read as an fp16 value, and one multiply-add yields two finished weights:
  `scaled_bits`. The scale is rounded to fp16 (11 bits; bf16 has 8) once for 16 or 32 weights, and
  so is the offset (-dmin * min, or -8 * d and the like). A power of two per row, its guard, keeps
  both within fp16; the result is divided by it.
* A lane loads 16 bytes that are its own: 8 words of 16 bits (see planes.py), in the place of the 8
  weights of the dense tile. The n-th values of the 8 words are one operand of the matrix
  instruction, and their inputs are 8 neighbours. No weight passes through shared memory, and
  nothing is shuffled.
* The scales of 256 weights are 16 bytes too, and the lane that multiplies these weights loads them.

A warp takes groups of 1,024 columns, and four lanes take a quarter each of a row in a group. All
loads of half a group are issued before the first use. Half, because bytes that wait for their use
take registers, and registers decide how many CTAs share a multiprocessor: others load while one
multiplies. For gate and up, Q4_K takes 84 registers instead of 129 with whole groups, Q6_K 109
instead of 172 (sm_90, Triton 3.6): five CTAs instead of three, and four instead of two.

Symbols: u is a piece of low bits, n the place of a value in the words of a piece (nibble or byte).

The weights differ from ggml's by 2e-4 (Q8_0) to 7e-4 (Q5_K) of their size, root mean square; if
rounded to bf16 they would differ by 1.7e-3. With inputs in float32 the same code is exact to the
last bits; the tests compare that with the reference.

Versions, instructions per weight (read from the SASS for sm_90, batch up to 8; times not measured)
                                                     Q4_K    Q6_K
  scale and subtract each weight, the loop alone      6.3       -
  integer products (dp4a), 8-bit inputs, the same     1.6       -     off by 5e-3; B times for B
  this one, a whole kernel of 4,096 columns           2.1     3.2
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_kernels.decode.matvec import DENSE, dense_tile, input_fragment, weight_fragment
from mistral_kernels.packed.planes import HIGH_BITS, Planes
from mistral_kernels.portable import require, scaled_bits, scaled_joined_bits, wait_for_producer


def operands(x: Tensor, *weights: Tensor | Planes) -> tuple[list[Tensor], list[str], torch.dtype]:
    """What a kernel needs of its matrices: their memory, their types and the dtype of products.

    Raises ValueError for packed weights together with plain ones, with inputs in bfloat16, which is
    too coarse for their scales, and of 2^31 bytes or more.
    """
    packed = [weight for weight in weights if isinstance(weight, Planes)]
    if not packed:
        return list(weights), [DENSE] * len(weights), weights[0].dtype
    require(len(packed) == len(weights), "one kernel takes plain matrices or packed ones, not both")
    require(
        x.dtype in (torch.float16, torch.float32),
        f"x is {x.dtype}: packed weights take float16 and float32",
    )
    for weight in packed:
        size = weight.data.nbytes
        require(
            size < 2**31,
            f"a matrix of {weight.rows} rows takes {size:,} bytes; the kernels count to 2^31",
        )
    return [weight.data for weight in packed], [weight.kind.name for weight in packed], x.dtype


@triton.constexpr_function
def low_pieces(kind):
    """How many pieces of low bits a group has."""
    return 16 if kind == "Q8_0" else 8


@triton.constexpr_function
def high_pieces(kind):
    """How many pieces of high bits a group has."""
    return {"Q5_K": 2, "Q6_K": 4}.get(kind, 0)


@triton.constexpr_function
def body_bytes(kind, columns):
    """Bytes of a row block before its tail."""
    return (columns + 1023) // 1024 * 512 * (1 + low_pieces(kind) + high_pieces(kind))


@triton.constexpr_function
def guards_at(kind, columns):
    """At which byte of a row block the guards begin."""
    return body_bytes(kind, columns) + ((columns + 1023) // 1024 * 64 if kind == "Q6_K" else 0)


@triton.constexpr_function
def row_block_bytes(kind, columns):
    """Bytes of 8 rows."""
    tail = guards_at(kind, columns) + 32 - body_bytes(kind, columns)
    return body_bytes(kind, columns) + (tail + 127) // 128 * 128


@triton.constexpr_function
def _high_shift(kind, u, n):
    """By how many bits to shift a word of high bits to the right (negative: left).

    After the shift the high bits of nibble n of piece u are next to the nibble.
    """
    places = HIGH_BITS[kind]
    return places[u % len(places)][n] - (8 if n % 2 else 4)


@triton.jit
def _pointers(
    data, rows, group, AT: tl.constexpr, GROUP_BYTES: tl.constexpr, ROW_BYTES: tl.constexpr,
    BLOCK_BYTES: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Pointers to `dtype`, [lines, 1]: each line's part of a region of a row block.

    The region begins at byte AT of every row block. The parts of two groups are GROUP_BYTES apart,
    those of two of the 8 rows ROW_BYTES. The offset counts elements, not bytes: only then the
    compiler knows that 16 bytes can be loaded at once.
    """
    SIZE: tl.constexpr = dtype.primitive_bitwidth // 8
    at = (
        rows // 8 * (BLOCK_BYTES // SIZE)
        + rows % 8 * (ROW_BYTES // SIZE)
        + group * (GROUP_BYTES // SIZE)
    )
    return (data.to(tl.pointer_type(dtype)) + at + AT // SIZE)[:, None]


@triton.jit
def _load_once(pointer, here, MASKED: tl.constexpr):
    """Load weights, 0 if not `here`. They are read once, so they leave the caches to the inputs."""
    if MASKED:
        loaded = tl.load(pointer, mask=here, other=0, eviction_policy="evict_first")
    else:
        loaded = tl.load(pointer, eviction_policy="evict_first")
    return loaded


@triton.jit
def _low_half(word):
    """The lower 16 bits of int32, an fp16 value, as fp32."""
    return (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _unsigned_byte(word, i: tl.constexpr):
    """Byte i of int32 as fp32."""
    return ((word >> 8 * i) & 0xFF).to(tl.float32)


@triton.jit
def _scale_and_offset(head, d, guard, u: tl.constexpr, n: tl.constexpr, KIND: tl.constexpr):
    """For value n of the words of piece u, value * scale + offset = weight: fp32 [lines, 4] each.

    Both are multiplied by the guard, and the scale also by 2^24, because `scaled_bits` reads a
    value as 2^-24 of it.

    head  the 4 words of 32 bits of each quarter's head; d and guard as `_packed_tile` loads them
    """
    if KIND == "Q4_K" or KIND == "Q5_K":
        # d, dmin, then 8 scales and 8 mins of 6 bits in 12 bytes, as drawn at `_scales_and_mins` in
        # mistral/quantization/dequantize.py. Four are unpacked at once, a byte each.
        if u < 4:
            scales = head[1] & 0x3F3F3F3F
            mins = head[2] & 0x3F3F3F3F
        else:
            scales = (head[3] & 0x0F0F0F0F) | (head[1] >> 2 & 0x30303030)
            mins = (head[3] >> 4 & 0x0F0F0F0F) | (head[2] >> 2 & 0x30303030)
        scale = _low_half(head[0]) * (guard * 2.0**24) * _unsigned_byte(scales, u % 4)
        offset = _low_half(head[0] >> 16) * -guard * _unsigned_byte(mins, u % 4)
    elif KIND == "Q6_K":
        # Inverting the sign bit of a signed byte yields an unsigned one, 128 higher: those convert
        # to fp32 faster.
        byte = _unsigned_byte(head[u // 2] ^ -0x7F7F7F80, u % 2 * 2 + n // 2)
        scale = d * (guard * 2.0**24) * (byte - 128.0)
        offset = scale * (-32 * 2.0**-24)  # value 32 is weight 0
    else:
        block: tl.constexpr = u // 2 if KIND == "Q8_0" else u
        scale = _low_half(head[block // 2] >> 16 * (block % 2)) * (guard * 2.0**24)
        zero: tl.constexpr = -128 if KIND == "Q8_0" else -8
        offset = scale * (zero * 2.0**-24)
    return scale, offset


@triton.jit
def _spread(scale, dtype: tl.constexpr):
    """One value per quarter, [lines, 4], repeated for each of its 8 words, [lines, 32]."""
    lines: tl.constexpr = scale.shape[0]
    return tl.reshape(tl.broadcast_to(scale.to(dtype)[:, :, None], [lines, 4, 8]), [lines, 32])


@triton.jit
def _unpacked(
    low, high, head, d, guard, u: tl.constexpr, n: tl.constexpr, KIND: tl.constexpr,
    dtype: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Value n of every word of piece u as a finished weight, times the guard: [lines, 32].

    low   the words of piece u, int16 [lines, 32]
    high  those with its high bits; of a type without them, anything
    """
    scale, offset = _scale_and_offset(head, d, guard, u, n, KIND)
    offset = _spread(offset, dtype)
    if KIND == "Q8_0":
        w = scaled_bits(low, _spread(scale, dtype), offset, 8 * n, 0xFF, ARCH)
    else:
        # An odd nibble is not shifted down by its last 4 bits: it counts 16 times its value.
        odd: tl.constexpr = n % 2
        scale = _spread(scale * (0.0625 if odd else 1.0), dtype)
        if high_pieces(KIND) == 0:
            w = scaled_bits(low, scale, offset, n // 2 * 8, 0xF << 4 * odd, ARCH)
        else:
            upper: tl.constexpr = (0x10 if KIND == "Q5_K" else 0x30) << 4 * odd
            w = scaled_joined_bits(
                low, high, scale, offset, n // 2 * 8, 0xF << 4 * odd, _high_shift(KIND, u, n),
                upper, ARCH,
            )  # fmt: skip
    return w


@triton.jit
def _four_words(head):
    """The four words of each 16 bytes: int32 [lines, 16] -> 4 times [lines, 4].

    They stay in the lane that loaded them.
    """
    even, odd = tl.split(tl.reshape(head, [head.shape[0], 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _load_pieces(words, here, FIRST: tl.constexpr, COUNT: tl.constexpr, MASKED: tl.constexpr):
    """Pieces FIRST .. FIRST + COUNT - 1 of a group, each int16 [lines, 32]: a tuple."""
    pieces = ()
    for u in tl.static_range(FIRST, FIRST + COUNT):
        # A piece is 512 bytes, or 256 words, after the one before.
        pieces = pieces + (_load_once(words + 256 * u, here, MASKED),)
    return pieces


@triton.jit
def _add_products(
    x, low, high, head, d, guard, column, b, even, odd, HALF: tl.constexpr, KIND: tl.constexpr,
    COLUMNS: tl.constexpr, WARPS: tl.constexpr, M: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """The two sums, with the products of half a group, value after value.

    32 columns of x belong to value n of piece u, 8 neighbours in each quarter.
    """
    LOW: tl.constexpr = low_pieces(KIND) // 2
    HIGH: tl.constexpr = high_pieces(KIND) // 2
    for k in tl.static_range(LOW):
        for n in tl.static_range(2 if KIND == "Q8_0" else 4):
            at = column + (16 if KIND == "Q8_0" else 32) * (HALF * LOW + k) + 8 * n
            if COLUMNS % 1024 == 0:
                v = tl.load(x + b[:, None] * COLUMNS + at)
            else:
                v = tl.load(x + b[:, None] * COLUMNS + at, mask=at < COLUMNS, other=0.0)
            top = high[k * HIGH // LOW] if HIGH > 0 else low[k]
            w = _unpacked(low[k], top, head, d, guard, HALF * LOW + k, n, KIND, v.dtype, ARCH)
            w = weight_fragment(w, WARPS)
            v = input_fragment(v, WARPS, M)
            if n % 2 == 0:
                even = tl.dot(w, v, even, input_precision="ieee")
            else:
                odd = tl.dot(w, v, odd, input_precision="ieee")
    return even, odd


@triton.jit
def _packed_tile(  # noqa: PLR0915
    x, data, rows, KIND: tl.constexpr, B: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr,
    M: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Rows `rows` (see `tile_rows`) of planes [., COLUMNS] times x [B, COLUMNS]: fp32 [16, M].

    Only the first B columns are defined.

    data  the planes' bytes: one pointer, or one for each line of the tile
    """
    # 1. Sizes, and which row of weights and which row of x a line has.
    GROUPS: tl.constexpr = (COLUMNS + 1023) // 1024
    RAGGED: tl.constexpr = GROUPS % WARPS != 0  # groups past the last count as zeros
    BLOCK: tl.constexpr = row_block_bytes(KIND, COLUMNS)
    BODY: tl.constexpr = body_bytes(KIND, COLUMNS)
    LOW: tl.constexpr = low_pieces(KIND) // 2  # pieces of half a group
    HIGH: tl.constexpr = high_pieces(KIND) // 2
    line = tl.arange(0, 16 * WARPS)
    input_line = tl.arange(0, M * WARPS)
    # Row B - 1 replaces the rows >= B.
    b = tl.minimum(input_line // (8 * WARPS) * 8 + input_line % 8, B - 1)
    word = tl.arange(0, 32)[None, :]
    guard = tl.load(_pointers(data, rows, 0, guards_at(KIND, COLUMNS), 0, 4, BLOCK, tl.float32))

    even = tl.zeros([WARPS, 16, M], tl.float32)  # two sums, so that one product need not wait for
    odd = even  # the one before
    for i in range((GROUPS + WARPS - 1) // WARPS):
        # 2. Load the head of a group for each warp, and d of Q6_K.
        group = i * WARPS + line // 8 % WARPS
        here = (group < GROUPS)[:, None]
        head = _pointers(data, rows, group, 0, BODY // GROUPS, 64, BLOCK, tl.int32)
        head = _load_once(head + tl.arange(0, 16)[None, :], here, RAGGED)
        d = 0.0
        if KIND == "Q6_K":
            d = _pointers(data, rows, group, BODY, 64, 8, BLOCK, tl.float16)
            d = _load_once(d + tl.arange(0, 4)[None, :], here, RAGGED).to(tl.float32)
        # After the head come the pieces: first all low bits, then all high bits.
        words = _pointers(data, rows, group, 512, BODY // GROUPS, 64, BLOCK, tl.int16) + word
        input_group = tl.minimum(i * WARPS + input_line // 8 % WARPS, GROUPS - 1)
        column = (input_group * 1024)[:, None] + 256 * (word // 8) + word % 8

        for half in tl.static_range(2):
            # 3. Load half of its pieces; keep all these loads before the first use of x, which the
            # previous kernel writes.
            low = _load_pieces(words, here, half * LOW, LOW, RAGGED)
            high = _load_pieces(words, here, 2 * LOW + half * HIGH, HIGH, RAGGED)
            wait_for_producer(ARCH)

            # 4. Unpack and multiply.
            even, odd = _add_products(
                x, low, high, _four_words(head), d, guard, column, b, even, odd, half, KIND,
                COLUMNS, WARPS, M, ARCH,
            )  # fmt: skip

    # 5. Divide by the guards, and add up the warps.
    unguard = tl.permute(tl.reshape(1.0 / guard, [2, WARPS, 8]), [1, 0, 2])
    return tl.sum((even + odd) * tl.reshape(unguard, [WARPS, 16, 1]), 0)


@triton.jit
def matrix_tile(
    x, weight, rows, KIND: tl.constexpr, B: tl.constexpr, COLUMNS: tl.constexpr,
    WARPS: tl.constexpr, CHUNKS: tl.constexpr, M: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """`dense_tile` or `_packed_tile`, by the type of the weights: fp32 [16, M]."""
    if KIND == "dense":
        out = dense_tile(x, weight, rows, B, COLUMNS, WARPS, CHUNKS, M, ARCH)
    else:
        out = _packed_tile(x, weight, rows, KIND, B, COLUMNS, WARPS, M, ARCH)
    return out


@triton.jit
def _one_of(
    takes_second, x, first, second, rows, KIND: tl.constexpr, SECOND_KIND: tl.constexpr,
    B: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, CHUNKS: tl.constexpr,
    M: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """A tile of one of two matrices.

    If both have one type, the code is there once, with one of two addresses.
    """
    if KIND == SECOND_KIND:
        weight = tl.where(takes_second, second, first)
        out = matrix_tile(x, weight, rows, KIND, B, COLUMNS, WARPS, CHUNKS, M, ARCH)
    elif takes_second:
        out = matrix_tile(x, second, rows, SECOND_KIND, B, COLUMNS, WARPS, CHUNKS, M, ARCH)
    else:
        out = matrix_tile(x, first, rows, KIND, B, COLUMNS, WARPS, CHUNKS, M, ARCH)
    return out


@triton.jit
def tile_of_three(
    is_first, is_third, x, first, second, third, rows, FIRST_KIND: tl.constexpr,
    SECOND_KIND: tl.constexpr, THIRD_KIND: tl.constexpr, B: tl.constexpr, COLUMNS: tl.constexpr,
    WARPS: tl.constexpr, CHUNKS: tl.constexpr, M: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """A tile of one of three matrices, of up to three types: fp32 [16, M]."""
    if FIRST_KIND == SECOND_KIND:
        out = _one_of(
            is_third, x, tl.where(is_first, first, second), third, rows, FIRST_KIND, THIRD_KIND, B,
            COLUMNS, WARPS, CHUNKS, M, ARCH,
        )  # fmt: skip
    elif is_first:
        out = matrix_tile(x, first, rows, FIRST_KIND, B, COLUMNS, WARPS, CHUNKS, M, ARCH)
    else:
        out = _one_of(
            is_third, x, second, third, rows, SECOND_KIND, THIRD_KIND, B, COLUMNS, WARPS, CHUNKS, M,
            ARCH,
        )  # fmt: skip
    return out
