"""Blocks become tiles (tiles.py), compiled: at a start each byte of a file is moved once.

The values of 8 columns of a row are spread over the bytes of an int64 first. A lane of a tile takes
every other one of them: those of even columns make one lane, those of odd columns the next.
"""

from collections.abc import Callable

import numpy as np

from mistral_kernels.cpu.blocks import FORMS, Bits, Form
from mistral_kernels.cpu.compiler import part
from mistral_kernels.cpu.lanes import (
    byte_at,
    short_at,
    store_byte,
    store_int,
    store_short,
    unaligned_long_at,
)

_EACH_BYTE = 0x0101010101010101


def tiles_of(kind: str) -> Callable:
    """The kernel that fills tiles `first` to `last` from rows of so many bytes, both addresses."""
    block_bytes = FORMS[kind].bytes
    copy = _copied_fields(FORMS[kind])
    spread = _weights(FORMS[kind])

    def fill(rows, row_bytes, tiles, first, last):
        for t in range(first, last):
            for b in range(0, row_bytes, block_bytes):
                block = rows + 8 * row_bytes * t + b
                to = tiles + 8 * (row_bytes * t + b)
                to = copy(block, row_bytes, to)
                spread(block, row_bytes, to)

    return fill


def _copied_fields(form: Form) -> Callable:
    """Copies fields, the 8 rows innermost; returns the address after them."""
    fields = tuple(map(tuple, form.copied))

    @part
    def copy(block, row_bytes, to):
        for at, count, unit in fields:
            for place in range(at, at + count * unit, unit):
                for r in range(8):
                    value = block + row_bytes * r + place
                    if unit == 2:
                        store_short(to, short_at(value))
                    else:
                        store_byte(to, byte_at(value))
                    to += unit
        return to

    return copy


def _weights(form: Form) -> Callable:
    """Writes the vectors of higher and of low bits of a block, a chunk of columns at a time."""
    if form.low is None:
        return part(lambda block, row_bytes, to: None)
    weights, columns, apart = form.weights, form.columns, form.low.bits
    wide = 32 // apart  # columns of a vector
    low = _lanes(form.low, apart)
    has_high = form.high is not None
    high = _lanes(form.high, apart) if has_high else low
    bits = form.high.bits if has_high else 0

    @part
    def write(block, row_bytes, to):
        for first in range(0, weights, columns):
            if has_high:
                for r in range(8):
                    even = odd = 0
                    for i in range(columns // wide):
                        lanes = high(block + row_bytes * r, first + wide * i)
                        even |= _rotated(lanes[0], apart) << bits * i
                        odd |= _rotated(lanes[1], apart) << bits * i
                    store_int(to + 4 * r, np.int32(even | odd << 16))
                to += 32
            for c in range(first, first + columns, wide):
                for r in range(8):
                    even, odd = low(block + row_bytes * r, c)
                    store_int(to + 4 * r, np.int32(even | odd << 16))
                to += 32

    return write


def _lanes(field: Bits, apart: int) -> Callable:
    """A function of a block's address and a column: the lanes of even columns and of odd ones.

    Their values begin every `apart` bits, 4 or 2, so a lane has 4 or 8 of them.
    """
    values = _eight_columns(field)

    @part
    def of_eight(block, column):
        eight = values(block, column)
        return _lane(eight), _lane(eight >> 8)

    @part
    def of_sixteen(block, column):
        first = values(block, column)
        second = values(block, column + 8)
        even = _closer(_lane(first)) | _closer(_lane(second)) << 8
        odd = _closer(_lane(first >> 8)) | _closer(_lane(second >> 8)) << 8
        return even, odd

    return of_eight if apart == 4 else of_sixteen


@part
def _lane(values):
    """The lowest 4 bits of bytes 0, 2, 4 and 6, side by side."""
    pairs = values & 0x000F000F000F000F
    pairs |= pairs >> 12  # two in the lowest byte of each half
    return (pairs | pairs >> 24) & 0xFFFF


@part
def _closer(lane):
    """Four values of 2 bits, from every 4 bits to every 2."""
    pairs = (lane | lane >> 2) & 0x0F0F
    return (pairs | pairs >> 4) & 0xFF


@part
def _rotated(lane, bits):
    """16 bits, some to the left: where a tile holds the higher bits, above the low ones."""
    return (lane << bits | lane >> 16 - bits) & 0xFFFF


def _eight_columns(field: Bits) -> Callable:
    """A function of a block's address and a column: the values of 8 columns, one a byte."""
    at, _, bits, run = field
    columns = run * 8 // bits  # of a run
    mask = _EACH_BYTE * ((1 << bits) - 1)

    @part
    def from_bytes(block, column):
        place = column // columns * run + column % run
        shift = column % columns // run * bits
        return unaligned_long_at(block + at + place) >> shift & mask

    @part
    def from_bits(block, column):  # the 8 bits of a byte are those of 8 columns
        held = byte_at(block + at + column // 8)
        values = 0
        for k in range(8):
            values |= (held >> k & 1) << 8 * k
        return values

    return from_bits if run == 1 else from_bytes
