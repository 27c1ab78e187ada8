"""Unpack ggml's blocks into float32 values, with tensor operations on the device of the blocks.

A row of weights is stored as consecutive blocks. Below, `blocks` is uint8 [n, bytes of a block] and
the result float32 [n, weights of a block]. The order of the operations is ggml's, so the results
are ggml's to the bit.

In the drawings a box is a field with its size in bytes; d, m and dmin are float16.

The types that files of this model commonly hold are unpacked here. gguf-py unpacks all others.

Source: `dequantize_row_*`, https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mistral.errors import CheckpointError
from mistral.quantization.ggml_types import GgmlType

# What a 4-bit number of IQ4_NL and IQ4_XS stands for
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def dequantize(data: Tensor, kind: GgmlType) -> Tensor:
    """Unpack rows of blocks: uint8 [..., bytes] -> float32 [..., weights].

    Raises CheckpointError for a type that cannot be unpacked.
    """
    function = FUNCTIONS.get(kind.name)
    if function is None:
        return _by_gguf_py(data, kind)
    weights = function(data.reshape(-1, kind.block_bytes))
    num_blocks = data.shape[-1] // kind.block_bytes
    return weights.reshape(*data.shape[:-1], num_blocks * kind.block_weights)


def unpack(field: Tensor, bits: int, run: int) -> Tensor:
    """Split bytes into numbers of `bits` bits: uint8 [n, bytes] -> uint8 [n, bytes * 8 / bits].

    Each run of `run` bytes yields the lowest bits of all its bytes first, then the next bits:

        run of 2 bytes, 4 bits   [ba dc] -> a c b d
    """
    planes = field.reshape(field.shape[0], -1, run)  # [n, runs, run]
    mask = (1 << bits) - 1
    return torch.stack([planes >> shift & mask for shift in range(0, 8, bits)], dim=2).flatten(1)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, as float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _f32(blocks: Tensor) -> Tensor:
    """[w 4]: float32."""
    return blocks.contiguous().view(torch.float32)


def _f64(blocks: Tensor) -> Tensor:
    """[w 8]: float64, rounded to float32."""
    return blocks.contiguous().view(torch.float64).float()


def _f16(blocks: Tensor) -> Tensor:
    """[w 2]: float16."""
    return blocks.contiguous().view(torch.float16).float()


def _bf16(blocks: Tensor) -> Tensor:
    """[w 2]: bfloat16, the upper half of a float32."""
    return blocks.contiguous().view(torch.bfloat16).float()


def _q4_0(blocks: Tensor) -> Tensor:
    """[d 2 | q 16]: 32 weights d * (q - 8).

    The low nibbles are weights 0-15, the high ones 16-31.
    """
    return _half(blocks, 0) * (unpack(blocks[:, 2:], 4, 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    """[d 2 | m 2 | q 16]: 32 weights d * q + m."""
    return _half(blocks, 0) * unpack(blocks[:, 4:], 4, 16).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    """[d 2 | high 4 | q 16]: 32 weights d * (q - 16).

    Bit i of `high` is the fifth bit of weight i.
    """
    q = unpack(blocks[:, 6:], 4, 16) | unpack(blocks[:, 2:6], 1, 1) << 4
    return _half(blocks, 0) * (q.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    """[d 2 | m 2 | high 4 | q 16]: 32 weights d * q + m."""
    q = unpack(blocks[:, 8:], 4, 16) | unpack(blocks[:, 4:8], 1, 1) << 4
    return _half(blocks, 0) * q.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    """[d 2 | q 32]: 32 weights d * q, q signed."""
    return blocks[:, 2:].view(torch.int8).float() * _half(blocks, 0)


def _q2_k(blocks: Tensor) -> Tensor:
    """[scales 16 | q 64 | d 2 | dmin 2]: 16 groups of 16 weights d * scale * q - dmin * min.

    A byte of `scales` is a group's scale (low nibble) and min (high nibble); q has 2 bits.
    """
    scale = blocks[:, :16] & 15
    low = blocks[:, :16] >> 4
    q = unpack(blocks[:, 16:80], 2, 32).view(-1, 16, 16).float()
    d = _half(blocks, 80)
    dmin = _half(blocks, 82)
    return ((d * scale.float())[..., None] * q - (dmin * low.float())[..., None]).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    """[high 32 | q 64 | scales 12 | d 2]: 16 groups of 16 weights d * (scale - 32) * (q - 4 or 0).

    q has 2 bits, and 4 is subtracted if the weight's bit in `high` is not set. A scale has 6 bits:
    the lower four of the 16 scales are nibbles of bytes 0-7, the upper two are in bytes 8-11.
    """
    scales = unpack(blocks[:, 96:104], 4, 8) | unpack(blocks[:, 104:108], 2, 4) << 4  # [n, 16]
    high = unpack(blocks[:, :32], 1, 32) << 2  # 4 or 0
    q = unpack(blocks[:, 32:96], 2, 32).float() + high.float() - 4
    scale = _half(blocks, 108) * (scales.float() - 32)
    return (scale[..., None] * q.view(-1, 16, 16)).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    """[d 2 | dmin 2 | scales 12 | q 128]: 8 groups of 32 weights d * scale * q - dmin * min."""
    scale, low = _scales_and_mins(blocks)
    q = unpack(blocks[:, 16:], 4, 32).view(-1, 8, 32).float()
    return (scale[..., None] * q - low[..., None]).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    """[d 2 | dmin 2 | scales 12 | high 32 | q 128]: 8 groups of 32 weights, computed as in Q4_K.

    Bit g of byte i of `high` is the fifth bit of weight i of group g.
    """
    scale, low = _scales_and_mins(blocks)
    q = unpack(blocks[:, 48:], 4, 32) | unpack(blocks[:, 16:48], 1, 32) << 4
    return (scale[..., None] * q.view(-1, 8, 32).float() - low[..., None]).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    """[q 128 | high 64 | scales 16 | d 2]: 16 groups of 16 weights d * scale * (q - 32).

    The scales are signed bytes. The lower four bits of a weight are in q, the upper two in `high`.
    """
    q = unpack(blocks[:, :128], 4, 64) | unpack(blocks[:, 128:192], 2, 32) << 4
    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()  # [n, 16]
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
    return _half(blocks, 0) * scale.float(), _half(blocks, 2) * low.float()


def _iq4_nl(blocks: Tensor) -> Tensor:
    """[d 2 | q 16]: 32 weights d * _IQ4_VALUES[q]."""
    return _half(blocks, 0) * _iq4_values(unpack(blocks[:, 2:], 4, 16))


def _iq4_xs(blocks: Tensor) -> Tensor:
    """[d 2 | high 2 | low 4 | q 128]: 8 groups of 32 weights d * (scale - 32) * _IQ4_VALUES[q].

    The lower four bits of a scale are in `low`, the upper two in `high`.
    """
    scale = unpack(blocks[:, 4:8], 4, 1) | unpack(blocks[:, 2:4], 2, 1) << 4  # [n, 8]
    values = _iq4_values(unpack(blocks[:, 8:], 4, 16)).view(-1, 8, 32)
    return ((_half(blocks, 0) * (scale.float() - 32))[..., None] * values).flatten(1)


def _iq4_values(q: Tensor) -> Tensor:
    """_IQ4_VALUES[q], float32, for q of any shape."""
    return _iq4_table(q.device).index_select(0, q.flatten().int()).view(q.shape)


@functools.cache  # on each device: a CUDA graph cannot wait for the host to send the table
def _iq4_table(device: torch.device) -> Tensor:
    return torch.tensor(_IQ4_VALUES, dtype=torch.float32, device=device)


def _by_gguf_py(data: Tensor, kind: GgmlType) -> Tensor:
    """`dequantize` by gguf-py, which computes on the host."""
    if data.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"{kind.name} is unpacked on the host, and a CUDA graph cannot wait for the host: "
            "use the eager engine, or load the checkpoint without packed=True"
        )
    import gguf  # here, because it takes half a second and few files need it

    try:
        known = gguf.GGMLQuantizationType[kind.name]
        with np.errstate(all="ignore"):  # scales may be infinite or NaN
            weights = gguf.dequantize(data.cpu().contiguous().numpy(), known)
    except (KeyError, NotImplementedError):
        raise CheckpointError(f"no way is known to unpack ggml type {kind.name}") from None
    return torch.from_numpy(weights).to(data.device)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _f32,
    "F64": _f64,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
