"""Targets of a folder's small files: configs, tokenizer.json, tokenizer.model, chat templates; and
damaged bytes of every file.
"""

import json
import shutil
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import small
import tokenizers
import torch
from fuzz_case import Maker, Target, cases
from fuzz_weights import CONFIG, PARAMS, PIECES, V, load, proto, state, tiny
from safetensors.torch import save_file

import mistral
from mistral.chat.formats import choose_format, encode_chat
from mistral.checkpoints.hugging_face_tokenizer import read_tokenizer, save_tokenizer
from mistral.checkpoints.names import consolidated_names
from mistral.pieces.model_proto import bytes_field, int_field

TEXTS = ("ab cd", " abc\n", "é", "<s>ab</s>", "a<|im_start|>b", "capital  ab", "")


@cache
def _weights(layout: str) -> bytes:
    """The weights of the tiny model in a safetensors file."""
    tensors = state()
    if layout != "hugging_face":
        tensors = {theirs: state()[ours] for ours, theirs in consolidated_names(1).items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        save_file(dict(tensors), path)
        return path.read_bytes()


# 1. Configs

SETTINGS = {
    "add_bos_token": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "added_tokens_decoder": {"2": {"content": "</s>", "special": True}},
    "additional_special_tokens": [],
}
NUMBERS = (
    0,
    1,
    2,
    3,
    -1,
    1.0,
    0.5,
    1e-5,
    1e30,
    1e308,
    2**31,
    2**63,
    10**28,
    True,
    None,
    "8",
    [],
    {},
)
SCALINGS = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0},
    {"rope_theta": 10000.0},
    {"rope_type": "yarn", "factor": 1e30, "beta_fast": 0, "beta_slow": 1e-300},
)
ODD_FIELDS = (
    *("rope_scaling", "rope_parameters", "quantization_config", "attention_bias", "hidden_act"),
    *("tie_word_embeddings", "torch_dtype", "partial_rotary_factor", "num_local_experts", "moe"),
    *(
        "architectures",
        "head_dim",
        "sliding_window",
        "layer_types",
        "rope_theta",
        "tied_embeddings",
    ),
)


def _configs(m: Maker) -> tuple[str, dict[str, bytes]]:
    layout = m.pick(("hugging_face", "hugging_face", "consolidated"))
    if layout == "hugging_face":
        files: dict[str, Any] = {"config.json": CONFIG}
        if m.chance(40):
            files["generation_config.json"] = {"eos_token_id": 2, "bos_token_id": 1}
        if m.chance(50):
            files["tokenizer_config.json"] = SETTINGS
        if m.chance(20):
            files["added_tokens.json"] = {"</s>": 2}
        if m.chance(20):
            files["special_tokens_map.json"] = {"eos_token": {"content": "</s>"}}
    else:
        files = {"params.json": PARAMS}
    for _ in range(m.number(0, 3)):
        name = m.pick(list(files))
        content = files[name]
        if not isinstance(content, dict) or m.chance(30):
            files[name] = m.changed(content)
            continue
        key = m.pick(ODD_FIELDS) if m.chance(40) else m.pick(list(content) or ["a"])
        odd = m.pick(NUMBERS) if m.chance(50) else m.pick(SCALINGS) if m.chance(40) else m.json(2)
        files[name] = content | {key: odd}
    return layout, {name: _dumped(content) for name, content in files.items()}


def _dumped(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except ValueError:  # a number of too many digits
        return b'{"a": 1' + b"0" * 5000 + b"}"


def check_configs(case: tuple[str, dict[str, bytes]]) -> str:
    """A folder loads, and what `save` writes of it loads as the same config; or it is refused."""
    layout, files = case
    weights = "model.safetensors" if layout == "hugging_face" else "consolidated.safetensors"
    files = {weights: _weights(layout), "tokenizer.model": proto(), **files}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data)
        model, tokenizer = load(path)
        again = Path(folder) / "again"
        mistral.save(model, tokenizer, again)
        saved, _ = mistral.load(again, device="cpu")
    assert saved.config == model.config, f"saved and loaded: {saved.config}, not {model.config}"
    return "loaded"


# 2. tokenizer.json

FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")
MERGES = [["a", "b"], ["▁", "a"], ["ab", "c"], ["c", "d"]]
STEPS: dict[str, tuple[Any, ...]] = {
    "normalizer": (
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
        *({"type": name} for name in ("NFC", "NFKC", "Lowercase", "StripAccents", "Nmt", "NoSuch")),
        {"type": "Strip", "strip_left": True, "strip_right": False},
        {"type": "BertNormalizer"},
        {"type": "ByteLevel"},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    ),
    "pre_tokenizer": (
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Split", "pattern": {"Regex": "(?i)x|("}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Removed", "invert": False},
        {"type": "Digits", "individual_digits": True},
        *({"type": name} for name in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "X")),
    ),
    "decoder": (
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
    ),
    "post_processor": (
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}], "pair": []},
        {"type": "ByteLevel"},
        {"type": "TemplateProcessing"},
    ),
}
INNER = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
    "post_processor": "processors",
}


def _tokenizer_json(m: Maker) -> tuple[dict[str, bytes], int]:
    """The files of a tokenizer, and the rows of the model."""
    vocab: dict[str, Any] = {piece: id for id, piece in enumerate(PIECES)}
    added = [
        {"id": id, "content": PIECES[id], "special": True} | dict.fromkeys(FLAGS[1:], False)
        for id in range(3)
    ]
    model: dict[str, Any] = {
        "type": "BPE",
        "vocab": vocab,
        "merges": MERGES,
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
    }
    content: dict[str, Any] = {"version": "1.0", "added_tokens": added, "model": model}
    content["normalizer"] = {"type": "Sequence", "normalizers": list(STEPS["normalizer"][:2])}
    # 1. Added tokens.
    for _ in range(m.number(0, 3)):
        text = (
            m.pick(("<think>", "capital", "<|im_start|>", "ab", " a", "é"))
            if m.chance(70)
            else m.text()
        )
        id = V + m.number(0, 3) if m.chance(70) else m.whole()
        entry = {"id": id, "content": text, **{flag: m.chance(40) for flag in FLAGS}}
        added.append(entry if m.chance(93) else m.changed(entry))
    # 2. The vocabulary and the merges.
    for _ in range(m.number(0, 2) if m.chance(40) else 0):
        action = m.number(0, 5)
        if action == 0:
            vocab[m.text()] = m.whole()
        elif action == 1:
            vocab.pop(m.pick(PIECES), None)
        elif action == 2:
            model["merges"] = [
                *MERGES,
                m.pick((["a", "z"], "a b", "a", ["a"], ["", ""], 5, ["c", "d"])),
            ]
        elif action == 3:
            model[m.pick(("type", "unk_token", "dropout", "byte_fallback", "vocab"))] = m.json(1)
        elif action == 4:
            vocab["<|im_start|>"] = V
        else:
            model["ignore_merges"] = m.chance(80)
    # 3. The steps.
    for name, steps in STEPS.items():
        if m.chance(25):
            chosen = m.some(lambda s=steps: m.pick(s) if m.chance(95) else m.json(2), 0, 2)
            content[name] = (
                {"type": "Sequence", INNER[name]: chosen} if m.chance(70) else chosen[:1] or None
            )
            if isinstance(content[name], list):
                content[name] = content[name][0]
    if m.chance(8):
        content = m.changed(content)
    data = _dumped(content)
    files = {"tokenizer.json": m.damaged(data) if m.chance(4) else data}
    if m.chance(25):
        files["tokenizer.model"] = proto()
    if m.chance(25):
        files["tokenizer_config.json"] = _dumped(SETTINGS if m.chance(60) else m.changed(SETTINGS))
    if m.chance(10):
        files["added_tokens.json"] = _dumped({m.text(): m.whole(), "</s>": 2})
    return files, V + m.number(0, 4)


def _config(rows: int) -> mistral.Config:
    return small.config(vocab_size=rows, eos_token_id=(2,))


def check_tokenizer_json(case: tuple[dict[str, bytes], int]) -> str:
    """A folder's tokenizer splits texts as the library does, and is the same when saved."""
    files, rows = case
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        made = read_tokenizer(Path(folder), _config(rows))
        ids = [_ids(made, text) for text in TEXTS]
        again = Path(folder) / "again"
        again.mkdir()
        save_tokenizer(made, again)
        saved = read_tokenizer(again, _config(rows))
        assert [_ids(saved, text) for text in TEXTS] == ids, (
            "it splits texts differently when saved"
        )
    if len(files) > 1 or b"single_word" not in files["tokenizer.json"]:
        return "read"
    try:
        library = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    except BaseException as error:  # a panic of the library is not an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return "read, not by the library"
    listed = json.loads(files["tokenizer.json"])["added_tokens"]
    # The library numbers added tokens itself, whatever ids they have in the file.
    if all(library.token_to_id(one["content"]) == one["id"] < rows for one in listed):
        for text, ours in zip(TEXTS, ids):
            if ours is not None:
                theirs = library.encode(text, add_special_tokens=False).ids
                assert ours == theirs, f"{text!r}: {ours}, and {theirs} by the library"
    return "read"


def _ids(tokenizer: mistral.Tokenizer, text: str) -> list[int] | None:
    """None for a text that the vocabulary cannot spell."""
    try:
        return tokenizer.encode(text, bos=False, special=True)
    except mistral.CheckpointError:
        raise
    except ValueError:
        return None


# 3. tokenizer.model: a protobuf message by hand


def _float_field(field: int, value: float) -> bytes:
    try:
        return bytes([field * 8 + 5]) + struct.pack("<f", value)
    except OverflowError:
        return bytes([field * 8 + 5]) + b"\0\0\x80\x7f"


def _model_proto(m: Maker) -> bytes:
    kinds = [2, 3, 3, *[6] * 256]
    pieces: list[tuple[bytes, float, int]] = []
    for id, piece in enumerate(PIECES):
        kind = kinds[id] if id < len(kinds) else 1
        pieces.append((piece.encode(), -float(id), kind))
    for _ in range(m.number(0, 4)):
        place = m.number(0, len(pieces) - 1)
        text, score, kind = pieces[place]
        action = m.number(0, 6)
        if action == 0:
            text = m.text().encode("utf-8", "surrogatepass")
        elif action == 1:
            kind = m.pick((0, 1, 2, 3, 4, 5, 6, 7, 2**31))
        elif action == 2:
            score = m.float()
        elif action == 3:
            text = m.pick(pieces)[0]
        elif action == 4:
            text = m.pick(
                (b"", b"\xff", b"a" * 60_000, b"<|im_start|>", "▁".encode() * 300, b"<0x41>")
            )
        elif action == 5:
            pieces.append((text, score, kind))
        else:
            del pieces[place:]
            break
        pieces[place:place] = []
        if place < len(pieces):
            pieces[place] = (text, score, kind)
    out = [
        bytes_field(1, bytes_field(1, text) + _float_field(2, score) + int_field(3, kind))
        for text, score, kind in pieces
    ]
    trainer = int_field(3, m.pick((2,) * 12 + (1, 3, 4, 0))) + int_field(4, len(pieces))
    trainer += int_field(35, 0 if m.rarely(10) else 1)
    for field, id in ((40, 0), (41, 1), (42, 2), (43, -1)):
        trainer += int_field(field, m.whole() if m.rarely(20) else id)
    if m.chance(10):
        trainer += bytes_field(m.pick((45, 46, 47, 36, 30)), m.bytes())
    normalizer = bytes_field(1, b"identity") + int_field(3, 1) + int_field(4, 0) + int_field(5, 1)
    if m.chance(10):
        normalizer += bytes_field(2, m.bytes()) + int_field(m.pick((3, 4, 5)), m.number(0, 1))
    out += [bytes_field(2, trainer), bytes_field(3, normalizer)]
    if m.chance(10):
        odd = (
            int_field(m.pick((4, 5, 15)), 1)
            if m.chance(50)
            else bytes_field(m.pick((1, 4, 5)), m.bytes())
        )
        out.insert(m.number(0, len(out)), odd)
    data = b"".join(out)
    return m.damaged(data, within=len(data)) if m.chance(15) else data


def check_tokenizer_model(data: bytes) -> str:
    """A vocabulary splits texts as sentencepiece does; or it is refused."""
    made = mistral.Tokenizer(data, stop_ids=(2,))
    peer = sentencepiece.SentencePieceProcessor()
    peer.LoadFromSerializedProto(data)
    theirs = {id for id in range(len(peer)) if peer.IsControl(id) or peer.IsUnknown(id)}
    is_peers = not made.words and made.control_ids <= theirs
    for text in TEXTS:
        try:
            ids = made.encode(text, bos=False)
        except mistral.CheckpointError:
            raise
        except ValueError:
            continue
        assert all(0 <= id < made.vocab_size for id in ids), "an id that does not exist"
        if is_peers:
            assert ids == peer.encode(text), f"sentencepiece splits {text!r} differently"
        stream = made.stream(strip_leading_space=True)
        assert "".join(map(stream.feed, ids)) + stream.finish() == made.decode(ids)
    return "read"


# 4. Chat templates

TEMPLATE_PARTS = (
    *(
        "{{ bos_token }}",
        "<|im_start|>",
        "<|im_end|>",
        "[INST]",
        "<<SYS>>",
        "{% for m in messages %}",
    ),
    *(
        "{% if",
        "USER:",
        "{{ ''.__class__.__mro__ }}",
        "<|user|>",
        "\0",
        "<s>",
        "é",
        "\n",
        "x" * 5000,
    ),
)


def _templates(m: Maker) -> dict[str, bytes]:
    def template() -> Any:
        return "".join(m.some(lambda: m.pick(TEMPLATE_PARTS), 0, 5)) if m.chance(85) else m.json(2)

    files: dict[str, Any] = {}
    if m.chance(60):
        form = m.number(0, 3)
        listed = [{"name": m.text(), "template": template()} for _ in range(m.number(0, 3))]
        given = (template(), listed, {m.text(): template()}, m.changed(listed))[form]
        files["tokenizer_config.json"] = SETTINGS | {"chat_template": given}
    if m.chance(30):
        files["chat_template.json"] = {"chat_template": template()} if m.chance(80) else m.json(2)
    made = {name: _dumped(content) for name, content in files.items()}
    if m.chance(40):
        text = template()
        made["chat_template.jinja"] = text.encode() if isinstance(text, str) else m.bytes()
    if m.chance(5):
        made["chat_template.jinja"] = b"a" * ((1 << 20) + 1)
    if m.chance(15):
        made["additional_chat_templates/tool_use.jinja"] = m.bytes() if m.chance(40) else b"x"
    return made


@cache
def _small_folder() -> dict[str, bytes]:
    names = ("tokenizer.model", "added_tokens.json")
    return {name: (small.DATA / "small" / name).read_bytes() for name in names}


def check_templates(files: dict[str, bytes]) -> str:
    """A template is text that is never run; it chooses a format, in which a message is encoded."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in {**_small_folder(), **files}.items():
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        tokenizer = read_tokenizer(Path(folder), small.config(vocab_size=480, eos_token_id=(2,)))
        assert all(isinstance(one, str) for one in tokenizer.chat_templates.values())
        again = Path(folder) / "again"
        again.mkdir()
        save_tokenizer(tokenizer, again)
        saved = read_tokenizer(again, small.config(vocab_size=480, eos_token_id=(2,)))
        assert saved.chat_templates == tokenizer.chat_templates, "a template changes when saved"
        name = choose_format(tokenizer)
        encode_chat(tokenizer, [{"role": "user", "content": "hi"}])
    return name


# 5. Damaged bytes


@cache
def _originals() -> dict[str, dict[str, bytes]]:
    """A folder and a GGUF file that the project wrote, of the tiny model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mistral.save(tiny(), mistral.Tokenizer(proto(), stop_ids=(2,)), folder / "m")
        (folder / "m/generation_config.json").write_bytes(b'{"eos_token_id": 2}')
        tokenizer = mistral.Tokenizer(proto(), stop_ids=(2,))
        mistral.export_gguf(tiny(), tokenizer, folder / "m.gguf", "F16")
        files = {path.name: path.read_bytes() for path in sorted((folder / "m").iterdir())}
        gguf = {"m.gguf": (folder / "m.gguf").read_bytes()}
        with torch.no_grad():
            torch.save(dict(state()), folder / "pytorch_model.bin")
        bin = {name: files[name] for name in files if not name.endswith(".safetensors")}
        bin["pytorch_model.bin"] = (folder / "pytorch_model.bin").read_bytes()
    return {"folder": files, "gguf": gguf, "bin": bin}


def _damaged(m: Maker) -> dict[str, bytes]:
    files = dict(_originals()[m.pick(("folder", "gguf", "bin"))])
    name = m.pick(list(files))
    if name.endswith(".json") and m.chance(50):
        files[name] = _dumped(m.changed(json.loads(files[name])))
    else:
        files[name] = m.damaged(files[name], within=len(files[name]))
    return files


def check_damaged(files: dict[str, bytes]) -> str:
    """Files with a damage load or are refused."""
    folder = Path(tempfile.mkdtemp())
    try:
        for name, data in files.items():
            (folder / name).write_bytes(data)
        load(folder / "m.gguf" if "m.gguf" in files else folder)
    finally:
        shutil.rmtree(folder)
    return "loaded"


TARGETS = (
    Target(
        "configs",
        "config.json, params.json, generation_config.json and the tokenizer's settings",
        cases(_configs),
        check_configs,
        (mistral.CheckpointError,),
        holds="saved and loaded again, the config is the same",
    ),
    Target(
        "tokenizer-json",
        "tokenizer.json: vocabulary, merges, added tokens, every type of step",
        cases(_tokenizer_json),
        check_tokenizer_json,
        (mistral.CheckpointError,),
        holds="the ids of tokenizers; the same when saved",
    ),
    Target(
        "tokenizer-model",
        "tokenizer.model: protobuf messages by hand",
        cases(_model_proto),
        check_tokenizer_model,
        (mistral.CheckpointError,),
        holds="the ids of sentencepiece; a stream is the whole",
    ),
    Target(
        "templates",
        "chat templates in all places of a folder",
        cases(_templates),
        check_templates,
        (mistral.CheckpointError,),
        holds="the same when saved; a format is chosen",
    ),
    Target(
        "damaged",
        "right files whose bytes are cut off, changed, removed or inserted",
        cases(_damaged),
        check_damaged,
        (mistral.CheckpointError,),
    ),
)
