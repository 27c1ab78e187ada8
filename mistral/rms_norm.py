"""Root-mean-square normalization."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps), over the last axis. [..., D] -> [..., D], same dtype.

    Source: Root Mean Square Layer Normalization, equation 4, https://arxiv.org/abs/1910.07467
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        # Squares of 16-bit values overflow or lose digits, so the mean is taken in float32 at
        # least. The result is rounded to x's dtype before it is multiplied by the weight: the order
        # is Mistral's, and visible in the last bits.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)
