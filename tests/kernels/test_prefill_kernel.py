"""Prefill attention against the model's own, and a prompt read with it against the model's
forward.
"""

import math

import pytest
import small
import torch

from mistral.attention import attend_explicit
from mistral.cache import window_mask
from mistral_kernels.prefill.attention import attend_chunk, attend_chunk_reference, spaced_heads
from mistral_kernels.prefill.chunk import read_chunk
from mistral_kernels.weights import weights_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B = 2
N = 6
K = 2
H = 16
CLOSE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


def assert_close(ours, theirs):
    assert ours.isfinite().all()
    assert (ours.double() - theirs.double()).abs().max() < CLOSE[
        ours.dtype
    ] * theirs.double().abs().max()


def ring_after(starts, S, dtype=torch.float32):
    """Random keys and values of rows that hold `starts` tokens, and which position each slot holds
    (-1: none).
    """
    held = torch.full((len(starts), S + 1), -1)
    for b, start in enumerate(starts):
        for p in range(max(0, start - S), start):
            held[b, p % S] = p
    return (
        normal(len(starts), K, S + 1, H, dtype=dtype),
        normal(len(starts), K, S + 1, H, dtype=dtype),
        held.to(DEVICE),
    )


CASES = [
    # what a row holds, how many tokens are real, slots, window
    ([0, 0], [37, 20], 64, None),  # from the start, ragged, without a window
    ([0, 0], [70, 33], 9, 5),  # a prompt far longer than the window, and the ring
    ([9, 3], [37, 37], 64, None),  # continues, nothing wrapped
    ([131, 12], [40, 1], 37, 32),  # wrapped; a row with a single token
    (
        [64, 200],
        [64, 0],
        66,
        64,
    ),  # tiles that end exactly where the chunk does; a row that reads nothing
    # The last query of a tile is the first that does not see the first key of a block.
    ([0, 0], [64, 33], 66, 63),
]


def a_chunk(starts, lengths, S, window):
    """Arguments of an attention up to `lengths`, its result [B, T, N, H], and where that is none:
    pads [B, T].
    """
    T = max(lengths)
    keys, values, held = ring_after(starts, S)
    q = normal(B, T, N, H)
    k = normal(B, T, K, H)
    v = normal(B, T, K, H)
    begin = torch.tensor(starts, device=DEVICE)
    real = torch.tensor(lengths, device=DEVICE)
    positions = begin[:, None] + torch.arange(T, device=DEVICE)  # [B, T]
    all_keys = torch.cat((keys, k.transpose(1, 2)), dim=2)
    all_values = torch.cat((values, v.transpose(1, 2)), dim=2)
    mask = window_mask(positions, torch.cat((held, positions), dim=1), window)
    # [B, T, N, H]
    expected = attend_explicit(q.transpose(1, 2), all_keys, all_values, mask).transpose(1, 2)

    # Whoever reads what no query may see gets NaN.
    pads = torch.arange(T, device=DEVICE) >= real[:, None]
    dead = (held < 0) | (held <= begin[:, None] - (window or T + 1000))
    for x in (keys, values):
        x.transpose(1, 2)[dead] = math.nan
    for x in (k, v):
        x[pads] = math.nan
    return (q, k, v, keys, values, begin, real), expected, pads


@pytest.mark.parametrize(("starts", "lengths", "S", "window"), CASES)
def test_a_query_sees_its_window_of_ring_and_chunk_and_nothing_else(starts, lengths, S, window):
    arguments, expected, pads = a_chunk(starts, lengths, S, window)
    y = poisoned(B + 1, max(lengths), N, H)
    attend_chunk(*arguments, y[:B], S, window, queries=32)
    assert_close(y[:B][~pads], expected[~pads])
    assert y[:B].isfinite().all()
    assert y[B:].isnan().all()


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_twin_and_kernel_agree_in_half_precision(dtype):
    T = 33
    S = 20
    window = 17
    keys, values, _ = ring_after([50, 7], S, dtype)
    q, k, v = (normal(B, T, heads, H, dtype=dtype) for heads in (N, K, K))
    begin = torch.tensor([50, 7], device=DEVICE)
    real = torch.tensor([T, T], device=DEVICE)
    y = poisoned(B, T, N, H, dtype=dtype)
    twin = poisoned(B, T, N, H, dtype=dtype)
    attend_chunk(q, k, v, keys, values, begin, real, y, S, window, queries=32)
    attend_chunk_reference(q, k, v, keys, values, begin, real, twin, S, window)
    assert_close(y, twin)


def small_model(window):
    sizes = dict(
        hidden_size=32, head_dim=H, intermediate_size=48, num_hidden_layers=2, sliding_window=window
    )
    return small.model(torch.float32, num_attention_heads=4, num_key_value_heads=2, **sizes).to(
        DEVICE
    )


@pytest.mark.parametrize("window", [5, pytest.param(40, marks=pytest.mark.slow), None])
def test_a_prompt_in_chunks_leaves_the_logits_and_the_cache_of_the_models_forward(window):
    model = small_model(window)
    if window is not None:  # else each matrix has a product of its own
        weights_of(model)
    ours, theirs = (
        model.new_cache(3, max_tokens=None if window == 5 else 100, slack=3) for _ in range(2)
    )
    for seed, lengths in enumerate(([37, 5, 11], [1, 9, 0], [16, 16, 16])):
        tokens = small.tokens(3, max(lengths), seed=seed).to(DEVICE)
        logits = read_chunk(model, tokens, ours, lengths if seed < 2 else None)
        expected = model(tokens, theirs, lengths, last_only=True)
        read = [b for b, n in enumerate(lengths) if n]
        assert_close(logits[read], expected[read])
        same_state(ours, theirs)


def same_state(ours, theirs):
    S = ours.num_slots
    assert_close(ours.keys[:, :, :, :S], theirs.keys[:, :, :, :S])
    assert_close(ours.values[:, :, :, :S], theirs.values[:, :, :, :S])
    assert ours.lengths == theirs.lengths
    assert ours.peaks == theirs.peaks


def test_a_cache_without_room_is_refused_and_stays_as_it_was():
    model = small_model(None)
    cache = model.new_cache(1, max_tokens=8)
    read_chunk(model, small.tokens(1, 5).to(DEVICE), cache)
    before = cache.keys.clone()
    with pytest.raises(ValueError, match="10 tokens do not fit"):
        read_chunk(model, small.tokens(1, 5).to(DEVICE), cache)
    assert torch.equal(cache.keys, before)
    assert cache.lengths == [5]


def test_what_the_prefill_kernel_cannot_do_is_named():
    def run(H=16, dtype=torch.float32):
        q = torch.zeros(1, 4, 2, H, dtype=dtype, device=DEVICE)
        ring = torch.zeros(1, 2, 9, H, device=DEVICE)
        one = torch.ones(1, dtype=torch.int64, device=DEVICE)
        attend_chunk(q, q, q, ring, ring, one, one, torch.empty_like(q), 8, None)

    with pytest.raises(
        ValueError, match="head_dim is 24; the prefill kernel needs 16, 32, 64, 128 or 256"
    ):
        run(H=24)
    with pytest.raises(
        ValueError, match="float64: the prefill kernel takes bfloat16, float16 and float32"
    ):
        run(dtype=torch.float64)
    gaps = torch.zeros(1, 4, 2, 32, device=DEVICE)[..., :16]
    one = torch.ones(1, dtype=torch.int64, device=DEVICE)
    ring = torch.zeros(1, 2, 9, 16, device=DEVICE)
    y = torch.zeros(1, 4, 2, 16, device=DEVICE)
    for k, v, problem in (
        (gaps, gaps, r"k \[1, 4, 2, 16\] must be contiguous"),
        (torch.zeros(1, 4, 64, device=DEVICE)[..., :32].view(1, 4, 2, 16), y, "strides, 64 and 32"),
    ):
        with pytest.raises(ValueError, match=problem):
            attend_chunk(gaps.clone(), k, v, ring, ring, one, one, y, 8, None)
    long = torch.empty(1, 2**27, 1, 16, device="meta")
    with pytest.raises(ValueError, match="134217728 tokens in steps of 16 elements"):
        spaced_heads(long, long, long)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "start, T, window", [(0, 2048, 4096), (5000, 2048, 4096), (4000, 300, None), (0, 6000, 4096)]
)
def test_a_7b_layer_in_half_precision(dtype, start, T, window):
    heads = 32
    groups = 8
    size = 128
    S = 4112 if window else 8192
    keys = normal(2, groups, S + 1, size, dtype=dtype)
    values = normal(2, groups, S + 1, size, dtype=dtype)
    q, k, v = (
        normal(2, T, heads, size, dtype=dtype),
        *(normal(2, T, groups, size, dtype=dtype) for _ in range(2)),
    )
    begin = torch.tensor([start, start // 2], device=DEVICE)
    real = torch.tensor([T, T - 7], device=DEVICE)
    y = poisoned(2, T, heads, size, dtype=dtype)
    twin = poisoned(2, T, heads, size, dtype=dtype)
    attend_chunk(q, k, v, keys, values, begin, real, y, S, window)
    for h in range(groups):  # one at a time: the twin keeps every score
        mine = slice(4 * h, 4 * h + 4)
        part = torch.empty_like(twin[:, :, mine])
        ring = (keys[:, h : h + 1], values[:, h : h + 1])
        chunk = (k[:, :, h : h + 1], v[:, :, h : h + 1])
        attend_chunk_reference(q[:, :, mine], *chunk, *ring, begin, real, part, S, window)
        twin[:, :, mine] = part
    pads = torch.arange(T, device=DEVICE) >= real[:, None]
    assert_close(y[~pads], twin[~pads])
