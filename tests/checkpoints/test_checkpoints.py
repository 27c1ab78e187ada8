"""Loading Hugging Face's layout: the right weights, little memory, and a clear refusal of
everything else.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

import mistral
from mistral.checkpoints.hugging_face import save
from mistral.checkpoints.load import choose_device

SMALL = small.DATA / "small"


@pytest.fixture
def folder(tmp_path):
    """A copy of the small checkpoint that a test may damage."""
    for file in SMALL.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )


def shard(folder, parts=3):
    """Split the one file into shards with an index, as transformers does above 5 GB."""
    tensors = load_file(folder / "model.safetensors")
    places = {
        name: f"model-{i % parts + 1:05d}-of-{parts:05d}.safetensors"
        for i, name in enumerate(tensors)
    }
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def assert_same_weights(model, other):
    mine = model.state_dict()
    theirs = other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_every_weight_arrives_in_the_dtype_that_was_asked_for():
    stored = load_file(SMALL / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        model, _ = mistral.load(SMALL, device="cpu", dtype=dtype)
        assert model.state_dict().keys() == stored.keys()
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, stored[name].to(dtype))


def test_the_default_on_a_cpu_is_float32():
    model, _ = mistral.load(SMALL, device="cpu")
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.gpu
def test_the_default_is_the_gpu_and_the_checkpoints_dtype():
    model, _ = mistral.load(SMALL)
    assert model.lm_head.weight.device.type == "cuda"
    assert model.lm_head.weight.dtype == torch.bfloat16
    tokens = small.tokens(2, 40, vocab_size=460)
    expected = mistral.load(SMALL, device="cpu", dtype=torch.float32)[0](tokens)
    assert (model.float()(tokens.cuda()).cpu() - expected).abs().max() < 1e-3


def test_shards_give_the_weights_of_one_file(folder):
    whole, _ = mistral.load(folder, device="cpu")
    shard(folder)
    assert_same_weights(mistral.load(folder, device="cpu")[0], whole)


def test_weights_in_other_layouts_beside_it_are_left_alone(folder):
    # A v0.3 folder: Mistral's own file holds the same weights again.
    shard(folder)
    save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, folder / "consolidated.safetensors")
    (folder / "params.json").write_text("{}")
    assert_same_weights(mistral.load(folder, device="cpu")[0], mistral.load(SMALL, device="cpu")[0])


def test_the_window_can_be_overridden():
    assert mistral.load(SMALL, device="cpu")[0].config.sliding_window == 16
    assert mistral.load(SMALL, device="cpu", sliding_window=None)[0].config.sliding_window is None
    assert mistral.load(SMALL, device="cpu", sliding_window=5)[0].config.sliding_window == 5


def test_what_save_writes_load_reads(tmp_path):
    model = small.model(torch.float32, vocab_size=32032, eos_token_id=(32000, 2))
    save(model, small.true_tokenizer(stop_ids=[32000, 2]), tmp_path)
    loaded, tokenizer = mistral.load(tmp_path, device="cpu")
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    assert tokenizer.added == {32000: "<|im_end|>", 32001: "<|im_start|>"}
    assert tokenizer.stop_ids == (32000, 2)
    assert not list(tmp_path.glob("*.unfinished"))


def test_model_and_tokenizer_stop_at_the_tokenizers_end_where_no_json_names_one(folder):
    edit_json(folder / "config.json", eos_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model, tokenizer = mistral.load(folder, device="cpu")
    assert model.config.eos_token_id == tokenizer.stop_ids == (2,)


def test_a_tied_matrix_is_one_parameter_after_loading(tmp_path):
    small.save_hf(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    shutil.copyfile(SMALL / "tokenizer.model", tmp_path / "tokenizer.model")
    edit_json(tmp_path / "config.json", vocab_size=101)
    model = small.load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    edit_tensors(
        tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    )
    with pytest.raises(
        mistral.CheckpointError, match="tie_word_embeddings is true, but lm_head.weight differs"
    ):
        small.load_model(tmp_path)


def test_stored_rotary_frequencies_are_ignored(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda t: t.update({name: torch.ones(16)}))
    assert_same_weights(mistral.load(folder, device="cpu")[0], mistral.load(SMALL, device="cpu")[0])


def test_a_loaded_model_can_be_trained():
    model, tokenizer = mistral.load(SMALL, device="cpu")
    model(torch.tensor([tokenizer.encode("abc")])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


DAMAGE = {
    "no such folder": (lambda f: shutil.rmtree(f), "does not exist"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "safetensors under the name of a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin is a safetensors file: give it that ending",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "has no tokenizer.model"),
    "empty weights": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "model.safetensors is empty: the download did not finish",
    ),
    "wrong magic": (
        lambda f: (f / "model.safetensors").write_bytes(b"GGUF" * 99),
        "model.safetensors is a GGUF file: rename it",
    ),
    "another header": (
        lambda f: (f / "model.safetensors").write_bytes(b"nonsense" * 99),
        "damaged or not complete",
    ),
    "half the weights": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:999999]
        ),
        "damaged or not complete",
    ),
    "half the tokenizer": (
        lambda f: (f / "tokenizer.model").write_bytes((f / "tokenizer.model").read_bytes()[:999]),
        "tokenizer.model: not a sentencepiece model",
    ),
    "eps missing": (
        lambda f: edit_json(f / "config.json", rms_norm_eps=None),
        "rms_norm_eps is missing",
    ),
    "more layers in the config": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=2**30),
        "the weights have 2 layers, the config says 1073741824",
    ),
    "fewer layers in the config": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=1),
        "the weights have 2 layers, the config says 1",
    ),
    "a tensor of no model": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.layers.0.extra": torch.zeros(2)})),
        "model.layers.0.extra is not part of a Mistral",
    ),
    "a tensor missing": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "model.layers.1.mlp.up_proj.weight is missing",
    ),
    "a tensor too many": (
        lambda f: edit_tensors(
            f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(256)})
        ),
        "model.layers.0.self_attn.q_proj.bias is not part of a Mistral",
    ),
    "a tensor of another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": torch.zeros(255)})),
        r"model.norm.weight is \[255\] in the file and \[256\] by the config",
    ),
    "another width in the config": (
        lambda f: edit_json(f / "config.json", head_dim=64),
        r"\(and 5 more\)",
    ),
    "an integer tensor": (
        lambda f: edit_tensors(
            f, lambda t: t.update({"model.norm.weight": torch.zeros(256).to(torch.int8)})
        ),
        "model.norm.weight is stored as I8",
    ),
    "a larger tokenizer": (
        lambda f: (
            edit_json(f / "config.json", vocab_size=450, eos_token_id=2)
            or edit_json(f / "generation_config.json", eos_token_id=2)
        ),
        "460 ids, and the model's vocabulary is 450",
    ),
    "quarrelling added tokens": (
        lambda f: edit_json(f / "added_tokens.json", **{"<|im_end|>": 461}),
        "have the id 461",
    ),
    "an added token without an id": (
        lambda f: edit_json(f / "added_tokens.json", x="7"),
        "'x' with the id '7' is not",
    ),
    "a shard missing": (
        lambda f: (shard(f), (f / "model-00002-of-00003.safetensors").unlink()),
        "00002-of-00003.safetensors is missing: the download is not complete",
    ),
    "a tensor not where the index puts it": (
        lambda f: (
            shard(f),
            shutil.copy(
                f / "model-00001-of-00003.safetensors", f / "model-00002-of-00003.safetensors"
            ),
        ),
        "lacks .*, which the index puts there",
    ),
    "an index that leaves the folder": (
        lambda f: (
            shard(f),
            edit_json(
                f / "model.safetensors.index.json",
                weight_map={"model.norm.weight": "../x.safetensors"},
            ),
        ),
        "is not a file name",
    ),
    "an index without a map": (
        lambda f: (shard(f), edit_json(f / "model.safetensors.index.json", weight_map=[])),
        "has no weight_map",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_refused_by_name(folder, damage):
    do, message = DAMAGE[damage]
    do(folder)
    with pytest.raises(mistral.CheckpointError, match=message):
        mistral.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(device="gpu"), "device 'gpu'"),
        (dict(dtype=torch.int8), "dtype must be one of torch.float32"),
        (dict(dtype=torch.float8_e4m3fn), "dtype must be one of torch.float32"),
        (dict(dtype="bfloat16"), "dtype must be one of torch.float32"),
        (dict(quantize="q5_0"), "quantize must be 'q8_0' or 'q4_0'"),
        (dict(sliding_window=0), "sliding_window must be"),
        (dict(sliding_window="4096"), "sliding_window must be"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mistral.load(SMALL, **{"device": "cpu", **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="finds no CUDA GPU"):
        mistral.load(SMALL, device="cuda")


def test_a_file_that_is_not_a_gguf_is_said(tmp_path):
    (tmp_path / "model").write_bytes(b"nonsense")
    with pytest.raises(mistral.CheckpointError, match="is not a GGUF file: it begins with b'nons'"):
        mistral.load(tmp_path / "model")


@pytest.mark.parametrize(
    "name",
    [
        file.name
        for file in SMALL.iterdir()
        if file.suffix in (".json", ".model", ".safetensors")
        and file.name not in ("tokens.json", "generation_config.json")
    ],
)
def test_mutated_files_give_a_model_or_a_checkpoint_error(folder, name):
    original = (SMALL / name).read_bytes()
    generator = random.Random(name)
    header = min(len(original), 3000)  # where safetensors keeps its names and shapes
    for _ in range(60):
        data = bytearray(original)
        at = generator.randrange(header)
        match generator.randrange(4):
            case 0:
                data = data[: generator.randrange(len(data))]
            case 1:
                for _ in range(generator.choice([1, 5, 20])):
                    data[generator.randrange(header)] = generator.randrange(256)
            case 2:
                del data[at : at + generator.randrange(40)]
            case 3:
                data[at:at] = generator.randbytes(5)
        (folder / name).write_bytes(data)
        start = time.process_time()
        try:
            _, tokenizer = mistral.load(folder, device="cpu")
            tokenizer.decode(tokenizer.encode("some <|im_start|> text", special=True))
        except mistral.CheckpointError:
            pass
        assert time.process_time() - start < 10


MEASURE = """
import sys, torch, mistral
from pathlib import Path
def kilobytes(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1])
mistral.load(sys.argv[2], device="cpu")  # everything is imported and warm
before = kilobytes("VmRSS")
model, _ = mistral.load(sys.argv[1], device="cpu")
size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1024
print((kilobytes("VmHWM") - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_takes_little_more_memory_than_stays(tmp_path):
    tokenizer = mistral.load(SMALL, device="cpu")[1]
    sizes = dict(
        vocab_size=4000, hidden_size=1024, intermediate_size=3584, num_hidden_layers=8, head_dim=64
    )
    model = mistral.Mistral(small.config(**sizes, num_attention_heads=16, num_key_value_heads=4))
    save(model.to(torch.bfloat16), tokenizer, tmp_path)  # 224 MB, which become 449 MB of float32
    shard(tmp_path)
    ratio = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path, SMALL], capture_output=True, text=True, check=True
    )
    assert 0.9 < float(ratio.stdout) < 1.15


def test_a_model_is_saved_and_exported_by_the_package_itself(tmp_path):
    model, tokenizer = mistral.load(small.DATA / "small", device="cpu")
    tokens = small.tokens(1, 20, vocab_size=460)
    mistral.save(model, tokenizer, str(tmp_path / "folder"))
    mistral.export_gguf(model, tokenizer, str(tmp_path / "model.gguf"), type="F32")
    for source in ("folder", "model.gguf"):
        again, its_tokenizer = mistral.load(tmp_path / source, device="cpu", sliding_window=16)
        assert torch.equal(again(tokens), model(tokens))
        assert its_tokenizer.vocabulary() == tokenizer.vocabulary()
    with pytest.raises(ValueError, match="is a path"):
        mistral.save("folder", tokenizer, tmp_path / "other")


def test_gpus_are_counted_from_0(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1").index == 1
    with pytest.raises(ValueError, match="there are 2 CUDA GPUs, counted from 0"):
        choose_device("cuda:2")
