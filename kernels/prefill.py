"""Reading a prompt: PyTorch's matrix products, with attention that knows the window and the ring.

A chunk of hundreds of tokens is bound by arithmetic, so the matrices go through cuBLAS; what PyTorch has nothing good
for is attention over a ring and a chunk with a window, and that is `attend_chunk`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral.cache import Plan, RollingCache
from mistral.model import Block, Mistral
from mistral.rms_norm import RMSNorm
from mistral.rotary import rotate
from mistral_kernels.prefill_attention import attend_chunk


@torch.inference_mode()
def read_chunk(
    model: Mistral, tokens: Tensor, cache: RollingCache, lengths: Tensor | Sequence[int] | None = None
) -> Tensor:
    """`model(tokens, cache, lengths, last_only=True)`, faster on a GPU: logits [B, V], and the same cache afterwards.

    tokens   int64 [B, T]; a chunk may be longer than the window
    lengths  [B]: how many of a row's T tokens are real; None: all. A tensor on the GPU is not waited for.

    Raises ValueError where the cache has no room and for head sizes that the kernel cannot do.
    """
    B, T = tokens.shape
    if lengths is not None:
        lengths = torch.as_tensor(lengths)
    plan = cache.plan(T, lengths)
    starts = cache.lengths.clone()
    real = plan.lengths - starts
    cache.begin(plan)
    x = model.model.embed_tokens(tokens)  # [B, T, D]
    cos, sin = (part.transpose(1, 2) for part in model.model.rotary(plan.positions, x.dtype))  # [B, T, 1, H] each
    for i, block in enumerate(model.model.layers):
        attended = _attention(block, x, (cos, sin), cache, i, plan, starts, real)
        x = x + attended
        x = x + block.mlp(_normalised(block.post_attention_layernorm, x))
    cache.commit(plan)
    last = (real - 1).clamp(min=0)  # [B]
    x = x[torch.arange(B, device=x.device), last]  # [B, D]
    return model.lm_head(_normalised(model.model.norm, x))


def _attention(
    block: Block,
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache: RollingCache,
    layer: int,
    plan: Plan,
    starts: Tensor,
    real: Tensor,
) -> Tensor:  # [B, T, D] -> [B, T, D]
    """One block's attention; then, and not before, its new keys take their places in the ring."""
    (B, T, _), attention = x.shape, block.self_attn
    x = _normalised(block.input_layernorm, x)
    q = attention.q_proj(x).view(B, T, -1, attention.head_dim)  # [B, T, N, H]
    k = attention.k_proj(x).view(B, T, -1, attention.head_dim)  # [B, T, K, H]
    v = attention.v_proj(x).view(B, T, -1, attention.head_dim)
    q, k, y = rotate(q, *rotary), rotate(k, *rotary), torch.empty_like(q)
    keys, values = cache.keys[layer], cache.values[layer]
    attend_chunk(q, k, v, keys, values, starts, real, y, cache.num_slots, cache.window)
    keys[plan.rows, :, plan.slots] = k
    values[plan.rows, :, plan.slots] = v
    return attention.o_proj(y.view(B, T, -1))


def _normalised(norm: RMSNorm, x: Tensor) -> Tensor:
    """`norm(x)` in one kernel instead of six."""
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
