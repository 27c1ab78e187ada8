"""Rotary position embedding: the angle between a query and a key depends only on their distance.

Source: RoFormer, section 3.2.2 and equation 34, https://arxiv.org/abs/2104.09864

Element i < H/2 of a head is paired with element i + H/2, and the pair is rotated by the angle
position * theta^(-2i/H):

    y[i]       = x[i] * cos - x[i + H/2] * sin
    y[i + H/2] = x[i] * sin + x[i + H/2] * cos

This is Hugging Face's pairing. The paper, Mistral's own files and GGUF pair neighbours (2i, 2i + 1)
instead; the two differ by a fixed permutation of the rows of the Q and K matrices
(checkpoints/names.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Positions to the cosines and sines of their angles."""

    def __init__(self, head_dim: int, theta: float):
        super().__init__()
        # Computed on the CPU, so that every device rotates by the same angles to the last bit.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        frequencies = 1.0 / theta**exponents  # [H/2]: theta^(-2i/H)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """For positions [B, T] int64: cosines and sines, [B, 1, T, H] of `dtype` each."""
        # Angles are float32 in every dtype, as in training. In bfloat16 an angle near 100 would be
        # off by up to 0.25; in float64 they would be more exact, and not those that the weights
        # were trained with.
        angles = positions[..., None].float() * self.frequencies  # [B, T, H/2]
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # [B, 1, T, H]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        # model.to(bfloat16) must move the frequencies and not round them.
        exact = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = exact.to(self.frequencies.device)
        return self


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of x [B, heads, T, H] by its position's angle; cos and sin [B, 1, T, H].

    Returns x's shape.
    """
    first, second = x.chunk(2, dim=-1)  # [B, heads, T, H/2] each
    return x * cos + torch.cat((-second, first), dim=-1) * sin
