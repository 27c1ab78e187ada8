"""The CPU's attention alone, against float64, for sizes that no small model has."""

import pytest
import torch

pytest.importorskip("numba")

from mistral_kernels.cpu import compiled  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True, scope="module")
def compiled_together():
    compiled.prepare([f"attention of {str(dtype)[6:]}" for dtype in DTYPES])


def attention(q, keys, values, first, last):
    """q [heads, H] to the positions `first` to `last` of a ring [S, H]: float32 [heads, H]."""
    heads, H = q.shape
    out = torch.zeros(heads, H + 8)
    attend = compiled.function(f"attention of {str(keys.dtype)[6:]}")
    ring = keys.data_ptr(), values.data_ptr(), len(keys)
    attend(q.data_ptr(), heads, H, *ring, first, last, out.data_ptr())
    return out[:, 8:] / out[:, 1:2]


@pytest.mark.parametrize("H", [16, 48, 64, 80, 128, 208])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_any_head_and_count_is_that_of_float64_around_the_ring(dtype, H):
    generator = torch.Generator().manual_seed(H)
    for heads, S, first, last in [
        (1, 7, 3, 4),
        (2, 9, 0, 8),
        (3, 70, 0, 33),
        (4, 70, 41, 100),  # past the last slot
        (5, 130, 250, 379),  # three blocks, and past the last slot
    ]:
        q = torch.randn(heads, H, generator=generator) / H**0.5
        keys = (2 * torch.randn(S, H, generator=generator)).to(dtype)
        values = torch.randn(S, H, generator=generator).to(dtype)
        slots = torch.arange(first, last) % S
        k, v = keys[slots].double(), values[slots].double()
        want = torch.softmax(q.double() @ k.T, dim=-1) @ v
        got = attention(q, keys, values, first, last)
        assert (got - want).abs().max() < 2e-6 * values.abs().max(), (heads, S, first, last)
