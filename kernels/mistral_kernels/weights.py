"""The model's own weights as the kernels read them; no matrix stays in memory twice.

Plain matrices that read the same x lie above each other in one tensor, and the model's parameters
become views of it. Packed ones become planes, and the model's layers give up their blocks: where
the model itself needs them, they are made again from the planes at each use, which is slow. A
matrix whose kind has no planes stays as it is, to be unpacked before each use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mistral.model import Block, Mistral
from mistral.quantization.packed import Packed, TiedOutput
from mistral.rms_norm import RMSNorm
from mistral_kernels.decode.matvec import scaled_norm
from mistral_kernels.packed.dequantize import Blocks, Matrix
from mistral_kernels.packed.planes import FAST_KINDS, Planes, fits, repack, restore, restore_rows


class Scaled(NamedTuple):
    """A norm's weight, and the power of two that it carries: see `scaled_norm`."""

    weight: Tensor  # [D]
    gain: float


@dataclass(frozen=True)
class ToUnpack:
    """Matrices with the same input that no kernel takes together as they are: unpacked above each
    other first.
    """

    parts: tuple[Matrix, ...]


# The first three are what kernels take. Of a ToUnpack a Workspace (dequantize.py) makes a Tensor.
Weight = Tensor | Planes | tuple[Planes, ...] | ToUnpack


class LayerWeights(NamedTuple):
    """Those of one block."""

    qkv: Weight  # [(N + 2K) H, D]
    o: Weight  # [D, N H]
    gate_up: Weight  # [2F, D]
    down: Weight  # [D, F]
    input_norm: Scaled
    post_norm: Scaled


class Weights(NamedTuple):
    """Those of the whole model."""

    embedding: Matrix  # [V, D]
    frequencies: Tensor  # fp32 [H/2]
    layers: list[LayerWeights]
    norm: Scaled
    head: Weight  # [V, D]
    activations: torch.dtype  # of the matrices' inputs, x, y and h


class InPlanes:
    """A `Keeper` (mistral/quantization/packed.py) of a layer's blocks, which has them as planes."""

    def __init__(self, planes: Planes):
        self.planes = planes

    def blocks(self) -> Tensor:
        """All of them, made again: uint8 [rows, bytes of a row]."""
        return restore(self.planes)

    def rows(self, which: Tensor) -> Tensor:
        """Those of some rows: int64 [n] -> uint8 [n, bytes of a row]."""
        return restore_rows(self.planes, which)


@torch.no_grad()
def weights_of(model: Mistral) -> Weights:
    """The weights of a model; those of Q, K, V and those of gate and up now lie above each other in
    one matrix each.

    The model computes what it did: its parameters become views of those matrices, its packed layers
    read the planes. It is changed matrix by matrix, so that little is in memory twice at any time.
    """
    trunk = model.model
    embedding, head = repacked(trunk.embed_tokens), _weight(model.lm_head)
    matrices = []
    for layer in trunk.layers:
        matrices.append(_matrices(layer))
        if model.device.type == "cuda":
            # what a layer's parts took can hold none of the next one's larger matrices
            torch.cuda.empty_cache()
    # Packed weights are multiplied in the dtype of x, and their scales need more digits than
    # bfloat16 has.
    read = [
        part for weight in (embedding, head, *sum(matrices, ())) for part in _as_they_are(weight)
    ]
    packed = any(isinstance(part, Planes) for part in read)
    activations = torch.float16 if packed and model.dtype != torch.float32 else model.dtype

    def scaled(norm: RMSNorm) -> Scaled:
        return Scaled(*scaled_norm(norm.weight.data, activations))

    layers = [
        LayerWeights(*four, scaled(layer.input_layernorm), scaled(layer.post_attention_layernorm))
        for four, layer in zip(matrices, trunk.layers)
    ]
    return Weights(
        embedding, trunk.rotary.frequencies, layers, scaled(trunk.norm), head, activations
    )


def matrix_of(module: nn.Module) -> Matrix:
    """The matrix of a layer, in the form that it has now."""
    if isinstance(module, TiedOutput):
        return matrix_of(module.embedding)
    if not isinstance(module, Packed):
        return module.weight.data
    return (
        module.keeper.planes
        if isinstance(module.keeper, InPlanes)
        else Blocks(module.all_blocks(), module.kind)
    )


def repacked(module: nn.Module) -> Matrix:
    """The matrix of a layer; one that is packed in a kind that has kernels becomes planes and gives
    up its blocks.

    Waits for the device then: where scales are infinite or NaN, the blocks stay, to be unpacked.
    """
    layer = module.embedding if isinstance(module, TiedOutput) else module
    if isinstance(layer, Packed) and layer.keeper is None and layer.kind.name in FAST_KINDS:
        planes = repack(layer.blocks, layer.kind)
        if fits(planes):
            layer.hand_over(InPlanes(planes))
    return matrix_of(layer)


def unpacked_kinds(weights: Weights) -> list[str]:
    """The names of the kinds of matrices that are unpacked at every step, sorted."""
    parts = [
        part for weight in _all(weights) if isinstance(weight, ToUnpack) for part in weight.parts
    ]
    return sorted({part.kind.name for part in parts if not isinstance(part, Tensor)})


def workspace_numbers(weights: Weights) -> int:
    """How many numbers a `Workspace` must hold: the most that a step unpacks at once, and any
    packed matrix of a layer.

    The output matrix, the largest, is read for few rows of a prompt and may come in pieces there.
    """
    *layers, head = _all(weights)
    sizes = [
        sum(map(_numbers, weight.parts))
        for weight in (*layers, head)
        if isinstance(weight, ToUnpack)
    ]
    sizes += [_numbers(part) for weight in layers for part in _packed_parts(weight)]
    sizes += [min(_numbers(part), 1 << 24) for part in _packed_parts(head)]
    return max(sizes, default=0)


def _all(weights: Weights) -> list[Weight]:
    """The matrices of the layers, and behind them the output matrix."""
    return [weight for layer in weights.layers for weight in layer[:4]] + [weights.head]


def _parts(weight: Weight) -> tuple[Matrix, ...]:
    if isinstance(weight, ToUnpack):
        return weight.parts
    return weight if isinstance(weight, tuple) else (weight,)


def _packed_parts(weight: Weight) -> list[Matrix]:
    return [part for part in _parts(weight) if not isinstance(part, Tensor)]


def _as_they_are(weight: Weight | Blocks) -> tuple[Matrix, ...]:
    """The matrices that a kernel reads without unpacking."""
    return () if isinstance(weight, (ToUnpack, Blocks)) else _parts(weight)


def _numbers(matrix: Matrix) -> int:
    """How many numbers it has."""
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
    """The matrices of some layers, for one kernel;

    `one_kind`: which takes packed ones only if they are of one kind.
    """
    if all(isinstance(module, nn.Linear) for module in modules):
        return stacked(modules)
    parts = tuple(map(repacked, modules))
    if not all(isinstance(part, Planes) for part in parts) or (
        one_kind and len({part.kind for part in parts}) > 1
    ):
        return ToUnpack(parts)
    return parts if len(parts) > 1 else parts[0]


def stacked(linears: Sequence[nn.Linear]) -> Tensor:
    """Their weights above each other as one [rows of all, columns], of which their own are views
    from then on.
    """
    weights = [linear.weight.data for linear in linears]
    rows, columns = [len(weight) for weight in weights], weights[0].shape[1]
    first, ends = weights[0], [weight.data_ptr() + weight.nbytes for weight in weights]
    shared = all(
        weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for weight in weights
    )
    if (
        shared and [weight.data_ptr() for weight in weights[1:]] == ends[:-1]
    ):  # another decoder was here before
        return first.as_strided((sum(rows), columns), (columns, 1))
    together = torch.cat(weights)
    for linear, part in zip(linears, together.split(rows)):
        linear.weight.data = part
    return together
