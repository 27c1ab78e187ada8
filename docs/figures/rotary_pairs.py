"""Where rotary embedding turns four of a head's pairs to, for the first positions of a text."""

import style
import torch

from mistral.rotary import Rotary, rotate

HEAD_DIM, THETA = 128, 1e4  # Mistral-7B v0.1
PAIRS, POSITIONS = (0, 8, 16, 32), 9


def data() -> dict:
    """For each pair: where (1, 0) is turned to at each position, as [x, y]."""
    x = torch.zeros(1, 1, POSITIONS, HEAD_DIM)
    x[..., : HEAD_DIM // 2] = 1.0
    y = rotate(x, *Rotary(HEAD_DIM, THETA)(torch.arange(POSITIONS)[None], x.dtype))[0, 0]  # [T, H]
    return {f"pair {i}": [[t[i].item(), t[i + HEAD_DIM // 2].item()] for t in y] for i in PAIRS}


def draw(folder=style.FOLDER) -> None:
    from matplotlib.patches import Circle

    numbers = data()
    figure, axes = style.start(4.6, 2, 2)
    for ax, (name, points) in zip(axes.flat, numbers.items()):
        ax.add_patch(Circle((0, 0), 1, fill=False, edgecolor=style.INK, alpha=0.4, linewidth=0.8))
        for position, (x, y) in enumerate(points):
            ax.plot(
                [0, x],
                [0, y],
                color=style.BLUE,
                alpha=0.25 + 0.75 * (1 - position / POSITIONS),
                linewidth=1,
            )
        first, last = points[0], points[-1]
        near = abs(last[0] - first[0]) + abs(last[1] - first[1]) < 0.5
        ax.text(1.2, 0, f"0–{POSITIONS - 1}" if near else "0", va="center", fontsize=9)
        if not near:
            ax.text(
                1.25 * last[0],
                1.25 * last[1],
                str(POSITIONS - 1),
                ha="center",
                va="center",
                fontsize=9,
            )
        ax.set(xlim=(-1.4, 1.8), ylim=(-1.4, 1.4), aspect="equal", title=name)
        ax.axis("off")
    style.save(figure, "rotary_pairs", numbers, folder)
