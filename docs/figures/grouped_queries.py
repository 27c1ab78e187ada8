"""Which key/value head each query head reads, found by asking attention itself."""

import style
import torch

from mistral.attention import attend

QUERY_HEADS, KV_HEADS = 8, 2


def data() -> dict:
    """reads[n]: the key/value heads whose values show in what query head n gives."""
    q, k = torch.zeros(1, QUERY_HEADS, 1, 4), torch.zeros(1, KV_HEADS, 1, 4)
    v = torch.eye(KV_HEADS, 4).view(
        1, KV_HEADS, 1, 4
    )  # head h holds a 1 at place h and nothing else
    y = attend(q, k, v, None)[0, :, 0]  # [N, H]
    return {"reads": [row.nonzero().flatten().tolist() for row in y]}


def draw(folder=style.FOLDER) -> None:
    numbers = data()
    figure, ax = style.start(2.2)
    style.bare(ax, 1.5 * QUERY_HEADS, 4)
    colors = (style.BLUE, style.ORANGE)
    middle = 1.5 * QUERY_HEADS / KV_HEADS
    for n, heads in enumerate(numbers["reads"]):
        for h in heads:
            style.cell(ax, 1.5 * n, 3, f"q{n}", colors[h], width=1.3)
            ax.plot([1.5 * n + 0.65, middle * (h + 0.5)], [3, 1], color=colors[h])
    for h in range(KV_HEADS):
        style.cell(ax, middle * (h + 0.5) - 1.6, 0, f"key/value {h}", colors[h], width=3.2)
    style.save(figure, "grouped_queries", numbers, folder)
