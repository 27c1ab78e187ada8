"""Logits against transformers: the same numbers to the last bit."""

import json

import numpy as np
import pytest
import small
import torch

import mistral
from mistral.checkpoints.hugging_face_config import read_config
from mistral.rotary import Rotary

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


LINEAR = {"rope_type": "linear", "factor": 2.5}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["Mistral", "Llama"])
@pytest.mark.parametrize(
    "scaling",
    [
        LINEAR,
        YARN,
        YARN | {"attention_factor": 0.8, "beta_fast": 12, "beta_slow": 0.5},
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False},
        None,
    ],
    ids=str,
)
def test_bit_identical_with_scaled_angles(scaling, family, dtype, tmp_path):
    # Up to, at and beyond the trained length of 16; the window, if there is one, is 4.
    ours, theirs = small.load_pair(small.save_hf(tmp_path, family=family, scaling=scaling), dtype)
    assert (ours.config.sliding_window, ours.config.rope_scaling is None) == (
        4 if family == "Mistral" else None,
        scaling is None,
    )
    for T in (1, 16, 17, 150):
        tokens = small.tokens(3, T)
        assert difference(ours(tokens), theirs(tokens, use_cache=False).logits) == 0.0


@pytest.mark.parametrize("window", [4, None])
@pytest.mark.parametrize("scaling", [LINEAR, YARN], ids=lambda scaling: scaling["rope_type"])
def test_cached_is_whole_with_scaled_angles(scaling, window, tmp_path):
    small.save_hf(tmp_path, scaling=scaling, sliding_window=window)
    ours = small.load_model(tmp_path, torch.float64)
    tokens = small.tokens(3, 60)
    cache = ours.new_cache(3, max_tokens=60)
    pieces = [ours(piece, cache) for piece in tokens.split(7, dim=1)]
    assert difference(torch.cat(pieces, dim=1), ours(tokens)) < 1e-10


def test_without_its_scaling_a_model_is_another(tmp_path):
    # The size of the error that these tests guard against.
    from dataclasses import replace

    ours = small.load_model(small.save_hf(tmp_path, scaling=YARN), torch.float32)
    plain = mistral.Mistral(replace(ours.config, rope_scaling=None))
    plain.load_state_dict(ours.state_dict())
    assert difference(ours(small.tokens(3, 17)), plain(small.tokens(3, 17))) > 0.1


PUBLISHED_YARN = {  # NousResearch/Yarn-Mistral-7b-128k
    "factor": 16.0,
    "finetuned": True,
    "original_max_position_embeddings": 8192,
    "type": "yarn",
}


@pytest.mark.parametrize("theta", [10000, 10000.0, 1e6, 123.4])
@pytest.mark.parametrize(
    "form",
    [
        {"rope_scaling": PUBLISHED_YARN},
        {"rope_scaling": {"type": "yarn", "factor": 7.3}},  # trained for max_position_embeddings
        {"rope_scaling": {"rope_type": "yarn", "factor": 7.3, "type": "yarn"}},
        {"rope_scaling": PUBLISHED_YARN | {"factor": None}},
        {"rope_scaling": PUBLISHED_YARN | {"beta_fast": None, "beta_slow": 0, "mscale": None}},
        {"rope_scaling": PUBLISHED_YARN | {"attention_factor": None, "mscale_all_dim": 0.5}},
        {"rope_scaling": PUBLISHED_YARN | {"mscale": 0.5, "mscale_all_dim": 0}},
        {"rope_scaling": PUBLISHED_YARN | {"mscale": 0.8, "mscale_all_dim": 0.5}},
        {"rope_scaling": PUBLISHED_YARN | {"truncate": None}},
        # The ramp begins before the first pair, ends after the last, is a step next to a pair.
        {"rope_scaling": PUBLISHED_YARN | {"original_max_position_embeddings": 8}},
        {"rope_scaling": PUBLISHED_YARN | {"original_max_position_embeddings": 2**30}},
        {
            "rope_scaling": PUBLISHED_YARN
            | {"original_max_position_embeddings": 1439, "beta_fast": 1.0, "truncate": False}
        },
        {"rope_scaling": PUBLISHED_YARN | {"truncate": False, "factor": 1.0}},
        {"rope_scaling": PUBLISHED_YARN | {"factor": 0.5, "attention_factor": 2}},
        {
            "rope_scaling": {"type": "yarn", "factor": 4.0},
            "original_max_position_embeddings": 777,
        },
        {"rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_scaling": {"rope_type": "linear", "factor": 1.0}},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"rope_type": "default", "factor": 4.0}},
        {"rope_scaling": {}},
        {"rope_scaling": None, "rope_parameters": None},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.3}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 3.3, "rope_theta": ...}},
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [10, 128])
def test_every_form_of_scaling_gives_the_angles_of_transformers(form, theta, head_dim):
    import transformers
    from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

    form = json.loads(json.dumps(form, default=lambda _: theta))  # fresh, and ... becomes theta
    raw = {**small.SIZES, "model_type": "mistral", "eos_token_id": 2} | {"head_dim": head_dim}
    raw |= {"rope_theta": theta} | form
    config = read_config(json.loads(json.dumps(raw)), 2)
    ours = Rotary(head_dim, config.rope_theta, config.rope_scaling)
    theirs = MistralRotaryEmbedding(transformers.MistralConfig(**raw))
    assert torch.equal(ours.frequencies, theirs.inv_freq)
    assert ours.attention_factor == theirs.attention_scaling
    positions = torch.tensor([[0, 1, 511, 512, 8192, 131071]])
    for dtype in DTYPES:
        cos, sin = ours(positions, dtype)
        their_cos, their_sin = theirs(torch.empty(0, dtype=dtype), positions)
        assert torch.equal(cos[:, 0], their_cos)
        assert torch.equal(sin[:, 0], their_sin)


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
