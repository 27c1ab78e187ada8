"""The weights of a folder in Hugging Face's layout: pickles as well as safetensors, and a name for
every other form.
"""

import json
import random
import shutil
import struct
import time
import warnings

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

import mistral
from mistral.checkpoints.hub import choose_files

SMALL = small.DATA / "small"
STATE = load_file(SMALL / "model.safetensors")
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    """A copy of the small checkpoint without its weights."""
    for file in SMALL.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, tmp_path / file.name)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_shards(folder, name, save):
    """Two shards with an index, as transformers names them. Returns the index's path."""
    stem, _, ending = name.partition(".")
    files = [f"{stem}-0000{i}-of-00002.{ending}" for i in (1, 2)]
    parts = [
        {k: v for k, v in STATE.items() if ("layers.1" in k) is flag} for flag in (False, True)
    ]
    for part, file in zip(parts, files):
        save(part, folder / file)
    index = {"metadata": {}, "weight_map": {k: f for p, f in zip(parts, files) for k in p}}
    path = folder / f"{name}.index.json"
    path.write_text(json.dumps(index))
    return path


def assert_loads(folder, dtype=torch.bfloat16):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = mistral.load(folder, device="cpu", dtype=dtype)
    state = model.state_dict()
    assert state.keys() == STATE.keys()
    for name, expected in STATE.items():
        assert torch.equal(state[name], expected.to(dtype)), name


def refusal(folder):
    with pytest.raises(mistral.CheckpointError) as caught:
        mistral.load(folder, device="cpu")
    message = str(caught.value)
    assert message.isprintable()  # on one line
    message.encode()
    return message


# pytorch_model.bin


def to_bin(state, path):
    torch.save(state, path)


def to_old_bin(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [to_bin, to_old_bin])
def test_pytorch_model_bin_is_read(save, folder):
    save(STATE, folder / "pytorch_model.bin")
    assert_loads(folder)
    assert_loads(folder, torch.float32)


@pytest.mark.parametrize("save", [to_bin, to_old_bin])
def test_shards_of_pytorch_model_bin_are_read(save, folder):
    write_shards(folder, "pytorch_model.bin", save)
    assert_loads(folder)


def test_a_state_dict_with_views_parameters_and_buffers_is_read(folder):
    state = {name: torch.nn.Parameter(tensor) for name, tensor in STATE.items()}
    rows = torch.cat([STATE[f"{Q}.weight"], STATE["model.layers.0.self_attn.k_proj.weight"]])
    state[f"{Q}.weight"] = rows[: len(STATE[f"{Q}.weight"])]
    state["model.layers.0.self_attn.k_proj.weight"] = rows[len(STATE[f"{Q}.weight"]) :]
    up = "model.layers.1.mlp.up_proj.weight"
    state[up] = STATE[up].t().contiguous().t()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    state["model.position_ids"] = torch.arange(9)
    torch.save(state, folder / "pytorch_model.bin")
    assert_loads(folder)


def test_a_tied_matrix_may_be_stored_once_or_twice(folder):
    edit_config(folder, tie_word_embeddings=True)
    embedding = STATE["model.embed_tokens.weight"]
    for state in (
        STATE | {"lm_head.weight": embedding},
        {k: v for k, v in STATE.items() if k != "lm_head.weight"},
    ):
        torch.save(state, folder / "pytorch_model.bin")
        model, _ = mistral.load(folder, device="cpu", dtype=torch.bfloat16)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, embedding)


def test_files_are_chosen_as_transformers_chooses_them(folder):
    zeros = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    to_bin(STATE, folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    assert_loads(folder)
    write_shards(folder, "model.safetensors", save_file)
    to_bin(zeros, folder / "pytorch_model.bin")
    assert_loads(folder)
    save_file(STATE, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert_loads(folder)


def test_a_repository_of_pickles_is_downloaded(folder):
    index = write_shards(folder, "pytorch_model.bin", to_bin)
    shards = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    base = ["config.json", "tokenizer.model"]
    chosen = choose_files("a/b", [*base, index.name, *shards], None, lambda name: folder / name)
    assert chosen == ["config.json", index.name, *shards, "tokenizer.model"]
    files = [*base, "pytorch_model.bin", index.name]
    assert choose_files("a/b", files, None, None) == [base[0], "pytorch_model.bin", base[1]]
    files += ["model.safetensors"]
    assert choose_files("a/b", files, None, None) == [base[0], "model.safetensors", base[1]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_a_pickled_tensor_of_another_dtype_is_refused_by_name(dtype, folder):
    norm = STATE["model.norm.weight"].to(dtype)
    torch.save(STATE | {"model.norm.weight": norm}, folder / "pytorch_model.bin")
    kind = str(dtype).removeprefix("torch.")
    assert f"pytorch_model.bin: model.norm.weight is stored as {kind}" in refusal(folder)


# Indexes


def edited(change):
    """A change of the weight_map."""

    def edit(index):
        value = json.loads(index.read_text())
        change(value["weight_map"])
        index.write_text(json.dumps(value))

    return edit


def twice(index):
    part = load_file(index.with_name("model-00002-of-00002.safetensors"))
    save_file(STATE | part, index.with_name("model-00001-of-00002.safetensors"))


INDEXES = {
    "a tensor that is not there": (
        edited(lambda m: m.update({"absent": m["lm_head.weight"]})),
        "model-00001-of-00002.safetensors lacks absent, which the index puts there",
    ),
    "a tensor that is not there, of half a character": (
        edited(lambda m: m.update({"\ud800": m["lm_head.weight"]})),
        r"lacks \ud800, which the index puts there",
    ),
    "a tensor in two shards": (twice, " is in two files, "),
    "a number for a file": (edited(lambda m: m.update(x=3)), "puts x into 3, which is not a file"),
    "no file": (edited(lambda m: m.update(x=None)), "puts x into None, which is not a file name"),
    **{
        f"the file {file!r}": (
            edited(lambda m, file=file: m.update({"lm_head.weight": file})),
            "which is not a file name",
        )
        for file in ("", ".", "..", "/etc/passwd", "../x.safetensors", "a/b", "\0", "\ud800", "a\n")
    },
    "a folder": (
        lambda index: (
            index.with_name("folder").mkdir(),
            edited(lambda m: m.update({"lm_head.weight": "folder"}))(index),
        ),
        "folder",
    ),
    "a list": (lambda index: index.write_text('{"weight_map": [1]}'), "has no weight_map"),
    "nothing": (lambda index: index.write_text('{"weight_map": {}}'), "has no weight_map"),
}


@pytest.mark.parametrize("what", INDEXES)
def test_a_damaged_index_is_refused(what, folder):
    change, message = INDEXES[what]
    change(write_shards(folder, "model.safetensors", save_file))
    assert message in refusal(folder)


def test_all_tensors_of_a_shard_are_read_as_transformers_reads_them(folder):
    index = write_shards(folder, "model.safetensors", save_file)
    edited(lambda m: m.pop("model.norm.weight"))(index)
    save_file(STATE, folder / "model-00003-of-00002.safetensors")  # the index does not name it
    assert_loads(folder)


# Quantized weights


def replaced(**parts):
    """The state with a matrix replaced by tensors whose names end so."""
    state = {name: tensor for name, tensor in STATE.items() if name != f"{Q}.weight"}
    names = {name.replace("__", "."): tensor for name, tensor in parts.items()}
    return state | {f"{Q}.{name}": tensor for name, tensor in names.items()}


INT32 = torch.zeros(32, 8, dtype=torch.int32)
BYTES = torch.zeros(64, 1, dtype=torch.uint8)
FP8 = torch.zeros(8, 8).to(torch.float8_e4m3fn)
HALF = torch.zeros(8).half()
QUANTIZED = {
    "GPTQ": dict(qweight=INT32, qzeros=INT32, scales=HALF, g_idx=INT32),
    "AWQ": dict(qweight=INT32, qzeros=INT32, scales=HALF),
    "bitsandbytes, 4 bits": dict(
        weight=BYTES,
        weight__absmax=BYTES,
        weight__quant_map=HALF,
        weight__quant_state__bitsandbytes__nf4=BYTES,
    ),
    "bitsandbytes, 8 bits": dict(weight=INT32.to(torch.int8), SCB=HALF),
    "HQQ": dict(W_q=BYTES, scale=HALF, zero=HALF),
    "EETQ": dict(weight=INT32.to(torch.int8), weight_scales=HALF),
    "MLX": dict(weight=INT32, scales=HALF, biases=HALF.clone()),
    "compressed-tensors": dict(weight_packed=INT32, weight_scale=HALF, weight_shape=INT32[0]),
    "torchao": dict(_weight_qdata=BYTES, _weight_scale=HALF),
    "fp8, in blocks": dict(weight=FP8, weight_scale_inv=HALF),
    "fp8": dict(weight=FP8, weight_scale=HALF),
}


@pytest.mark.parametrize("config", [None, {"quant_method": "other"}, [], "x", {"quant_method": 3}])
@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_weights_are_refused_by_their_method(method, config, folder):
    save_file(
        {k: v.clone() for k, v in replaced(**QUANTIZED[method]).items()},
        folder / "model.safetensors",
    )
    edit_config(folder, quantization_config=config)
    message = refusal(folder)
    assert f"model.safetensors: the weights are quantized with {method} ({Q}." in message
    assert "use the original checkpoint, or a GGUF" in message


def test_the_config_names_the_method_that_the_tensors_do_not_show(folder):
    save_file(
        replaced(weight=INT32.to(torch.int8), weight_scale=HALF), folder / "model.safetensors"
    )
    assert f"{Q}.weight is stored as I8; only float64," in refusal(folder)
    edit_config(folder, quantization_config={"quant_method": "compressed-tensors"})
    assert f"quantized with compressed-tensors ({Q}.weight is I8)" in refusal(folder)


@pytest.mark.parametrize(
    "config", [{"quant_method": "gptq", "bits": 4}, {"load_in_4bit": True}, "x"]
)
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_a_config_that_plain_weights_contradict_is_noted(config, form, folder):
    save = save_file if form.endswith("safetensors") else to_bin
    save(STATE, folder / form)
    edit_config(folder, quantization_config=config)
    with pytest.warns(
        UserWarning, match="has a quantization_config, but the weights are pl"
    ) as notes:
        model, _ = mistral.load(folder, device="cpu", dtype=torch.bfloat16)
    assert len(notes) == 1
    assert torch.equal(model.state_dict()[f"{Q}.weight"], STATE[f"{Q}.weight"])
    edit_config(folder, quantization_config={})
    assert_loads(folder)


@pytest.mark.parametrize("kind", ["F4", "F6_E2M3", "F8_E8M0", "C64", "NEW"])
def test_a_type_of_safetensors_that_is_not_read_is_named(kind, folder):
    size = {"F4": 4, "F6_E2M3": 6, "C64": 64}.get(kind, 8)
    entry = {"dtype": kind, "shape": [8], "data_offsets": [0, size]}
    header = json.dumps({"model.norm.weight": entry}).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    message = refusal(folder)
    assert message.startswith(f"{path}")
    assert kind in message
    assert "damaged" not in message


# Other names


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."]
)
def test_a_wrappers_prefix_is_left_out_with_a_note(prefix, form, folder):
    save = save_file if form.endswith("safetensors") else to_bin
    save({prefix + name: tensor for name, tensor in STATE.items()}, folder / form)
    with pytest.warns(UserWarning, match=f"{prefix}lm_head.weight .* as lm_head.weight") as notes:
        model, _ = mistral.load(folder, device="cpu", dtype=torch.bfloat16)
    assert len(notes) == 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, STATE[name])


def test_compiled_layers_are_read(folder):
    state = {name.replace("layers.1.", "layers.1._orig_mod."): t for name, t in STATE.items()}
    save_file(state, folder / "model.safetensors")
    with pytest.warns(
        UserWarning, match=r"layers.1._orig_mod.* reading it as model.layers.1.input"
    ):
        mistral.load(folder, device="cpu")
    save_file(
        state | {"_orig_mod.lm_head.weight": STATE["lm_head.weight"].clone()},
        folder / "model.safetensors",
    )
    assert "and the same without a wrapper" in refusal(folder)


def added(name, *size):
    return lambda: STATE | {name: torch.zeros(size or 8)}


def renamed(change):
    return lambda: {change(name): tensor for name, tensor in STATE.items()}


NAMES = {
    "an embedding model": (
        lambda: {n.removeprefix("model."): t for n, t in STATE.items() if n != "lm_head.weight"},
        "begins with model.layers., the first is embed_tokens.weight: the names lack model.",
    ),
    "Mistral's own names": (
        lambda: {"layers.0.attention.wq.weight": torch.zeros(8)},
        "the first is layers.0.attention.wq.weight: these are the names of Mistral's own layout",
    ),
    "GGUF's names": (lambda: {"blk.0.attn_q.weight": torch.zeros(8)}, "these are GGUF's names"),
    "names of nobody": (renamed(lambda name: "x." + name), "the first is x.lm_head.weight: name a"),
    "no tensors": (dict, "there are no tensors"),
    "a LoRA adapter": (
        added(f"{Q}.lora_A.default.weight"),
        f"{Q}.lora_A.default.weight is not part of a Mistral: this is a LoRA adapter that is not",
    ),
    "an unmerged model of PEFT": (
        renamed(lambda name: "base_model.model." + name.replace("q_proj.", "q_proj.base_layer.")),
        "is a LoRA adapter that is not merged: call merge_and_unload()",
    ),
    "a Mixtral": (
        added("model.layers.0.block_sparse_moe.experts.0.w1.weight"),
        "experts.0.w1.weight is not part of a Mistral: this is a mixture of experts",
    ),
    "a classifier": (
        lambda: (
            {n: t for n, t in STATE.items() if n != "lm_head.weight"}
            | {"score.weight": torch.zeros(2, 8)}
        ),
        "score.weight is not part of a Mistral: this is a classifier",
    ),
    "biases": (added(f"{Q}.bias"), f"{Q}.bias is not part of a Mistral: biases belong to another"),
    "a multimodal model": (
        renamed(lambda name: "language_model." + name),
        "language_model.lm_head.weight is not part of a Mistral: this is a multimodal model",
    ),
    "a GPT-2": (
        lambda: {"transformer.h.0.ln_1.weight": torch.zeros(8)},
        "transformer.h.0.ln_1.weight is not part of a Mistral",
    ),
    "a tensor of nobody": (added("extra.weight"), "extra.weight is not part of a Mistral"),
    "a name of many lines": (added("\n" * 10_000 + "x" * 10_000), "is not part of a Mistral"),
    "a tensor missing": (
        lambda: {n: t for n, t in STATE.items() if n != "model.norm.weight"},
        "model.norm.weight is missing",
    ),
    "many faults": (
        renamed(lambda name: name.replace("up_proj", "u").replace("norm", "n")),
        "is missing; model.layers.0.mlp.up_proj.weight is missing (and 11 more)",
    ),
    "another number of layers": (
        added("model.layers.7.input_layernorm.weight"),
        "the weights have 3 layers, the config says 2",
    ),
}


@pytest.mark.filterwarnings("ignore:.*what a wrapper of the model")
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("what", NAMES)
def test_what_other_names_belong_to_is_said_in_a_line(what, form, folder):
    make, message = NAMES[what]
    state = {name: tensor.clone() for name, tensor in make().items()}
    if form.endswith("safetensors"):
        save_file(state, folder / form)
    else:
        torch.save(dict(sorted(state.items())), folder / form)
    said = refusal(folder)
    assert message in said
    assert len(said) < 600


def test_many_names_are_compared_in_a_moment(folder):
    names = [f"model.layers.{i}.x.{j}.weight" for i in range(2) for j in range(24_000)]
    random.Random(0).shuffle(names)
    entry = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps(dict.fromkeys(names, entry)).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    start = time.process_time()
    assert "model.embed_tokens.weight is missing; " in refusal(folder)
    assert time.process_time() - start < 20
