"""The parts of a block against their formulas, written here a second way."""

import math

import pytest
import small
import torch

from mistral.attention import attend, attend_explicit
from mistral.cache import window_mask
from mistral.config import RotaryScaling
from mistral.mlp import MLP
from mistral.rms_norm import RMSNorm
from mistral.rotary import Rotary, rotate


def test_rms_norm_is_its_formula_in_true_float64():
    x = torch.randn(3, 11, 40, dtype=torch.float64) * 1e-3
    eps = 3e-6  # of the size of the squares; not the usual number
    norm = RMSNorm(40, eps=eps).double()
    torch.nn.init.normal_(norm.weight)
    for b in range(3):
        for t in range(11):
            mean = math.fsum(v * v for v in x[b, t].tolist()) / 40
            expected = norm.weight * x[b, t] / math.sqrt(mean + eps)
            assert torch.allclose(norm(x)[b, t], expected, rtol=1e-14, atol=0)


def test_rms_norm_rounds_before_the_weight():
    x = torch.randn(2000, 64).bfloat16()
    norm = RMSNorm(64, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    norm.bfloat16()
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), norm.weight * wide.bfloat16())
    assert not torch.equal(norm(x), (norm.weight.float() * wide).bfloat16())


def test_rms_norm_of_large_half_precision_numbers_does_not_overflow():
    assert torch.equal(
        RMSNorm(8, eps=1e-5).half()(torch.full((1, 8), 6e4).half()), torch.ones(1, 8).half()
    )


def test_mlp_is_its_formula():
    mlp = MLP(small.config()).double()
    x = torch.randn(3, 40, dtype=torch.float64)
    gate = x @ mlp.gate_proj.weight.T
    up = x @ mlp.up_proj.weight.T
    assert torch.allclose(
        mlp(x), (gate / (1 + (-gate).exp()) * up) @ mlp.down_proj.weight.T, atol=1e-12
    )


def test_mlp_in_place_is_its_formula():
    mlp = MLP(small.config()).double()
    x = torch.randn(2, 5, 40, dtype=torch.float64)
    expected = mlp(x)  # with gradients, nothing is computed in place
    with torch.no_grad():
        assert torch.equal(mlp(x), expected)


def test_rotation_is_complex_multiplication_of_the_pairs():
    H = 10
    positions = torch.tensor([[0, 1, 2, 77, 4095]])
    x = torch.randn(1, 3, 5, H, dtype=torch.float64)
    pairs = torch.complex(x[..., : H // 2], x[..., H // 2 :])
    angles = positions[0, :, None].float() * (1 / 1e4 ** (torch.arange(0, H, 2) / H))
    turned = pairs * torch.polar(torch.ones(5, H // 2, dtype=torch.float64), angles.double())
    result = rotate(x, *Rotary(H, 1e4)(positions, torch.float64))
    assert torch.allclose(result, torch.cat((turned.real, turned.imag), dim=-1), atol=1e-6)
    assert torch.equal(result[:, :, 0], x[:, :, 0])


def test_rotated_products_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 10, dtype=torch.float64)

    def product(i, j):
        at = [Rotary(10, 1e4)(torch.tensor([[p]]), torch.float64) for p in (i, j)]
        return (rotate(q, *at[0]) * rotate(k, *at[1])).sum().item()

    assert product(9, 5) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(9, 5) != pytest.approx(product(5, 9), abs=1e-4)


def test_rotary_angles_are_float32_in_every_dtype():
    positions = torch.tensor([[32767]])
    exact = (positions.double() * 1e6 ** (-torch.arange(0, 128, 2).double() / 128)).cos()
    for dtype in (torch.float64, torch.float32):
        cos, _ = Rotary(128, 1e6)(positions, dtype)
        assert cos.dtype == dtype
        assert (cos[0, 0, 0, :64] - exact).abs().max() < 5e-3
    rotary = Rotary(128, 1e6)
    cos, _ = rotary(positions, torch.float32)
    assert torch.equal(rotary.to(torch.bfloat16)(positions, torch.bfloat16)[0], cos.bfloat16())


def test_linear_scaling_is_a_division_of_the_positions():
    scaling = RotaryScaling(rope_type="linear", factor=4.0)
    positions = torch.arange(0, 400, 4)[None]
    scaled = Rotary(10, 1e4, scaling)(positions, torch.float32)
    plain = Rotary(10, 1e4)(positions // 4, torch.float32)
    for ours, expected in zip(scaled, plain):
        assert torch.allclose(ours, expected, atol=1e-5)


def test_yarn_slows_the_slow_pairs_and_only_them():
    H, factor, length = 128, 16.0, 8192
    scaling = RotaryScaling(
        rope_type="yarn", factor=factor, original_max_position_embeddings=length
    )
    plain = Rotary(H, 1e4).frequencies
    rotary = Rotary(H, 1e4, scaling)
    slowed = plain / rotary.frequencies
    turns = length * plain / (2 * torch.pi)  # within the trained length
    # The ends of the ramp are rounded outwards to whole pairs.
    assert torch.allclose(slowed[turns > 32 * 1.2], torch.tensor(1.0))
    assert torch.allclose(slowed[turns < 1 / 1.2], torch.tensor(factor))
    assert (slowed.diff() >= -1e-5).all()
    assert rotary.attention_factor == pytest.approx(0.1 * math.log(16) + 1)
    cos, sin = rotary(torch.tensor([[0, 77, 100_000]]), torch.float32)
    assert torch.allclose((cos**2 + sin**2).sqrt(), torch.tensor(rotary.attention_factor))


@pytest.mark.parametrize("window", [1, 4, 11, 12, None])
def test_a_query_sees_w_keys_itself_included(window):
    positions = torch.arange(11)[None]
    mask = window_mask(positions, positions, window)
    for i in range(11):
        for j in range(11):
            assert mask[0, 0, i, j] == (j <= i and (window is None or i - j < window))
    assert mask.sum(-1).max() == min(window or 11, 11)


@pytest.mark.parametrize("T", [1, 2, 11])
@pytest.mark.parametrize("kind", ["causal", "window", "random"])
@pytest.mark.parametrize("H", [10, 264])
def test_the_two_attentions_agree(T, kind, H):
    q, k, v = (torch.randn(3, heads, T, H, dtype=torch.float64) for heads in (6, 2, 2))
    mask = None
    if kind == "window":
        mask = window_mask(torch.arange(T)[None], torch.arange(T)[None], 4)
    elif kind == "random":
        mask = torch.rand(3, 1, T, T) < 0.5
        mask |= torch.eye(T, dtype=torch.bool)
    assert torch.allclose(attend(q, k, v, mask), attend_explicit(q, k, v, mask), atol=1e-12)


def test_the_two_attentions_agree_with_more_keys_than_queries():
    q = torch.randn(3, 6, 2, 10).double()
    k = torch.randn(3, 2, 7, 10).double()
    v = torch.randn(3, 2, 7, 10).double()
    mask = window_mask(torch.tensor([[5, 6]]), torch.arange(7)[None], 4)
    assert torch.allclose(attend(q, k, v, mask), attend_explicit(q, k, v, mask), atol=1e-12)
    one = q[:, :, :1]
    assert torch.allclose(attend(one, k, v, None), attend_explicit(one, k, v, None), atol=1e-12)


def test_query_heads_share_key_value_heads_in_consecutive_groups():
    q = torch.randn(1, 6, 1, 10).double()
    k = torch.randn(1, 2, 5, 10).double()
    v = torch.zeros(1, 2, 5, 10).double()
    v[:, 1] = 1.0  # key/value head 1 belongs to query heads 3, 4 and 5
    for version in (attend, attend_explicit):
        assert torch.allclose(
            version(q, k, v, None)[0, :, 0, 0], torch.tensor([0, 0, 0, 1, 1, 1]).double()
        )


def test_explicit_attention_of_a_query_without_keys_is_finite():
    q, k, v = (torch.randn(1, heads, 2, 10) for heads in (6, 2, 2))
    assert attend_explicit(q, k, v, torch.zeros(1, 1, 2, 2, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize(("H", "shares"), [(256, True), (264, False)])
def test_heads_above_256_are_repeated_before_pytorchs_kernels(H, shares, monkeypatch):
    """CUDA's kernels share heads up to this size; on a CPU both ways have the same bits."""
    options = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def recorded(*arguments, **named):
        options.append(named.get("enable_gqa", False))
        return attention(*arguments, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    attend(torch.randn(1, 4, 3, H), torch.randn(1, 2, 3, H), torch.randn(1, 2, 3, H), None)
    assert options == [shares]
