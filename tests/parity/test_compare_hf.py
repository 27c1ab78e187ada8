"""compare_hf.py compares with what transformers itself reads, wherever it can read."""

import compare_hf
import pytest
import small
import torch

import mistral

pytest.importorskip("transformers")
GGUF = small.DATA / "gguf/q4_k_m.gguf"


@pytest.fixture(scope="module")
def ours():
    model, _ = mistral.load(GGUF, device="cpu", dtype=torch.float32, sliding_window=16)
    return model.requires_grad_(False)


def logits(model):
    tokens = small.tokens(2, 40, vocab_size=460)
    with torch.no_grad():
        output = model(tokens)
    return output if isinstance(output, torch.Tensor) else output.logits


def test_transformers_reads_a_gguf_file_itself(ours, capsys):
    pytest.importorskip("accelerate")
    theirs = compare_hf.load_theirs(GGUF, ours)
    assert "gets the weights from us" not in capsys.readouterr().err
    assert theirs.config.sliding_window == 16
    assert torch.equal(logits(theirs), logits(ours))


def test_a_fault_of_our_reading_shows(capsys):
    pytest.importorskip("accelerate")
    wrong, _ = mistral.load(GGUF, device="cpu", dtype=torch.float32, sliding_window=16)
    with torch.no_grad():
        wrong.model.layers[1].self_attn.k_proj.weight[:64] *= 1.01
    assert not torch.equal(logits(compare_hf.load_theirs(GGUF, wrong)), logits(wrong))


def test_it_gets_our_weights_if_it_cannot_read_the_file(ours, tmp_path, capsys):
    unknown = tmp_path / "unknown.gguf"
    unknown.write_bytes(b"GGUF")
    theirs = compare_hf.load_theirs(unknown, ours)
    assert "unknown.gguf (" in capsys.readouterr().err
    assert torch.equal(logits(theirs), logits(ours))
