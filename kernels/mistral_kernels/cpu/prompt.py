"""A forward pass over many tokens of one row, in float32: what `Trunk` does, with our products.

The step (step.py) reads up to 32 tokens. More of them are worth PyTorch's attention, and buffers of
their own. Everything else is as in the step: activations are rounded once for all matrices that
read them, and threads share rows or tiles (pool.py).
"""

import functools

import torch
from torch import Tensor, nn

from mistral.attention import attend
from mistral.cache import LayerCache, RollingCache
from mistral.config import Config
from mistral.model import Mistral
from mistral.quantization.packed import Packed, TiedOutput
from mistral_kernels.cpu import compiled
from mistral_kernels.cpu.activations import Activations
from mistral_kernels.cpu.linear import multiply
from mistral_kernels.cpu.pool import share
from mistral_kernels.cpu.tiles import ROWS
from mistral_kernels.cpu.weights import Weights

_WIDENED = 1 << 20  # 16-bit weights that are widened at a time


class _Memory:
    """What one forward pass of T tokens writes, again in each layer."""

    def __init__(self, T: int, config: Config):
        D, N, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        H, F = config.head_dim, config.intermediate_size
        self.x = torch.empty(T, D)  # the residual stream
        self.added = torch.zeros(T, D)  # what the next norm adds to x first
        self.normed = Activations(torch.empty(T, D))
        self.qkv = torch.empty(T, (N + 2 * K) * H)
        self.attended = Activations(torch.empty(T, N * H))
        self.gated = Activations(torch.empty(T, F))
        self.up = torch.empty(T, F)


def read_prompt(
    model: Mistral, weights: Weights, tokens: Tensor, cache: RollingCache, last_only: bool
) -> Tensor:
    """Let the cache's only row read tokens, int64 [T]; returns the logits after them.

    float32 [T, V], or [1, V] of the last one. Raises what `RollingCache.plan` raises.
    """
    config = model.config
    T = len(tokens)
    plan = cache.plan(T)
    cache.begin(plan)
    memory = _Memory(T, config)
    weights.embed(tokens, memory.x)
    cos, sin = model.model.rotary(plan.positions, torch.float32)  # [1, 1, T, H] each
    half = config.head_dim // 2
    angles = cos[0, 0, :, :half].contiguous(), sin[0, 0, :, :half].contiguous()
    for i, block in enumerate(model.model.layers):
        _norm(memory, weights, 2 * i, config)
        _attention(memory, block.self_attn, angles, plan.mask, cache.layer(i, plan))
        _norm(memory, weights, 2 * i + 1, config)
        _mlp(memory, block.mlp)
    _norm(memory, weights, 2 * len(model.model.layers), config)
    cache.commit(plan)
    scored = memory.normed
    if last_only:
        scored = Activations(scored.values[-1:])
        scored.round()
    room = -(-config.vocab_size // ROWS) * ROWS
    logits = torch.empty(len(scored.values), room)
    _product(model.lm_head, scored, logits)
    return logits[:, : config.vocab_size]


def _norm(memory: _Memory, weights: Weights, index: int, config: Config) -> None:
    """Add what the last part of a block computed, and normalise."""
    D = config.hidden_size
    x, added = memory.x.data_ptr(), memory.added.data_ptr()
    weight = weights.norms[index].data_ptr()
    eps = torch.tensor([config.rms_norm_eps])
    norm_rows = compiled.function("norm rows")

    fixed = (x, added, weight, D, eps.data_ptr())
    memory.normed.share_rows(lambda *which: norm_rows(*fixed, *which))


def _attention(
    memory: _Memory,
    attention: nn.Module,
    angles: tuple[Tensor, Tensor],  # cosines and sines, [T, H/2] each
    mask: Tensor | None,
    cache: LayerCache,
) -> None:
    H = attention.head_dim
    T, width = memory.qkv.shape
    at = 0
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        size = _rows_of(layer)
        _product(layer, memory.normed, memory.qkv[:, at : at + size])
        at += size
    values = size // H  # heads that are not rotated
    fixed = (memory.qkv.data_ptr(), 4 * width, width // H - values, H)
    at = [angle.data_ptr() for angle in angles]
    rotate_rows = compiled.function("rotate rows")
    share(lambda a, b: rotate_rows(*fixed, *at, a, b), T)
    heads = memory.qkv.view(1, T, width // H, H).transpose(1, 2)  # [1, N + 2K, T, H]
    q, k, v = heads.split((width // H - 2 * values, values, values), dim=1)
    dtype = cache.keys.dtype
    k, v = cache.update(k.to(dtype), v.to(dtype))  # [1, K, keys, H]
    y = attend(q, k.float(), v.float(), mask)  # [1, N, T, H]
    memory.attended.values.view(T, -1, H).copy_(y[0].transpose(0, 1))
    memory.attended.round()
    _product(attention.o_proj, memory.attended, memory.added)


def _mlp(memory: _Memory, mlp: nn.Module) -> None:
    F = memory.up.shape[1]
    up = memory.up.data_ptr()
    gate_rows = compiled.function("gate rows")
    _product(mlp.gate_proj, memory.normed, memory.gated.values)
    _product(mlp.up_proj, memory.normed, memory.up)
    memory.gated.share_rows(lambda *which: gate_rows(up, F, *which))
    _product(mlp.down_proj, memory.gated, memory.added)


def _product(layer: nn.Module, x: Activations, out: Tensor) -> None:
    """x W^T into out."""
    layer = layer.embedding if isinstance(layer, TiedOutput) else layer
    if isinstance(layer, Packed):
        multiply(x, layer.keeper.tiles, out)
        return
    weight = layer.weight
    out = out[:, : len(weight)]
    if weight.dtype == torch.float32:
        torch.mm(x.values, weight.T, out=out)
    elif weight.dtype in _fast_dtypes():
        out.copy_(x.values.to(weight.dtype) @ weight.T)
    else:
        _widened_product(x.values, weight, out)


def _widened_product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """The product in float32 with 16-bit weights: some rows are widened at a time."""
    rows = max(1, _WIDENED // weight.shape[1])
    buffer = torch.empty(rows, weight.shape[1])
    for first in range(0, len(weight), rows):
        part = weight[first : first + rows]
        wide = buffer[: len(part)].copy_(part)
        torch.mm(x, wide.T, out=out[:, first : first + len(part)])


def _rows_of(layer: nn.Module) -> int:
    return layer.num_rows if isinstance(layer, Packed) else len(layer.weight)


@functools.cache
def _fast_dtypes() -> frozenset[torch.dtype]:
    """The 16-bit dtypes that the processor multiplies itself; PyTorch emulates others, slowly."""
    known = {
        torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
        torch.float16: ("amx_fp16", "avx512_fp16", "fp16_arith"),
    }
    able = torch.cpu.get_capabilities()
    return frozenset(dtype for dtype, names in known.items() if any(able.get(n) for n in names))
