"""Attention of a few new tokens, split over the keys, against the model's own.

On a CPU the kernel runs in Triton's interpreter; `pytest -m gpu` adds the sizes of a 7B.
"""

import math

import pytest
import torch
from test_prefill_kernel import (
    CLOSE,
    DEVICE,
    B,
    H,
    K,
    N,
    a_chunk,
    assert_close,
    normal,
    poisoned,
    ring_after,
)

from mistral_kernels.decode.attention import Partials
from mistral_kernels.prefill.attention import attend_chunk_reference
from mistral_kernels.prefill.short_attention import attend_short

CASES = [
    # what a row holds, how many tokens are real, slots, window
    ([0, 0], [5, 2], 64, None),  # from the start, ragged: the ring is empty
    ([9, 3], [1, 7], 64, None),  # continues, nothing wrapped
    ([131, 12], [9, 1], 37, 32),  # wrapped; a row with a single token
    ([640, 200], [16, 0], 402, 400),  # more than one block for each part; a row that reads nothing
    ([300, 7], [16, 16], 9, 5),  # a chunk longer than the window
]


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("starts", "lengths", "S", "window"), CASES)
def test_a_query_sees_its_window_of_ring_and_chunk_and_nothing_else(
    starts, lengths, S, window, splits
):
    T = max(lengths)
    arguments, expected, pads = a_chunk(starts, lengths, S, window)
    partials = Partials(B, N, K, H, DEVICE, tokens=T, splits=splits)
    partials.outputs.fill_(math.nan)
    partials.stats.fill_(math.nan)
    for _ in range(2):  # the second call finds the counters as the first did
        y = poisoned(B + 1, T, N, H)
        attend_short(*arguments, y[:B], S, window, partials=partials)
        assert_close(y[:B][~pads], expected[~pads])
        assert y[:B].isfinite().all()
        assert y[B:].isnan().all()
        assert not partials.counters.any()


@pytest.mark.parametrize("T", [1, 2, 3, 5, 6, 11, 16, 21])
def test_every_number_of_tokens_fills_its_rows(T):
    keys, values, _ = ring_after([50, 7], 20)
    q, k, v = (normal(B, T, heads, H) for heads in (N, K, K))
    begin = torch.tensor([50, 7], device=DEVICE)
    real = torch.tensor([T, T], device=DEVICE)
    y = poisoned(B, T, N, H)
    twin = poisoned(B, T, N, H)
    partials = Partials(B, N, K, H, DEVICE, tokens=T, splits=2)
    attend_short(q, k, v, keys, values, begin, real, y, 20, 17, partials=partials)
    attend_chunk_reference(q, k, v, keys, values, begin, real, twin, 20, 17)
    assert_close(y, twin)


def test_a_chunk_one_token_longer_than_the_window():
    """The last query is the only one that does not see the chunk's first token."""
    heads = (2, 1, 1)  # two query heads: 64 queries are 32 tokens, without padding
    q, k, v = (normal(1, 32, n, H) for n in heads)
    keys, values = (normal(1, 1, 33, H) for _ in range(2))
    zero = torch.tensor([0], device=DEVICE)
    real = torch.tensor([32], device=DEVICE)
    y, twin = (poisoned(1, 32, 2, H) for _ in range(2))
    partials = Partials(1, 2, 1, H, DEVICE, tokens=32, splits=1)
    attend_short(q, k, v, keys, values, zero, real, y, 32, 31, partials=partials)
    attend_chunk_reference(q, k, v, keys, values, zero, real, twin, 32, 31)
    assert_close(y, twin)


def test_in_float16_it_agrees_with_its_twin():
    keys, values, _ = ring_after([50, 7], 20, torch.float16)
    q, k, v = (normal(B, 9, heads, H, dtype=torch.float16) for heads in (N, K, K))
    begin = torch.tensor([50, 7], device=DEVICE)
    real = torch.tensor([9, 4], device=DEVICE)
    y, twin = (poisoned(B, 9, N, H, dtype=torch.float16) for _ in range(2))
    attend_short(
        q,
        k,
        v,
        keys,
        values,
        begin,
        real,
        y,
        20,
        17,
        partials=Partials(B, N, K, H, DEVICE, tokens=9),
    )
    attend_chunk_reference(q, k, v, keys, values, begin, real, twin, 20, 17)
    assert_close(y[0], twin[0])
    assert_close(y[1, :4], twin[1, :4])


def test_what_it_cannot_do_is_named():
    def run(T=4, H=16, dtype=torch.float32):
        q = torch.zeros(1, T, 2, H, dtype=dtype, device=DEVICE)
        ring = torch.zeros(1, 2, 9, H, device=DEVICE)
        one = torch.ones(1, dtype=torch.int64, device=DEVICE)
        partials = Partials(1, 2, 2, H, DEVICE, tokens=T)
        attend_short(q, q, q, ring, ring, one, one, torch.empty_like(q), 8, None, partials=partials)

    with pytest.raises(ValueError, match="head_dim is 24; the kernel needs 16, 32, 64, 128 or 256"):
        run(H=24)
    with pytest.raises(ValueError, match="float64: the kernel takes bfloat16, float16 and float32"):
        run(dtype=torch.float64)
    with pytest.raises(
        ValueError, match="65 queries of a key/value head; the kernel takes 1 to 64"
    ):
        run(T=65)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [2, 9, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_7b_past_its_window_on_a_gpu(T, dtype):
    N = 32
    K = 8
    H = 128
    S = 4113
    W = 4096
    keys, values = (torch.randn(1, K, S + 1, H, device=DEVICE, dtype=dtype) for _ in range(2))
    q, k, v = (torch.randn(1, T, heads, H, device=DEVICE, dtype=dtype) for heads in (N, K, K))
    begin = torch.tensor([9000], device=DEVICE)
    real = torch.tensor([T], device=DEVICE)
    y, twin = (torch.full_like(q, math.nan) for _ in range(2))
    attend_short(
        q, k, v, keys, values, begin, real, y, S, W, partials=Partials(1, N, K, H, DEVICE, tokens=T)
    )
    attend_chunk_reference(q, k, v, keys, values, begin, real, twin, S, W)
    assert (y.double() - twin.double()).abs().max() < CLOSE[dtype] * twin.double().abs().max()
