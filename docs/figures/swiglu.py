"""SiLU, the gate of SwiGLU, and what the gates of one layer of the demo do with one token."""

import style
import torch
import torch.nn.functional as F

LAYER = 2


@torch.inference_mode()
def data() -> dict:
    """The curve; and for the last token: the sizes of the F products that one layer adds up,
    largest first.
    """
    z = torch.linspace(-6, 4, 41)
    block = style.demo()[0].model.layers[LAYER]
    state = style.hidden_states(style.question_ids())[LAYER][None]  # [1, T, D]
    products = []
    hook = block.mlp.down_proj.register_forward_pre_hook(
        lambda _, inputs: products.append(inputs[0][0, -1])
    )
    rotary = style.demo()[0].model.rotary(torch.arange(state.shape[1])[None], state.dtype)
    block(state, rotary, None, None)
    hook.remove()
    sizes = products[0].abs().sort(descending=True).values
    return {
        "z": z.tolist(),
        "silu": F.silu(z).tolist(),
        "relu": F.relu(z).tolist(),
        "products": sizes.tolist(),
    }


def draw(folder=style.FOLDER) -> None:
    numbers = data()
    figure, (left, right) = style.start(2.7, 1, 2)
    left.plot(
        numbers["z"], numbers["relu"], color=style.INK, alpha=0.5, linestyle="--", label="max(0, z)"
    )
    left.plot(numbers["z"], numbers["silu"], label="silu(z)")
    left.set(xlabel="z", title="the gate")
    left.legend()
    right.semilogy(range(1, len(numbers["products"]) + 1), numbers["products"], color=style.ORANGE)
    right.set(xlabel="hidden units, largest first", title="|silu(gate) · up|", ylim=(1e-4, None))
    style.save(figure, "swiglu", numbers, folder)
