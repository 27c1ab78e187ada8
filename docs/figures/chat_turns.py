"""A conversation as the model reads it: control tokens between stretches of text, each encoded on
its own.
"""

import style

from mistral.chat import encode_chat

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello! <|im_end|>"},
]
WIDTH = 46  # letters in a row


def data() -> dict:
    """Each token's text and id, and whether it is a control token."""
    tokenizer = style.demo()[1]
    ids = encode_chat(tokenizer, MESSAGES)
    return {"tokens": [[style.label(id), id, id in tokenizer.control_ids] for id in ids]}


def draw(folder=style.FOLDER) -> None:
    numbers = data()
    rows, x = [[]], 0.0
    for text, id, control in numbers["tokens"]:
        width = max(len(text), len(str(id))) + 1.0
        if x + width > WIDTH:
            rows.append([])
            x = 0.0
        rows[-1].append((x, width, text, id, control))
        x += width
    figure, ax = style.start(0.62 * len(rows) + 0.2)
    ax.set(xlim=(-0.3, WIDTH + 0.3), ylim=(-0.2, 2.2 * len(rows)))
    ax.axis("off")
    for row, boxes in enumerate(rows):
        y = 2.2 * (len(rows) - 1 - row) + 0.8
        for x, width, text, id, control in boxes:
            style.cell(
                ax, x, y, text, style.ORANGE if control else style.BLUE, width=width, fontsize=8
            )
            ax.text(x + width / 2, y - 0.55, str(id), ha="center", fontsize=7, alpha=0.8)
    style.save(figure, "chat_turns", numbers, folder)
