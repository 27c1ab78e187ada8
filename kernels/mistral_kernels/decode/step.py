"""One forward pass for one new token per row: the kernels in their order, and their buffers.

    embed                                                     token, position -> residual, x
    for each layer:  qkv        x -> queries; key and value into the ring
                     attend     queries, ring -> y
                     project    residual += y O^T;     x
                     gate_up    x -> h = silu(gate) * up
                     project    residual += h down^T;  x
    head                                                      x -> logits

5 launches per layer and 2 more (7B: 162); for more than 16 rows about twice as many, see
many_rows.py. The host reads nothing back and decides nothing, and every buffer stays at its
address, so a CUDA graph of `run` serves every later step. The residual stream is float32: only the
inputs of matrices are rounded.

Packed matrices are multiplied without unpacking them. One that no kernel can multiply is unpacked
before its kernel, at every step, into memory that all such matrices share. That takes more launches
and is slow, but the model stays as small as its file.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mistral.cache import RollingCache
from mistral.model import Mistral
from mistral.quantization.dequantize import dequantize as dequantize_blocks
from mistral_kernels.decode import attention as decode_attention
from mistral_kernels.decode import embed, gate_up, head, many_rows, projection, qkv
from mistral_kernels.decode.matvec import MAX_BATCH, TILE, require_rows
from mistral_kernels.packed import dequantize
from mistral_kernels.packed.dequantize import Blocks, Workspace
from mistral_kernels.packed.planes import Planes
from mistral_kernels.portable import require, row_width
from mistral_kernels.weights import ToUnpack, Weight, weights_of, workspace_size


class Operations(NamedTuple):
    """The six operations of a step, and the one that unpacks matrices.

    There are two sets with the same arguments, except that qkv, attend, project, gate_up and head
    of KERNELS also take `pdl` (see `Launch.run`).
    """

    embed: Callable[..., None]
    qkv: Callable[..., None]
    attend: Callable[..., None]
    project: Callable[..., None]
    gate_up: Callable[..., None]
    head: Callable[..., None]
    unpack: Callable[..., None]


KERNELS = Operations(
    embed=embed.embed,
    qkv=qkv.qkv,
    attend=decode_attention.attend,
    project=projection.project,
    gate_up=gate_up.gate_up,
    head=head.head,
    unpack=dequantize.unpack,
)
# For more than MAX_BATCH rows. They do not take `pdl`.
MANY_ROWS = KERNELS._replace(
    qkv=many_rows.qkv,
    project=many_rows.project,
    gate_up=many_rows.gate_up,
    head=many_rows.head,
)
MANY_ROWS_SAME_BITS = KERNELS._replace(
    qkv=partial(many_rows.qkv, keep_bits=True),
    project=partial(many_rows.project, keep_bits=True),
    gate_up=partial(many_rows.gate_up, keep_bits=True),
    head=partial(many_rows.head, keep_bits=True),
)
REFERENCES = Operations(
    embed=embed.embed_reference,
    qkv=qkv.qkv_reference,
    attend=decode_attention.attend_reference,
    project=projection.project_reference,
    gate_up=gate_up.gate_up_reference,
    head=head.head_reference,
    unpack=dequantize.unpack_reference,
)


class DecodeStep:
    """The model with its cache and buffers.

    `run` reads `tokens`, int64 [B], and writes `logits`, fp32 [B, V]. They are a view of
    `wide_logits`, whose rows have `row_width(V)` columns.

    cache       a RollingCache of the model. Keys and values are written into it; the caller keeps
                its tables, which say which slot holds which position.
    operations  KERNELS, or REFERENCES: the same in plain PyTorch, for a CPU and for debugging
    pdl         programmatic dependent launch, see `Launch.run`; of the kernels for up to 16 rows

    keep_bits   set it to True before `run`: the bits of a row then do not depend on the other rows,
                even if there are more than 16 and matrices are plain, which is slower. The bits of
                fewer rows, and of products of packed matrices, are always kept.

    Raises ValueError for `pdl` with REFERENCES, which launch no kernel of their own, or with more
    than 16 rows, and for more rows than KERNELS support.
    """

    def __init__(
        self,
        model: Mistral,
        cache: RollingCache,
        operations: Operations = KERNELS,
        pdl: bool = False,
    ):
        require(
            not (pdl and operations is REFERENCES),
            "pdl launches kernels early, and the plain twins launch none",
        )
        config = model.config
        B = cache.batch_size
        if operations is KERNELS:
            require_rows(B)
        require(
            not pdl or B <= MAX_BATCH,
            f"dependent launch is for 1 to {MAX_BATCH} rows, not {B}: leave out pdl",
        )
        device = model.device
        D = config.hidden_size
        F = config.intermediate_size
        V = config.vocab_size
        N = config.num_attention_heads
        K = config.num_key_value_heads
        H = config.head_dim
        self.config = config
        self.cache = cache
        self.weights = weights_of(model)
        self.operations = operations
        self.keep_bits = False
        # The twins do not take `pdl`, so it is passed only if it is on.
        self._early = {"pdl": True} if pdl else {}
        self.workspace = Workspace(
            workspace_size(self.weights), model.dtype, device, operations.unpack
        )

        def new(*shape: int, dtype: torch.dtype = self.weights.activations) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens = new(B, dtype=torch.int64)
        self.wide_logits = new(B, row_width(V), dtype=torch.float32)
        self.logits = self.wide_logits[:, :V]
        self._residual = new(B, D, dtype=torch.float32)
        self._sums = new(B, D // TILE, dtype=torch.float32)
        self._x = new(B, D)
        self._y = new(B, N * H)
        self._h = new(B, F)
        self._q = new(B, N, H, dtype=model.dtype)  # the dtype of the cache's keys
        self._cos = new(B, H // 2, dtype=torch.float32)
        self._sin = new(B, H // 2, dtype=torch.float32)
        self._slots = new(B, dtype=torch.int64)
        self._rows = torch.arange(B, device=device)
        self._partials = decode_attention.Partials(B, N, K, H, device)

    def run(self, positions: Tensor) -> None:
        """One forward pass of `tokens` at `positions`, int64 [B].

        A row at position -1 is idle, and its logits are undefined.

        Raises ValueError if a kernel does not support the model's sizes, its dtype or the batch,
        and if no kernel can run on this device.
        """
        do = self._chosen_operations()
        cache = self.cache
        w = self.weights
        residual = self._residual
        x = self._x
        sums = self._sums
        eps = self.config.rms_norm_eps

        # 1. Token and position. Never launched early: the work before it in the stream is not one
        # of these kernels, and only a plain launch waits for its end.
        tokens, table = self._embedding()
        do.embed(
            tokens, positions, table, w.layers[0].input_norm.weight, w.frequencies,
            residual, x, sums, self._cos, self._sin, self._slots, cache.num_slots,
            w.attention_factor,
        )  # fmt: skip

        # 2. The layers. `project` also multiplies x by the weight of the norm that comes next.
        next_norms = [layer.input_norm for layer in w.layers[1:]] + [w.norm]
        for layer, keys, values, next_norm in zip(w.layers, cache.keys, cache.values, next_norms):
            weight, early = self._ready(layer.qkv)
            do.qkv(
                x, sums, weight, self._cos, self._sin, self._slots, self._q, keys, values,
                eps, layer.input_norm.gain, **early,
            )  # fmt: skip
            do.attend(
                self._q, keys, values, positions, self._y, self._partials, cache.num_slots,
                self.config.sliding_window, **self._early,
            )  # fmt: skip
            weight, early = self._ready(layer.o)
            do.project(self._y, weight, layer.post_norm.weight, residual, x, sums, **early)
            weight, early = self._ready(layer.gate_up)
            do.gate_up(x, sums, weight, self._h, eps, layer.post_norm.gain, **early)
            weight, early = self._ready(layer.down)
            do.project(self._h, weight, next_norm.weight, residual, x, sums, **early)

        # 3. The logits.
        weight, early = self._ready(w.head)
        do.head(x, sums, weight, self.wide_logits, eps, w.norm.gain, **early)

    def _chosen_operations(self) -> Operations:
        """Those for the number of rows."""
        if self.operations is not KERNELS or self.cache.batch_size <= MAX_BATCH:
            return self.operations
        return MANY_ROWS_SAME_BITS if self.keep_bits else MANY_ROWS

    def _ready(self, weight: Weight) -> tuple[Tensor | Planes | tuple[Planes, ...], dict]:
        """A matrix in a form that its kernel takes, and the options of that kernel's launch.

        After an unpacking the launch is a plain one: with `pdl` a kernel loads weights before it
        waits, and they might not be written yet.
        """
        if isinstance(weight, ToUnpack):
            return self.workspace.fill(weight.parts), {}
        return weight, self._early

    def _embedding(self) -> tuple[Tensor, Tensor | Planes]:
        """The tokens and the table that they index.

        If no kernel can unpack the table: the row numbers and the tokens' own rows, unpacked.
        """
        table = self.weights.embedding
        if not isinstance(table, Blocks):
            return self.tokens, table
        return self._rows, dequantize_blocks(table.data[self.tokens], table.kind).to(self._q.dtype)
