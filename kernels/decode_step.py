"""One forward of one new token a row: the kernels in their order, and the memory that they pass things on in.

    embed                                                     token, position -> residual, x
    for each layer:  qkv        x -> queries; key and value into the ring
                     attend     queries, ring -> y
                     project    residual += y O^T;     x
                     gate_up    x -> h = silu(gate) * up
                     project    residual += h down^T;  x
    head                                                      x -> logits

5 L + 2 launches (7B: 162). Nothing here is allocated, read back or decided by the host, so that a CUDA graph of `run`
serves every later step. The residual stream is float32, so rounding happens only where a matrix is read.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mistral.cache import RollingCache
from mistral.model import Mistral
from mistral_kernels import decode_attention, embed, gate_up, head, projection, qkv
from mistral_kernels.matvec import TILE
from mistral_kernels.weights import weights_of


class Operations(NamedTuple):
    """The six operations; there are two sets of them, with the same arguments."""

    embed: Callable[..., None]
    qkv: Callable[..., None]
    attend: Callable[..., None]
    project: Callable[..., None]
    gate_up: Callable[..., None]
    head: Callable[..., None]


KERNELS = Operations(
    embed.embed, qkv.qkv, decode_attention.attend, projection.project, gate_up.gate_up, head.head
)  # fmt: skip
REFERENCES = Operations(
    embed.embed_reference, qkv.qkv_reference, decode_attention.attend_reference, projection.project_reference,
    gate_up.gate_up_reference, head.head_reference,
)  # fmt: skip


class DecodeStep:
    """`run` reads `tokens` [B] at `positions` [B], writes their keys and values, and leaves `logits` [B, V] fp32.

    cache       a RollingCache of the model, for its ring; its tables are the caller's business
    operations  KERNELS, or REFERENCES: the same in plain PyTorch, for a CPU and for debugging
    pdl         programmatic dependent launch
    """

    def __init__(self, model: Mistral, cache: RollingCache, operations: Operations = KERNELS, pdl: bool = False):
        config, B, device = model.config, cache.batch_size, model.device
        D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
        N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.config, self.cache, self.weights = config, cache, weights_of(model)
        self.operations, self.pdl = operations, pdl

        def new(*shape: int, dtype: torch.dtype = model.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens = new(B, dtype=torch.int64)
        self.logits = new(B, V, dtype=torch.float32)
        self._residual, self._sums = new(B, D, dtype=torch.float32), new(B, D // TILE, dtype=torch.float32)
        self._x, self._q, self._y, self._h = new(B, D), new(B, N, H), new(B, N * H), new(B, F)
        self._cos, self._sin = new(B, H // 2, dtype=torch.float32), new(B, H // 2, dtype=torch.float32)
        self._slots = new(B, dtype=torch.int64)
        self._workspace = decode_attention.Workspace(B, N, K, H, device)

    def run(self, positions: Tensor) -> None:
        """positions int64 [B]: where the tokens stand; -1: the row takes no part, and its logits mean nothing."""
        do, cache, w, pdl = self.operations, self.cache, self.weights, self.pdl
        residual, x, sums, eps = self._residual, self._x, self._sums, self.config.rms_norm_eps
        do.embed(
            self.tokens, positions, w.embedding, w.layers[0].input_norm.weight, w.frequencies,
            residual, x, sums, self._cos, self._sin, self._slots, cache.num_slots, pdl=False,
        )  # fmt: skip
        following = [layer.input_norm for layer in w.layers[1:]] + [w.norm]
        for layer, keys, values, next_norm in zip(w.layers, cache.keys, cache.values, following):
            do.qkv(
                x, sums, layer.qkv, self._cos, self._sin, self._slots, self._q, keys, values,
                eps, layer.input_norm.gain, pdl=pdl,
            )  # fmt: skip
            do.attend(
                self._q, keys, values, positions, self._y, self._workspace, cache.num_slots,
                self.config.sliding_window, pdl=pdl,
            )  # fmt: skip
            do.project(self._y, layer.o, layer.post_norm.weight, residual, x, sums, pdl=pdl)
            do.gate_up(x, sums, layer.gate_up, self._h, eps, layer.post_norm.gain, pdl=pdl)
            do.project(self._h, layer.down, next_norm.weight, residual, x, sums, pdl=pdl)
        do.head(x, sums, w.head, self.logits, eps, w.norm.gain, pdl=pdl)
