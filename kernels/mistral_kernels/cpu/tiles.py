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
    two bits  2 vectors: bits 2j and 2j + 1 of a lane of vector i are column 16i + 2j (+ 1)
    third     1 vector: bit 2j + 2 + i (of 16: 16 and 17 are 0 and 1) is the third bit of the pair
              (i, j) of `two bits`: a shift by i puts it above its two bits

                of 32 columns (with a K, and IQ4_XS: of 256)            bytes, as in the file
    Q4_0        d, nibbles                                              144
    Q4_1        d, m, nibbles                                           160
    Q5_0        d, fifth, nibbles                                       176
    Q5_1        d, m, fifth, nibbles                                    192
    Q8_0        d, bytes                                                272
    Q2_K        d, dmin, the 16 bytes of scales, 8 x two bits           672
    Q3_K        d, the 12 bytes of scales, 8 x (third, two bits)        880
    Q4_K        d, dmin, the 12 bytes of scales, 8 x nibbles            1152
    Q5_K        d, dmin, the 12 bytes of scales, 8 x (fifth, nibbles)   1408
    Q6_K        d, 16 scales, 16 x (sixth, 2 vectors of nibbles)        1680
    IQ4_NL      d, nibbles                                              144
    IQ4_XS      d, the 6 bytes of scales, 8 x nibbles                   1088

Every field is in the order of the file (blocks.py) with the 8 rows innermost. All is exact:
`restore` returns the blocks. Rows are padded to a multiple of 8 with zeros.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral.quantization.ggml_types import GgmlType
from mistral_kernels.cpu import compiled
from mistral_kernels.cpu.blocks import FORMS, Bits
from mistral_kernels.cpu.pool import share

KINDS = tuple(FORMS)
ROWS = 8  # of a tile
_AT_ONCE = 1 << 18  # bytes to restore at a time: the memory besides stays small


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


def tiles_shape(blocks: Tensor) -> tuple[int, int]:
    """(tiles, bytes of a tile) of blocks uint8 [rows, bytes of a row]."""
    rows, row_bytes = blocks.shape
    return -(-rows // ROWS), ROWS * row_bytes


def repack(blocks: Tensor, kind: GgmlType, data: Tensor | None = None) -> Tiles:
    """Blocks uint8 [rows, bytes of a row] of one of KINDS as tiles.

    data  where they are written: uint8 of `tiles_shape`; None: to new memory
    """
    rows, row_bytes = blocks.shape
    fill = compiled.function(f"tiles of {kind.name}")
    if data is None:
        data = blocks.new_empty(tiles_shape(blocks))
    whole = rows // ROWS
    source = blocks.contiguous()
    at = source.data_ptr(), row_bytes, data.data_ptr()
    share(lambda first, last: fill(*at, first, last), whole)
    if rows % ROWS:
        last = F.pad(source[whole * ROWS :], (0, 0, 0, -rows % ROWS))
        fill(last.data_ptr(), row_bytes, data[whole].data_ptr(), 0, 1)
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


def _unpack(tiles: Tensor, kind: GgmlType) -> Tensor:
    """The reverse of packing.py: uint8 [n, bytes of a tile] -> [8 n, bytes of a row]."""
    form = FORMS[kind.name]
    n = len(tiles)
    tiles = tiles.view(n, -1, ROWS * form.bytes)  # [n, b, bytes]
    b = tiles.shape[1]
    blocks = tiles.new_empty(n, ROWS, b, form.bytes)

    # 1. Copied fields.
    at = 0
    for field in form.copied:
        size = field.count * field.unit
        units = tiles[..., at : at + ROWS * size].reshape(n, b, field.count, ROWS, field.unit)
        blocks[..., field.at : field.at + size] = units.permute(0, 3, 1, 2, 4).flatten(3)
        at += ROWS * size

    # 2. The weights, chunk by chunk of columns: the vector of higher bits, then the others.
    if form.low is None:
        return blocks.view(n * ROWS, -1)
    low = form.low.bits
    starts = range(0, 16, low)
    chunks = tiles[..., at:].reshape(n, b, form.weights // form.columns, -1)
    if form.high:
        bits = form.high.bits
        vectors = form.columns * low // 32
        above = [(start + low) % 16 + bits * i for i in range(vectors) for start in starts]
        _store_values(blocks, form.high, _from_lanes(chunks[..., :32], bits, above))
        chunks = chunks[..., 32:]
    _store_values(blocks, form.low, _from_lanes(chunks, low, starts))
    return blocks.view(n * ROWS, -1)


def _store_values(blocks: Tensor, field: Bits, values: Tensor) -> None:
    """Write values, one a byte in the order of columns [n, 8, b, columns], to their bits."""
    shifts = torch.arange(0, 8, field.bits, dtype=torch.uint8)[:, None]
    in_runs = values.reshape(*blocks.shape[:3], -1, len(shifts), field.run) << shifts
    written = in_runs.sum(-2, dtype=torch.uint8).flatten(3)
    blocks[..., field.at : field.at + field.bytes] = written


def _from_lanes(vectors: Tensor, bits: int, starts: Iterable[int]) -> Tensor:
    """The values in the lanes of vectors; pair p begins at bit starts[p] of a lane.

    uint8 [n, b, chunks, 32 * vectors] -> [n, 8, b, columns], one a byte.
    """
    shifts = torch.tensor(list(starts), dtype=torch.int32)[:, None]
    lanes = vectors.contiguous().view(torch.int16).int().unflatten(-1, (-1, ROWS, 1, 2))
    values = lanes >> shifts & (1 << bits) - 1  # [n, b, chunks, vectors, 8, pairs, 2]
    return values.to(torch.uint8).permute(0, 4, 1, 2, 3, 5, 6).flatten(3)
