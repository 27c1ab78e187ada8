"""Who looks at whom, with a window of 3: the mask of one chunk."""

import style
import torch

from mistral.cache import window_mask

TOKENS, WINDOW = 7, 3


def data() -> dict:
    """sees[i][j]: whether the query at position i sees the key at position j."""
    positions = torch.arange(TOKENS)[None]
    return {"sees": window_mask(positions, positions, WINDOW)[0, 0].int().tolist()}


def draw(folder=style.FOLDER) -> None:
    numbers = data()
    figure, ax = style.start(3.6)
    style.bare(ax, TOKENS + 1.5, TOKENS + 1.2)
    for i, row in enumerate(numbers["sees"]):
        y = TOKENS - 1 - i
        ax.text(1.2, y + 0.5, f"query {i}", ha="right", va="center_baseline")
        ax.text(i + 2, TOKENS + 0.2, str(i), ha="center")
        for j, sees in enumerate(row):
            style.cell(ax, j + 1.5, y, "×" if sees else "", style.BLUE if sees else None)
    ax.text(1.2, TOKENS + 0.2, "key", ha="right")
    style.save(figure, "window_mask", numbers, folder)
