"""Packed weights in the layout of the CPU's products: ggml's blocks, eight rows at a time.

A tile is 8 rows of a matrix. For each 32 columns it stores the rows' scales side by side, then the
weights so that a vector of 16 lanes (`Words`) holds two neighbouring columns of each of the 8 rows:

    lane     0       1       2       3       4    ...  15
    row      0       0       1       1       2         7
    column   c       c + 1   c       c + 1   c         c + 1

Such a vector times a pair of activations, neighbours added, is a partial sum of 8 rows: no sum ever
runs across lanes. A lane has 16 bits, so a vector holds several pairs of columns:

    nibbles   4 vectors: bits 4p .. 4p+3 of a lane of vector i are column 8i + 2p (+ 1)
    bytes     16 vectors of signed bytes: columns 2j and 2j + 1
    fifth     1 vector: bit (4, 8, 12, 0)[p] + i is the fifth bit of the pair (i, p) of `nibbles`:
              a shift by i puts it above its nibble, wherever that is (above that of p = 3 after
              4 to the left, because that nibble is shifted to the bottom)
    sixth     for 16 columns 1 vector: bits (4, 8, 12, 0)[p] + 2i and the next one are the fifth
              and sixth bit of the pair (i, p) of the 2 vectors of nibbles

                of 32 columns (Q4_K, Q5_K, Q6_K: of 256)                bytes, as in the file
    Q4_0        d, nibbles                                              144
    Q4_1        d, m, nibbles                                           160
    Q5_0        d, fifth, nibbles                                       176
    Q5_1        d, m, fifth, nibbles                                    192
    Q8_0        d, bytes                                                272
    Q4_K        d, dmin, the 12 bytes of scales, 8 x nibbles            1152
    Q5_K        d, dmin, the 12 bytes of scales, 8 x (fifth, nibbles)   1408
    Q6_K        d, 16 scales, 16 x (sixth, 2 vectors of nibbles)        1680

Every field is in the order of the file with the 8 rows innermost. All is exact: `restore` returns
the blocks. Rows are padded to a multiple of 8 with zeros.

Sources: the blocks are drawn in mistral/quantization/dequantize.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral.quantization.dequantize import unpack
from mistral.quantization.ggml_types import GgmlType

ROWS = 8  # of a tile
_AT_ONCE = 1 << 18  # bytes to repack at a time: what it needs besides stays small and is used again
_NIBBLES = (0, 4, 8, 12)  # at which bit of a lane each value of a vector begins
_HIGHER = (4, 8, 12, 0)  # the same for the higher bits


class _Scales(NamedTuple):
    """Fields of a block that are copied: `unit` bytes each."""

    at: slice
    unit: int


class _Bits(NamedTuple):
    """A field of small values in a block: `bits` each, in runs of `run` bytes as in `unpack`."""

    at: slice
    bits: int
    run: int


@dataclass(frozen=True)
class _Layout:
    """Where the fields of a block are.

    columns  of which the higher bits make one vector
    """

    scales: tuple[_Scales, ...]
    low: _Bits
    high: _Bits | None = None
    columns: int = 32


_D = _Scales(slice(0, 2), 2)
_M = _Scales(slice(2, 4), 2)
_SIX_BITS = _Scales(slice(4, 16), 1)
_LAYOUTS = {
    "Q4_0": _Layout((_D,), _Bits(slice(2, 18), 4, 16)),
    "Q4_1": _Layout((_D, _M), _Bits(slice(4, 20), 4, 16)),
    "Q5_0": _Layout((_D,), _Bits(slice(6, 22), 4, 16), _Bits(slice(2, 6), 1, 1)),
    "Q5_1": _Layout((_D, _M), _Bits(slice(8, 24), 4, 16), _Bits(slice(4, 8), 1, 1)),
    "Q8_0": _Layout((_D,), _Bits(slice(2, 34), 8, 32)),
    "Q4_K": _Layout((_D, _M, _SIX_BITS), _Bits(slice(16, 144), 4, 32)),
    "Q5_K": _Layout((_D, _M, _SIX_BITS), _Bits(slice(48, 176), 4, 32), _Bits(slice(16, 48), 1, 32)),
    "Q6_K": _Layout(
        (_Scales(slice(208, 210), 2), _Scales(slice(192, 208), 1)),
        _Bits(slice(0, 128), 4, 64),
        _Bits(slice(128, 192), 2, 32),
        columns=16,
    ),
}
KINDS = tuple(_LAYOUTS)


@dataclass(frozen=True, eq=False)
class Tiles:
    """A packed matrix [rows, columns]."""

    kind: GgmlType  # one of KINDS
    rows: int
    columns: int
    data: Tensor  # uint8 [ceil(rows / 8), bytes of a tile]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.rows, self.columns


def repack(blocks: Tensor, kind: GgmlType) -> Tiles:
    """Blocks uint8 [rows, bytes of a row] of one of KINDS as tiles."""
    rows, row_bytes = blocks.shape
    data = blocks.new_empty(-(-rows // ROWS), ROWS * row_bytes)
    at_once = max(1, _AT_ONCE // data.shape[1])  # tiles
    for part, some in zip(data.split(at_once), blocks.split(at_once * ROWS)):
        padded = F.pad(some, (0, 0, 0, -len(some) % ROWS))
        part.copy_(_pack(padded, kind))
    columns = row_bytes // kind.block_bytes * kind.block_weights
    return Tiles(kind=kind, rows=rows, columns=columns, data=data)


def restore(tiles: Tiles) -> Tensor:
    """The blocks that were packed: uint8 [rows, bytes of a row]."""
    at_once = max(1, _AT_ONCE // tiles.data.shape[1])
    blocks = tiles.data.new_empty(len(tiles.data) * ROWS, tiles.data.shape[1] // ROWS)
    for part, some in zip(blocks.split(at_once * ROWS), tiles.data.split(at_once)):
        part.copy_(_unpack(some, tiles.kind))
    return blocks[: tiles.rows]


def restore_rows(tiles: Tiles, which: Tensor) -> Tensor:
    """The blocks of some rows: int64 [n] -> uint8 [n, bytes of a row]."""
    blocks = _unpack(tiles.data[which // ROWS], tiles.kind)
    return blocks.view(len(which), ROWS, -1)[torch.arange(len(which)), which % ROWS]


def _pack(rows: Tensor, kind: GgmlType) -> Tensor:
    """uint8 [8 n, bytes of a row] -> [n, bytes of a tile]."""
    layout = _LAYOUTS[kind.name]
    blocks = rows.view(len(rows) // ROWS, ROWS, -1, kind.block_bytes)  # [n, 8, b, bytes]
    n, _, b, _ = blocks.shape

    # 1. Copied fields, the 8 rows innermost: [n, 8, b, units, unit] -> [n, b, units * 8 * unit].
    parts = []
    for field in layout.scales:
        units = blocks[..., field.at].unflatten(-1, (-1, field.unit))
        parts.append(units.permute(0, 2, 3, 1, 4).flatten(2))

    # 2. The weights, chunk by chunk of columns: the vector of higher bits, then the others.
    low = _values(blocks, layout.low).view(n, ROWS, b, -1, layout.columns)
    if layout.low.bits == 8:
        pairs = low.view(n, ROWS, b, -1, 2).permute(0, 2, 3, 1, 4)  # [n, b, pairs, 8, 2]
        return torch.cat([*parts, pairs.flatten(2)], dim=-1).flatten(1)
    vectors = [_to_lanes(low.unflatten(-1, (-1, 4, 2)), _NIBBLES)]  # [n, b, chunks, 32 i]
    if layout.high:
        high = _values(blocks, layout.high).view(n, ROWS, b, -1, layout.columns)
        of_chunk = high.unflatten(-1, (1, -1, 2))  # one vector: (i, p) together
        bits = layout.high.bits
        starts = [start + bits * i for i in range(layout.columns // 8) for start in _HIGHER]
        vectors.insert(0, _to_lanes(of_chunk, starts))
    parts.append(torch.cat(vectors, dim=-1).flatten(2))
    return torch.cat(parts, dim=-1).flatten(1)


def _unpack(tiles: Tensor, kind: GgmlType) -> Tensor:
    """The reverse of `_pack`: uint8 [n, bytes of a tile] -> [8 n, bytes of a row]."""
    layout = _LAYOUTS[kind.name]
    n = len(tiles)
    tiles = tiles.view(n, -1, ROWS * kind.block_bytes)  # [n, b, bytes]
    b = tiles.shape[1]
    blocks = tiles.new_empty(n, ROWS, b, kind.block_bytes)

    # 1. Copied fields.
    at = 0
    for field in layout.scales:
        size = field.at.stop - field.at.start
        units = tiles[..., at : at + ROWS * size].reshape(n, b, -1, ROWS, field.unit)
        blocks[..., field.at] = units.permute(0, 3, 1, 2, 4).flatten(3)
        at += ROWS * size

    # 2. The weights.
    weights = tiles[..., at:]
    if layout.low.bits == 8:
        pairs = weights.reshape(n, b, -1, ROWS, 2)
        blocks[..., layout.low.at] = pairs.permute(0, 3, 1, 2, 4).flatten(3)
        return blocks.view(n * ROWS, -1)
    chunks = weights.reshape(n, b, kind.block_weights // layout.columns, -1)
    if layout.high:
        bits = layout.high.bits
        starts = [start + bits * i for i in range(layout.columns // 8) for start in _HIGHER]
        _store_values(blocks, layout.high, _from_lanes(chunks[..., :32], bits, starts))
        chunks = chunks[..., 32:]
    _store_values(blocks, layout.low, _from_lanes(chunks, 4, _NIBBLES))
    return blocks.view(n * ROWS, -1)


def _values(blocks: Tensor, field: _Bits) -> Tensor:
    """The values of a field, one a byte, in the order of columns: [n, 8, b, columns]."""
    data = blocks[..., field.at]
    if field.bits == 8:
        return data
    values = unpack(data.reshape(-1, data.shape[-1]), field.bits, field.run)
    return values.view(*blocks.shape[:3], -1)


def _store_values(blocks: Tensor, field: _Bits, values: Tensor) -> None:
    """The reverse of `_values`."""
    shifts = torch.arange(0, 8, field.bits, dtype=torch.uint8)[:, None]
    in_runs = values.reshape(*blocks.shape[:3], -1, len(shifts), field.run) << shifts
    blocks[..., field.at] = in_runs.sum(-2, dtype=torch.uint8).flatten(3)


def _to_lanes(values: Tensor, starts: Sequence[int]) -> Tensor:
    """Pairs of values in the lanes of vectors, as bytes.

    values  uint8 [n, 8, b, chunks, vectors, pairs, 2]; pair p begins at bit starts[p] of a lane
    Returns uint8 [n, b, chunks, 32 * vectors].
    """
    # One pair after another in int16: three times faster than all shifted at once in int32.
    lanes = torch.zeros(*values.shape[:-2], 2, dtype=torch.int16)
    for pair, start in enumerate(starts):
        lanes |= values[..., pair, :].to(torch.int16) << start
    lanes = lanes.permute(0, 2, 3, 4, 1, 5).contiguous()  # [n, b, chunks, vectors, 8, 2]
    return lanes.flatten(3).view(torch.uint8)


def _from_lanes(vectors: Tensor, bits: int, starts: Sequence[int]) -> Tensor:
    """The reverse of `_to_lanes`: uint8 [n, b, chunks, 32 * vectors] -> [n, 8, b, columns]."""
    shifts = torch.tensor(starts, dtype=torch.int32)[:, None]
    lanes = vectors.contiguous().view(torch.int16).int().unflatten(-1, (-1, ROWS, 1, 2))
    values = lanes >> shifts & (1 << bits) - 1  # [n, b, chunks, vectors, 8, pairs, 2]
    return values.to(torch.uint8).permute(0, 4, 1, 2, 3, 5, 6).flatten(3)
