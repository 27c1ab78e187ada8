"""The first vector of a tile of Q4_0: which weight each half byte is, and what one instruction does
with it.

Bits are flipped one by one, and the reader of the tile tells which weight changed.
"""

import style
import torch

from mistral.quantization.dequantize import dequantize
from mistral.quantization.ggml_types import GGML_TYPES
from mistral_kernels.cpu.tiles import Tiles, restore

Q4_0 = next(kind for kind in GGML_TYPES.values() if kind.name == "Q4_0")
ROWS, LANES = 8, 16
MASKS = ("0x000F", "0x00F0", "0x0F00", ">> 12")
MEANS = ("the weights", "16 times", "256 times", "the weights")


def data() -> dict:
    """lanes: for each lane, from its lowest half byte up, the [row, column] of the weight."""
    scales = torch.ones(ROWS, dtype=torch.float16).view(torch.uint8)
    tile = torch.zeros(1, ROWS * Q4_0.block_bytes, dtype=torch.uint8)
    tile[0, : len(scales)] = scales
    before = _weights(tile)
    lanes = []
    for lane in range(LANES):
        places = []
        for byte, bit in ((0, 1), (0, 16), (1, 1), (1, 16)):
            changed = tile.clone()
            changed[0, len(scales) + 2 * lane + byte] ^= bit
            places.append((_weights(changed) - before).nonzero()[0].tolist())
        lanes.append(places)
    return {"lanes": lanes}


def _weights(tile: torch.Tensor) -> torch.Tensor:
    """float32 [8, 32]."""
    return dequantize(restore(Tiles(kind=Q4_0, rows=ROWS, columns=32, data=tile)), Q4_0)


def draw(folder=style.FOLDER) -> None:
    numbers = data()
    figure, (top, bottom) = style.start(3.4, 2, 1, gridspec_kw={"height_ratios": [6.4, 6]})
    # 1. The vector: lanes from left to right, the lowest bits at the bottom.
    style.bare(top, 23, 6)
    for lane, places in enumerate(numbers["lanes"]):
        color = (style.BLUE, style.ORANGE)[places[0][0] % 2]
        for height, (_, column) in enumerate(places):
            style.cell(top, lane, height, f"{column}", color, fontsize=8)
        if lane % 2 == 0:
            top.text(lane + 1, 4.3, f"row {places[0][0]}", ha="center", fontsize=7)
    for height, (mask, means) in enumerate(zip(MASKS, MEANS)):
        top.text(16.3, height + 0.5, f"{mask}: {means}", va="center_baseline", fontsize=8)
    top.text(8, 5.4, "16 lanes of 16 bits: columns of 8 rows", ha="center")
    # 2. One instruction: 16 products, neighbours added.
    style.bare(bottom, 23, 6)
    for lane, places in enumerate(numbers["lanes"]):
        color = (style.BLUE, style.ORANGE)[places[0][0] % 2]
        style.cell(bottom, lane, 4, f"w{places[0][1]}", color, fontsize=8)
        style.cell(bottom, lane, 2.6, f"x{places[0][1]}", style.GREEN, fontsize=8)
    for row in range(ROWS):
        color = (style.BLUE, style.ORANGE)[row % 2]
        style.cell(bottom, 2 * row, 0.6, f"y{row}", color, width=2, fontsize=8)
        for lane in (0.5, 1.5):
            bottom.plot([2 * row + lane, 2 * row + 1], [2.5, 1.7], color=style.INK, linewidth=0.6)
    for y, text in ((4, "masked"), (2.6, "times the same pair"), (0.6, "neighbours added")):
        bottom.text(16.3, y + 0.5, text, va="center_baseline", fontsize=8)
    bottom.text(8, 5.3, "one instruction: two columns of 8 rows", ha="center")
    style.save(figure, "packed_lanes", numbers, folder)
