"""The slots of a rolling cache with window 3 while eight tokens are read one by one."""

import style
import torch

import mistral
from mistral.cache import RollingCache, window_mask

TOKENS, WINDOW = 8, 3


def data() -> dict:
    """After each token: the position in each slot (-1: empty), and the positions that the token
    saw.
    """
    config = mistral.Config(**{**vars(style.demo()[0].config), "sliding_window": WINDOW})
    cache = RollingCache(
        config, 1, max_tokens=None, slack=0, dtype=torch.float32, device=torch.device("cpu")
    )
    steps = []
    for position in range(TOKENS):
        plan = cache.plan(1)
        cache.begin(plan)
        cache.commit(plan)
        slots = cache.slot_positions
        seen = slots[0][window_mask(torch.tensor([[position]]), slots, WINDOW)[0, 0, 0]]
        steps.append({"slots": slots[0].tolist(), "sees": sorted(seen.tolist())})
    return {"steps": steps}


def draw(folder=style.FOLDER) -> None:
    numbers = data()
    figure, ax = style.start(4.0)
    style.bare(ax, 12.5, TOKENS + 1)
    for slot in range(WINDOW):
        ax.text(4.5 + slot * 1.4, TOKENS + 0.25, f"slot {slot}", ha="center")
    for position, step in enumerate(numbers["steps"]):
        y = TOKENS - 1 - position
        ax.text(3.2, y + 0.5, f"read {position}", ha="right", va="center_baseline")
        for slot, held in enumerate(step["slots"]):
            color = style.ORANGE if held == position else style.BLUE if held >= 0 else None
            style.cell(ax, 3.8 + slot * 1.4, y, str(held) if held >= 0 else "", color, width=1.4)
        ax.text(8.5, y + 0.5, f"sees {' '.join(map(str, step['sees']))}", va="center_baseline")
    style.save(figure, "rolling_cache", numbers, folder)
