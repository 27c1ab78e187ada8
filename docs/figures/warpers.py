"""What each warper leaves of one distribution: what the demo expects behind "What is" in a user's
turn.
"""

import style
import torch

from mistral import Sampling
from mistral.sampling import processed_scores

BEGINNING = "What is"
SHOWN = 8
RULES = {
    "temperature 0.5": dict(temperature=0.5),
    "temperature 1.5": dict(temperature=1.5),
    "top_k 4": dict(top_k=4),
    "top_p 0.5": dict(top_p=0.5),
    "min_p 0.4": dict(min_p=0.4),
    "typical_p 0.5": dict(typical_p=0.5),
}


def beginning_ids() -> list[int]:
    """The ids of a user's turn that has only begun."""
    tokenizer = style.demo()[1]
    start = tokenizer.control_id("<|im_start|>")
    # A space may be a piece of its own or the first letter of the next one; so some word is
    # encoded, and taken off.
    return [tokenizer.bos_id, start, *tokenizer.encode(f"user\n{BEGINNING} a", bos=False)[:-1]]


@torch.inference_mode()
def data() -> dict:
    """Labels of the most probable tokens; their probabilities as they are, and under each rule."""
    ids = beginning_ids()
    logits = style.demo()[0](torch.tensor([ids]), last_only=True)  # [1, V]
    history, lengths = torch.tensor([ids]), torch.tensor([len(ids)])
    plain = logits[0].softmax(-1)
    top = plain.topk(SHOWN).indices
    warped = {
        name: processed_scores(logits, Sampling(**rule), history, lengths)[0]
        .softmax(-1)[top]
        .tolist()
        for name, rule in RULES.items()
    }
    return {
        "tokens": [style.label(id) for id in top.tolist()],
        "plain": plain[top].tolist(),
        "warped": warped,
    }


def draw(folder=style.FOLDER) -> None:
    numbers = data()
    figure, axes = style.start(5.0, 3, 2, sharex=True, sharey=True)
    places = range(SHOWN)
    for ax, (name, probabilities) in zip(axes.flat, numbers["warped"].items()):
        ax.bar(places, probabilities, color=style.BLUE, alpha=0.8)
        ax.bar(
            places, numbers["plain"], fill=False, edgecolor=style.INK, linewidth=1, linestyle=":"
        )
        ax.set(title=name, xticks=list(places))
        ax.set_xticklabels(
            numbers["tokens"], rotation=60, ha="right", rotation_mode="anchor", fontsize=8
        )
    style.save(figure, "warpers", numbers, folder)
