"""Rounding while loading: gguf-py's bytes, and a model like that of a quantised GGUF file."""

import json
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
import small
import torch
from safetensors.torch import load_file, save_file

import mistral
from mistral.checkpoints import gguf_export
from mistral.quantization.packed import Packed, PackedEmbedding, PackedLinear, TiedOutput
from mistral.quantization.quantize import KINDS, quantize

CPU = torch.device("cpu")
SMALL = small.DATA / "small"


def load(path, **arguments):
    return mistral.load(path, **{"device": "cpu", "sliding_window": None, **arguments})


def awkward_rows():
    """Ordinary numbers, and those whose rounding could go either way."""
    rows = torch.randn(24, 256) * 0.02
    rows[0] = 0
    rows[1, 8] = 1e-7  # a scale that float16 rounds to nothing
    rows[2, ::2] = 0.5
    rows[2, 1::2] = -0.5  # two that are equally large, with different signs
    rows[3] = torch.randint(-254, 255, (256,)) / 2  # halves
    rows[4] = torch.arange(256) * 30.0
    return rows


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_bytes_are_gguf_pys(name, dtype, monkeypatch):
    from mistral.quantization import quantize as module

    monkeypatch.setattr(module, "weights_at_once", lambda device: 5 * 256)  # five rows at a time
    rows = awkward_rows().to(dtype)
    theirs = gguf.quantize(rows.float().numpy(), gguf.GGMLQuantizationType[KINDS[name].name])
    assert np.array_equal(quantize(rows, KINDS[name], CPU).numpy(), theirs)


@pytest.mark.parametrize(
    ("number", "name"), [(torch.inf, "q8_0"), (torch.nan, "q4_0"), (9e6, "q8_0"), (6e5, "q4_0")]
)
def test_numbers_that_a_block_cannot_hold_are_refused(number, name):
    rows = awkward_rows()
    rows[23, 255] = number
    with pytest.raises(mistral.CheckpointError, match="holds numbers up to"):
        quantize(rows, KINDS[name], CPU)


def test_the_model_is_that_of_a_packed_gguf(tmp_path):
    original = load(SMALL)
    gguf_export.export(*original, tmp_path / "m.gguf", "Q8_0")
    theirs, _ = load(tmp_path / "m.gguf", packed=True)
    ours, tokenizer = load(SMALL, quantize="q8_0")
    assert tokenizer.vocab_size == original[1].vocab_size
    state = ours.state_dict()
    expected = theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    tokens = small.tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(ours(tokens), theirs(tokens))
    ids = list(mistral.generate(ours, [1, 5, 6], mistral.Sampling(temperature=0), max_new_tokens=5))
    assert ids == list(
        mistral.generate(theirs, [1, 5, 6], mistral.Sampling(temperature=0), max_new_tokens=5)
    )


def test_four_bits_are_for_all_matrices_but_the_output_and_norms_stay():
    model, _ = load(SMALL, quantize="q4_0", dtype=torch.bfloat16)
    kinds = {
        name: module.kind.name
        for name, module in model.named_modules()
        if isinstance(module, Packed)
    }
    assert kinds.pop("lm_head") == "Q8_0"
    assert set(kinds.values()) == {"Q4_0"}
    assert len(kinds) == 1 + 7 * model.config.num_hidden_layers
    assert isinstance(model.model.embed_tokens, PackedEmbedding)
    norm = load_file(SMALL / "model.safetensors")["model.norm.weight"]
    assert torch.equal(model.model.norm.weight, norm.bfloat16())


def consolidated_copy(folder):
    """The small checkpoint in Mistral's own layout."""
    from mistral.checkpoints.names import consolidated_names, interleaved_rows, rotary_heads

    config = load(SMALL)[0].config
    names = consolidated_names(config.num_hidden_layers)
    tensors = {}
    for name, tensor in load_file(SMALL / "model.safetensors").items():
        heads = rotary_heads(name, config)
        tensors[names[name]] = (
            tensor if heads is None else tensor[interleaved_rows(len(tensor), heads)].contiguous()
        )
    save_file(tensors, folder / "consolidated.safetensors")
    shutil.copyfile(SMALL / "tokenizer.model", folder / "tokenizer.model.v3")
    params = dict(
        dim=config.hidden_size, n_layers=config.num_hidden_layers, head_dim=config.head_dim,
        n_heads=config.num_attention_heads, n_kv_heads=config.num_key_value_heads, rope_theta=config.rope_theta,
        norm_eps=config.rms_norm_eps,
    )  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))


def test_every_form_that_holds_numbers_gives_the_same_blocks(tmp_path):
    consolidated_copy(tmp_path)
    gguf_export.export(*load(SMALL), tmp_path / "plain.gguf", "F32")
    wanted = load(SMALL, quantize="q4_0")[0].state_dict()
    for source in (tmp_path, tmp_path / "plain.gguf"):
        state = load(source, quantize="q4_0")[0].state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted), source


def test_a_tied_output_has_eight_bits_and_no_bytes_of_its_own(tmp_path):
    small.save_hf(
        tmp_path, tie_word_embeddings=True, hidden_size=64, intermediate_size=96, head_dim=16
    )
    model = small.load_model(tmp_path, quantize="q4_0")
    assert model.model.embed_tokens.kind.name == "Q8_0"
    assert isinstance(model.lm_head, TiedOutput)
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    assert model(small.tokens(1, 5)).isfinite().all()


def test_what_cannot_be_rounded_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="quantize must be 'q8_0' or 'q4_0', not 'q4_k'"):
        load(SMALL, quantize="q4_k")
    with pytest.raises(
        ValueError,
        match=r"q8_0.gguf is quantised \(lm_head.weight is Q8_0\): keep it .* packed",
    ):
        load(small.DATA / "gguf/q8_0.gguf", quantize="q4_0")
    small.save_hf(tmp_path)  # rows of 40
    shutil.copyfile(SMALL / "tokenizer.model", tmp_path / "tokenizer.model")
    with pytest.raises(
        ValueError, match="stores blocks of 32 weights, and .* has rows of 40: leave out quantize"
    ):
        small.load_model(tmp_path, quantize="q8_0")
    tensors = load_file(SMALL / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = torch.inf
    broken = shutil.copytree(SMALL, tmp_path / "broken")
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(
        mistral.CheckpointError, match="layers.1.mlp.up_proj.weight: Q8_0 holds numbers up to"
    ):
        load(broken, quantize="q8_0")


def test_a_packed_model_is_written_as_it_is(tmp_path):
    model, tokenizer = load(SMALL, quantize="q4_0")
    gguf_export.export(model, tokenizer, tmp_path / "m.gguf", None)
    again, _ = load(tmp_path / "m.gguf", packed=True)
    state = again.state_dict()
    wanted = model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match="the type must be one of"):
        gguf_export.export(load(SMALL)[0], tokenizer, tmp_path / "n.gguf", None)


def test_packed_asks_for_blocks_and_quantize_makes_them():
    with pytest.raises(ValueError, match="packed=True is for quantised GGUF files"):
        load(SMALL, packed=True)
    model, _ = load(SMALL, packed=True, quantize="q8_0")
    assert isinstance(model.lm_head, PackedLinear)


def test_memory_is_asked_for_what_the_blocks_take(monkeypatch):
    from mistral.checkpoints import room

    asked = []
    monkeypatch.setattr(room, "require_memory", lambda needed, *rest: asked.append(needed))
    model, _ = load(SMALL, quantize="q8_0")
    assert asked == [sum(tensor.nbytes for tensor in model.state_dict().values())]


@pytest.mark.slow
def test_the_scripts_take_it():
    command = [
        sys.executable,
        "scripts/generate.py",
        str(SMALL),
        "--quantize",
        "q8_0",
        "--prompt",
        "Hello",
    ]
    options = ["--max-new-tokens", "2", "--device", "cpu"]
    result = subprocess.run([*command, *options], capture_output=True, text=True, cwd=small.ROOT)
    assert result.returncode == 0, result.stderr
    load_it = (
        "import sys; sys.path.insert(0, 'scripts'); import common; parser = common.parser('', ''); "
    )
    load_it += (
        "common.add_model_arguments(parser); print(common.load(parser.parse_args())[0].lm_head)"
    )
    command = [sys.executable, "-c", load_it, str(SMALL), "--device", "cpu", "--quantize"]
    result = subprocess.run([*command, "q8_0"], capture_output=True, text=True, cwd=small.ROOT)
    assert result.stdout.startswith("PackedLinear("), result.stderr
    refused = subprocess.run([*command, "q3_0"], capture_output=True, text=True, cwd=small.ROOT)
    assert refused.returncode == 2
