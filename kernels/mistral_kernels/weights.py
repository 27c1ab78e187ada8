"""The model's own weights in the layout of the kernels; no matrix stays in memory twice.

Plain matrices with the same input are stacked in one tensor, and the model's parameters become
views of it. Packed ones become planes, and the model's layers give up their blocks: if the model
itself needs them, they are rebuilt from the planes at each use, which is slow. A matrix whose
quantization type has no planes stays as it is, and is unpacked before each use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mistral.model import Block, Mistral
from mistral.quantization.packed import Keeper, Packed, TiedOutput
from mistral.rms_norm import RMSNorm
from mistral_kernels.decode.matvec import scaled_norm
from mistral_kernels.packed.dequantize import Blocks, Matrix
from mistral_kernels.packed.planes import FAST_KINDS, Planes, fits, repack, restore, restore_rows


class _Scaled(NamedTuple):
    """A norm's weight, and the power of two in it: see `scaled_norm`."""

    weight: Tensor  # [D]
    gain: float


@dataclass(frozen=True)
class ToUnpack:
    """Matrices with the same input that no kernel takes together: they are unpacked at each use."""

    parts: tuple[Matrix, ...]


# Kernels take the first three. A Workspace (packed/dequantize.py) unpacks a ToUnpack to a Tensor.
Weight = Tensor | Planes | tuple[Planes, ...] | ToUnpack


class _LayerWeights(NamedTuple):
    """The weights of one block."""

    qkv: Weight  # [(N + 2K) H, D]
    o: Weight  # [D, N H]
    gate_up: Weight  # [2F, D]
    down: Weight  # [D, F]
    input_norm: _Scaled
    post_norm: _Scaled


class Weights(NamedTuple):
    """The weights of the whole model."""

    embedding: Matrix  # [V, D]
    frequencies: Tensor  # fp32 [H/2], of Rotary
    attention_factor: float  # of Rotary
    layers: list[_LayerWeights]
    norm: _Scaled
    head: Weight  # [V, D]
    activations: torch.dtype  # of the inputs of matrices: x, y and h


class _InPlanes(Keeper):
    """Holds a layer's blocks as planes."""

    def __init__(self, planes: Planes):
        self.planes = planes

    def blocks(self) -> Tensor:
        """All blocks, rebuilt: uint8 [rows, bytes of a row]."""
        return restore(self.planes)

    def rows(self, which: Tensor) -> Tensor:
        """The blocks of some rows: int64 [n] -> uint8 [n, bytes of a row]."""
        return restore_rows(self.planes, which)


@torch.inference_mode(False)  # else the model's parameters could not be trained any more
@torch.no_grad()
def weights_of(model: Mistral) -> Weights:
    """The weights of a model; Q, K and V are now stacked in one matrix, and gate and up in another.

    The model still computes the same: its parameters become views of those matrices, its packed
    layers read the planes. It is changed matrix by matrix, so little is in memory twice at any
    time.
    """
    trunk = model.model
    embedding = _repacked(trunk.embed_tokens)
    head = _weight(model.lm_head)
    matrices = []
    for layer in trunk.layers:
        matrices.append(_matrices(layer))
        if model.device.type == "cuda":
            # The memory of a layer's parts is too fragmented for the next one's larger matrices.
            torch.cuda.empty_cache()
    # Packed weights are multiplied in the dtype of x. Their scales need more digits than bfloat16
    # has.
    weights = (embedding, head, *sum(matrices, ()))
    packed = any(isinstance(part, Planes) for weight in weights for part in _as_they_are(weight))
    activations = torch.float16 if packed and model.dtype != torch.float32 else model.dtype

    def scaled(norm: RMSNorm) -> _Scaled:
        return _Scaled(*scaled_norm(norm.weight.data, activations))

    layers = [
        _LayerWeights(*four, scaled(layer.input_layernorm), scaled(layer.post_attention_layernorm))
        for four, layer in zip(matrices, trunk.layers)
    ]
    return Weights(
        embedding=embedding,
        frequencies=trunk.rotary.frequencies,
        attention_factor=trunk.rotary.attention_factor,
        layers=layers,
        norm=scaled(trunk.norm),
        head=head,
        activations=activations,
    )


def matrix_of(module: nn.Module) -> Matrix:
    """The matrix of a layer in its present form."""
    if isinstance(module, TiedOutput):
        return matrix_of(module.embedding)
    if not isinstance(module, Packed):
        return module.weight.data
    if isinstance(module.keeper, _InPlanes):
        return module.keeper.planes
    return Blocks(module.all_blocks(), module.kind)


def _repacked(module: nn.Module) -> Matrix:
    """The matrix of a layer.

    If it is packed in a type that has kernels, it becomes planes and the layer gives up its blocks.
    This synchronizes: if scales are infinite or NaN, the blocks stay, to be unpacked.
    """
    layer = module.embedding if isinstance(module, TiedOutput) else module
    if isinstance(layer, Packed) and layer.keeper is None and layer.kind.name in FAST_KINDS:
        planes = repack(layer.blocks, layer.kind)
        if fits(planes):
            layer.hand_over(_InPlanes(planes))
    return matrix_of(layer)


def unpacked_kinds(weights: Weights) -> list[str]:
    """The names of the quantization types that are unpacked at every step, sorted."""
    parts = [
        part for weight in _all(weights) if isinstance(weight, ToUnpack) for part in weight.parts
    ]
    return sorted({part.kind.name for part in parts if not isinstance(part, Tensor)})


def workspace_size(weights: Weights) -> int:
    """How many weights a `Workspace` must hold.

    The most that a step unpacks at once, and any packed matrix of a layer. The output matrix, the
    largest, is needed for few rows of a prompt: there it may come in pieces.
    """
    *layers, head = _all(weights)
    sizes = []
    for weight in (*layers, head):
        if isinstance(weight, ToUnpack):
            sizes.append(sum(map(_size, weight.parts)))
    sizes += [_size(part) for weight in layers for part in _packed_parts(weight)]
    sizes += [min(_size(part), 1 << 24) for part in _packed_parts(head)]
    return max(sizes, default=0)


def _all(weights: Weights) -> list[Weight]:
    """The matrices of the layers, then the output matrix."""
    return [weight for layer in weights.layers for weight in layer[:4]] + [weights.head]


def _parts(weight: Weight) -> tuple[Matrix, ...]:
    if isinstance(weight, ToUnpack):
        return weight.parts
    return weight if isinstance(weight, tuple) else (weight,)


def _packed_parts(weight: Weight) -> list[Matrix]:
    return [part for part in _parts(weight) if not isinstance(part, Tensor)]


def _as_they_are(weight: Weight | Blocks) -> tuple[Matrix, ...]:
    """The matrices that a kernel takes without unpacking."""
    return () if isinstance(weight, (ToUnpack, Blocks)) else _parts(weight)


def _size(matrix: Matrix) -> int:
    """How many weights it has."""
    rows, columns = matrix.shape
    return rows * columns


def _matrices(layer: Block) -> tuple[Weight, ...]:
    """Q, K and V; O; gate and up; down."""
    attention = layer.self_attn
    mlp = layer.mlp
    return (
        _weight(attention.q_proj, attention.k_proj, attention.v_proj),
        _weight(attention.o_proj),
        _weight(mlp.gate_proj, mlp.up_proj, one_kind=True),
        _weight(mlp.down_proj),
    )


def _weight(*modules: nn.Module, one_kind: bool = False) -> Weight:
    """The matrices of some layers, for one kernel.

    one_kind  the kernel takes packed ones only if they have the same quantization type
    """
    if all(isinstance(module, nn.Linear) for module in modules):
        return _stacked(modules)
    parts = tuple(map(_repacked, modules))
    if not all(isinstance(part, Planes) for part in parts):
        return ToUnpack(parts)
    if one_kind and len({part.kind for part in parts}) > 1:
        return ToUnpack(parts)
    return parts if len(parts) > 1 else parts[0]


def _stacked(linears: Sequence[nn.Linear]) -> Tensor:
    """Their weights as one tensor [rows of all, columns]; the layers' own become views of it."""
    together = already_stacked(linears)
    if together is None:
        weights = [linear.weight.data for linear in linears]
        together = torch.cat(weights)
        for linear, part in zip(linears, together.split([len(weight) for weight in weights])):
            linear.weight.data = part
    return together


def already_stacked(linears: Sequence[nn.Linear]) -> Tensor | None:
    """The weights of some layers as one tensor [rows of all, columns], if they are views of one.

    None if a weight was replaced since `weights_of` has stacked them, or if it never has.
    """
    weights = [linear.weight.data for linear in linears]
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    if [weight.data_ptr() for weight in weights[1:]] != ends[:-1]:
        return None
    if len({weight.untyped_storage().data_ptr() for weight in weights}) > 1:
        return None
    columns = weights[0].shape[1]
    rows = sum(len(weight) for weight in weights)
    return weights[0].as_strided((rows, columns), (columns, 1))
