"""Packed models of random weights: valid blocks, made where they are used."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import mistral
from benchmark_parts import mixtures
from mistral.quantization.packed import Packed, PackedEmbedding, PackedLinear, TiedOutput

FORMATS = ("Q4_K_M", "Q5_K_M", "Q4_0", "Q6_K", "Q8_0", "Q3_K_M", "Q2_K", "IQ4_XS")
# Where a block has its float16 scales, and what they must be for weights of about 0.02
SCALES = {
    "Q4_0": {0: 4e-3},
    "Q8_0": {0: 2.7e-4},
    "Q2_K": {80: 1.8e-3, 82: 2.6e-3},
    "Q3_K": {108: 4.3e-4},
    "Q4_K": {0: 1.3e-4, 2: 1e-3},
    "Q5_K": {0: 6.5e-5, 2: 1e-3},
    "Q6_K": {208: 1.5e-5},
    "IQ4_XS": {0: 1.6e-5},
}


def replace_matrices(model: mistral.Mistral, format: str) -> None:
    """Replace all matrices by packed layers; on `meta`, their blocks are not allocated yet."""
    layers = model.config.num_hidden_layers
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    for name, module in list(model.named_modules()):
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        owner, _, last = name.rpartition(".")
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        kind = mixtures.kind_of(format, last, layer, layers, group)
        rows, columns = module.weight.shape
        if columns % kind.block_weights:
            raise ValueError(
                f"{name} has rows of {columns}, and {kind.name} stores blocks of "
                f"{kind.block_weights}"
            )
        size = rows, columns // kind.block_weights * kind.block_bytes
        blocks = torch.empty(size, dtype=torch.uint8, device=module.weight.device)
        embedding = isinstance(module, nn.Embedding)
        packed = (
            PackedEmbedding(blocks, kind, model.dtype) if embedding else PackedLinear(blocks, kind)
        )
        setattr(model.get_submodule(owner), last, packed)


def fill(model: mistral.Mistral, factor: Callable[[str], float]) -> None:
    """Random blocks in all packed layers.

    factor  of the weights of a matrix, by its name; 1: they are as large as `SCALES` makes them
    """
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            blocks = module.blocks.view(-1, module.kind.block_bytes)
            blocks.random_(0, 256)
            for at, size in SCALES[module.kind.name].items():
                blocks[:, at : at + 2] = _scale(size * factor(name), blocks)


def packed_bytes(model: mistral.Mistral, embedding: bool) -> int:
    """What the packed layers take, with the embedding or without; a tied one is always read."""
    layers = [module for module in model.modules() if isinstance(module, Packed)]
    tied = isinstance(model.lm_head, TiedOutput)
    return sum(
        layer.num_rows * layer.row_bytes
        for layer in layers
        if embedding or tied or not isinstance(layer, PackedEmbedding)
    )


def _scale(size: float, blocks: Tensor) -> Tensor:
    return torch.tensor([size], dtype=torch.float16, device=blocks.device).view(torch.uint8)
