"""Rotary position embedding: a query and a key meet at an angle that depends only on how far apart they are.

Source: RoFormer, section 3.2.2 and equation 34, https://arxiv.org/abs/2104.09864

Head axis i < H/2 is paired with axis i + H/2, and the pair is turned by position * theta^(-2i/H):

    y[i]       = x[i] * cos - x[i + H/2] * sin
    y[i + H/2] = x[i] * sin + x[i + H/2] * cos

This is Hugging Face's pairing. The paper, Mistral's own files and GGUF pair neighbours (2i, 2i + 1) instead; the two
differ by a fixed permutation of the rows of the Q and K matrices.
"""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def inverse_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/H) for i < H/2: float32 [H/2] on `device`."""
    # Worked out on the CPU, so that every device turns by the same angles to the last bit, and kept (the function is
    # pure), so that a forward on a GPU copies nothing.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    return (1.0 / theta**exponents).to(device)


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `positions` [B, T] int64: two tensors [B, 1, T, H] of `dtype`."""
    # Angles are float32 in every dtype, as in the models' training. In bfloat16 position 100 would be off by 0.1 rad.
    # At position 32,767 the float32 cosine is off by up to 5e-4, and the weights were trained with just that.
    angles = positions[..., None].float() * inverse_frequencies(head_dim, theta, positions.device)  # [B, T, H/2]
    angles = torch.cat((angles, angles), dim=-1)[:, None]  # [B, 1, T, H]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of x [B, heads, T, H] by its position's angle; cos and sin [B, 1, T, H]."""
    first, second = x.chunk(2, dim=-1)  # [B, heads, T, H/2] each
    return x * cos + torch.cat((-second, first), dim=-1) * sin
