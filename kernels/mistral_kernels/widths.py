"""The widths that a model must have for the kernels of a GPU, and for those of a CPU."""

from mistral.config import Config


def width_problem(config: Config, kernels: str) -> str | None:
    """Why `kernels` cannot multiply matrices of these widths; None if they can."""
    widths = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads * head_dim": config.num_attention_heads * config.head_dim,
    }
    for name, width in widths.items():
        if width % 32:
            return f"{kernels} need {name} to be a multiple of 32, not {width}"
    return None
