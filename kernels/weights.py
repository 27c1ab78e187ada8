"""The model's own weights as the kernels read them: nothing is copied that stays.

Plain matrices that read the same x lie above each other in one tensor, and the model's parameters become views of it.
Packed ones become planes, and the model's layers give up their blocks and read them from the planes (slowly: they are
put together again at each use). What has no planes stays as it is, to be unpacked before each use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mistral.model import Block, Mistral
from mistral.quantization.packed import Packed, TiedOutput
from mistral.rms_norm import RMSNorm
from mistral_kernels.dequantize import Blocks, Matrix
from mistral_kernels.matvec import scaled_norm
from mistral_kernels.planes import FAST_KINDS, Planes, fits, repack, restore, restore_rows


class Scaled(NamedTuple):
    """A norm's weight, and the power of two that it carries: see `scaled_norm`."""

    weight: Tensor  # [D]
    gain: float


@dataclass(frozen=True)
class ToUnpack:
    """Matrices with the same input that no kernel takes as they are: they are unpacked above each other first."""

    parts: tuple[Matrix, ...]


# What a kernel takes, but for the last, which a Workspace makes a Tensor of.
Weight = Tensor | Planes | tuple[Planes, ...] | ToUnpack


class LayerWeights(NamedTuple):
    """One block."""

    qkv: Weight  # [(N + 2K) H, D]
    o: Weight  # [D, N H]
    gate_up: Weight  # [2F, D]
    down: Weight  # [D, F]
    input_norm: Scaled
    post_norm: Scaled


class Weights(NamedTuple):
    """The whole model."""

    embedding: Matrix  # [V, D]
    frequencies: Tensor  # fp32 [H/2]
    layers: list[LayerWeights]
    norm: Scaled
    head: Weight  # [V, D]
    activations: torch.dtype  # of the matrices' inputs


class InPlanes:
    """Who keeps the blocks of a layer of the model: see `mistral.quantization.packed.Keeper`."""

    def __init__(self, planes: Planes):
        self.planes = planes

    def blocks(self) -> Tensor:
        """All of them, made again."""
        return restore(self.planes)

    def rows(self, which: Tensor) -> Tensor:
        """Those of some rows."""
        return restore_rows(self.planes, which)


@torch.no_grad()
def weights_of(model: Mistral) -> Weights:
    """The weights of a model; those of Q, K, V and those of gate and up now lie above each other in one matrix each.

    The model stays what it is: its parameters become views of those matrices, its packed layers read the planes. Matrix
    by matrix, so that little is in memory twice.
    """
    trunk = model.model
    embedding, head = repacked(trunk.embed_tokens), _weight(model.lm_head)
    matrices = [_matrices(layer) for layer in trunk.layers]
    # The scales of packed weights need more digits than bfloat16 has, and so their inputs come in float16.
    planes = [isinstance(part, Planes) for weight in (embedding, head, *sum(matrices, ())) for part in _direct(weight)]
    activations = torch.float16 if any(planes) and model.dtype != torch.float32 else model.dtype

    def scaled(norm: RMSNorm) -> Scaled:
        return Scaled(*scaled_norm(norm.weight.data, activations))

    layers = [
        LayerWeights(*four, scaled(layer.input_layernorm), scaled(layer.post_attention_layernorm))
        for four, layer in zip(matrices, trunk.layers)
    ]
    return Weights(embedding, trunk.rotary.frequencies, layers, scaled(trunk.norm), head, activations)


def matrix_of(module: nn.Module) -> Matrix:
    """The matrix of a layer, as it is."""
    if isinstance(module, TiedOutput):
        return matrix_of(module.embedding)
    if not isinstance(module, Packed):
        return module.weight.data
    return module.keeper.planes if isinstance(module.keeper, InPlanes) else Blocks(module.all_blocks(), module.kind)


def repacked(module: nn.Module) -> Matrix:
    """The matrix of a layer; one that is packed in a kind that has kernels becomes planes and gives up its blocks.

    Waits for the device then: where scales are infinite or no numbers, the blocks stay, and are unpacked.
    """
    layer = module.embedding if isinstance(module, TiedOutput) else module
    if isinstance(layer, Packed) and layer.keeper is None and layer.kind.name in FAST_KINDS:
        planes = repack(layer.blocks, layer.kind)
        if fits(planes):
            layer.hand_over(InPlanes(planes))
    return matrix_of(layer)


def unpacked_kinds(weights: Weights) -> list[str]:
    """The kinds of matrices that are unpacked at every step."""
    parts = [part for weight in _all(weights) if isinstance(weight, ToUnpack) for part in weight.parts]
    return sorted({part.kind.name for part in parts if not isinstance(part, Tensor)})


def workspace_numbers(weights: Weights) -> int:
    """How many numbers a `Workspace` must hold: the most that a step unpacks at once, and any packed matrix of a layer.

    The output matrix, the largest, is read for few rows of a prompt and may come in pieces there.
    """
    at_once = [sum(map(_numbers, weight.parts)) for weight in _all(weights) if isinstance(weight, ToUnpack)]
    *layers, head = [
        [_numbers(part) for part in _parts(weight) if not isinstance(part, Tensor)] for weight in _all(weights)
    ]
    return max(at_once + sum(layers, []) + [min(size, 1 << 24) for size in head], default=0)


def _all(weights: Weights) -> list[Weight]:
    """The output matrix is the last."""
    return [weight for layer in weights.layers for weight in layer[:4]] + [weights.head]


def _parts(weight: Weight) -> tuple[Matrix, ...]:
    if isinstance(weight, ToUnpack):
        return weight.parts
    return weight if isinstance(weight, tuple) else (weight,)


def _direct(weight: Weight | Blocks) -> tuple[Matrix, ...]:
    return () if isinstance(weight, (ToUnpack, Blocks)) else _parts(weight)


def _numbers(matrix: Matrix) -> int:
    rows, columns = matrix.shape
    return rows * columns


def _matrices(layer: Block) -> tuple[Weight, ...]:
    """Q, K and V; O; gate and up; down."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        _weight(attention.q_proj, attention.k_proj, attention.v_proj),
        _weight(attention.o_proj),
        _weight(mlp.gate_proj, mlp.up_proj, one_kind=True),
        _weight(mlp.down_proj),
    )


def _weight(*modules: nn.Module, one_kind: bool = False) -> Weight:
    """The matrices of some layers. `one_kind`: the kernel multiplies packed ones only if they are of one kind."""
    if all(isinstance(module, nn.Linear) for module in modules):
        return stacked(modules)
    parts = tuple(map(repacked, modules))
    if not all(isinstance(part, Planes) for part in parts) or (one_kind and len({part.kind for part in parts}) > 1):
        return ToUnpack(parts)
    return parts if len(parts) > 1 else parts[0]


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
