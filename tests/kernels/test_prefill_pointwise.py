"""Rotation, ring and SwiGLU of a chunk against the model's own."""

import math

import pytest
import torch

from mistral.rotary import Rotary, rotate
from mistral_kernels.prefill import pointwise as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
CLOSE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def guarded(x):
    """A copy in front of memory full of NaN, and that memory."""
    whole = torch.full((x.numel() + 64,), math.nan, dtype=x.dtype, device=DEVICE)
    whole[: x.numel()] = x.flatten()
    return whole[: x.numel()].view(x.shape), whole[x.numel() :]


def assert_close(ours, theirs):
    assert ours.isfinite().all()
    assert (ours.double() - theirs.double()).abs().max() < CLOSE[
        ours.dtype
    ] * theirs.double().abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "N", "K", "H"), [(1, 1, 2, 1, 16), (3, 13, 6, 2, 16), (2, 5, 7, 3, 64)]
)
def test_queries_and_keys_are_turned_as_the_model_turns_them(B, T, N, K, H, dtype):
    positions = torch.randint(0, 5000, (B, T), device=DEVICE)
    cos, sin = Rotary(H, 1e4).to(DEVICE)(positions, torch.float64)  # [B, 1, T, H] each
    q = normal(B, T, N, H, dtype=dtype)
    k = normal(B, T, K, H, dtype=dtype)
    expected = [rotate(x.double().transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k)]
    c, s = (part[:, 0, :, : H // 2].float().contiguous() for part in (cos, sin))
    twins = q.clone(), k.clone()
    q, behind_q = guarded(q)
    k, behind_k = guarded(k)

    kernels.rotate_chunk(q, k, c, s)
    kernels.rotate_chunk_reference(*twins, c, s)

    for ours, twin, theirs in zip((q, k), twins, expected):
        assert_close(ours, theirs)
        assert_close(twin, theirs)
    assert behind_q.isnan().all() and behind_k.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_key_goes_to_its_tokens_slot_and_nothing_else_is_touched(dtype):
    B = 3
    T = 21
    K = 3
    H = 32
    S = 40
    k = normal(B, T, K, H, dtype=dtype)
    v = normal(B, T, K, H, dtype=dtype)
    slots = torch.stack([torch.randperm(S)[:T] for _ in range(B)]).to(DEVICE)
    slots[1, 4:] = S  # padding: all of it goes to the slot that is never read
    keys, values = (
        torch.full((B, K, S + 1, H), math.nan, dtype=dtype, device=DEVICE) for _ in range(2)
    )
    twins = keys.clone(), values.clone()

    kernels.store_chunk(k, v, slots, keys, values)
    kernels.store_chunk_reference(k, v, slots, *twins)

    for ours, twin, new in zip((keys, values), twins, (k, v)):
        assert torch.equal(ours[:, :, :S].nan_to_num(), twin[:, :, :S].nan_to_num())
        for b, t in ((0, 0), (0, T - 1), (1, 3), (2, 7)):
            assert torch.equal(ours[b, :, slots[b, t]], new[b, t])
        assert ours[1, :, :S].isnan().sum() == K * (S - 4) * H


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 48), (2, 33, 144), (2048,), (3, 5000)])
def test_the_gate_is_applied_as_in_the_model(shape, dtype):
    gate = normal(*shape, dtype=dtype) * 8
    up = normal(*shape, dtype=dtype)
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    twin = gate.clone()
    gate, after = guarded(gate)

    kernels.swiglu(gate, up)
    kernels.swiglu_reference(twin, up)

    assert_close(gate, expected)
    assert_close(twin, expected)
    assert after.isnan().all()


@pytest.mark.parametrize("B", [1, 2])
def test_parts_of_one_product_are_taken_as_they_are(B):
    T, N, K, H, S = 3, 4, 2, 16, 5
    wide = normal(B, T, (N + 2 * K) * H, dtype=torch.float32)
    twin = wide.clone()

    def parts(product):
        heads = product.split((N * H, K * H, K * H), dim=-1)
        return [part.view(B, T, -1, H) for part in heads]

    angles = [normal(B, T, H // 2, dtype=torch.float32) for _ in range(2)]
    slots = torch.tensor([[4, 0, 1]] * B, device=DEVICE)
    rings = [torch.zeros(B, K, S + 1, H, device=DEVICE) for _ in range(4)]
    q, k, v = parts(wide)
    kernels.rotate_chunk(q, k, *angles)
    kernels.store_chunk(k, v, slots, *rings[:2])
    q, k, v = parts(twin)
    kernels.rotate_chunk_reference(q, k, *angles)
    kernels.store_chunk_reference(k, v, slots, *rings[2:])
    assert_close(wide, twin)
    assert_close(torch.stack(rings[:2]), torch.stack(rings[2:]))

    kernels.swiglu(*wide.chunk(2, dim=-1))
    kernels.swiglu_reference(*twin.chunk(2, dim=-1))
    assert_close(wide, twin)


def test_a_product_too_large_for_float16_is_held_to_its_largest_number():
    gate = torch.full((4,), 3e4, device=DEVICE).half()
    up = torch.tensor([3.0, -3.0, 1.0, math.nan], device=DEVICE).half()
    kernels.swiglu(gate, up)
    assert gate[:3].tolist() == [65504.0, -65504.0, 30000.0]
    assert gate[3].isnan()


def test_what_these_kernels_cannot_do_is_named():
    def chunk(H=16, dtype=torch.float32):
        return torch.zeros(1, 4, 2, H, dtype=dtype, device=DEVICE)

    angles = torch.zeros(1, 4, 8, device=DEVICE)
    with pytest.raises(
        ValueError, match="head_dim is 24; the prefill kernels need 16, 32, 64, 128 or 256"
    ):
        kernels.rotate_chunk(chunk(24), chunk(24), angles, angles)
    with pytest.raises(ValueError, match="float64: the kernels take bfloat16, float16 and float32"):
        kernels.swiglu(chunk(dtype=torch.float64), chunk(dtype=torch.float64))
    with pytest.raises(ValueError, match=r"k \[1, 4, 2, 16\] must be contiguous"):
        kernels.rotate_chunk(chunk(), chunk(32)[..., :16], angles, angles)
    with pytest.raises(ValueError, match="head_dim is 12"):
        slots = torch.zeros(1, 4, dtype=torch.int64, device=DEVICE)
        ring = torch.zeros(1, 2, 9, 12, device=DEVICE)
        kernels.store_chunk(chunk(12), chunk(12), slots, ring, ring)


def test_heads_of_128_are_rotated_whole():
    q = torch.randn(1, 3, 2, 128, device=DEVICE)
    k = torch.randn(1, 3, 1, 128, device=DEVICE)
    angles = torch.randn(1, 3, 64, device=DEVICE)
    theirs = (q.clone(), k.clone())
    kernels.rotate_chunk_reference(*theirs, angles.cos(), angles.sin())
    kernels.rotate_chunk(q, k, angles.cos(), angles.sin())
    for ours, twin in zip((q, k), theirs):
        assert torch.allclose(ours, twin, atol=1e-5)
