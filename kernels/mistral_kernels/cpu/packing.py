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
    """Writes the vectors of higher bits and of nibbles of a block, a chunk of columns at a time."""
    if form.low is None:
        return part(lambda block, row_bytes, to: None)
    weights, columns, vectors = form.weights, form.columns, form.columns // 8
    low = _eight_columns(form.low)
    has_high = form.high is not None
    high = _eight_columns(form.high) if has_high else low
    bits = form.high.bits if has_high else 0

    @part
    def write(block, row_bytes, to):
        for first in range(0, weights, columns):
            if has_high:
                for r in range(8):
                    even = odd = 0
                    for i in range(vectors):
                        values = high(block + row_bytes * r, first + 8 * i)
                        even |= _rotated(_lane(values)) << bits * i
                        odd |= _rotated(_lane(values >> 8)) << bits * i
                    store_int(to + 4 * r, np.int32(even | odd << 16))
                to += 32
            for c in range(first, first + columns, 8):
                for r in range(8):
                    values = low(block + row_bytes * r, c)
                    store_int(to + 4 * r, np.int32(_lane(values) | _lane(values >> 8) << 16))
                to += 32

    return write


@part
def _lane(values):
    """The lowest 4 bits of bytes 0, 2, 4 and 6, side by side."""
    pairs = values & 0x000F000F000F000F
    pairs |= pairs >> 12  # two in the lowest byte of each half
    return (pairs | pairs >> 24) & 0xFFFF


@part
def _rotated(lane):
    """16 bits, 4 to the left: where a tile holds the higher bits of the four pairs."""
    return (lane << 4 | lane >> 12) & 0xFFFF


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
