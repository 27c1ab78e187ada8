"""Grouped-query attention in a sliding window.

Sources: Attention Is All You Need, equation 1, https://arxiv.org/abs/1706.03762 (attention);
GQA, section 2.2, https://arxiv.org/abs/2305.13245 (G query heads share one key/value head);
Mistral 7B, section 2, https://arxiv.org/abs/2310.06825 (the window).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mistral.cache import LayerCache
from mistral.config import Config
from mistral.rotary import rotate


class Attention(nn.Module):
    """Attention of one block. Query head n reads key/value head n // G."""

    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        D = config.hidden_size
        q_size = config.num_attention_heads * config.head_dim  # N * H
        kv_size = config.num_key_value_heads * config.head_dim  # K * H
        self.q_proj = nn.Linear(D, q_size, bias=False)
        self.k_proj = nn.Linear(D, kv_size, bias=False)
        self.v_proj = nn.Linear(D, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, D, bias=False)
        self.attend = attend  # training may replace it, by a function with other rounding

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        rotary: tuple[Tensor, Tensor],  # cosines and sines, [B, 1, T, H] each
        mask: Tensor | None,  # [B, 1, T, keys], True for a key that is seen; None: see `attend`
        cache: LayerCache | None,
    ) -> Tensor:  # [B, T, D]
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, N, T, H]
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, H]
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # [B, K, T, H]
        q = rotate(q, *rotary)
        k = rotate(k, *rotary)
        if cache is not None:
            k, v = cache.update(k, v)  # [B, K, keys, H]: the cached and the new
        y = self.attend(q, k, v, mask)  # [B, N, T, H]
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def attend_explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(H)) v, spelled out: the version to learn from. Shapes as in `attend`.

    It computes what `attend` computes, and a test holds the two together. It keeps all T x keys
    scores in memory.
    """
    T = q.shape[2]
    keys = k.shape[2]
    G = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(G, dim=1)  # [B, N, keys, H]
    v = v.repeat_interleave(G, dim=1)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # [B, N, T, keys]
    if mask is None and T > 1:
        mask = torch.ones(T, keys, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        # The lowest finite value and not -inf: a query that sees no key would be 0/0.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return weights @ v  # [B, N, T, H]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(H)) v by PyTorch's fused kernels: the version that runs.

    q [B, N, T, H]; k, v [B, K, keys, H]; mask [B, 1, T, keys], True for a key that is seen. Returns
    [B, N, T, H]. Without a mask, T > 1 means plain causal attention over T keys, and T = 1 a query
    that sees every key.

    The choice of kernel shows in the last bits, so the three cases are those of transformers.
    """
    B, N, T, H = q.shape
    K = k.shape[1]
    if mask is None and H <= 256:  # up to this size PyTorch's kernels share heads themselves
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)
    if T == 1:
        # One query: the G heads that share keys and values become queries of one head, and nothing
        # is repeated.
        q = q.view(B, K, N // K, H)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(B, N, 1, H)
    k = k.repeat_interleave(N // K, dim=1)  # [B, N, keys, H]
    v = v.repeat_interleave(N // K, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
