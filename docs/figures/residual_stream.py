"""How large the hidden state of the demo's last token is at each layer, before the norm and behind
it.
"""

import style


def data() -> dict:
    """The root mean square of what enters each layer, and of what its attention reads."""
    states = [state[-1] for state in style.hidden_states(style.question_ids())]
    layers = style.demo()[0].model.layers
    normed = [layer.input_layernorm(state) for layer, state in zip(layers, states)]
    return {"stream": [rms(x) for x in states], "normed": [rms(x) for x in normed]}


def rms(x) -> float:
    return x.pow(2).mean().sqrt().item()


def draw(folder=style.FOLDER) -> None:
    numbers = data()
    figure, ax = style.start(2.8)
    ax.plot(numbers["stream"], "o-", label="the stream that enters the layer")
    ax.plot(numbers["normed"], "s-", label="what attention reads of it, normalised")
    ax.set(
        xlabel="layer",
        ylabel="root mean square",
        xticks=range(len(numbers["stream"])),
        ylim=(0, None),
    )
    ax.set_xticklabels([*range(len(numbers["normed"])), "out"])
    ax.legend()
    style.save(figure, "residual_stream", numbers, folder)
