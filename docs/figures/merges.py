"""How byte-pair encoding puts a word together: the merges of the demo's tokenizer, one by one."""

import style

WORD = "window"


def merge_steps(word: str, scores: dict[str, float]) -> list[list[str]]:
    """The pieces of a word after each merge: always the neighbours whose joint piece has the
    highest score.
    """
    steps = [list(word)]
    while True:
        pieces = steps[-1]
        joints = [
            (scores[a + b], -i)
            for i, (a, b) in enumerate(zip(pieces, pieces[1:]))
            if a + b in scores
        ]
        if not joints:
            return steps
        i = -max(joints)[1]  # of equals, the first
        steps.append([*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]])


def data() -> dict:
    """The steps, and how the tokenizer itself splits the word."""
    tokenizer = style.demo()[1]
    scores = {piece: score for piece, score, kind in tokenizer.vocabulary() if kind == 1}
    ids = tokenizer.encode(WORD, bos=False, prefix_space=False)
    return {
        "steps": merge_steps(WORD, scores),
        "tokenizer": [tokenizer.token_bytes(id).decode() for id in ids],
    }


def draw(folder=style.FOLDER) -> None:
    numbers = data()
    steps = numbers["steps"]
    figure, ax = style.start(0.45 * len(steps) + 0.2)
    style.bare(ax, len(WORD) + 3.5, 1.25 * len(steps))
    for row, pieces in enumerate(steps):
        x, y, before = 3.5, 1.25 * (len(steps) - 1 - row), steps[max(row - 1, 0)]
        ax.text(
            3.2, y + 0.5, f"merge {row}" if row else "letters", ha="right", va="center_baseline"
        )
        for piece in pieces:
            new = row > 0 and piece not in before
            style.cell(ax, x, y, piece, style.ORANGE if new else None, width=len(piece))
            x += len(piece)
    style.save(figure, "merges", numbers, folder)
