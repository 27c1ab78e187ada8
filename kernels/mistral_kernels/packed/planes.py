"""Packed weights in the layout of the kernels: the bytes of ggml's blocks in another order.

A block is laid out for one thread: its fields are 2 to 128 bytes long and begin at any byte. A warp
of 32 threads loads best 512 consecutive bytes, 16 for each thread:

    matrix       [row blocks]: blocks of 8 rows; rows are padded to a multiple of 8, columns to a
                 multiple of 1,024, with zeros
    row block    [group 0][group 1] ... [tail]
    group        1,024 weights of each of the 8 rows, in pieces of 512 bytes:
                 [head][low bits ...][high bits ...]
    piece        [8 rows][4 quarters][16 bytes]: a quarter is 256 weights of the group
    tail         the rows' guards, fp32 [8], zero-padded to a multiple of 128 bytes; for Q6_K its d
                 come first, fp16 [groups][8 rows][4 quarters]

            a quarter's 16 bytes of head             low bits, pieces    high bits, pieces
    Q4_0    d of its 8 blocks, fp16                  4         8         -
    Q4_K    d, dmin and 12 bytes of scales           4         8         -
    Q5_K    the same                                 4         8         1          2
    Q6_K    its 16 scales, signed bytes              4         8         2          4
    Q8_0    d of its 8 blocks, fp16                  8         16        -

Sixteen bytes of low bits are 8 little-endian words of 16 bits. Nibble i of word c is weight 8 i + c
of the 32 that a quarter has in this piece; so the weights of nibble i are 8 neighbours, and so are
their inputs. For Q8_0, byte i of word c is weight 8 i + c of 16; its sign bit is inverted, so that
the value counts up from -128. High bits are stored at places from where one shift moves them next
to their nibble: `HIGH_BITS`.

The guard is a power of two by which a kernel multiplies the scales of a row, so that they fit fp16
(see `_guards`). Guards and padding are all that is added: 128 bytes for 8 rows, 0.7% for 4,096
columns of 4 bits. All other bits are the blocks' own, and `restore` returns the blocks.

Sources: the block formats are drawn in mistral/quantization/dequantize.py; tile.py explains this
order.
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
_QUARTER = 256  # weights of a row in a quarter
_AT_ONCE = 1 << 22  # weights to repack at a time: it needs little memory besides the matrix

# A piece of high bits serves 4 (Q5_K) or 2 (Q6_K) pieces of nibbles: one row here for each of these
# pieces, with the bit of a word at which the high bits of nibble i begin.
HIGH_BITS = {
    "Q5_K": ((4, 8, 5, 9), (6, 10, 7, 11), (0, 12, 1, 13), (2, 14, 3, 15)),
    "Q6_K": ((4, 8, 10, 14), (2, 6, 0, 12)),
}


class _Bits(NamedTuple):
    """A field of 256 values in the bytes of a quarter, and the words that it is packed into."""

    at: slice
    bits: int  # of a value
    run: int  # of bytes, as in `unpack`
    pieces: int  # of 8 words
    shifts: tuple[int, ...]  # at which bit of a word each of its values begins
    flip: int = 0  # bits to invert


class _Fields(NamedTuple):
    """The fields in the bytes of a quarter.

    Those of one block of 256 weights, or of 8 small ones with their d's first (`_scales_first`).
    """

    head: slice
    scales: slice  # the fp16 values
    reach: tuple[float, ...]  # the largest factor of each of them in a kernel, except the guard
    low: _Bits
    high: _Bits | None = None
    d: slice | None = None  # if it is not in the head

    @property
    def pieces(self) -> int:
        """How many make a group, the head included."""
        return 1 + self.low.pieces + (self.high.pieces if self.high else 0)


_NIBBLES = (0, 4, 8, 12)
_BYTES = (0, 8)
# A kernel reads the bits of a value as fp16, 2^-24 of it, and multiplies the scale by 2^24.
_UP = 2.0**24
_FIELDS = {
    "Q4_0": _Fields(
        head=slice(0, 16),
        scales=slice(0, 16),
        reach=(_UP,) * 8,
        low=_Bits(slice(16, 144), bits=4, run=16, pieces=8, shifts=_NIBBLES),
    ),
    "Q4_K": _Fields(
        head=slice(0, 16),
        scales=slice(0, 4),
        reach=(63 * _UP, 63),
        low=_Bits(slice(16, 144), bits=4, run=32, pieces=8, shifts=_NIBBLES),
    ),
    "Q5_K": _Fields(
        head=slice(0, 16),
        scales=slice(0, 4),
        reach=(63 * _UP, 63),
        low=_Bits(slice(48, 176), bits=4, run=32, pieces=8, shifts=_NIBBLES),
        high=_Bits(slice(16, 48), bits=1, run=32, pieces=2, shifts=sum(HIGH_BITS["Q5_K"], ())),
    ),
    "Q6_K": _Fields(
        head=slice(192, 208),
        scales=slice(208, 210),
        reach=(128 * _UP,),
        low=_Bits(slice(0, 128), bits=4, run=64, pieces=8, shifts=_NIBBLES),
        high=_Bits(slice(128, 192), bits=2, run=32, pieces=4, shifts=sum(HIGH_BITS["Q6_K"], ())),
        d=slice(208, 210),
    ),
    "Q8_0": _Fields(
        head=slice(0, 16),
        scales=slice(0, 16),
        reach=(_UP,) * 8,
        low=_Bits(slice(16, 272), bits=8, run=256, pieces=16, shifts=_BYTES, flip=128),
    ),
}
FAST_KINDS = tuple(_FIELDS)


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


def repack(blocks: Tensor, kind: GgmlType) -> Planes:
    """Blocks, uint8 [rows, bytes of a row], to planes on the same device.

    They are repacked a few megabytes at a time, so little memory is needed besides the planes.

    Raises ValueError for a type that has no planes, and for bytes that are not whole blocks.
    """
    if kind.name not in FAST_KINDS:
        raise ValueError(f"{kind.name} has no planes; {', '.join(FAST_KINDS)} have")
    rows, row_bytes = blocks.shape
    if row_bytes == 0 or row_bytes % kind.block_bytes:
        raise ValueError(
            f"a row of {row_bytes} bytes does not consist of whole {kind.name} blocks of "
            f"{kind.block_bytes}"
        )
    columns = row_bytes // kind.block_bytes * kind.block_weights
    data = blocks.new_empty(-(-rows // ROWS), row_block_bytes(kind, columns))
    planes = Planes(kind, rows, columns, data)
    missing_bytes = _groups(columns) * 4 * _quarter_bytes(kind) - row_bytes
    for part in _parts(planes):
        some = blocks[part.start * ROWS : part.stop * ROWS]
        missing_rows = (part.stop - part.start) * ROWS - len(some)
        planes.data[part] = _pack(F.pad(some, (0, missing_bytes, 0, missing_rows)), kind)
    return planes


def restore(planes: Planes) -> Tensor:
    """The blocks that `repack` was given: uint8 [rows, bytes of a row]."""
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
    """A matrix as float32 [rows, columns], packed or not, or several stacked."""
    if isinstance(weight, tuple):
        return torch.cat([dense(part) for part in weight])
    if isinstance(weight, Planes):
        return dequantize(restore(weight), weight.kind)
    return weight.float()


def fits(planes: Planes) -> bool:
    """Whether the kernels compute what the reference computes; synchronizes.

    They do not if a scale is infinite or NaN: then the reference has infinities and NaN, and the
    kernels only NaN.
    """
    return bool(planes.guards.isfinite().all())


def _groups(columns: int) -> int:
    return -(-columns // GROUP)


def _body_bytes(kind: GgmlType, columns: int) -> int:
    """Bytes of a row block before its tail."""
    return _groups(columns) * _FIELDS[kind.name].pieces * ROWS * 64


def _d_bytes(kind: GgmlType, columns: int) -> int:
    return _groups(columns) * ROWS * 8 if _FIELDS[kind.name].d else 0


def _quarter_bytes(kind: GgmlType) -> int:
    """Bytes of the blocks of 256 weights."""
    return _QUARTER // kind.block_weights * kind.block_bytes


def _parts(planes: Planes) -> Iterator[slice]:
    """Slices of row blocks, of about `_AT_ONCE` weights each, that together are all of them."""
    step = max(1, _AT_ONCE // (ROWS * planes.columns))
    return (
        slice(start, min(start + step, len(planes.data)))
        for start in range(0, len(planes.data), step)
    )


def _pack(rows: Tensor, kind: GgmlType) -> Tensor:
    """Blocks to planes.

    uint8 [row blocks * 8, bytes of a row] -> [row blocks, bytes of a row block]

    In the shapes: R row blocks, Q quarters of a row, P pieces of a group.
    """
    fields = _FIELDS[kind.name]
    R = len(rows) // ROWS

    # 1. One line for each quarter, with the scales of small blocks first: [R * 8 * Q, bytes].
    quarters = _scales_first(rows.reshape(-1, _quarter_bytes(kind)), kind)

    # 2. Each line as the 16 bytes that it has in every piece: head, low bits, high bits.
    pieces = [quarters[:, None, fields.head]]  # [R * 8 * Q, 1, 16]
    for field in filter(None, (fields.low, fields.high)):
        values = unpack(quarters[:, field.at], field.bits, field.run)  # [R * 8 * Q, 256]
        pieces.append(_to_words(values, field))  # [R * 8 * Q, pieces of the field, 16]
    body = torch.cat(pieces, dim=1).view(R, ROWS, -1, 4, fields.pieces, 16)

    # 3. (row block, row, group, quarter, piece, byte) -> (row block, group, piece, row, quarter,
    # byte): a piece is consecutive.
    parts = [body.permute(0, 2, 4, 1, 3, 5).flatten(1)]

    # 4. The tail: Q6_K's d, [R, 8, groups, 4 quarters * 2 bytes] with groups first; the guards.
    if fields.d:
        d = quarters[:, fields.d].reshape(R, ROWS, -1, 8)
        parts.append(d.transpose(1, 2).flatten(1))
    guards = _guards(quarters, fields, len(rows))
    parts.append(guards.view(R, ROWS).view(torch.uint8))

    # 5. Padding, so that the next row block begins at a multiple of 128 bytes.
    packed = torch.cat(parts, dim=1)
    return F.pad(packed, (0, -packed.shape[1] % 128))


def _unpack(packed: Tensor, kind: GgmlType, columns: int) -> Tensor:
    """The reverse of `_pack`: planes to blocks."""
    fields = _FIELDS[kind.name]
    groups = _groups(columns)
    size = _body_bytes(kind, columns)
    body = packed[:, :size]
    tail = packed[:, size:]

    # 1. (row block, group, piece, row, quarter, byte) -> one line for each quarter, [., P, 16].
    body = body.view(-1, groups, fields.pieces, ROWS, 4, 16)
    body = body.permute(0, 3, 1, 4, 2, 5).reshape(-1, fields.pieces, 16)

    # 2. Each line's fields, back where the blocks have them.
    quarters = packed.new_empty(len(body), _quarter_bytes(kind))
    quarters[:, fields.head] = body[:, 0]
    at = 1  # after the head
    for field in filter(None, (fields.low, fields.high)):
        quarters[:, field.at] = _fold(_from_words(body[:, at : at + field.pieces], field), field)
        at += field.pieces
    if fields.d:
        d = tail[:, : _d_bytes(kind, columns)].reshape(-1, groups, ROWS, 8).transpose(1, 2)
        quarters[:, fields.d] = d.reshape(-1, 2)
    return _scales_back(quarters, kind).view(len(packed) * ROWS, -1)


def _scales_first(quarters: Tensor, kind: GgmlType) -> Tensor:
    """8 small blocks with all their d first: [d 2 | q] * 8 -> [d 16 | q * 8].

    A large block is returned as it is.
    """
    if kind.block_weights == _QUARTER:
        return quarters
    small = quarters.view(len(quarters), 8, -1)
    return torch.cat((small[:, :, :2].flatten(1), small[:, :, 2:].flatten(1)), dim=1)


def _scales_back(quarters: Tensor, kind: GgmlType) -> Tensor:
    """The reverse of `_scales_first`."""
    if kind.block_weights == _QUARTER:
        return quarters
    d = quarters[:, :16].view(-1, 8, 2)
    q = quarters[:, 16:].view(len(quarters), 8, -1)
    return torch.cat((d, q), dim=2).flatten(1)


def _to_words(values: Tensor, field: _Bits) -> Tensor:
    """The 256 values of each quarter, uint8 [n, 256] -> 16-bit words as bytes [n, pieces, 16]."""
    shifts = torch.tensor(field.shifts, dtype=torch.int32, device=values.device)[:, None]
    values = values ^ field.flip
    values = values.view(len(values), field.pieces, -1, 8).int()  # [n, pieces, values per word, 8]
    return (values << shifts).sum(2, dtype=torch.int32).to(torch.int16).view(torch.uint8)


def _from_words(pieces: Tensor, field: _Bits) -> Tensor:
    """The reverse of `_to_words`."""
    shifts = torch.tensor(field.shifts, dtype=torch.int32, device=pieces.device)[:, None]
    words = pieces.contiguous().view(torch.int16).int()[:, :, None]  # [n, pieces, 1, 8]
    values = (words >> shifts & (1 << field.bits) - 1).to(torch.uint8)
    return values.flatten(1) ^ field.flip


def _fold(values: Tensor, field: _Bits) -> Tensor:
    """The reverse of `unpack`: uint8 [n, 256] -> [n, bytes]."""
    shifts = torch.arange(0, 8, field.bits, dtype=torch.uint8, device=values.device)[:, None]
    parts = values.view(len(values), -1, len(shifts), field.run) << shifts
    return parts.sum(2, dtype=torch.uint8).flatten(1)


def _guards(quarters: Tensor, fields: _Fields, rows: int) -> Tensor:
    """Each row's guard, fp32 [rows]; NaN if a scale is not finite.

    The guard is the power of two that moves the largest product of a scale in a kernel to between
    2^14 and 2^15, below fp16's limit of 65504.
    """
    scales = quarters[:, fields.scales].contiguous().view(torch.float16).float()
    most = (scales.abs() * torch.tensor(fields.reach, device=scales.device)).view(rows, -1).amax(-1)
    exponent = torch.frexp(most).exponent  # most < 2^exponent
    # 2^(15 - exponent) from its bits, so that it is exact on any device
    guards = (127 + 15 - exponent << 23).view(torch.float32)
    return torch.where(most.isfinite(), guards, torch.nan)
