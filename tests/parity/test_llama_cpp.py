"""Exported files in llama.cpp itself.

Runs where llama-cpp-python is installed: pip install -e ".[peers]"
"""

import numpy as np
import pytest
import small
import torch

import mistral
from mistral.checkpoints.gguf_export import export

llama_cpp = pytest.importorskip("llama_cpp")


def their_logits(path, ids):
    F32 = 0
    model = llama_cpp.Llama(
        str(path),
        n_ctx=256,
        n_batch=256,
        logits_all=True,
        verbose=False,
        type_k=F32,
        type_v=F32,
        n_threads=2,
    )
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)])), model


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
    logits, _ = their_logits(folder / "F32.gguf", tokens[0].tolist())
    with torch.no_grad():
        assert (model(tokens)[0] - logits).abs().max() < 2e-5


def test_llama_cpp_is_near_our_logits_on_an_exported_q8_0_file(exported):
    # It rounds the activations to 8 bits as well, which we do not.
    folder, _, _ = exported
    model, _ = mistral.load(folder / "Q8_0.gguf", device="cpu", sliding_window=None)
    tokens = small.tokens(1, 48, vocab_size=460)
    logits, _ = their_logits(folder / "Q8_0.gguf", tokens[0].tolist())
    with torch.no_grad():
        difference = (model(tokens)[0] - logits).abs()
    assert difference.mean() < 0.03
    assert difference.max() < 0.3


def test_llama_cpp_splits_text_as_we_do(exported):
    folder, _, tokenizer = exported
    _, theirs = their_logits(folder / "F32.gguf", [1])
    for text in (
        "Hello world",
        "  two  spaces ",
        "naïve 日本語 😀",
        "<|im_start|>user\nhi<|im_end|>\n",
        "\n",
    ):
        for special in (False, True):
            ids = theirs.tokenize(text.encode(), add_bos=False, special=special)
            assert tokenizer.encode(text, bos=False, special=special) == ids
