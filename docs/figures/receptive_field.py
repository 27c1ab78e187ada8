"""Which earlier tokens reach the last one through a stack of layers with window 3: gradients
tell.
"""

import style
import torch

import mistral

TOKENS, WINDOW, LAYERS = 12, 3, 4


def data() -> dict:
    """reach[l][j]: whether what enters layer l at position j matters to what the last layer gives
    at the last one.
    """
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    sizes |= dict(
        num_hidden_layers=LAYERS,
        sliding_window=WINDOW,
        head_dim=4,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
    )
    config = {**vars(style.demo()[0].config), **sizes, "eos_token_id": (2,)}
    model, states = mistral.Mistral(mistral.Config(**config)).double(), []
    for layer in [*model.model.layers, model.model.norm]:
        layer.register_forward_pre_hook(
            lambda _, inputs: (inputs[0].retain_grad(), states.append(inputs[0]))[0]
        )
    model(torch.randint(3, 32, (1, TOKENS)), last_only=True).sum().backward()
    return {"reach": [(state.grad[0].abs().sum(-1) > 0).int().tolist() for state in states]}


def draw(folder=style.FOLDER) -> None:
    numbers = data()
    reach = numbers["reach"]
    figure, ax = style.start(2.9)
    for layer, row in enumerate(reach):
        for j, counts in enumerate(row):
            fill = style.BLUE if counts else "none"
            ax.plot(
                j,
                layer,
                "o",
                markersize=11,
                markerfacecolor=fill,
                markeredgecolor=style.BLUE,
                zorder=2,
            )
            if layer and counts:
                for i in range(max(0, j - WINDOW + 1), j + 1):
                    ax.plot(
                        [i, j],
                        [layer - 1, layer],
                        color=style.INK,
                        alpha=0.35,
                        linewidth=0.8,
                        zorder=1,
                    )
    ax.set(xticks=range(TOKENS), xlabel="position", yticks=range(LAYERS + 1))
    ax.set_yticklabels(["embedding", *(f"behind layer {n}" for n in range(LAYERS))])
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    style.save(figure, "receptive_field", numbers, folder)
