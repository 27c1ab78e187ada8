"""Blocks to numbers: ggml's formats, worked out with whole tensors on whatever device the bytes
are.

Every format stores a row of weights as blocks, one after the other. `blocks` below is uint8 [n,
bytes of a block], the result float32 [n, weights of a block]. The order of the operations is
ggml's, so the results are ggml's to the bit.

In the drawings a box is a field with its size in bytes; d, m and dmin are float16.

The formats that files of this model come in are here, the others in rare.py.

Source: `dequantize_row_*`, https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mistral.errors import CheckpointError
from mistral.quantization.ggml_types import GgmlType


def dequantize(data: Tensor, kind: GgmlType) -> Tensor:
    """Rows of packed bytes, uint8 [..., bytes], to float32 [..., weights].

    Raises CheckpointError for a format that is not known.
    """
    function = FUNCTIONS.get(kind.name) or _rare(kind)
    weights = function(data.reshape(-1, kind.block_bytes))
    return weights.reshape(
        *data.shape[:-1], data.shape[-1] // kind.block_bytes * kind.block_weights
    )


def unpack(field: Tensor, bits: int, run: int) -> Tensor:
    """Split bytes into numbers of `bits` bits: uint8 [n, bytes] -> uint8 [n, bytes * 8 / bits].

    Within each run of `run` bytes come first the lowest bits of every byte, then the next, and so
    on:

        run of 2 bytes, 4 bits   [ba dc] -> a c b d
    """
    planes = field.reshape(field.shape[0], -1, run)  # [n, runs, run]
    mask = (1 << bits) - 1
    return torch.stack([planes >> shift & mask for shift in range(0, 8, bits)], dim=2).flatten(1)


def half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, as float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def f32(blocks: Tensor) -> Tensor:
    """[w 4]: float32."""
    return blocks.contiguous().view(torch.float32)


def f64(blocks: Tensor) -> Tensor:
    """[w 8]: float64, rounded to float32."""
    return blocks.contiguous().view(torch.float64).float()


def f16(blocks: Tensor) -> Tensor:
    """[w 2]: float16."""
    return blocks.contiguous().view(torch.float16).float()


def bf16(blocks: Tensor) -> Tensor:
    """[w 2]: bfloat16, the upper half of a float32."""
    return blocks.contiguous().view(torch.bfloat16).float()


def q4_0(blocks: Tensor) -> Tensor:
    """[d 2 | q 16]: 32 weights d * (q - 8).

    The low nibbles are weights 0-15, the high ones 16-31.
    """
    return half(blocks, 0) * (unpack(blocks[:, 2:], 4, 16).float() - 8)


def q4_1(blocks: Tensor) -> Tensor:
    """[d 2 | m 2 | q 16]: 32 weights d * q + m."""
    return half(blocks, 0) * unpack(blocks[:, 4:], 4, 16).float() + half(blocks, 2)


def q5_0(blocks: Tensor) -> Tensor:
    """[d 2 | high 4 | q 16]: 32 weights d * (q - 16).

    Bit i of `high` is the fifth bit of weight i.
    """
    q = unpack(blocks[:, 6:], 4, 16) | unpack(blocks[:, 2:6], 1, 1) << 4
    return half(blocks, 0) * (q.float() - 16)


def q5_1(blocks: Tensor) -> Tensor:
    """[d 2 | m 2 | high 4 | q 16]: 32 weights d * q + m."""
    q = unpack(blocks[:, 8:], 4, 16) | unpack(blocks[:, 4:8], 1, 1) << 4
    return half(blocks, 0) * q.float() + half(blocks, 2)


def q8_0(blocks: Tensor) -> Tensor:
    """[d 2 | q 32]: 32 weights d * q, q signed."""
    return blocks[:, 2:].view(torch.int8).float() * half(blocks, 0)


def q2_k(blocks: Tensor) -> Tensor:
    """[scales 16 | q 64 | d 2 | dmin 2]: 16 groups of 16 weights d * scale * q - dmin * min.

    A byte of `scales` is a group's scale (low nibble) and min (high nibble); q has 2 bits.
    """
    scale, low = blocks[:, :16] & 15, blocks[:, :16] >> 4
    q = unpack(blocks[:, 16:80], 2, 32).view(-1, 16, 16).float()
    d, dmin = half(blocks, 80), half(blocks, 82)
    return ((d * scale.float())[..., None] * q - (dmin * low.float())[..., None]).flatten(1)


def q3_k(blocks: Tensor) -> Tensor:
    """[high 32 | q 64 | scales 12 | d 2]: 16 groups of 16 weights d * (scale - 32) * (q - 4 or 0).

    q has 2 bits, and 4 is taken off where its bit in `high` is not set. A scale has 6 bits: the
    lower four of the 16 scales are nibbles of bytes 0-7, the upper two lie in bytes 8-11.
    """
    scales = unpack(blocks[:, 96:104], 4, 8) | unpack(blocks[:, 104:108], 2, 4) << 4  # [n, 16]
    high = unpack(blocks[:, :32], 1, 32) << 2  # 4 or 0
    q = unpack(blocks[:, 32:96], 2, 32).float() + high.float() - 4
    scale = half(blocks, 108) * (scales.float() - 32)
    return (scale[..., None] * q.view(-1, 16, 16)).flatten(1)


def q4_k(blocks: Tensor) -> Tensor:
    """[d 2 | dmin 2 | scales 12 | q 128]: 8 groups of 32 weights d * scale * q - dmin * min."""
    scale, low = _scales_and_mins(blocks)
    q = unpack(blocks[:, 16:], 4, 32).view(-1, 8, 32).float()
    return (scale[..., None] * q - low[..., None]).flatten(1)


def q5_k(blocks: Tensor) -> Tensor:
    """[d 2 | dmin 2 | scales 12 | high 32 | q 128]: 8 groups of 32 weights d * scale * q - dmin *
    min.

    Bit g of byte i of `high` is the fifth bit of weight i of group g.
    """
    scale, low = _scales_and_mins(blocks)
    q = unpack(blocks[:, 48:], 4, 32) | unpack(blocks[:, 16:48], 1, 32) << 4
    return (scale[..., None] * q.view(-1, 8, 32).float() - low[..., None]).flatten(1)


def q6_k(blocks: Tensor) -> Tensor:
    """[q 128 | high 64 | scales 16 | d 2]: 16 groups of 16 weights d * scale * (q - 32), scales
    signed bytes.

    The lower four bits of a weight are in q, the upper two in `high`.
    """
    q = unpack(blocks[:, :128], 4, 64) | unpack(blocks[:, 128:192], 2, 32) << 4
    scale = half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()  # [n, 16]
    return (scale[..., None] * (q.view(-1, 16, 16).float() - 32)).flatten(1)


def _scales_and_mins(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """d * scale and dmin * min of the 8 groups of a Q4_K or Q5_K block, float32 [n, 8] each.

    Scale and min have 6 bits. A..H are the scales, a..h the mins, one letter a bit:

        bytes 0-3    EEAAAAAA FFBBBBBB GGCCCCCC HHDDDDDD
        bytes 4-7    eeaaaaaa ffbbbbbb ggcccccc hhdddddd
        bytes 8-11   eeeeEEEE ffffFFFF ggggGGGG hhhhHHHH
    """
    first, second, third = blocks[:, 4:16].view(-1, 3, 4).unbind(1)  # [n, 4] each
    scale = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=1)
    low = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1)
    return half(blocks, 0) * scale.float(), half(blocks, 2) * low.float()


def _rare(kind: GgmlType) -> Callable[[Tensor], Tensor]:
    from mistral.quantization import (
        rare,
    )  # which builds on this file, and takes its tables from gguf-py

    if kind.name not in rare.FUNCTIONS:
        raise CheckpointError(f"no way is known to unpack ggml type {kind.name}")
    return rare.FUNCTIONS[kind.name]


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    function.__name__.upper(): function
    for function in (
        f32,
        f64,
        f16,
        bf16,
        q4_0,
        q4_1,
        q5_0,
        q5_1,
        q8_0,
        q2_k,
        q3_k,
        q4_k,
        q5_k,
        q6_k,
    )
}
