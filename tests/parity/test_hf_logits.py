"""Logits against transformers: the same numbers to the last bit."""

import numpy as np
import pytest
import small
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def difference(ours, theirs):
    return (ours.double() - theirs.double()).abs().max().item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save_hf(tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 11, 40])  # below, at and beyond the window of 4
def test_bit_identical_at_unequal_sizes(folder, dtype, T):
    ours, theirs = small.load_pair(folder, dtype)
    tokens = small.tokens(3, T)
    assert difference(ours(tokens), theirs(tokens, use_cache=False).logits) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": None},
        {"tie_word_embeddings": True},
        {"rope_theta": 1e6, "sliding_window": 11},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1},
        {"head_dim": 264, "num_hidden_layers": 1},
    ],
    ids=str,
)
def test_bit_identical_for_every_kind_of_config(changes, dtype, tmp_path):
    ours, theirs = small.load_pair(small.save_hf(tmp_path, **changes), dtype)
    for T in (1, 10, 11, 12):
        tokens = small.tokens(3, T)
        assert difference(ours(tokens), theirs(tokens, use_cache=False).logits) == 0.0


def test_bit_identical_at_true_width(tmp_path):
    sizes = dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )
    small.save_hf(
        tmp_path,
        torch.bfloat16,
        num_hidden_layers=1,
        sliding_window=16,
        initializer_range=0.02,
        **sizes,
    )
    ours, theirs = small.load_pair(tmp_path, torch.bfloat16)
    for T in (9, 40):
        tokens = small.tokens(1, T)
        assert difference(ours(tokens), theirs(tokens, use_cache=False).logits) == 0.0


def test_the_explicit_attention_gives_the_logits_of_transformers_eager(folder, monkeypatch):
    # The same formula in the same order, so the same bits again.
    from mistral import attention

    monkeypatch.setattr(attention, "attend", attention.attend_explicit)
    for dtype in DTYPES:
        ours, theirs = small.load_pair(folder, dtype, attention="eager")
        for T in (3, 11):
            tokens = small.tokens(3, T)
            assert difference(ours(tokens), theirs(tokens, use_cache=False).logits) == 0.0


def test_one_key_more_in_the_window_is_seen_at_once(folder):
    # The size of the error that these tests guard against.
    _, theirs = small.load_pair(folder, torch.float32)
    ours = small.load_model(folder, torch.float32, sliding_window=5)
    tokens = small.tokens(3, 11)
    assert difference(ours(tokens), theirs(tokens, use_cache=False).logits) > 0.1


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_cached_reading_agrees_with_transformers_cache(folder, chunk):
    from transformers import DynamicCache

    ours, theirs = small.load_pair(folder, torch.float32)
    tokens = small.tokens(3, 42)
    cache = ours.new_cache(3)
    their_cache = DynamicCache(config=theirs.config)
    for piece in tokens.split(chunk, dim=1):
        expected = theirs(piece, past_key_values=their_cache, use_cache=True).logits
        assert difference(ours(piece, cache), expected) < 2e-5


def test_recorded_logits_of_a_checkpoint_made_elsewhere():
    # Recorded, so that a later transformers that changed its mind would be noticed.
    expected = np.load(small.DATA / "small/expected.npz")
    tokens = torch.from_numpy(expected["tokens"])
    for window, name in (("auto", "hf_logits"), (None, "hf_logits_full")):
        ours = small.load_model(small.DATA / "small", torch.float32, sliding_window=window)
        assert difference(ours(tokens), torch.from_numpy(expected[name])) < 2e-5


def test_bfloat16_decoding_is_as_close_to_float32_as_transformers_is(folder):
    from transformers import DynamicCache

    tokens = small.tokens(3, 60)
    exact, _ = small.load_pair(folder, torch.float32)
    target = exact(tokens)
    ours, theirs = small.load_pair(folder, torch.bfloat16)
    cache = ours.new_cache(3)
    their_cache = DynamicCache(config=theirs.config)
    mine = torch.cat([ours(t, cache) for t in tokens.split(1, dim=1)], dim=1)
    reference = [
        theirs(t, past_key_values=their_cache, use_cache=True).logits
        for t in tokens.split(1, dim=1)
    ]
    error, their_error = (
        (x.float() - target).abs().mean() for x in (mine, torch.cat(reference, dim=1))
    )
    assert error < 1.05 * their_error
