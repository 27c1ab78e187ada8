"""How much choice a JSON grammar leaves: at each token of an answer, how many of the vocabulary's
ids may come.
"""

import style

from mistral.chat.grammar import json_constraint

ANSWER = '{"city": "Lisbon", "people": 3}'
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}


def data() -> dict:
    """The answer's tokens, and how many ids the grammar allows in the place of each; the last is
    the stop token.
    """
    model, tokenizer = style.demo()
    constraint = json_constraint(tokenizer, model.config.vocab_size, SCHEMA)
    tokens, allowed = [], []
    for id in [*tokenizer.encode(ANSWER, bos=False, prefix_space=False), tokenizer.eos_id]:
        tokens.append(style.label(id))
        allowed.append(int(constraint.mask().sum()))
        constraint.accept(id)
    return {"tokens": tokens, "allowed": allowed, "vocabulary": model.config.vocab_size}


def draw(folder=style.FOLDER) -> None:
    numbers = data()
    places = range(len(numbers["tokens"]))
    figure, ax = style.start(2.9)
    colors = [style.ORANGE if count == 1 else style.BLUE for count in numbers["allowed"]]
    ax.bar(
        places, [count - 0.8 for count in numbers["allowed"]], bottom=0.8, color=colors, alpha=0.8
    )
    ax.axhline(numbers["vocabulary"], color=style.INK, linestyle=":", linewidth=1)
    ax.set(
        yscale="log",
        ylim=(0.8, numbers["vocabulary"] * 1.6),
        ylabel="ids allowed",
        xticks=list(places),
    )
    ax.set_xticklabels(
        numbers["tokens"], rotation=60, ha="right", rotation_mode="anchor", fontsize=8
    )
    for place, count in zip(places, numbers["allowed"]):
        ax.text(place, count * 1.1, str(count), ha="center", fontsize=7)
    style.save(figure, "grammar_mask", numbers, folder)
