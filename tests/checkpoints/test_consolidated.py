"""Mistral's own layout: other names, other rotary pairs, and a params.json that leaves things
out.
"""

import json
import pickle
import shutil

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

import mistral
from mistral.checkpoints.names import consolidated_names, interleaved_rows, rotary_heads

PARAMS = dict(
    dim=40,
    n_layers=3,
    head_dim=10,
    hidden_dim=56,
    n_heads=6,
    n_kv_heads=2,
    norm_eps=small.SIZES["rms_norm_eps"],
    vocab_size=32000,
)


@pytest.fixture(scope="module")
def model():
    return small.model(torch.bfloat16, vocab_size=32000)


def write(folder, model, form="safetensors", tokenizer="tokenizer.model", **params):
    names = consolidated_names(3)
    state = {}
    for name, tensor in model.state_dict().items():
        heads = rotary_heads(name, model.config)
        state[names[name]] = (
            tensor[interleaved_rows(len(tensor), heads)] if heads else tensor.clone()
        )
    if form == "safetensors":
        save_file(state, folder / "consolidated.safetensors")
    else:
        torch.save(state, folder / "consolidated.00.pth")
    values = PARAMS | {"sliding_window": 4, "rope_theta": 1e4} | params
    (folder / "params.json").write_text(
        json.dumps({k: v for k, v in values.items() if v is not ...})
    )
    shutil.copyfile(small.TRUE_TOKENIZERS / "tokenizer.model.v1", folder / tokenizer)
    return folder


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_weights_and_logits_are_the_models(form, model, tmp_path):
    loaded, tokenizer = mistral.load(
        write(tmp_path, model, form), device="cpu", dtype=torch.bfloat16
    )
    assert loaded.config.sliding_window == 4
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    tokens = small.tokens(2, 11)
    assert torch.equal(loaded(tokens), model(tokens))
    assert tokenizer.encode("Hello world") == [1, 22557, 1526]


def test_rows_are_paired_as_complex_numbers():
    # mistral-inference rotates neighbours (2i, 2i + 1) as complex numbers; the scores must not
    # notice.
    from mistral.rotary import Rotary, rotate

    q, k = torch.randn(2, 1, 1, 7, 10, dtype=torch.float64)
    order = interleaved_rows(10, 1)
    positions = torch.arange(7)[None]
    angles = positions[0, :, None].double() * Rotary(10, 1e4).frequencies.double()
    turn = torch.polar(torch.ones_like(angles), angles)

    def as_mistral(x):
        pairs = torch.view_as_complex(x[..., order].reshape(1, 1, 7, 5, 2))
        return torch.view_as_real(pairs * turn).flatten(-2)

    ours = [rotate(x, *Rotary(10, 1e4)(positions, torch.float64)) for x in (q, k)]
    theirs = [as_mistral(x) for x in (q, k)]
    assert torch.allclose(ours[0] @ ours[1].mT, theirs[0] @ theirs[1].mT, atol=1e-5)


@pytest.mark.parametrize(
    ("params", "theta", "window"),
    [
        (dict(rope_theta=..., sliding_window=4096), 1e4, 4096),  # v0.1
        (dict(rope_theta=..., sliding_window=...), 1e6, None),
        (dict(rope_theta=1e6, sliding_window=...), 1e6, None),  # v0.2, v0.3
        (dict(rope_theta=5e5, sliding_window=None), 5e5, None),
        (dict(sliding_window=..., _sliding_window=16), 1e4, 16),
        (dict(sliding_window=[16, 16, 16]), 1e4, 16),
        (dict(sliding_window=[None, None, None], rope_theta=...), 1e6, None),
    ],
)
def test_theta_and_window_follow_the_documented_rule(params, theta, window, model, tmp_path):
    loaded, _ = mistral.load(write(tmp_path, model, **params), device="cpu")
    assert (loaded.config.rope_theta, loaded.config.sliding_window) == (theta, window)
    assert mistral.load(tmp_path, device="cpu", sliding_window=9)[0].config.sliding_window == 9


def test_sizes_come_from_the_tensors_where_published_files_are_wrong(model, tmp_path):
    loaded, _ = mistral.load(write(tmp_path, model, hidden_dim=4096, vocab_size=...), device="cpu")
    assert (loaded.config.intermediate_size, loaded.config.vocab_size) == (56, 32000)


def test_a_stored_output_matrix_of_a_tied_model_must_be_the_embedding(model, tmp_path):
    write(tmp_path, model, tied_embeddings=True)
    with pytest.raises(mistral.CheckpointError, match="lm_head.weight differs from"):
        mistral.load(tmp_path, device="cpu")
    tied = small.model(torch.bfloat16, vocab_size=32000, tie_word_embeddings=True)
    loaded, _ = mistral.load(write(tmp_path, tied, tied_embeddings=True), device="cpu")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_folder_with_both_layouts_is_read_as_hugging_faces(tmp_path):
    for file in (small.DATA / "small").iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    (tmp_path / "params.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert mistral.load(tmp_path, device="cpu")[0].config.vocab_size == 480


def test_the_tokenizer_may_have_a_version_in_its_name(model, tmp_path):
    assert (
        mistral.load(write(tmp_path, model, tokenizer="tokenizer.model.v1"), device="cpu")[
            1
        ].vocab_size
        == 32000
    )


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def edit_tensors(folder, change):
    path = folder / "consolidated.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


DAMAGE = {
    "Hugging Face's names": (
        lambda f: save_file(
            {"model.layers.0.x.weight": torch.zeros(1)}, f / "consolidated.safetensors"
        ),
        r"or tok_embeddings.weight \(the first is model.layers.0.x.weight\)",
    ),
    "quantized weights": (
        lambda f: edit_tensors(
            f,
            lambda t: t.update(
                {"layers.0.attention.wq.weight": torch.zeros(60, 40).to(torch.float8_e4m3fn)}
            ),
        ),
        r"quantized with fp8 \(layers.0.attention.wq.weight is F8_E4M3\)",
    ),
    "a LoRA adapter in the same file": (
        lambda f: edit_tensors(
            f, lambda t: t.update({"layers.0.attention.wq.lora_A.weight": torch.zeros(1)})
        ),
        "layers.0.attention.wq.lora_A.weight is not part of a Mistral: this is a LoRA adapter",
    ),
    "no weights": (
        lambda f: (f / "consolidated.safetensors").unlink(),
        "neither consolidated.safetensors nor",
    ),
    "half the weights": (
        lambda f: (f / "consolidated.safetensors").write_bytes(
            (f / "consolidated.safetensors").read_bytes()[:999]
        ),
        "damaged or not complete",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "has no tokenizer.model"),
    "an empty params.json": (
        lambda f: (f / "params.json").write_text("{}"),
        "dim must be a whole number",
    ),
    "no params.json": (lambda f: (f / "params.json").unlink(), "no config.json .* no params.json"),
    "windows that differ": (
        lambda f: (f / "params.json").write_text(
            json.dumps(PARAMS | {"sliding_window": [4, None, 4]})
        ),
        "differs between the layers",
    ),
    "a mixture of experts": (
        lambda f: (f / "params.json").write_text(json.dumps(PARAMS | {"moe": {}})),
        "moe is not supported",
    ),
    "another number of layers": (
        lambda f: (f / "params.json").write_text(json.dumps(PARAMS | {"n_layers": 2})),
        "the weights have 3 layers, the config says 2",
    ),
    "another number of heads": (
        lambda f: (f / "params.json").write_text(json.dumps(PARAMS | {"n_kv_heads": 3})),
        r"layers.0.attention.wk.weight is \[20, 40\] in the file and \[30, 40\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused_by_name(damage, model, tmp_path):
    do, message = DAMAGE[damage]
    do(write(tmp_path, model))
    with pytest.raises(mistral.CheckpointError, match=message):
        mistral.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", pickle.dumps({"x": Evil()}), pickle.dumps([1, 2])]
)
def test_a_pickle_that_is_more_than_tensors_is_refused_unrun(content, model, tmp_path, capsys):
    write(tmp_path, model)
    (tmp_path / "consolidated.safetensors").unlink()
    (tmp_path / "consolidated.00.pth").write_bytes(content)
    with pytest.raises(mistral.CheckpointError, match=r"consolidated.00.pth"):
        mistral.load(tmp_path, device="cpu")
    for value in ({"x": Evil()}, {"x": torch.zeros(2, dtype=torch.int8)}, [torch.zeros(1)]):
        torch.save(value, tmp_path / "consolidated.00.pth")
        with pytest.raises(mistral.CheckpointError, match=r"consolidated.00.pth"):
            mistral.load(tmp_path, device="cpu")
    assert "must not run" not in capsys.readouterr().out
