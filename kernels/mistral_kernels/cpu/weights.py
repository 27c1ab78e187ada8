"""A model's weights as the CPU's step reads them.

Packed matrices become tiles (tiles.py), and the model's layers give up their blocks; what the model
itself needs, it gets from the tiles. So no packed matrix is in memory twice, except those of types
that are widened to bytes (widening.py). Other matrices are read where they are.
"""

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mistral.engine.memory import has_room
from mistral.files import format_bytes
from mistral.model import Mistral
from mistral.quantization.ggml_types import GgmlType
from mistral.quantization.packed import Keeper, Packed, TiedOutput
from mistral_kernels.cpu import compiled
from mistral_kernels.cpu.layout import VALUE_BYTES
from mistral_kernels.cpu.linear import linear
from mistral_kernels.cpu.pages import Pages
from mistral_kernels.cpu.tiles import (
    KINDS,
    ROWS,
    Tiles,
    repack,
    restore,
    restore_rows,
    tiles_shape,
)
from mistral_kernels.cpu.widening import WIDENED, widen, widened_bytes
from mistral_kernels.widths import width_problem


class InTiles(Keeper):
    """Holds a layer's blocks as tiles, and multiplies with them."""

    def __init__(self, tiles: Tiles):
        self.tiles = tiles

    def blocks(self) -> Tensor:
        """All blocks: uint8 [rows, bytes of a row]."""
        return restore(self.tiles)

    def rows(self, which: Tensor) -> Tensor:
        """The blocks of some rows: int64 [n] -> uint8 [n, bytes of a row]."""
        return restore_rows(self.tiles, which)

    def linear(self, x: Tensor, kind: GgmlType) -> Tensor:
        """x W^T in float32, then in the dtype of x; the activations are rounded to 15 bits.

        If a gradient is recorded, the blocks are restored instead.
        """
        if x.requires_grad and torch.is_grad_enabled():
            return super().linear(x, kind)
        out = linear(x.reshape(-1, self.tiles.columns).float(), self.tiles)
        return out.to(x.dtype).view(*x.shape[:-1], self.tiles.rows)


class InBytes(InTiles):
    """Holds a layer's blocks, and multiplies with the signed bytes that they were widened to."""

    def __init__(self, blocks: Tensor, kind: GgmlType):
        super().__init__(widen(blocks, kind))
        self._blocks = blocks

    def blocks(self) -> Tensor:
        """All blocks: uint8 [rows, bytes of a row]."""
        return self._blocks

    def rows(self, which: Tensor) -> Tensor:
        """The blocks of some rows: int64 [n] -> uint8 [n, bytes of a row]."""
        return self._blocks.index_select(0, which)


class _Matrix(NamedTuple):
    """One matrix as a step reads it."""

    function: int  # address of its product
    data: Tensor  # what is read
    tiles: int  # 8 rows each
    source: Tensor | None = None  # of a padded copy

    @property
    def entry(self) -> tuple[int, int, int]:
        """Its line in the step's table (`Matrix` in layout.py)."""
        return self.function, self.data.data_ptr(), self.tiles


class Weights:
    """The matrices and norms of a model, and the tables of their addresses."""

    def __init__(self, model: Mistral):
        self.embedding = model.model.embed_tokens
        _repack(model)
        layers = [[_matrix(module) for module in _linears(layer)] for layer in model.model.layers]
        head = _matrix(model.lm_head)
        _return_freed_memory()
        self._kept = [layers, head]  # their memory must not be freed
        everything = [*sum(layers, []), head]
        self._padded = [matrix for matrix in everything if matrix.source is not None]
        # Where the plain matrices are
        self._sources = {name: weight.data_ptr() for name, weight in _plain_weights(model)}
        self.matrices = torch.zeros(len(layers) + 1, 7, 3, dtype=torch.int64)
        for i, layer in enumerate(layers):
            self.matrices[i] = torch.tensor([matrix.entry for matrix in layer])
        self.matrices[-1, 0] = torch.tensor(head.entry)
        self.vocab_tiles = head.tiles
        norms = [
            norm.weight
            for layer in model.model.layers
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        # float32 [2 layers + 1, D]
        self.norms = torch.stack(
            [norm.detach().float() for norm in (*norms, model.model.norm.weight)]
        )

    def check(self, model: Mistral) -> None:
        """Follow what was changed in place. ValueError if a matrix is no longer where it was."""
        now = {name: weight.data_ptr() for name, weight in _plain_weights(model)}
        if now != self._sources:
            moved = next(iter(dict(now.items() ^ self._sources.items())))
            raise ValueError(
                f"{moved} was replaced after the decoder was created: create a new decoder"
            )
        self._copy(model)

    def _copy(self, model: Mistral) -> None:
        """Copy what a step does not read where the model has it: norms, and padded matrices."""
        for i, layer in enumerate(model.model.layers):
            self.norms[2 * i] = layer.input_layernorm.weight
            self.norms[2 * i + 1] = layer.post_attention_layernorm.weight
        self.norms[-1] = model.model.norm.weight
        for matrix in self._padded:
            rows = len(matrix.source)
            matrix.data[:rows] = matrix.source

    def embed(self, ids: Tensor, out: Tensor) -> None:
        """The embeddings of ids [n] as float32, to the first n rows of out [.., D]."""
        keeper = getattr(self.embedding, "keeper", None)
        if not isinstance(keeper, InTiles):
            out[: len(ids)] = self.embedding(ids[None])[0]
            return
        tiles = keeper.tiles
        unpack = compiled.function(f"row of {tiles.kind.name}")
        for i, id in enumerate(ids.tolist()):
            unpack(tiles.data.data_ptr(), id, tiles.columns // 32, out[i].data_ptr())


def problem(model: Mistral) -> str | None:
    """Why a step cannot run the model, with the remedy; None if it can."""
    config = model.config
    if reason := width_problem(config, "the CPU kernels"):
        return reason
    if config.head_dim % 16:
        return f"the CPU kernels need a head_dim that is a multiple of 16, not {config.head_dim}"
    for name, layer in _multiplied(model):
        if layer.kind.name not in KINDS + WIDENED:
            return f"no CPU kernel multiplies {layer.kind.name}, the type of {name}"
    dtypes = {weight.dtype for _, weight in _plain_weights(model)} | {model.dtype}
    for dtype in dtypes:
        if _name(dtype) not in VALUE_BYTES:
            return f"the CPU kernels know no {dtype}: load the checkpoint in float32 or bfloat16"
    layers = _to_widen(model)
    needed = sum(widened_bytes(layer.num_rows, _columns(layer)) for layer in layers)
    if not has_room(needed, model.device):
        size = format_bytes(needed)
        return f"{_kinds(layers)} as bytes would take {size}, more than is free: free some memory"
    return None


def widening_note(model: Mistral) -> str | None:
    """What is widened before a decoder is there, which takes long; None if nothing is."""
    layers = _to_widen(model)
    if not layers:
        return None
    return f"unpacking {_kinds(layers)} to bytes, which may take minutes"


def widened_note(model: Mistral) -> str | None:
    """Which types were widened, and what they take; None if none was."""
    layers = [layer for layer in model.modules() if isinstance(layer, Packed)]
    layers = [layer for layer in layers if isinstance(layer.keeper, InBytes)]
    if not layers:
        return None
    packed = sum(layer.keeper.blocks().nbytes for layer in layers)
    both = packed + sum(layer.keeper.tiles.data.nbytes for layer in layers)
    return f"{_kinds(layers)} multiplied as bytes, with {both / packed:.1f} times the file's memory"


def _multiplied(model: Mistral) -> Iterator[tuple[str, Packed]]:
    """The packed layers that are multiplied, by name: of an embedding any row can be unpacked."""
    for name, module in model.named_modules():
        layer = _holder(module)
        if isinstance(layer, Packed) and module is not model.model.embed_tokens:
            yield name, layer


def _to_widen(model: Mistral) -> list[Packed]:
    """The layers that a decoder would widen."""
    layers = [layer for _, layer in _multiplied(model)]
    return [layer for layer in layers if layer.keeper is None and layer.kind.name in WIDENED]


def _columns(layer: Packed) -> int:
    return layer.row_bytes // layer.kind.block_bytes * layer.kind.block_weights


def _kinds(layers: list[Packed]) -> str:
    return ", ".join(sorted({layer.kind.name for layer in layers}))


def kernels_for(model: Mistral, cache_dtype: torch.dtype) -> list[str]:
    """The names of all compiled functions that a decoder of the model calls (compiled.py)."""
    names = ["step", "round rows", "norm rows", "gate rows", "rotate rows"]
    names += [f"attention of {_name(cache_dtype)}", f"storing of {_name(cache_dtype)}"]
    names += [f"plain product of {_name(weight.dtype)}" for _, weight in _plain_weights(model)]
    for module in model.modules():
        if isinstance(module, Packed) and module.kind.name in KINDS:
            names += [f"product of {module.kind.name}", f"tiles of {module.kind.name}"]
    if any(layer.kind.name in WIDENED for _, layer in _multiplied(model)):
        names += ["product of bytes", "row of bytes"]
    embedding = model.model.embed_tokens
    if isinstance(embedding, Packed) and embedding.kind.name in KINDS:
        names.append(f"row of {embedding.kind.name}")
    return list(dict.fromkeys(names))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain_weights(model: Mistral) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield f"{name}.weight", module.weight.data


def _linears(layer: nn.Module) -> tuple[nn.Module, ...]:
    attention = layer.self_attn
    mlp = layer.mlp
    return (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )


def _repack(model: Mistral) -> None:
    """Packed matrices become tiles, in the order of a step; their layers give up the blocks."""
    modules = [module for layer in model.model.layers for module in _linears(layer)]
    modules = [*map(_holder, modules), _holder(model.lm_head), model.model.embed_tokens]
    packed = [
        module
        for module in dict.fromkeys(modules)
        if isinstance(module, Packed) and module.keeper is None and module.kind.name in KINDS
    ]
    shapes = [tiles_shape(module.blocks) for module in packed]
    memory = Pages(sum(tiles * size for tiles, size in shapes), pieces=len(packed))
    for module, shape in zip(packed, shapes):
        module.hand_over(InTiles(repack(module.blocks, module.kind, memory.take(*shape))))


def _return_freed_memory() -> None:
    """Give freed blocks back to the system, which glibc would keep. Other C libraries cannot."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _holder(module: nn.Module) -> nn.Module:
    """The module that has the matrix."""
    return module.embedding if isinstance(module, TiedOutput) else module


def _matrix(module: nn.Module) -> _Matrix:
    layer = _holder(module)
    if isinstance(layer, Packed) and layer.keeper is None:
        layer.hand_over(InBytes(layer.blocks, layer.kind))
    if isinstance(layer, Packed):
        if not isinstance(layer.keeper, InTiles):
            raise ValueError("another engine holds the packed weights: load the checkpoint again")
        data = layer.keeper.tiles.data
        function = compiled.address(f"product of {layer.keeper.tiles.kind.name}")
        return _Matrix(function=function, data=data, tiles=len(data))
    weight = layer.weight.data
    function = compiled.address(f"plain product of {_name(weight.dtype)}")
    if weight.is_contiguous() and len(weight) % ROWS == 0:
        return _Matrix(function=function, data=weight, tiles=len(weight) // ROWS)
    tiles = -(-len(weight) // ROWS)
    data = weight.new_zeros(ROWS * tiles, weight.shape[1])
    return _Matrix(function=function, data=data, tiles=tiles, source=weight)
