"""The model's own weights as the kernels read them: nothing is copied that stays."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mistral.model import Block, Mistral
from mistral_kernels.matvec import scaled_norm


class Scaled(NamedTuple):
    """A norm's weight, and the power of two that it carries: see `scaled_norm`."""

    weight: Tensor  # [D]
    gain: float


class LayerWeights(NamedTuple):
    """One block."""

    qkv: Tensor  # [(N + 2K) H, D]
    o: Tensor  # [D, N H]
    gate_up: Tensor  # [2F, D]
    down: Tensor  # [D, F]
    input_norm: Scaled
    post_norm: Scaled


class Weights(NamedTuple):
    """The whole model."""

    embedding: Tensor  # [V, D]
    frequencies: Tensor  # fp32 [H/2]
    layers: list[LayerWeights]
    norm: Scaled
    head: Tensor  # [V, D]


@torch.no_grad()
def weights_of(model: Mistral) -> Weights:
    """The weights of a model; those of Q, K, V and those of gate and up now lie above each other in one matrix each.

    The model stays what it is: its parameters become views of those matrices. Layer by layer, so that no more than
    one layer is in memory twice. Raises ValueError for packed weights.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) and hasattr(module, "kind"):
            raise ValueError(
                f"{name} is packed ({module.kind.name}); the kernels read plain weights: load without packed"
            )
    trunk = model.model
    return Weights(
        trunk.embed_tokens.weight.data,
        trunk.rotary.frequencies,
        [_layer_weights(layer) for layer in trunk.layers],
        Scaled(*scaled_norm(trunk.norm.weight.data)),
        model.lm_head.weight.data,
    )


def _layer_weights(layer: Block) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        stacked((attention.q_proj, attention.k_proj, attention.v_proj)),
        attention.o_proj.weight.data,
        stacked((mlp.gate_proj, mlp.up_proj)),
        mlp.down_proj.weight.data,
        Scaled(*scaled_norm(layer.input_layernorm.weight.data)),
        Scaled(*scaled_norm(layer.post_attention_layernorm.weight.data)),
    )


def stacked(linears: Sequence[nn.Linear]) -> Tensor:
    """Their weights above each other as one matrix, of which their own are views from then on."""
    weights = [linear.weight.data for linear in linears]
    rows, columns = [len(weight) for weight in weights], weights[0].shape[1]
    first, ends = weights[0], [weight.data_ptr() + weight.nbytes for weight in weights]
    shared = all(weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for weight in weights)
    if shared and [weight.data_ptr() for weight in weights[1:]] == ends[:-1]:  # another decoder was here before
        return first.as_strided((sum(rows), columns), (columns, 1))
    together = torch.cat(weights)
    for linear, part in zip(linears, together.split(rows)):
        linear.weight.data = part
    return together
