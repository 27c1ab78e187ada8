"""One forward of one new token a row: the kernels in their order, and the memory that they pass
things on in.

    embed                                                     token, position -> residual, x
    for each layer:  qkv        x -> queries; key and value into the ring
                     attend     queries, ring -> y
                     project    residual += y O^T;     x
                     gate_up    x -> h = silu(gate) * up
                     project    residual += h down^T;  x
    head                                                      x -> logits

5 launches a layer and 2 more (7B: 162). Nothing is read back or decided by the host, and what the
kernels pass on stays in place, so that a CUDA graph of `run` serves every later step. The residual
stream is float32: only what a matrix reads is rounded.

Packed matrices are multiplied as they are. One that no kernel can take like that is unpacked ahead
of its kernel, at every step, into memory that all such matrices share. That takes more launches and
is slow, but the model stays as small as its file.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mistral.cache import RollingCache
from mistral.model import Mistral
from mistral.quantization.dequantize import dequantize as dequantize_blocks
from mistral_kernels.decode import attention as decode_attention
from mistral_kernels.decode import embed, gate_up, head, projection, qkv
from mistral_kernels.decode.matvec import TILE
from mistral_kernels.packed import dequantize
from mistral_kernels.packed.dequantize import Blocks, Workspace
from mistral_kernels.packed.planes import Planes
from mistral_kernels.weights import ToUnpack, Weight, weights_of, workspace_numbers


class Operations(NamedTuple):
    """The six operations of a step, and the one that unpacks matrices.

    There are two sets, with the same arguments.
    """

    embed: Callable[..., None]
    qkv: Callable[..., None]
    attend: Callable[..., None]
    project: Callable[..., None]
    gate_up: Callable[..., None]
    head: Callable[..., None]
    unpack: Callable[..., None]


KERNELS = Operations(
    embed.embed, qkv.qkv, decode_attention.attend, projection.project, gate_up.gate_up, head.head,
    dequantize.unpack
)  # fmt: skip
REFERENCES = Operations(
    embed.embed_reference, qkv.qkv_reference, decode_attention.attend_reference,
    projection.project_reference,
    gate_up.gate_up_reference, head.head_reference, dequantize.unpack_reference,
)  # fmt: skip


class DecodeStep:
    """The model with its cache and buffers: `run` reads `tokens`, int64 [B], and leaves `logits`,
    fp32 [B, V].

    cache       a RollingCache of the model. Keys and values are written into it; which slot holds
                which position (its tables) is the caller's business.
    operations  KERNELS, or REFERENCES: the same in plain PyTorch, for a CPU and for debugging
    pdl         programmatic dependent launch, see `Launch.run`
    """

    def __init__(
        self,
        model: Mistral,
        cache: RollingCache,
        operations: Operations = KERNELS,
        pdl: bool = False,
    ):
        config, B, device = model.config, cache.batch_size, model.device
        D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
        N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.config, self.cache, self.weights = config, cache, weights_of(model)
        self.operations, self.pdl = operations, pdl
        self.workspace = Workspace(
            workspace_numbers(self.weights), model.dtype, device, operations.unpack
        )

        def new(*shape: int, dtype: torch.dtype = self.weights.activations) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens = new(B, dtype=torch.int64)
        self.logits = new(B, V, dtype=torch.float32)
        self._residual, self._sums = (
            new(B, D, dtype=torch.float32),
            new(B, D // TILE, dtype=torch.float32),
        )
        self._x, self._y, self._h = new(B, D), new(B, N * H), new(B, F)
        self._q = new(B, N, H, dtype=model.dtype)  # multiplied with the cache's keys
        self._cos, self._sin = (
            new(B, H // 2, dtype=torch.float32),
            new(B, H // 2, dtype=torch.float32),
        )
        self._slots, self._rows = new(B, dtype=torch.int64), torch.arange(B, device=device)
        self._partials = decode_attention.Partials(B, N, K, H, device)

    def run(self, positions: Tensor) -> None:
        """One forward of `tokens` at `positions`, int64 [B]; -1: the row takes no part, and its
        logits mean nothing.

        Raises ValueError where a kernel cannot do the model's sizes, its dtype or the batch, and
        where none can run.
        """
        do, cache, w = self.operations, self.cache, self.weights
        residual, x, sums, eps = self._residual, self._x, self._sums, self.config.rms_norm_eps
        tokens, table = self._embedding()
        do.embed(
            tokens, positions, table, w.layers[0].input_norm.weight, w.frequencies,
            residual, x, sums, self._cos, self._sin, self._slots, cache.num_slots,
            # what runs ahead of it is none of these kernels: only a plain launch waits for its end
            pdl=False,
        )  # fmt: skip
        next_norms = [layer.input_norm for layer in w.layers[1:]] + [w.norm]
        for layer, keys, values, next_norm in zip(w.layers, cache.keys, cache.values, next_norms):
            weight, early = self._ready(layer.qkv)
            do.qkv(
                x, sums, weight, self._cos, self._sin, self._slots, self._q, keys, values,
                eps, layer.input_norm.gain, pdl=early,
            )  # fmt: skip
            do.attend(
                self._q, keys, values, positions, self._y, self._partials, cache.num_slots,
                self.config.sliding_window, pdl=self.pdl,
            )  # fmt: skip
            weight, early = self._ready(layer.o)
            do.project(self._y, weight, layer.post_norm.weight, residual, x, sums, pdl=early)
            weight, early = self._ready(layer.gate_up)
            do.gate_up(x, sums, weight, self._h, eps, layer.post_norm.gain, pdl=early)
            weight, early = self._ready(layer.down)
            do.project(self._h, weight, next_norm.weight, residual, x, sums, pdl=early)
        weight, early = self._ready(w.head)
        do.head(x, sums, weight, self.logits, eps, w.norm.gain, pdl=early)

    def _ready(self, weight: Weight) -> tuple[Tensor | Planes | tuple[Planes, ...], bool]:
        """A matrix as its kernel takes it, and whether that kernel may begin before the one ahead
        of it has ended.

        Not after an unpacking: a kernel loads weights before it waits, and they might not be there
        yet.
        """
        if isinstance(weight, ToUnpack):
            return self.workspace.fill(weight.parts), False
        return weight, self.pdl

    def _embedding(self) -> tuple[Tensor, Tensor | Planes]:
        """The tokens and the table that they are rows of; or their own rows alone, where no kernel
        can unpack them.
        """
        table = self.weights.embedding
        if not isinstance(table, Blocks):
            return self.tokens, table
        return self._rows, dequantize_blocks(table.data[self.tokens], table.kind).to(self._q.dtype)
