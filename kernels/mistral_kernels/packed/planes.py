"""Packed weights as the kernels read them: the bytes of ggml's blocks, in another order.

A block is made to be read by one thread: its fields are 2 to 128 bytes long and begin at any byte.
A warp of 32 threads wants 512 consecutive bytes, 16 for each, and finds them here:

    matrix       [blocks of 8 rows]; rows are filled up to a multiple of 8, columns to one of 1,024,
                 with zeros
    row block    [group 0][group 1] ... [tail]
    group        1,024 weights of each of the 8 rows, in pieces of 512 bytes:  [head][low bits
                 ...][high bits ...]
    piece        [8 rows][4 quarters][16 bytes]: a quarter is 256 weights of the group
    tail         the rows' guards, fp32 [8], and zeros up to a multiple of 128 bytes; for Q6_K its d
                 come first, fp16 [groups][8 rows][4 quarters]

              16 bytes of head, for a quarter                 low bits   in pieces   high bits   in
                                                              pieces
    Q4_0      d of its 8 blocks, fp16                         4          8           -
    Q4_K      d, dmin and 12 bytes of scales, as they were    4          8           -
    Q5_K      the same                                        4          8           1           2
    Q6_K      its 16 scales, signed bytes                     4          8           2           4
    Q8_0      d of its 8 blocks, fp16                         8          16          -

Sixteen bytes of low bits are 8 little-endian words of 16 bits. Nibble i of word c is weight 8 i + c
of the 32 that a quarter has in this piece. Of Q8_0, byte i of word c is weight 8 i + c of 16; its
sign bit is turned over, so that it counts up from -128. So the weights that go with nibble i are 8
neighbours, and so are their inputs. High bits lie where a shift brings them beside their nibble:
`HIGH_BITS`.

The guard is a power of two that a kernel multiplies the scales of a row by, so that they fit fp16
(see `_guards`). Guards and zeros are all that is added: 128 bytes for 8 rows, 0.7% for 4,096
columns of 4 bits. Everything else is the blocks' own bits, and `restore` gives them back.

Sources: the blocks are drawn in mistral/quantization/dequantize.py; why the order is this one, in
packed_tile.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral.quantization.dequantize import dequantize, unpack
from mistral.quantization.ggml_types import GgmlType

ROWS = 8  # of a row block
GROUP = 1024  # weights of a row in a group
QUARTER = 256  # weights of a row in a quarter
_AT_ONCE = 1 << 22  # weights to move at a time, so that little memory is needed beside the matrix

# A piece of high bits serves 4 (Q5_K) or 2 (Q6_K) pieces of nibbles: one row here for each of
# those, and in it the bit of a word at which the high bits of nibble i begin.
HIGH_BITS = {
    "Q5_K": ((4, 8, 5, 9), (6, 10, 7, 11), (0, 12, 1, 13), (2, 14, 3, 15)),
    "Q6_K": ((4, 8, 10, 14), (2, 6, 0, 12)),
}


class Bits(NamedTuple):
    """A field of 256 numbers: where it is in the bytes of a quarter, and the words that it
    becomes.
    """

    at: slice
    bits: int  # of a number
    run: int  # of bytes, as in `unpack`
    pieces: int  # of 8 words
    shifts: tuple[int, ...]  # at which bit of a word each of its numbers begins
    flip: int = 0  # bits to turn over


class Fields(NamedTuple):
    """What the bytes of 256 weights are: those of a block, or of 8 small ones with their d's ahead
    of the rest.
    """

    head: slice
    scales: slice  # the fp16 numbers
    reach: tuple[float, ...]  # the most that a kernel multiplies each of them by, guard aside
    low: Bits
    high: Bits | None = None
    d: slice | None = None  # where it is no part of the head

    @property
    def pieces(self) -> int:
        """How many make a group, the head included."""
        return 1 + self.low.pieces + (self.high.pieces if self.high else 0)


_NIBBLES, _BYTES = (0, 4, 8, 12), (0, 8)
# A kernel reads the bits of a number as fp16, which makes 2^-24 of it, and multiplies the scale by
# this in return.
_UP = 2.0**24
FIELDS = {
    "Q4_0": Fields(
        slice(0, 16), slice(0, 16), (_UP,) * 8, Bits(slice(16, 144), 4, 16, 8, _NIBBLES),
    ),
    "Q4_K": Fields(
        slice(0, 16), slice(0, 4), (63 * _UP, 63), Bits(slice(16, 144), 4, 32, 8, _NIBBLES),
    ),
    "Q5_K": Fields(
        slice(0, 16), slice(0, 4), (63 * _UP, 63), Bits(slice(48, 176), 4, 32, 8, _NIBBLES),
        high=Bits(slice(16, 48), 1, 32, 2, sum(HIGH_BITS["Q5_K"], ())),
    ),
    "Q6_K": Fields(
        slice(192, 208), slice(208, 210), (128 * _UP,), Bits(slice(0, 128), 4, 64, 8, _NIBBLES),
        high=Bits(slice(128, 192), 2, 32, 4, sum(HIGH_BITS["Q6_K"], ())), d=slice(208, 210),
    ),
    "Q8_0": Fields(
        slice(0, 16), slice(0, 16), (_UP,) * 8, Bits(slice(16, 272), 8, 256, 16, _BYTES, flip=128),
    ),
}  # fmt: skip
FAST_KINDS = tuple(FIELDS)


@dataclass(frozen=True, eq=False)
class Planes:
    """A packed matrix [rows, columns]."""

    kind: GgmlType  # one of FAST_KINDS
    rows: int
    columns: int
    data: Tensor  # uint8 [ceil(rows / 8), bytes of a row block]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.rows, self.columns

    @property
    def guards(self) -> Tensor:
        """fp32 [row blocks, 8]; NaN for a row with an infinite or NaN scale."""
        start = _body_bytes(self.kind, self.columns) + _d_bytes(self.kind, self.columns)
        return self.data[:, start : start + 4 * ROWS].contiguous().view(torch.float32)


def row_block_bytes(kind: GgmlType, columns: int) -> int:
    """How many bytes 8 rows take."""
    tail = _d_bytes(kind, columns) + 4 * ROWS
    return _body_bytes(kind, columns) + -(-tail // 128) * 128


def repack(blocks: Tensor, kind: GgmlType, device: torch.device | str | None = None) -> Planes:
    """Blocks, uint8 [rows, bytes of a row], to planes on `device` (None: where the blocks are).

    A few megabytes at a time go there and are put in order there, so `blocks` may be a mapped file
    of any size.

    Raises ValueError for a kind that has no planes, and for bytes that are not whole blocks.
    """
    if kind.name not in FAST_KINDS:
        raise ValueError(f"{kind.name} has no planes; {', '.join(FAST_KINDS)} have")
    rows, row_bytes = blocks.shape
    if row_bytes == 0 or row_bytes % kind.block_bytes:
        raise ValueError(
            f"a row of {row_bytes} bytes is no whole number of {kind.name} blocks of "
            f"{kind.block_bytes}"
        )
    columns = row_bytes // kind.block_bytes * kind.block_weights
    device = blocks.device if device is None else torch.device(device)
    size = -(-rows // ROWS), row_block_bytes(kind, columns)
    planes = Planes(kind, rows, columns, torch.empty(size, dtype=torch.uint8, device=device))
    full_row_bytes = _groups(columns) * 4 * _quarter_bytes(kind)
    for part in _parts(planes):
        some = blocks[part.start * ROWS : part.stop * ROWS].to(device)
        missing_rows = (part.stop - part.start) * ROWS - len(some)
        planes.data[part] = _pack(
            F.pad(some, (0, full_row_bytes - row_bytes, 0, missing_rows)), kind
        )
    return planes


def restore(planes: Planes) -> Tensor:
    """The blocks, uint8 [rows, bytes of a row], as they were."""
    row_bytes = planes.columns // planes.kind.block_weights * planes.kind.block_bytes
    blocks = planes.data.new_empty(len(planes.data) * ROWS, row_bytes)
    for part in _parts(planes):
        rows = _unpack(planes.data[part], planes.kind, planes.columns)
        blocks[part.start * ROWS : part.stop * ROWS] = rows[:, :row_bytes]
    return blocks[: planes.rows]


def restore_rows(planes: Planes, rows: Tensor) -> Tensor:
    """The blocks of some rows: int64 [n] -> uint8 [n, bytes of a row]."""
    around = Planes(planes.kind, ROWS * len(rows), planes.columns, planes.data[rows // ROWS])
    return restore(around)[torch.arange(len(rows), device=rows.device) * ROWS + rows % ROWS]


def dense(weight: Tensor | Planes | tuple[Planes, ...]) -> Tensor:
    """A matrix as float32 [rows, columns], packed or not, or several above each other."""
    if isinstance(weight, tuple):
        return torch.cat([dense(part) for part in weight])
    return (
        dequantize(restore(weight), weight.kind) if isinstance(weight, Planes) else weight.float()
    )


def fits(planes: Planes) -> bool:
    """Whether the kernels give what the reference gives; waits for the device.

    They do not where a scale is infinite or NaN: there the reference has infinities and NaN, the
    kernels NaN alone.
    """
    return bool(planes.guards.isfinite().all())


def _groups(columns: int) -> int:
    return -(-columns // GROUP)


def _body_bytes(kind: GgmlType, columns: int) -> int:
    """Bytes of a row block ahead of its tail."""
    return _groups(columns) * FIELDS[kind.name].pieces * ROWS * 64


def _d_bytes(kind: GgmlType, columns: int) -> int:
    return _groups(columns) * ROWS * 8 if FIELDS[kind.name].d else 0


def _quarter_bytes(kind: GgmlType) -> int:
    """Bytes of the blocks that 256 weights take."""
    return QUARTER // kind.block_weights * kind.block_bytes


def _parts(planes: Planes) -> Iterator[slice]:
    """Slices of row blocks, of about `_AT_ONCE` weights each, that together are all of them."""
    step = max(1, _AT_ONCE // (ROWS * planes.columns))
    return (
        slice(start, min(start + step, len(planes.data)))
        for start in range(0, len(planes.data), step)
    )


def _pack(rows: Tensor, kind: GgmlType) -> Tensor:
    """uint8 [row blocks * 8, bytes of a row] -> [row blocks, bytes of a row block]."""
    fields = FIELDS[kind.name]
    quarters = _scales_first(
        rows.reshape(-1, _quarter_bytes(kind)), kind
    )  # [rows * quarters of a row, bytes]
    pieces = [quarters[:, None, fields.head]]
    for field in filter(None, (fields.low, fields.high)):
        pieces.append(_to_words(unpack(quarters[:, field.at], field.bits, field.run), field))
    body = torch.cat(pieces, dim=1).view(len(rows) // ROWS, ROWS, -1, 4, fields.pieces, 16)
    parts = [
        body.permute(0, 2, 4, 1, 3, 5).flatten(1)
    ]  # row block, group, piece, row, quarter, byte
    if fields.d:
        parts.append(
            quarters[:, fields.d].reshape(len(body), ROWS, -1, 8).transpose(1, 2).flatten(1)
        )
    parts.append(_guards(quarters, fields, len(rows)).view(len(body), ROWS).view(torch.uint8))
    packed = torch.cat(parts, dim=1)
    return F.pad(packed, (0, -packed.shape[1] % 128))


def _unpack(packed: Tensor, kind: GgmlType, columns: int) -> Tensor:
    """What `_pack` was given."""
    fields, groups, size = FIELDS[kind.name], _groups(columns), _body_bytes(kind, columns)
    body, tail = packed[:, :size], packed[:, size:]
    body = (
        body.view(-1, groups, fields.pieces, ROWS, 4, 16)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(-1, fields.pieces, 16)
    )
    quarters = packed.new_empty(len(body), _quarter_bytes(kind))
    quarters[:, fields.head] = body[:, 0]
    at = 1  # behind the head
    for field in filter(None, (fields.low, fields.high)):
        quarters[:, field.at] = _fold(_from_words(body[:, at : at + field.pieces], field), field)
        at += field.pieces
    if fields.d:
        d = tail[:, : _d_bytes(kind, columns)].reshape(-1, groups, ROWS, 8).transpose(1, 2)
        quarters[:, fields.d] = d.reshape(-1, 2)
    return _scales_back(quarters, kind).view(len(packed) * ROWS, -1)


def _scales_first(quarters: Tensor, kind: GgmlType) -> Tensor:
    """Small blocks with the d's of all 8 first, [d 2 | q] * 8 -> [d 16 | q * 8]; large ones as they
    are.
    """
    if kind.block_weights == QUARTER:
        return quarters
    small = quarters.view(len(quarters), 8, -1)
    return torch.cat((small[:, :, :2].flatten(1), small[:, :, 2:].flatten(1)), dim=1)


def _scales_back(quarters: Tensor, kind: GgmlType) -> Tensor:
    """The reverse of `_scales_first`."""
    if kind.block_weights == QUARTER:
        return quarters
    d, q = quarters[:, :16].view(-1, 8, 2), quarters[:, 16:].view(len(quarters), 8, -1)
    return torch.cat((d, q), dim=2).flatten(1)


def _to_words(numbers: Tensor, field: Bits) -> Tensor:
    """The 256 numbers of each quarter, uint8 [n, 256] -> 16-bit words as bytes [n, pieces, 16]."""
    shifts = torch.tensor(field.shifts, dtype=torch.int32, device=numbers.device)[:, None]
    numbers = numbers ^ field.flip
    numbers = numbers.view(
        len(numbers), field.pieces, -1, 8
    ).int()  # [n, pieces, numbers of a word, words]
    return (numbers << shifts).sum(2, dtype=torch.int32).to(torch.int16).view(torch.uint8)


def _from_words(pieces: Tensor, field: Bits) -> Tensor:
    """The reverse of `_to_words`."""
    shifts = torch.tensor(field.shifts, dtype=torch.int32, device=pieces.device)[:, None]
    words = pieces.contiguous().view(torch.int16).int()[:, :, None]  # [n, pieces, 1, words]
    numbers = (words >> shifts & (1 << field.bits) - 1).to(torch.uint8)
    return numbers.flatten(1) ^ field.flip


def _fold(numbers: Tensor, field: Bits) -> Tensor:
    """The reverse of `unpack`: uint8 [n, 256] -> [n, bytes]."""
    shifts = torch.arange(0, 8, field.bits, dtype=torch.uint8, device=numbers.device)[:, None]
    parts = numbers.view(len(numbers), -1, len(shifts), field.run) << shifts
    return parts.sum(2, dtype=torch.uint8).flatten(1)


def _guards(quarters: Tensor, fields: Fields, rows: int) -> Tensor:
    """The power of two for each row that brings the most its scales can become to 2^14 ..

    2^15: fp32 [rows].
    """
    scales = quarters[:, fields.scales].contiguous().view(torch.float16).float()
    most = (scales.abs() * torch.tensor(fields.reach, device=scales.device)).view(rows, -1).amax(-1)
    exponent = torch.frexp(most).exponent  # most < 2^exponent
    guards = (127 + 15 - exponent << 23).view(
        torch.float32
    )  # 2^(15 - exponent), by its bits: exact on any device
    return torch.where(most.isfinite(), guards, torch.nan)
