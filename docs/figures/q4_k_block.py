"""The 144 bytes of a Q4_K super-block: which weight each half byte is, and what each bit of the
scales belongs to.

Nothing is copied from a description: bits are flipped one by one, and `dequantize` tells what
changed.
"""

import style
import torch
from torch import Tensor

from mistral.quantization.dequantize import dequantize
from mistral.quantization.ggml_types import GGML_TYPES

Q4_K = next(kind for kind in GGML_TYPES.values() if kind.name == "Q4_K")
HEADER, SCALES = (
    16,
    slice(4, 16),
)  # d and dmin, two bytes each, then the scales; the rest are half bytes


def block(scales: list[int], nibbles: int) -> Tensor:
    """A block with d = dmin = 1, these 12 bytes of scales, and the same byte everywhere behind
    them.
    """
    ones = torch.ones(2, dtype=torch.float16).view(torch.uint8).tolist()
    return torch.tensor(
        [*ones, *scales, *[nibbles] * (Q4_K.block_bytes - HEADER)], dtype=torch.uint8
    )


def changes(before: Tensor, byte: int, mask: int) -> Tensor:
    """What flipping some bits of one byte does to the 256 weights."""
    after = before.clone()
    after[byte] ^= mask
    return dequantize(after[None], Q4_K)[0] - dequantize(before[None], Q4_K)[0]


def data() -> dict:
    """scales: for each of 12 bytes, from bit 7 to bit 0, a letter: A-H are the scales, a-h the mins
    of groups 0-7. nibbles: for each byte behind the header the weight that its lower half is, and
    the weight that its upper half is.
    """
    scales = []
    for byte in range(SCALES.start, SCALES.stop):
        letters = ""
        for bit in range(7, -1, -1):
            change = changes(
                block([0] * 12, 0x11), byte, 1 << bit
            )  # every q is 1: the change is that of scale - min
            group = int(change.nonzero()[0]) // 32
            letters += "ABCDEFGH"[group] if change.sum() > 0 else "abcdefgh"[group]
        scales.append(letters)
    every_scale_1 = block([1] * 4 + [0] * 4 + [1] * 4, 0)
    nibbles = [
        [int(changes(every_scale_1, byte, mask).nonzero()[0]) for mask in (0x0F, 0xF0)]
        for byte in range(HEADER, Q4_K.block_bytes)
    ]
    return {"scales": scales, "nibbles": nibbles}


def draw(folder=style.FOLDER) -> None:
    numbers = data()
    figure, (top, bottom) = style.start(3.7, 2, 1, gridspec_kw={"height_ratios": [10, 4.6]})
    rows = Q4_K.block_bytes // 16
    style.bare(top, 27, rows + 1)
    for byte in range(Q4_K.block_bytes):
        x, y = byte % 16, rows - 1 - byte // 16
        if byte < SCALES.start:
            if byte % 2 == 0:
                style.cell(
                    top, x, y, "d" if byte == 0 else "dmin", style.GREEN, width=2, fontsize=7
                )
        elif byte < HEADER:
            style.cell(top, x, y, "", style.PURPLE)
        else:
            style.cell(top, x, y, "", (style.BLUE, style.ORANGE)[(byte - HEADER) // 32 % 2])
    top.text(16.4, rows - 0.5, "d, dmin, 12 bytes of scales", va="center_baseline", fontsize=8)
    for row in range(1, rows):
        low, high = zip(*numbers["nibbles"][16 * (row - 1) : 16 * row])
        text = f"low: w{low[0]}–{low[-1]}  high: w{high[0]}–{high[-1]}"
        top.text(16.4, rows - 0.5 - row, text, va="center_baseline", fontsize=8)
    top.text(8, rows + 0.3, "144 bytes, 16 in a row", ha="center")
    style.bare(bottom, 41, 7)
    bottom.text(20, 6, "the 12 bytes of scales, bit by bit", ha="center")
    for byte, letters in enumerate(numbers["scales"]):
        for i, letter in enumerate(letters):
            color = style.BLUE if letter.isupper() else style.ORANGE
            x, y = byte % 4 * 10.2 + i * 1.2, 4 - byte // 4 * 1.6
            style.cell(bottom, x, y, letter, color, width=1.2, fontsize=8)
    style.save(figure, "q4_k_block", numbers, folder)
