"""One tensor, three names: Hugging Face's (ours), Mistral's own files', and GGUF's.

Beyond the names there is one difference: for the rotary embedding Hugging Face pairs element i of a
head with element i + H/2, and the other two pair neighbours. So the rows of each head of Q and K
have another order there; `half_split_rows` brings them into ours.
"""

import torch
from torch import Tensor

from mistral.config import Config

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"

_OUTSIDE_THE_LAYERS = {  # Hugging Face: (Mistral's own, GGUF)
    EMBEDDING: ("tok_embeddings.weight", "token_embd.weight"),
    "model.norm.weight": ("norm.weight", "output_norm.weight"),
    OUTPUT: ("output.weight", "output.weight"),
}
_IN_A_LAYER = {
    "input_layernorm": ("attention_norm", "attn_norm"),
    "self_attn.q_proj": ("attention.wq", "attn_q"),
    "self_attn.k_proj": ("attention.wk", "attn_k"),
    "self_attn.v_proj": ("attention.wv", "attn_v"),
    "self_attn.o_proj": ("attention.wo", "attn_output"),
    "post_attention_layernorm": ("ffn_norm", "ffn_norm"),
    "mlp.gate_proj": ("feed_forward.w1", "ffn_gate"),
    "mlp.up_proj": ("feed_forward.w3", "ffn_up"),
    "mlp.down_proj": ("feed_forward.w2", "ffn_down"),
}


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by Hugging Face's name, computed without building the model."""
    D = config.hidden_size
    F = config.intermediate_size
    V = config.vocab_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    in_a_layer = {
        "input_layernorm": (D,),
        "self_attn.q_proj": (q, D),
        "self_attn.k_proj": (kv, D),
        "self_attn.v_proj": (kv, D),
        "self_attn.o_proj": (D, q),
        "post_attention_layernorm": (D,),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    shapes = {EMBEDDING: (V, D)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in in_a_layer.items()}
    return shapes | {"model.norm.weight": (D,), OUTPUT: (V, D)}


def hugging_face_names(num_layers: int) -> dict[str, str]:
    """Hugging Face's name -> itself, for every tensor."""
    return {name: name for name in consolidated_names(num_layers)}


def consolidated_names(num_layers: int) -> dict[str, str]:
    """Hugging Face's name -> Mistral's own, for every tensor."""
    return _names(num_layers, column=0, layer="layers")


def gguf_names(num_layers: int) -> dict[str, str]:
    """Hugging Face's name -> GGUF's, for every tensor."""
    return _names(num_layers, column=1, layer="blk")


def _names(num_layers: int, column: int, layer: str) -> dict[str, str]:
    names = {ours: theirs[column] for ours, theirs in _OUTSIDE_THE_LAYERS.items()}
    for i in range(num_layers):
        for ours, theirs in _IN_A_LAYER.items():
            names[f"model.layers.{i}.{ours}.weight"] = f"{layer}.{i}.{theirs[column]}.weight"
    return names


def rotary_heads(name: str, config: Config) -> int | None:
    """The number of heads in the rows of a Q or K matrix; None for every other tensor.

    name  Hugging Face's
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(name.split(".")[-2])


def half_split_rows(num_rows: int, num_heads: int) -> Tensor:
    """The place of each of our rows in a file that pairs neighbours: int64 [rows].

    In a head of size 6, rows a0 b0 a1 b1 a2 b2 become a0 a1 a2 b0 b1 b2.
    """
    head_dim = num_rows // num_heads
    return torch.arange(num_rows).view(num_heads, head_dim // 2, 2).transpose(1, 2).reshape(-1)


def interleaved_rows(num_rows: int, num_heads: int) -> Tensor:
    """The inverse: the place of each row of a file that pairs neighbours among ours."""
    head_dim = num_rows // num_heads
    return torch.arange(num_rows).view(num_heads, 2, head_dim // 2).transpose(1, 2).reshape(-1)
