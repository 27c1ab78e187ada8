"""What the demo would say if it stopped behind each layer: the logit lens."""

import style
import torch


@torch.inference_mode()
def data() -> dict:
    """Behind the embedding and each layer: the most probable token, and the probability of the
    final answer.
    """
    model = style.demo()[0]
    states = style.hidden_states(style.question_ids())
    p = torch.stack(
        [model.lm_head(model.model.norm(state[-1])).softmax(-1) for state in states]
    )  # [L + 1, V]
    answer = p[-1].argmax().item()
    return {
        "answer": style.label(answer),
        "probability": p[:, answer].tolist(),
        "says": [style.label(id) for id in p.argmax(-1).tolist()],
    }


def draw(folder=style.FOLDER) -> None:
    numbers = data()
    figure, ax = style.start(2.9)
    names = ["embedding", *(f"layer {n}" for n in range(len(numbers["says"]) - 1))]
    rows = range(len(names))
    ax.barh(rows, numbers["probability"], color=style.BLUE, alpha=0.8)
    for row, says in zip(rows, numbers["says"]):
        ax.text(1.03, row, says, va="center_baseline", family="DejaVu Sans Mono")
    ax.text(1.03, -1.1, "would say", va="center_baseline")
    ax.set(
        yticks=rows,
        xlim=(0, 1),
        xlabel=f"probability of “{numbers['answer']}”, the token that it says in the end",
    )
    ax.set_yticklabels(names)
    ax.invert_yaxis()
    style.save(figure, "logit_lens", numbers, folder)
