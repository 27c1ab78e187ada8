"""What a 7B has to read from memory for one new token, part by part, in three formats. Arithmetic,
not a measurement.

Sizes: Mistral 7B, table 1, https://arxiv.org/abs/2310.06825
"""

import style

import mistral
from mistral.checkpoints.names import tensor_shapes
from mistral.quantization.ggml_types import GGML_TYPES

SEVEN_B = mistral.Config(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=4096,
    max_position_embeddings=32768,
    tie_word_embeddings=False,
    eos_token_id=(2,),
)
BITS = {
    kind.name: 8 * kind.block_bytes / kind.block_weights for kind in GGML_TYPES.values()
}  # of one weight
# llama.cpp's mix Q4_K_M keeps v_proj and down_proj finer in these layers: first and last eighth,
# one in three between
FINER = {i for i in range(32) if i < 4 or i >= 28 or (i - 4) % 3 == 2}
PARTS = {
    "Q, K, V": ("q_proj", "k_proj", "v_proj"),
    "O": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "output matrix": ("lm_head",),
}


def bits_of(name: str, format: str) -> float:
    """Bits of a weight of this tensor."""
    if format != "Q4_K_M":
        return BITS[format]
    if name == "lm_head.weight":
        return BITS["Q6_K"]
    layer, module = name.split(".")[2], name.split(".")[-2]
    return BITS["Q6_K" if module in ("v_proj", "down_proj") and int(layer) in FINER else "Q4_K"]


def matrix_bytes(format: str) -> dict[str, float]:
    """Bytes of the matrices that one token has to pass through, part by part; of the embedding it
    needs one row.
    """
    found = dict.fromkeys(PARTS, 0.0)
    for name, shape in tensor_shapes(SEVEN_B).items():
        for part, modules in PARTS.items():
            if name.split(".")[-2] in modules:
                found[part] += shape[0] * shape[1] * bits_of(name, format) / 8
    return found


def data() -> dict:
    """Gigabytes, part by part; the cache is that of a full window in 16 bits."""
    cache = SEVEN_B.cache_bytes(SEVEN_B.sliding_window, itemsize=2)
    return {
        format: {
            part: count / 1e9 for part, count in (matrix_bytes(format) | {"cache": cache}).items()
        }
        for format in ("BF16", "Q8_0", "Q4_K_M")
    }


def draw(folder=style.FOLDER) -> None:
    numbers = data()
    figure, ax = style.start(2.5)
    colors = (style.BLUE, style.GREEN, style.ORANGE, style.RED, style.PURPLE, style.INK)
    for row, parts in enumerate(numbers.values()):
        left = 0.0
        for (part, size), color in zip(parts.items(), colors):
            ax.barh(
                -row, size, left=left, color=color, alpha=0.75, label=part if row == 0 else None
            )
            left += size
        ax.text(left + 0.1, -row, f"{left:.2f} GB", va="center")
    ax.set(
        yticks=[0, -1, -2], yticklabels=list(numbers), xlabel="GB read for one token", xlim=(0, 17)
    )
    figure.legend(loc="outside upper center", ncols=3)
    style.save(figure, "decode_bytes", numbers, folder)
