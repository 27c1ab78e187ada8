"""The forms in which people bring a checkpoint: each is built small, and loads or is refused.

The table of docs/reference/files.md is what `mistral.load` says to them; `test_forms.py` compares
the two, and this file as a program rewrites the page:

    python tests/checkpoints/forms.py
"""

import json
import shutil
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import tokenizer_files
import torch
from safetensors.torch import load_file, save_file

import mistral

ROOT = Path(__file__).resolve().parents[2]
SMALL = ROOT / "tests/data/small"
GGUF = ROOT / "tests/data/gguf/q8_0.gguf"
PAGE = ROOT / "docs/reference/files.md"
BEGIN = "<!-- the table begins: tests/checkpoints/forms.py writes it -->\n"
END = "<!-- the table ends -->\n"
WEIGHTS = "model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 4943\n"
WEB_PAGE = b"<!DOCTYPE html>\n<html><head><title>model.safetensors</title></head></html>\n"


@dataclass(frozen=True)
class Form:
    """One form.

    group  the heading above it in the table
    text   what it is
    build  writes it into an empty folder and returns the source to load
    """

    group: str
    text: str
    build: Callable[[Path], Path]


FORMS: list[Form] = []


def form(group: str, text: str) -> Callable:
    """Adds the decorated builder to FORMS."""

    def add(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
        FORMS.append(Form(group, text, build))
        return build

    return add


def answer(form: Form, folder: Path) -> str:
    """What `mistral.load` says: "loads", with its warnings, or the error's line."""
    source = form.build(folder)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model, tokenizer = mistral.load(source, device="cpu")
        except mistral.CheckpointError as error:
            text = str(error)
        else:
            assert model(torch.tensor([tokenizer.encode("Hello")])).isfinite().all()
            notes = [str(warning.message) for warning in said]
            text = "**loads**" + "".join(f"; note: {note}" for note in notes)
    text = text.replace(str(folder), "FOLDER").replace(folder.name, "FOLDER")
    return text.replace("|", "\\|").replace("\n", " ")


def table() -> str:
    """The table in Markdown."""
    lines = ["| form | what happens |", "|---|---|"]
    group = ""
    for one in FORMS:
        if one.group != group:
            group = one.group
            lines.append(f"| **{group}** | |")
        with tempfile.TemporaryDirectory() as folder:
            lines.append(f"| {one.text} | {answer(one, Path(folder).resolve())} |")
    return "\n".join(lines) + "\n"


# The pieces that the forms are built of


def small(folder: Path, without: tuple[str, ...] = (), **config: object) -> Path:
    """A copy of the small checkpoint; `config` changes keys of its config.json, ... removes one."""
    skipped = ("expected.npz", "tokens.json", *without)
    for file in SMALL.iterdir():
        if file.name not in skipped:
            shutil.copy(file, folder / file.name)
    if config:
        raw = json.loads((SMALL / "config.json").read_text()) | config
        kept = {key: value for key, value in raw.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))
    return folder


def state() -> dict[str, torch.Tensor]:
    """The tensors of the small checkpoint."""
    return load_file(SMALL / WEIGHTS)


def halves(tensors: dict[str, torch.Tensor], name: str) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors in two files, by the files' names; `name` has a place for the number."""
    parts = [
        {k: v for k, v in tensors.items() if ("layers.1" in k) is late} for late in (False, True)
    ]
    return {name.format(i + 1): part for i, part in enumerate(parts)}


def write_index(path: Path, files: dict[str, dict[str, torch.Tensor]]) -> None:
    """The index of sharded weights."""
    places = {name: file for file, part in files.items() for name in part}
    path.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def with_tensors(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """The small checkpoint with other tensors."""
    small(folder, without=(WEIGHTS,), **config)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS)
    return folder


def with_files(folder: Path, **files: object) -> Path:
    """Writes files: bytes as they are, everything else as JSON. Two underscores are a dot."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def write_gguf(path: Path, tensors: bool = True, **changes: object) -> Path:
    """A copy of q8_0.gguf; two underscores in a key are a dot, and ... removes one."""
    source = gguf.GGUFReader(GGUF)
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    writer = gguf.GGUFWriter(path, str(changes.pop("general.architecture", "llama")))
    for key, field in source.fields.items():
        if key.startswith("GGUF.") or key in changes or key == "general.architecture":
            continue
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for key, value in changes.items():
        if value is not ...:
            kind = gguf.GGUFValueType.get_type(value)
            writer.add_key_value(key, value, kind)
    for tensor in source.tensors if tensors else []:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Hugging Face's layout

HF = "Hugging Face's layout"


@form(HF, "`config.json`, `model.safetensors`, `tokenizer.model`")
def plain(folder: Path) -> Path:
    return small(folder)


@form(HF, "shards with `model.safetensors.index.json`")
def shards(folder: Path) -> Path:
    small(folder, without=(WEIGHTS,))
    files = halves(state(), "model-{:05d}-of-00002.safetensors")
    for name, part in files.items():
        save_file(part, folder / name)
    write_index(folder / "model.safetensors.index.json", files)
    return folder


@form(HF, "`pytorch_model.bin`")
def pickle(folder: Path) -> Path:
    small(folder, without=(WEIGHTS,))
    torch.save(state(), folder / "pytorch_model.bin")
    return folder


@form(HF, "`pytorch_model-00001-of-00002.bin`, ... with their index")
def pickle_shards(folder: Path) -> Path:
    small(folder, without=(WEIGHTS,))
    files = halves(state(), "pytorch_model-{:05d}-of-00002.bin")
    for name, part in files.items():
        torch.save(part, folder / name)
    write_index(folder / "pytorch_model.bin.index.json", files)
    return folder


def tokenizer_json(folder: Path) -> None:
    """Writes the vocabulary of the small checkpoint as transformers saves it."""
    content = tokenizer_files.of_sentencepiece(SMALL / "tokenizer.model")
    (folder / "tokenizer.json").write_text(json.dumps(content))


@form(HF, "`tokenizer.json` without `tokenizer.model`")
def json_alone(folder: Path) -> Path:
    small(folder, without=("tokenizer.model",))
    tokenizer_json(folder)
    return folder


@form(HF, "both, which agree")
def both(folder: Path) -> Path:
    tokenizer_json(small(folder))
    return folder


@form(HF, "both, and only `tokenizer.json` has the ChatML tokens")
def more_in_json(folder: Path) -> Path:
    tokenizer_json(small(folder, without=("added_tokens.json", "tokenizer_config.json")))
    return folder


@form(HF, "a `tokenizer.json` that is not byte-pair encoding")
def unigram(folder: Path) -> Path:
    small(folder, without=("tokenizer.model",))
    return with_files(folder, tokenizer__json={"model": {"type": "Unigram", "vocab": []}})


@form(HF, "`model_type: llama`")
def llama(folder: Path) -> Path:
    return small(folder, model_type="llama", sliding_window=..., attention_bias=False)


@form(HF, "rotary scaling `linear`")
def linear(folder: Path) -> Path:
    return small(
        folder, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    )


@form(HF, "rotary scaling `yarn`, as in Yarn-Mistral-7b-128k")
def yarn(folder: Path) -> Path:
    scaling = {
        "type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 512,
        "finetuned": True,
    }
    return small(folder, rope_parameters=..., rope_theta=10000.0, rope_scaling=scaling)


@form(HF, "no `sliding_window` in config.json")
def no_window(folder: Path) -> Path:
    return small(folder, sliding_window=...)


@form(HF, "a leftover `quantization_config` beside plain weights")
def leftover(folder: Path) -> Path:
    return small(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


@form(HF, "`<pad>` added after the last row of the matrix")
def pad(folder: Path) -> Path:
    added = {"<|im_end|>": 460, "<|im_start|>": 461, "<pad>": 480}
    return with_files(small(folder), added_tokens__json=added)


@form(HF, "rotary scaling `dynamic`, `longrope`, `llama3`")
def dynamic(folder: Path) -> Path:
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return small(folder, rope_parameters=parameters)


@form(HF, "another `model_type`, such as `mixtral`")
def mixtral(folder: Path) -> Path:
    return small(folder, model_type="mixtral")


@form(HF, "`attention_bias: true`")
def bias(folder: Path) -> Path:
    return small(folder, model_type="llama", attention_bias=True)


@form(HF, "no tokenizer")
def no_tokenizer(folder: Path) -> Path:
    return small(folder, without=("tokenizer.model",))


@form(HF, "shards, and the index forgotten")
def no_index(folder: Path) -> Path:
    small(folder, without=(WEIGHTS,))
    for name, part in halves(state(), "model-{:05d}-of-00002.safetensors").items():
        save_file(part, folder / name)
    return folder


@form(HF, "one of the shards is missing")
def no_shard(folder: Path) -> Path:
    shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return folder


# Tensors that are not a Mistral's own

OTHERS = "Other tensors"


@form(OTHERS, "GPTQ")
def gptq(folder: Path) -> Path:
    tensors = state()
    weight = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        kind = torch.float16 if name == "scales" else torch.int32
        tensors[f"model.layers.0.self_attn.q_proj.{name}"] = torch.zeros(len(weight), dtype=kind)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    return with_tensors(folder, tensors, quantization_config=config)


@form(OTHERS, "AWQ")
def awq(folder: Path) -> Path:
    tensors = state()
    weight = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    for name in ("qweight", "qzeros", "scales"):
        kind = torch.float16 if name == "scales" else torch.int32
        tensors[f"model.layers.0.self_attn.q_proj.{name}"] = torch.zeros(len(weight), dtype=kind)
    return with_tensors(folder, tensors, quantization_config={"quant_method": "awq", "bits": 4})


@form(OTHERS, "bitsandbytes, 4 bits")
def bitsandbytes(folder: Path) -> Path:
    tensors = state()
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = torch.zeros((tensors[name].numel() // 2, 1), dtype=torch.uint8)
    tensors[f"{name}.absmax"] = torch.zeros(8)
    tensors[f"{name}.quant_map"] = torch.zeros(16)
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(8, dtype=torch.uint8)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return with_tensors(folder, tensors, quantization_config=config)


@form(OTHERS, "float8")
def float8(folder: Path) -> Path:
    tensors = state()
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale"] = torch.ones(1)
    return with_tensors(folder, tensors, quantization_config={"quant_method": "fp8"})


@form(OTHERS, "a LoRA adapter's folder")
def lora(folder: Path) -> Path:
    small(folder, without=(WEIGHTS,))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(8, 256)}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": "mistralai/Mistral-7B-v0.1"}
    return with_files(folder, adapter_config__json=config)


@form(OTHERS, "names of torch.compile, `_orig_mod.`")
def compiled(folder: Path) -> Path:
    return with_tensors(folder, {f"_orig_mod.{name}": t for name, t in state().items()})


@form(OTHERS, "names of PEFT, `base_model.model.`")
def peft(folder: Path) -> Path:
    return with_tensors(folder, {f"base_model.model.{name}": t for name, t in state().items()})


@form(OTHERS, "an embedding model: no `model.` and no head")
def embedding(folder: Path) -> Path:
    tensors = {name.removeprefix("model."): t for name, t in state().items()}
    del tensors["lm_head.weight"]
    return with_tensors(folder, tensors)


@form(OTHERS, "a classifier: `score.weight` instead of the head")
def classifier(folder: Path) -> Path:
    tensors = state()
    tensors["score.weight"] = tensors.pop("lm_head.weight")[:3]
    return with_tensors(folder, tensors)


# Mistral's own layout

OWN = "Mistral's own layout"


def consolidated(folder: Path) -> dict[str, torch.Tensor]:
    """Writes all but the weights, which it returns."""
    from mistral.checkpoints.names import consolidated_names, interleaved_rows

    names = consolidated_names(2)
    heads = {"q_proj": 8, "k_proj": 2}
    tensors = {}
    for name, tensor in state().items():
        count = heads.get(name.split(".")[-2])
        tensors[names[name]] = (
            tensor if count is None else tensor[interleaved_rows(len(tensor), count)]
        )
    params = dict(dim=256, n_layers=2, head_dim=32, n_heads=8, n_kv_heads=2, norm_eps=1e-5)
    with_files(folder, params__json=params | {"sliding_window": 16, "vocab_size": 480})
    shutil.copy(SMALL / "tokenizer.model", folder)
    return tensors


@form(OWN, "`params.json`, `consolidated.safetensors`, `tokenizer.model` (or `.v1` to `.v3`)")
def own_safetensors(folder: Path) -> Path:
    save_file(consolidated(folder), folder / "consolidated.safetensors")
    return folder


@form(OWN, "`consolidated.00.pth`")
def own_pickle(folder: Path) -> Path:
    torch.save(consolidated(folder), folder / "consolidated.00.pth")
    return folder


@form(OWN, "a mixture of experts")
def own_experts(folder: Path) -> Path:
    own_safetensors(folder)
    params = json.loads((folder / "params.json").read_text())
    return with_files(folder, params__json=params | {"moe": {"num_experts": 8}})


# GGUF

FILES = "GGUF"


@form(FILES, "one file")
def one_gguf(folder: Path) -> Path:
    return Path(shutil.copy(GGUF, folder / "model.Q8_0.gguf"))


@form(FILES, "one file under any name, as in ollama's store")
def blob(folder: Path) -> Path:
    return Path(shutil.copy(GGUF, folder / ("sha256-" + "a" * 64)))


@form(FILES, "a folder with one GGUF file")
def gguf_folder(folder: Path) -> Path:
    one_gguf(folder)
    return folder


@form(FILES, "a folder with several")
def gguf_folder_of_two(folder: Path) -> Path:
    one_gguf(folder)
    shutil.copy(GGUF, folder / "model.Q4_K_M.gguf")
    return folder


@form(FILES, "rotary scaling `yarn`")
def gguf_yarn(folder: Path) -> Path:
    changes = {
        "llama__rope__scaling__type": "yarn",
        "llama__rope__scaling__factor": 16.0,
        "llama__rope__scaling__original_context_length": 512,
    }
    return write_gguf(folder / "yarn.gguf", **changes)


@form(FILES, "a vocabulary without weights")
def vocabulary_only(folder: Path) -> Path:
    return write_gguf(folder / "vocabulary.gguf", tensors=False)


@form(FILES, "a LoRA adapter")
def gguf_lora(folder: Path) -> Path:
    return write_gguf(
        folder / "lora.gguf", tensors=False, general__type="adapter", adapter__type="lora"
    )


@form(FILES, "an importance matrix")
def imatrix(folder: Path) -> Path:
    return write_gguf(folder / "imatrix.gguf", tensors=False, general__type="imatrix")


@form(FILES, "the vision part of another model (mmproj)")
def mmproj(folder: Path) -> Path:
    return write_gguf(folder / "mmproj.gguf", general__architecture="clip")


@form(FILES, "another architecture")
def qwen(folder: Path) -> Path:
    return write_gguf(folder / "qwen.gguf", general__architecture="qwen2")


@form(FILES, "an unknown pre-tokenizer of a byte-level vocabulary")
def pre_tokenizer(folder: Path) -> Path:
    changes = {"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": "something-new"}
    return write_gguf(folder / "model.gguf", **changes)


@form(FILES, "big-endian")
def big_endian(folder: Path) -> Path:
    data = bytearray(GGUF.read_bytes())
    data[4:8] = struct.pack(">I", 3)
    (folder / "big.gguf").write_bytes(data)
    return folder / "big.gguf"


@form(FILES, "llama.cpp's formats before GGUF")
def ggml(folder: Path) -> Path:
    (folder / "ggml-model-q4_0.bin").write_bytes(b"tjgg" + bytes(100))
    return folder / "ggml-model-q4_0.bin"


@form(FILES, "the end is missing")
def cut(folder: Path) -> Path:
    (folder / "model.gguf").write_bytes(GGUF.read_bytes()[:700_000])
    return folder / "model.gguf"


# Things that are not the checkpoint itself

PLACES = "Paths and downloads"


@form(PLACES, "a folder of the hub's cache, `models--owner--name`")
def hub_cache(folder: Path) -> Path:
    snapshot = folder / "models--owner--name/snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    small(snapshot)
    return folder / "models--owner--name"


@form(PLACES, "a file inside the folder, such as `model.safetensors`")
def file_inside(folder: Path) -> Path:
    return small(folder) / WEIGHTS


@form(PLACES, "a Git LFS pointer instead of the weights")
def pointer(folder: Path) -> Path:
    small(folder)
    (folder / WEIGHTS).write_bytes(POINTER)
    return folder


@form(PLACES, "a Git LFS pointer instead of a GGUF file")
def gguf_pointer(folder: Path) -> Path:
    (folder / "model.gguf").write_bytes(POINTER)
    return folder / "model.gguf"


@form(PLACES, "a saved web page instead of a GGUF file")
def web_page(folder: Path) -> Path:
    (folder / "model.gguf").write_bytes(WEB_PAGE)
    return folder / "model.gguf"


@form(PLACES, "a link to a file that is gone")
def broken_link(folder: Path) -> Path:
    small(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("../blobs/0123abcd")
    return folder


@form(PLACES, "a folder without a checkpoint")
def empty(folder: Path) -> Path:
    return folder


@form(PLACES, "a name that does not exist")
def nothing(folder: Path) -> Path:
    return folder / "missing"


def page_with(new_table: str) -> str:
    """The text of the page with this table."""
    before, rest = PAGE.read_text().split(BEGIN)
    return before + BEGIN + new_table + END + rest.split(END)[1]


if __name__ == "__main__":
    sys.exit(PAGE.write_text(page_with(table())) == 0)
