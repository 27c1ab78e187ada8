"""Rotary scaling in files: the keys of llama.cpp, and round trips through both layouts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import small
import torch

import mistral
from mistral import RotaryScaling
from mistral.checkpoints import gguf, gguf_export, hugging_face
from mistral.checkpoints.gguf_header import GgufHeader, read_header

FILE = small.DATA / "gguf/q8_0.gguf"
TOKENS = small.tokens(1, 40, vocab_size=460)


@pytest.fixture(scope="module")
def original():
    return mistral.load(small.DATA / "small", device="cpu", sliding_window=None)


@pytest.fixture
def config_of(monkeypatch):
    """The config of q8_0.gguf with more keys; scale_linear is not within `scaling`."""

    def read(**keys):
        header = read_header(FILE)
        prefixes = {"scale_linear": "llama.rope."}
        more = {prefixes.get(k, "llama.rope.scaling.") + k: v for k, v in keys.items()}
        forged = GgufHeader(header.metadata | more, header.tensors)
        monkeypatch.setattr(gguf, "read_header", lambda path: forged)
        return gguf.GgufReader(FILE).config()

    return read


def test_a_scaling_factor_of_1_or_0_is_none(config_of):
    for key in ("factor", "scale_linear"):
        for value in (0.0, 1.0):
            for kind in ({}, {"type": "linear"}, {"type": "none"}):
                assert config_of(**{key: value}, **kind).rope_scaling is None
    assert config_of(type="none", factor=4.0).rope_scaling is None


def test_a_scaling_factor_without_a_type_is_linear(config_of):
    for keys in (
        dict(factor=4.0),
        dict(factor=4.0, type="linear"),
        dict(scale_linear=4.0),
        dict(scale_linear=7.0, factor=4.0),  # the old key counts only without the new
    ):
        config = config_of(**keys)
        assert config.rope_scaling == RotaryScaling(rope_type="linear", factor=4.0)
        assert config.sliding_window is None  # base 10,000, but made for longer sequences


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=512)
YARN_KEYS = dict(type="yarn", factor=4.0, original_context_length=512)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {}),
        ({"finetuned": True, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}, {}),
        ({"attn_factor": 1.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}, {}),
        (
            {"yarn_beta_fast": 40.0, "yarn_beta_slow": 2.0},
            {"beta_fast": 40.0, "beta_slow": 2.0},
        ),
        ({"yarn_attn_factor": 1.5}, {"attention_factor": 1.5}),  # by the converter of llama.cpp
        ({"attn_factor": 0.5}, {"attention_factor": 0.5 * (0.1 * math.log(4) + 1)}),
        ({"original_context_length": 0}, {"original_max_position_embeddings": 2048}),
        ({"factor": 0.0}, {"factor": 1.0}),
    ],
    ids=str,
)
def test_yarn_in_the_keys_of_llama_cpp(keys, expected, config_of):
    config = config_of(**YARN_KEYS | keys)
    assert config.rope_scaling == RotaryScaling(**YARN | expected)
    assert config.sliding_window is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"yarn_ext_factor": 0.0}, "yarn_ext_factor 0.0 is not supported"),
        ({"yarn_log_multiplier": 0.1}, "yarn_log_multiplier 0.1 is not supported"),
        ({"yarn_attn_factor": 1.5, "attn_factor": 1.5}, "contradict each other"),
        ({"yarn_attn_factor": "x"}, "attention_factor must be a positive number"),
        ({"attn_factor": -1.0}, "attn_factor must be a positive number"),
        ({"yarn_beta_fast": float("nan")}, "beta_fast must be a positive number"),
        ({"yarn_beta_slow": np.ones(2)}, "beta_slow must be a positive number"),
        ({"original_context_length": 2.5}, "original_context_length must be a whole number"),
        ({"factor": float("inf")}, "factor must be a positive number"),
    ],
    ids=str,
)
def test_yarn_that_is_not_supported_is_refused_by_its_key(keys, message, config_of):
    with pytest.raises(mistral.CheckpointError, match=message):
        config_of(**YARN_KEYS | keys)


@pytest.mark.parametrize(
    "scaling",
    [
        dict(rope_type="linear", factor=3.3),
        YARN,
        YARN | dict(factor=3.3),
        YARN | dict(attention_factor=1.1, beta_fast=40.0, beta_slow=0.3),
        YARN | dict(mscale=0.7, mscale_all_dim=1.2),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:llama.cpp computes other logits")
def test_an_exported_scaling_is_read_back(scaling, tmp_path, original):
    plain, tokenizer = original
    config = replace(plain.config, rope_scaling=RotaryScaling(**scaling))
    model = mistral.Mistral(config)
    model.load_state_dict(plain.state_dict())
    gguf_export.export(model, tokenizer, tmp_path / "m.gguf", "F32")
    hugging_face.save(model, tokenizer, tmp_path / "hf")
    for path in (tmp_path / "m.gguf", tmp_path / "hf"):
        loaded, _ = mistral.load(path, device="cpu")
        with torch.no_grad():
            assert torch.equal(loaded(TOKENS), model(TOKENS))
            assert not torch.equal(loaded(TOKENS), plain(TOKENS))
    assert loaded.config == model.config


def test_what_a_gguf_file_cannot_say_of_a_scaling_is_said(tmp_path, original):
    plain, tokenizer = original

    def export(**changes):
        scaling = RotaryScaling(**YARN | changes)
        model = mistral.Mistral(replace(plain.config, rope_scaling=scaling))
        gguf_export.export(model, tokenizer, tmp_path / "m.gguf", "F32")

    with pytest.warns(UserWarning, match="llama.cpp computes other logits from this file") as notes:
        export(beta_fast=40.0)
    assert notes[0].filename == __file__
    with pytest.raises(ValueError, match="no key for truncate"):
        export(truncate=False)
