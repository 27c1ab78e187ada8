"""The rarer block formats, in the manner of dequantize.py: importance quants, ternary ones, and
4-bit floats.

The importance quants (IQ...) look runs of 4 or 8 weights up in a grid of the patterns that occur;
the grids are gguf-py's, and so is the order of the operations. A lookup with signs has a bit for
each weight, or 7 bits that stand for 8 (an even number of them is set).

Source: gguf-py, quants.py (`dequantize_blocks`); ggml-quants.c, see dequantize.py
"""

import functools
from collections.abc import Callable

import gguf
import numpy as np
import torch
from torch import Tensor

from mistral.quantization.dequantize import half, unpack

NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_DOUBLED = (
    0,
    1,
    2,
    3,
    4,
    6,
    8,
    12,
    0,
    -1,
    -2,
    -3,
    -4,
    -6,
    -8,
    -12,
)  # 4-bit floats, twice what they stand for


def iq4_nl(blocks: Tensor) -> Tensor:
    """[d 2 | q 16]: 32 weights d * NONLINEAR[q]."""
    return half(blocks, 0) * _look_up(
        _numbers(NONLINEAR, blocks.device), unpack(blocks[:, 2:], 4, 16)
    )


def iq4_xs(blocks: Tensor) -> Tensor:
    """[d 2 | high 2 | low 4 | q 128]: 8 groups of 32 weights d * (scale - 32) * NONLINEAR[q].

    A scale's lower four bits are in `low`, the upper two in `high`.
    """
    scale = unpack(blocks[:, 4:8], 4, 1) | unpack(blocks[:, 2:4], 2, 1) << 4
    values = _look_up(_numbers(NONLINEAR, blocks.device), unpack(blocks[:, 8:], 4, 16)).view(
        -1, 8, 32
    )
    return ((half(blocks, 0) * (scale.float() - 32))[..., None] * values).flatten(1)


def tq1_0(blocks: Tensor) -> Tensor:
    """[q 48 | high 4 | d 2]: 256 weights d * (digit - 1).

    A byte is a fraction of 256 with five digits to base 3.
    """
    first, second, third = blocks[:, :32], blocks[:, 32:48], blocks[:, 48:52]
    powers = (1, 3, 9, 27, 81)  # uint8 drops what lies before the point
    parts = [
        part * power
        for part, digits in ((first, 5), (second, 5), (third, 4))
        for power in powers[:digits]
    ]
    return half(blocks, 52) * ((torch.cat(parts, dim=1).int() * 3 >> 8).float() - 1)


def tq2_0(blocks: Tensor) -> Tensor:
    """[q 64 | d 2]: 256 weights d * (q - 1)."""
    return half(blocks, 64) * (unpack(blocks[:, :64], 2, 32).float() - 1)


def mxfp4(blocks: Tensor) -> Tensor:
    """[e 1 | q 16]: 32 weights 2^(e - 128) * E2M1_DOUBLED[q]."""
    e = blocks[:, :1].int()
    d = torch.where(e < 2, 0x200000 * (e + 1), (e - 1) << 23).view(
        torch.float32
    )  # the first two are subnormal
    return d * _look_up(_numbers(E2M1_DOUBLED, blocks.device), unpack(blocks[:, 1:], 4, 16))


def nvfp4(blocks: Tensor) -> Tensor:
    """[d 4 | q 32]: 4 groups of 16 weights d / 2 * E2M1_DOUBLED[q]; each d is a byte, a float
    E4M3.
    """
    half_d = _look_up(
        _numbers(tuple(map(_half_of_e4m3, range(256))), blocks.device), blocks[:, :4]
    )  # [n, 4]
    values = _look_up(_numbers(E2M1_DOUBLED, blocks.device), unpack(blocks[:, 4:], 4, 8)).view(
        -1, 4, 16
    )
    return (half_d[..., None] * values).flatten(1)


def iq2_xxs(blocks: Tensor) -> Tensor:
    """[d 2 | (index 4, signs and scale 4) * 8]: 8 groups of 4 lookups of 8 weights d * (scale +
    1/2) / 4 * grid.
    """
    groups = blocks[:, 2:].reshape(-1, 8, 8)
    words = _words(
        groups[:, :, 4:], torch.int32
    )  # [n, 8, 1]: four times 7 bits of signs, 4 bits of scale
    scale = half(blocks, 0)[..., None] * (0.5 + (words >> 28 & 15).float()) * 0.25
    return _from_grid("IQ2_XXS", groups[:, :, :4], scale, _seven_bits(words))


def iq2_xs(blocks: Tensor) -> Tensor:
    """[d 2 | q 64 | scales 8]: 16 groups of 2 lookups of 8 weights; q has 9 bits of index and 7 of
    signs.
    """
    q = _words(blocks[:, 2:66], torch.int16).int() & 0xFFFF  # [n, 32]
    scale = half(blocks, 0) * (0.5 + unpack(blocks[:, 66:], 4, 1).float()) * 0.25
    return _from_grid("IQ2_XS", q & 511, scale, _look_up(_even_signs(blocks.device), q >> 9))


def iq2_s(blocks: Tensor) -> Tensor:
    """[d 2 | q 32 | signs 32 | high 8 | scales 8]: 16 groups of 2 lookups of 8 weights;

    `high` has 2 bits more of q.
    """
    q = blocks[:, 2:34].int() | unpack(blocks[:, 66:74], 2, 1).int() << 8
    scale = half(blocks, 0) * (0.5 + unpack(blocks[:, 74:], 4, 1).float()) * 0.25
    return _from_grid("IQ2_S", q, scale, _signs(blocks[:, 34:66]))


def iq3_xxs(blocks: Tensor) -> Tensor:
    """[d 2 | q 64 | (signs and scale 4) * 8]: 8 groups of 8 lookups of 4 weights d * (scale + 1/2)
    / 2 * grid.
    """
    words = _words(blocks[:, 66:].reshape(-1, 8, 4), torch.int32)
    scale = half(blocks, 0)[..., None] * (0.5 + (words >> 28 & 15).float()) * 0.5
    return _from_grid("IQ3_XXS", blocks[:, 2:66], scale, _seven_bits(words))


def iq3_s(blocks: Tensor) -> Tensor:
    """[d 2 | q 64 | high 8 | signs 32 | scales 4]: 8 groups of 8 lookups of 4 weights d * (2 scale
    + 1) * grid.
    """
    q = blocks[:, 2:66].int() | unpack(blocks[:, 66:74], 1, 1).int() << 8
    scale = half(blocks, 0) * (1 + 2 * unpack(blocks[:, 106:], 4, 1)).float()
    return _from_grid("IQ3_S", q, scale, _signs(blocks[:, 74:106]))


def iq1_s(blocks: Tensor) -> Tensor:
    """[d 2 | q 32 | high 16]: 8 groups of 4 lookups of 8 weights d * (2 scale + 1) * (grid + 1/8 or
    - 1/8).

    A word of `high` has 3 bits more of the index for each lookup, then the scale, then the eighth's
    sign.
    """
    high = _words(blocks[:, 34:], torch.int16).int()  # [n, 8]
    q = blocks[:, 2:34].int() | _fields(high, 3).flatten(1) << 8
    scale = half(blocks, 0) * (2 * (high >> 12 & 7) + 1).float()
    return _from_grid("IQ1_S", q, scale, shift=(1 - 2 * (high >> 15 & 1).float()) * 0.125)


def iq1_m(blocks: Tensor) -> Tensor:
    """[q 32 | high 16 | scales 8]: 16 groups of 2 lookups of 8 weights, as in IQ1_S.

    A nibble of `high` has 3 bits more of the index and the eighth's sign. A word of `scales` has 4
    scales of 3 bits and 4 bits of d.
    """
    words = _words(blocks[:, 48:], torch.int16).int() & 0xFFFF  # [n, 4]
    d = (
        sum((words[:, i : i + 1] >> 12) << 4 * i for i in range(4))
        .to(torch.int16)
        .view(torch.float16)
        .float()
    )
    high = unpack(blocks[:, 32:48], 4, 1).int()  # [n, 32]
    scale = d * (2 * _fields(words, 3).flatten(1) + 1).float()
    q = blocks[:, :32].int() | (high & 7) << 8
    return _from_grid("IQ1_M", q, scale, shift=(1 - 2 * (high >> 3 & 1).float()) * 0.125)


def _from_grid(
    name: str,
    index: Tensor,
    scale: Tensor,
    signs: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Look up `index`, and multiply by the scale of each group: -> [n, 256].

    signs  1 or -1 for each weight
    shift  is added to each weight of a lookup, or of as many lookups as there are for one of it
    """
    n = index.shape[0]
    values = _look_up(_grid(name, index.device), index)
    if shift is not None:
        values = values.view(n, shift.numel() // n, -1) + shift.reshape(n, -1, 1)
    scaled = scale.reshape(n, -1, 1) * values.reshape(n, scale.numel() // n, -1)
    return scaled.flatten(1) if signs is None else scaled.flatten(1) * signs.reshape(n, -1)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index], [n, index.numel() / n * width of the table], for `index` [n, ...] of any
    integer type.
    """
    return table.index_select(0, index.reshape(-1).int()).view(index.shape[0], -1)


def _words(field: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as little-endian integers of `dtype` (negative where their highest bit is set)."""
    return field.contiguous().view(dtype)


def _fields(words: Tensor, bits: int) -> Tensor:
    """The four lowest fields of each word: [n, k] -> [n, k, 4]."""
    return torch.stack([words >> bits * i & (1 << bits) - 1 for i in range(4)], dim=-1)


def _signs(bits: Tensor) -> Tensor:
    """A bit for each weight, uint8 [n, k] -> 1 or -1, [n, 8 k]."""
    return 1 - 2 * unpack(bits, 1, 1).float()


def _seven_bits(words: Tensor) -> Tensor:
    """The signs in the lower 28 bits of the words [n, k, 1]: -> [n, 32 k]."""
    return _look_up(_even_signs(words.device), _fields(words, 7))


@functools.cache
def _grid(name: str, device: torch.device) -> Tensor:
    kind = getattr(gguf.quants, name)
    kind.init_grid()
    return torch.from_numpy(kind.grid[0, 0].copy()).to(device)


@functools.cache
def _even_signs(device: torch.device) -> Tensor:
    """[128, 8]: seven signs, and an eighth that makes the number of minuses even."""
    bits = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, dtype=np.uint8).copy()
    return _signs(torch.from_numpy(bits)[:, None]).to(device)


@functools.cache
def _numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept: a CUDA graph must not wait for the host to send them.
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]


def _half_of_e4m3(x: int) -> float:
    """Half of the float E4M3 (4 bits of exponent, 3 of mantissa) in the byte `x`;

    0x7F, nan elsewhere, counts as 0.
    """
    e, m = x >> 3 & 15, x & 7
    return 0.0 if x == 0x7F else 0.5 * (m * 2.0**-9 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    function.__name__.upper(): function
    for function in (
        iq4_nl, iq4_xs, tq1_0, tq2_0, mxfp4, nvfp4, iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s, iq1_s, iq1_m,
    )
}  # fmt: skip
