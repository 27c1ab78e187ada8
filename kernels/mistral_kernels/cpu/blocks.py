"""Where the fields of ggml's blocks are, for the kinds that the CPU engine has products for.

Sources: the blocks are drawn in mistral/quantization/dequantize.py.
"""

from typing import NamedTuple


class Copied(NamedTuple):
    """A field of units that a tile holds as they are: scales, or weights of whole bytes."""

    at: int  # its first byte
    count: int  # of units
    unit: int  # bytes: 1 or 2


class Bits(NamedTuple):
    """A field of values of less than a byte.

    A run of bytes holds the lowest bits of its values in the first bits of all its bytes, then
    the next ones, as in `unpack` of mistral/quantization/dequantize.py.
    """

    at: int  # its first byte
    bytes: int
    bits: int  # of a value
    run: int  # bytes


class Form(NamedTuple):
    """The fields of a block of one kind, in the order in which tiles hold them."""

    bytes: int  # of a block
    weights: int
    copied: tuple[Copied, ...]
    low: Bits | None = None  # the lowest 4 or 2 bits of each weight
    high: Bits | None = None  # the others
    columns: int = 32  # of which the higher bits make one vector


_D = Copied(0, 1, 2)
_M = Copied(2, 1, 2)
_SIX_BITS = Copied(4, 12, 1)
# What a 4-bit number of IQ4_NL and IQ4_XS stands for
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FORMS = {
    "Q4_0": Form(18, 32, (_D,), low=Bits(2, 16, 4, 16)),
    "Q4_1": Form(20, 32, (_D, _M), low=Bits(4, 16, 4, 16)),
    "Q5_0": Form(22, 32, (_D,), low=Bits(6, 16, 4, 16), high=Bits(2, 4, 1, 1)),
    "Q5_1": Form(24, 32, (_D, _M), low=Bits(8, 16, 4, 16), high=Bits(4, 4, 1, 1)),
    "Q8_0": Form(34, 32, (_D, Copied(2, 16, 2))),
    "Q2_K": Form(
        bytes=84,
        weights=256,
        copied=(Copied(80, 1, 2), Copied(82, 1, 2), Copied(0, 16, 1)),
        low=Bits(16, 64, 2, 32),
    ),
    "Q3_K": Form(
        bytes=110,
        weights=256,
        copied=(Copied(108, 1, 2), Copied(96, 12, 1)),
        low=Bits(32, 64, 2, 32),
        high=Bits(0, 32, 1, 32),
    ),
    "Q4_K": Form(144, 256, (_D, _M, _SIX_BITS), low=Bits(16, 128, 4, 32)),
    "Q5_K": Form(
        bytes=176,
        weights=256,
        copied=(_D, _M, _SIX_BITS),
        low=Bits(48, 128, 4, 32),
        high=Bits(16, 32, 1, 32),
    ),
    "Q6_K": Form(
        bytes=210,
        weights=256,
        copied=(Copied(208, 1, 2), Copied(192, 16, 1)),
        low=Bits(0, 128, 4, 64),
        high=Bits(128, 64, 2, 32),
        columns=16,
    ),
    "IQ4_NL": Form(18, 32, (_D,), low=Bits(2, 16, 4, 16)),
    "IQ4_XS": Form(
        bytes=136,
        weights=256,
        copied=(_D, Copied(2, 2, 1), Copied(4, 4, 1)),
        low=Bits(8, 128, 4, 16),
    ),
}
