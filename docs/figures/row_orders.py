"""The rows of one head of Q (or K) in a file that pairs neighbours, and where they stand in
ours.
"""

import style

from mistral.checkpoints.names import half_split_rows

HEAD = 8  # a head of this size, instead of 128


def data() -> dict:
    """places[r]: which row of the file is our row r."""
    return {"places": half_split_rows(HEAD, 1).tolist()}


def draw(folder=style.FOLDER) -> None:
    numbers = data()
    figure, ax = style.start(3.4)
    style.bare(ax, 12.4, HEAD + 1)
    colors = (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE)
    ax.text(2, HEAD + 0.3, "in the file", ha="center")
    ax.text(10, HEAD + 0.3, "in our matrix", ha="center")
    for ours, theirs in enumerate(numbers["places"]):
        pair, color = theirs // 2, colors[theirs // 2]
        text = f"{'ab'[theirs % 2]}{pair}"
        y_file, y_ours = HEAD - 1 - theirs, HEAD - 1 - ours
        style.cell(ax, 0.5, y_file, f"row {theirs}:  {text}", color, width=3)
        style.cell(ax, 8.5, y_ours, f"row {ours}:  {text}", color, width=3)
        ax.plot([3.6, 8.4], [y_file + 0.5, y_ours + 0.5], color=color, linewidth=1.6)
    style.save(figure, "row_orders", numbers, folder)
