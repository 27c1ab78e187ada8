"""Where two heads of the demo look, on a text in which words come twice."""

import style
import torch

from mistral.attention import attend_explicit
from mistral.rotary import rotate

TEXT = "Clara sees Hugo. Clara"
HEADS = ((0, 0), (1, 0))  # layer and query head


@torch.inference_mode()
def weights(ids: list[int], layer: int) -> torch.Tensor:
    """The attention weights of every head of a layer: [N, T, T]."""
    model = style.demo()[0]
    block, T = model.model.layers[layer], len(ids)
    x = block.input_layernorm(style.hidden_states(ids)[layer])  # [T, D]
    q, k = (p(x).view(1, T, -1, model.config.head_dim).transpose(1, 2) for p in projections(block))
    rotary = model.model.rotary(torch.arange(T)[None], x.dtype)
    # With the unit matrix for values, what attention puts out is its weights.
    values = torch.eye(T).expand(1, k.shape[1], T, T)
    return attend_explicit(rotate(q, *rotary), rotate(k, *rotary), values, None)[0]


def projections(block) -> tuple:
    return block.self_attn.q_proj, block.self_attn.k_proj


def data() -> dict:
    ids = style.demo()[1].encode(TEXT)
    heads = {
        f"layer {layer}, head {head}": weights(ids, layer)[head].tolist() for layer, head in HEADS
    }
    return {"tokens": [style.label(id) for id in ids], "heads": heads}


def draw(folder=style.FOLDER) -> None:
    from matplotlib.patches import Rectangle

    numbers = data()
    tokens = numbers["tokens"]
    figure, axes = style.start(7.0, 2, 1, sharex=True)
    for ax, (name, table) in zip(axes, numbers["heads"].items()):
        for i, row in enumerate(table):
            for j, weight in enumerate(row):
                if weight > 0.01:
                    square = Rectangle(
                        (j - 0.5, i - 0.5), 1, 1, facecolor=style.BLUE, alpha=weight, linewidth=0
                    )
                    ax.add_patch(square)
        ticks, edges = range(len(tokens)), (-0.5, len(tokens) - 0.5)
        ax.set(xticks=ticks, yticks=ticks, xlim=edges, ylim=edges, title=name, aspect="equal")
        ax.set_xticklabels(tokens, rotation=90, fontsize=9)
        ax.set_yticklabels(tokens, fontsize=9)
        ax.tick_params(length=0)
        ax.invert_yaxis()
    style.save(figure, "attention_weights", numbers, folder)
