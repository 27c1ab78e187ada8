"""Exported files in llama.cpp itself, through the wheel xllamacpp."""

from dataclasses import replace

import pytest
import small
import torch
from benchmark_parts.llama_cpp_peer import LlamaCpp

import mistral
from mistral.checkpoints.gguf_export import export

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    model, tokenizer = mistral.load(small.DATA / "small", device="cpu", sliding_window=None)
    for kind in ("F32", "Q8_0"):
        export(model, tokenizer, folder / f"{kind}.gguf", kind)
    return folder, model, tokenizer


def test_llama_cpp_gives_our_logits_on_an_exported_f32_file(exported):
    folder, model, _ = exported
    tokens = small.tokens(1, 48, vocab_size=460)
    logits = LlamaCpp(folder / "F32.gguf", n_ctx=256).logits(tokens[0].tolist())
    with torch.no_grad():
        assert (model(tokens)[0] - logits).abs().max() < 2e-5


@pytest.mark.parametrize(
    "scaling",
    [
        dict(rope_type="linear", factor=2.5),
        dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=16),
        dict(
            rope_type="yarn",
            factor=3.3,
            original_max_position_embeddings=24,
            attention_factor=0.8,
        ),
        dict(
            rope_type="yarn",
            factor=8.0,
            original_max_position_embeddings=16,
            mscale=0.7,
            mscale_all_dim=1.2,
        ),
    ],
    ids=str,
)
def test_llama_cpp_scales_the_angles_as_we_do(scaling, exported, tmp_path):
    _, plain, tokenizer = exported
    model = mistral.Mistral(replace(plain.config, rope_scaling=mistral.RotaryScaling(**scaling)))
    model.load_state_dict(plain.state_dict())
    export(model, tokenizer, tmp_path / "m.gguf", "F32")
    tokens = small.tokens(1, 200, vocab_size=460)
    logits = LlamaCpp(tmp_path / "m.gguf", n_ctx=256).logits(tokens[0].tolist())
    with torch.no_grad():
        assert (model(tokens)[0] - logits).abs().max() < 5e-5  # 4 without the scaling


def test_llama_cpp_is_near_our_logits_on_an_exported_q8_0_file(exported):
    # It rounds the activations to 8 bits as well, which we do not.
    folder, _, _ = exported
    model, _ = mistral.load(folder / "Q8_0.gguf", device="cpu", sliding_window=None)
    tokens = small.tokens(1, 48, vocab_size=460)
    logits = LlamaCpp(folder / "Q8_0.gguf", n_ctx=256).logits(tokens[0].tolist())
    with torch.no_grad():
        difference = (model(tokens)[0] - logits).abs()
    assert difference.mean() < 0.03
    assert difference.max() < 0.3


def test_llama_cpp_reads_a_sequence_in_pieces_as_the_whole(exported):
    # The benchmark appends tokens; the logits above come from one call.
    folder, _, _ = exported
    theirs = LlamaCpp(folder / "F32.gguf", n_ctx=256)
    ids = small.tokens(48, vocab_size=460).tolist()
    whole = theirs.logits(ids)
    theirs.reset()
    for piece in (ids[:20], ids[20:21], ids[21:]):
        last = theirs.append(piece)
    assert (last - whole[-1]).abs().max() < 2e-5


def test_llama_cpp_splits_text_as_we_do(exported):
    folder, _, tokenizer = exported
    theirs = LlamaCpp(folder / "F32.gguf", n_ctx=256)
    for text in (
        "Hello world",
        "  two  spaces ",
        "naïve 日本語 😀",
        "<|im_start|>user\nhi<|im_end|>\n",
        "\n",
    ):
        for special in (False, True):
            ids = theirs.tokenize(text, special=special)
            assert tokenizer.encode(text, bos=False, special=special) == ids
