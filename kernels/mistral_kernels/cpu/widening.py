"""Matrices of types that have no tiles of their own, as signed bytes with scales in float32.

A weight of each of these types is a small integer times a scale that at least 16 columns share.
Where the two are in a block differs, and gguf-py knows: it unpacks a block, and once more with all
scales set so that they are 1, which yields the integers. A scale is then a weight divided by its
integer, so a product has the unpacked weights up to the rounding of float32.

    IQ1_S, IQ1_M    8 times (-1, 0 or 1, plus or minus 1/8)
    IQ2_*, IQ3_*    values of a grid, up to 62, with signs
    TQ1_0, TQ2_0    -1 to 2
    MXFP4, NVFP4    0 to 12, with signs: twice a 4-bit float

The tile of such a matrix, `BYTES`, has for 32 columns the 8 rows' scales of the first 16 and of the
last 16, float32, and then the `bytes` of tiles.py: 10 bits a weight. The blocks cannot be restored
from it, so they are kept.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral.quantization.dequantize import dequantize
from mistral.quantization.ggml_types import GgmlType
from mistral_kernels.cpu.pool import share
from mistral_kernels.cpu.tiles import ROWS, Tiles

BYTES = GgmlType("bytes", 32, 40)
_AT_ONCE = 1 << 18  # weights to unpack at a time: the memory besides stays small


class _Set(NamedTuple):
    """Bytes of a block that are set so that all scales are 1."""

    where: slice
    values: tuple[int, ...]
    kept: int = 0  # bits of each byte that stay


_EIGHT = (0x00, 0x48)  # float16
_FOUR = (0x00, 0x44)
_ONE = (0x00, 0x3C)
_INTEGERS = {
    "IQ1_S": (_Set(slice(0, 2), _EIGHT), _Set(slice(35, 50, 2), (0,), kept=0x8F)),
    # The float16 is spread over the highest 4 bits of four int16.
    "IQ1_M": (_Set(slice(48, 56), (0, 0, 0, 0, 0, 0x80, 0, 0x40)),),
    "IQ2_XXS": (_Set(slice(0, 2), _EIGHT), _Set(slice(9, 66, 8), (0,), kept=0x0F)),
    "IQ2_XS": (_Set(slice(0, 2), _EIGHT), _Set(slice(66, 74), (0,))),
    "IQ2_S": (_Set(slice(0, 2), _EIGHT), _Set(slice(74, 82), (0,))),
    "IQ3_XXS": (_Set(slice(0, 2), _FOUR), _Set(slice(69, 98, 4), (0,), kept=0x0F)),
    "IQ3_S": (_Set(slice(0, 2), _ONE), _Set(slice(106, 110), (0,))),
    "TQ1_0": (_Set(slice(52, 54), _ONE),),
    "TQ2_0": (_Set(slice(64, 66), _ONE),),
    "MXFP4": (_Set(slice(0, 1), (128,)),),
    "NVFP4": (_Set(slice(0, 4), (0x40,)),),
}
WIDENED = tuple(_INTEGERS)


def widened_bytes(rows: int, columns: int) -> int:
    """What the tiles of a matrix take."""
    return -(-rows // ROWS) * ROWS * columns // BYTES.block_weights * BYTES.block_bytes


def widen(blocks: Tensor, kind: GgmlType) -> Tiles:
    """Blocks uint8 [rows, bytes of a row] of one of WIDENED as tiles of BYTES."""
    rows, row_bytes = blocks.shape
    columns = row_bytes // kind.block_bytes * kind.block_weights
    data = blocks.new_empty(-(-rows // ROWS), widened_bytes(1, columns))

    def fill(first: int, last: int) -> None:
        with torch.inference_mode():  # a thread does not have its parent's mode
            part = blocks[ROWS * first : ROWS * last]
            part = F.pad(part, (0, 0, 0, ROWS * (last - first) - len(part)))
            data[first:last] = _tiles(*integers_and_scales(part, kind))

    share(fill, len(data), max(1, _AT_ONCE // (ROWS * columns)))
    return Tiles(kind=BYTES, rows=rows, columns=columns, data=data)


def integers_and_scales(blocks: Tensor, kind: GgmlType) -> tuple[Tensor, Tensor]:
    """Blocks uint8 [rows, bytes of a row] -> int8 [rows, G, 16] and float32 [rows, G]."""
    ones = blocks.view(-1, kind.block_bytes).clone()
    for where, values, kept in _INTEGERS[kind.name]:
        ones[:, where] = ones[:, where] & kept | torch.tensor(values, dtype=torch.uint8)
    integers = dequantize(ones.view_as(blocks), kind).unflatten(-1, (-1, 16))
    weights = dequantize(blocks, kind).unflatten(-1, (-1, 16))
    largest = integers.abs().argmax(-1, keepdim=True)
    weight = weights.gather(-1, largest)[..., 0]
    integer = integers.gather(-1, largest)[..., 0]
    # Of 16 zeros any scale will do, unless it was infinite or NaN, which makes the weights NaN.
    scales = torch.where(integer == 0, weight, weight / integer)
    return integers.to(torch.int8), scales


def _tiles(integers: Tensor, scales: Tensor) -> Tensor:
    """int8 [8 n, G, 16] and float32 [8 n, G] -> uint8 [n, bytes of a tile]."""
    n = len(integers) // ROWS
    # [n, 32 columns, half, 8]
    scales = scales.view(n, ROWS, -1, 2).permute(0, 2, 3, 1).contiguous()
    # [n, 32 columns, pairs, 8, 2]
    values = integers.reshape(n, ROWS, -1, 16, 2).permute(0, 2, 3, 1, 4).contiguous()
    parts = (scales.view(torch.uint8).flatten(2), values.view(torch.uint8).flatten(2))
    return torch.cat(parts, dim=-1).flatten(1)
