"""Rotary position embedding: the angle between a query and a key depends only on their distance.

Source: RoFormer, section 3.2.2 and equation 34, https://arxiv.org/abs/2104.09864

Element i < H/2 of a head is paired with element i + H/2, and the pair is rotated by the angle
position * theta^(-2i/H):

    y[i]       = x[i] * cos - x[i + H/2] * sin
    y[i + H/2] = x[i] * sin + x[i + H/2] * cos

This is Hugging Face's pairing. The paper, Mistral's own files and GGUF pair neighbours (2i, 2i + 1)
instead; the two differ by a fixed permutation of the rows of the Q and K matrices
(checkpoints/names.py).

The second half of this file is for models whose angles were slowed, so that they read longer
sequences than they were trained for (RotaryScaling in config.py).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mistral.config import RotaryScaling


class Rotary(nn.Module):
    """Positions to the cosines and sines of their angles."""

    def __init__(self, head_dim: int, theta: float, scaling: RotaryScaling | None = None):
        super().__init__()
        # Computed on the CPU, so that every device rotates by the same angles to the last bit.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        frequencies = 1.0 / theta**exponents  # [H/2]: theta^(-2i/H)
        self.attention_factor = 1.0
        if scaling is not None:
            frequencies = _scaled_frequencies(theta, exponents, scaling)
            self.attention_factor = attention_factor(scaling)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """For positions [B, T] int64: cosines and sines, [B, 1, T, H] of `dtype` each."""
        # Angles are float32 in every dtype, as in training. In bfloat16 an angle near 100 would be
        # off by up to 0.25; in float64 they would be more exact, and not those that the weights
        # were trained with.
        angles = positions[..., None].float() * self.frequencies  # [B, T, H/2]
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # [B, 1, T, H]
        cos = angles.cos() * self.attention_factor
        sin = angles.sin() * self.attention_factor
        return cos.to(dtype), sin.to(dtype)

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


def _scaled_frequencies(theta: float, exponents: Tensor, scaling: RotaryScaling) -> Tensor:
    """The frequencies [H/2] of a model for `factor` times longer sequences; exponents fp32 [H/2].

    linear  all are divided by the factor, as if the positions were: https://arxiv.org/abs/2306.15595
    yarn    a pair that turns often within the trained length tells neighbours apart, and keeps its
            frequency; one that does not complete a turn is divided by the factor; in between a ramp
            mixes the two: section 3.2 of https://arxiv.org/abs/2309.00071

    The order of the operations is that of Hugging Face, for the same bits.
    """
    powers = theta**exponents  # [H/2]
    if scaling.rope_type == "linear":
        return 1.0 / powers / scaling.factor
    low, high = _ramp_ends(theta, 2 * len(exponents), scaling)
    pairs = torch.arange(len(exponents), dtype=torch.float32, device="cpu")
    kept = 1 - ((pairs - low) / (high - low)).clamp(0, 1)  # [H/2]: 1 for fast pairs, 0 for slow
    slowed = 1.0 / (scaling.factor * powers)
    return slowed * (1 - kept) + 1.0 / powers * kept


def _ramp_ends(theta: float, head_dim: int, scaling: RotaryScaling) -> tuple[float, float]:
    """The pairs between which YaRN's ramp lies: they turn beta_fast and beta_slow times within the
    trained length.
    """

    def pair_with(turns: float) -> float:
        # Solves length * theta^(-2i/H) = 2 pi turns for i.
        length = scaling.original_max_position_embeddings
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_with(scaling.beta_fast)
    high = pair_with(scaling.beta_slow)
    if scaling.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = float(max(low, 0))
    high = float(min(high, head_dim - 1))
    if low == high:
        high += 0.001  # a step, without dividing by zero
    return low, high


def attention_factor(scaling: RotaryScaling) -> float:
    """What cosines and sines are multiplied by: the scores of the attention grow by its square.

    Only YaRN has one. Its default, 0.1 ln(factor) + 1, is that of section 3.4 of the paper.
    """
    if scaling.rope_type == "linear":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        whole = _magnitude(scaling.factor, scaling.mscale_all_dim)
        return _magnitude(scaling.factor, scaling.mscale) / whole
    return _magnitude(scaling.factor, 1.0)


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
