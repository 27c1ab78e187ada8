"""Targets of weights: GGUF, safetensors with an index, torch's ZIP container and its old format.

Each begins with the file of a tiny model, written by hand, in which parts are then wrong.
"""

import json
import struct
import tempfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from fuzz_case import Maker, Target, cases
from safetensors.torch import load_file

import mistral
from mistral.checkpoints.names import gguf_names
from mistral.checkpoints.pickle_files import pickled_tensors
from mistral.checkpoints.sentencepiece_model import write_model

D, F, N, K, H = 8, 32, 2, 1, 4
LETTERS = [*"▁abcdefghij", "ab", "▁a", "abc", "cd"]
PIECES = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *LETTERS]
KINDS = [2, 3, 3, *[6] * 256, *[1] * len(LETTERS)]
SCORES = [0.0] * 259 + [-float(i) for i in range(len(LETTERS))]
V = len(PIECES)
CONFIG = {
    "model_type": "mistral",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 1,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PARAMS = {
    "dim": D,
    "n_layers": 1,
    "n_heads": N,
    "n_kv_heads": K,
    "head_dim": H,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 16,
}
NAMES_OF_TENSORS = ("", "a", "../x", "\x1b[2J", "\u202e", "\ud800", "x" * 300, "rope.freqs", "é")


@cache
def proto() -> bytes:
    """The tokenizer.model of the tiny model."""
    return write_model(PIECES, SCORES, KINDS, bos_id=1, eos_id=2)


@cache
def tiny() -> mistral.Mistral:
    """The tiny model, with random weights."""
    config = mistral.Config(
        **{key: CONFIG[key] for key in CONFIG if key not in ("model_type", "bos_token_id")}
        | {"eos_token_id": (2,), "tie_word_embeddings": False}
    )
    torch.manual_seed(0)
    return mistral.Mistral(config).float().requires_grad_(False)


@cache
def state() -> dict[str, torch.Tensor]:
    """Its tensors by Hugging Face's names."""
    return {name: tensor.contiguous() for name, tensor in tiny().state_dict().items()}


def load(source: Path, packed: bool = False) -> tuple[mistral.Mistral, mistral.Tokenizer]:
    """`mistral.load`, and one forward pass and one text with the result."""
    model, tokenizer = mistral.load(source, device="cpu", packed=packed)
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.long))
    try:
        tokenizer.decode(tokenizer.encode("ab cé <|im_start|>", bos=False, special=True))
    except mistral.CheckpointError:
        raise
    except ValueError:  # a vocabulary that cannot spell it
        pass
    return model, tokenizer


# 1. GGUF

_STRUCT = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 30: (1, 2)}


@cache
def _metadata() -> list[tuple[str, Any, Any]]:
    """Key, type (of an array: (9, type)), value."""
    return [
        ("general.architecture", _STRING, "llama"),
        ("general.name", _STRING, "tiny"),
        ("llama.context_length", 4, 64),
        ("llama.embedding_length", 4, D),
        ("llama.block_count", 4, 1),
        ("llama.feed_forward_length", 4, F),
        ("llama.attention.head_count", 4, N),
        ("llama.attention.head_count_kv", 4, K),
        ("llama.attention.key_length", 4, H),
        ("llama.attention.layer_norm_rms_epsilon", 6, 1e-5),
        ("llama.rope.freq_base", 6, 10000.0),
        ("tokenizer.ggml.model", _STRING, "llama"),
        ("tokenizer.ggml.tokens", (_ARRAY, _STRING), PIECES),
        ("tokenizer.ggml.scores", (_ARRAY, 6), SCORES),
        ("tokenizer.ggml.token_type", (_ARRAY, 5), KINDS),
        ("tokenizer.ggml.bos_token_id", 4, 1),
        ("tokenizer.ggml.eos_token_id", 4, 2),
    ]


ODD_KEYS = (
    *("general.alignment", "general.type", "split.count", "split.no", "tokenizer.chat_template"),
    *("llama.attention.sliding_window", "llama.rope.scaling.type", "llama.rope.scaling.factor"),
    *("llama.rope.dimension_count", "llama.expert_count", "llama.vocab_size", "tokenizer.ggml.pre"),
    *("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.merges"),
    *("llama.rope.scaling.original_context_length", "llama.rope.scaling.attn_factor"),
    *("llama.rope.scaling.yarn_beta_fast", "tokenizer.ggml.unknown_token_id", "a.b", "\x1b[2J"),
    *("tokenizer.ggml.eot_token_id", "tokenizer.chat_template.x", "llama.rope.scale_linear"),
)


def _packed_value(m: Maker, kind: Any, value: Any) -> bytes:
    """A value of the metadata, type first; one that does not fit the type is cut to it."""
    if isinstance(kind, tuple):
        items = b"".join(_scalar(kind[1], item) for item in value)
        return (
            struct.pack("<IIQ", _ARRAY, kind[1], len(value) + m.pick((0,) * 40 + (1, 2**61)))
            + items
        )
    return struct.pack("<I", kind) + _scalar(kind, value)


def _scalar(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        text = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else bytes(value)
        return struct.pack("<Q", len(text)) + text
    form = _STRUCT.get(kind, "I")
    try:
        return struct.pack(f"<{form}", value)
    except (struct.error, OverflowError):
        size = struct.calcsize(form)
        number = value if isinstance(value, int) else 1
        return (number & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _odd_value(m: Maker) -> tuple[Any, Any]:
    """Any type with a value for it."""
    kind = m.number(0, 12) if m.chance(95) else m.pick((13, 255, 2**31))
    if kind == _ARRAY:
        inner = m.pick((0, 4, 5, 6, 8, 9, 12, 99))
        make = m.text if inner == _STRING else m.whole if inner != 6 else m.float
        return (_ARRAY, inner), m.some(make, 0, 4)
    if kind == _STRING:
        return kind, m.bytes() if m.chance(20) else m.text()
    return kind, m.float() if kind in (6, 12) else m.whole()


def _odd_vocabulary(m: Maker, metadata: list[tuple[str, Any, Any]]) -> None:
    """Pieces that are empty, long or double, with odd scores and types."""
    by_key = {key: i for i, (key, _, _) in enumerate(metadata)}
    pieces, scores, kinds = PIECES.copy(), SCORES.copy(), KINDS.copy()
    for _ in range(m.number(1, 4)):
        place = m.number(0, V - 1) if m.chance(50) else m.number(259, V - 1)
        action = m.number(0, 5)
        if action == 0:
            pieces[place] = m.text()
        elif action == 1:
            pieces[place] = pieces[m.number(0, V - 1)]
        elif action == 2:
            pieces[place] = m.pick(("", "▁" * 300, "a" * 60_000, "<|x|>", "<0x1>", "<0x41>", "\n"))
        elif action == 3:
            scores[place] = m.float()
        elif action == 4:
            kinds[place] = m.pick((0, 1, 2, 3, 4, 5, 6, 7, -1, 2**31 - 1))
        else:
            kinds[place:] = [m.pick((1, 3, 4, 5))] * (V - place)
    for key, kind, value in (
        ("tokens", (_ARRAY, _STRING), pieces),
        ("scores", (_ARRAY, 6), scores),
        ("token_type", (_ARRAY, 5), kinds),
    ):
        if m.chance(5):
            value = value[: m.number(0, V)]
        name = f"tokenizer.ggml.{key}"
        metadata[by_key[name]] = (name, kind, value)


def _gguf(m: Maker) -> tuple[bytes, bool]:
    """A file, and whether it is loaded packed."""
    # 1. The metadata.
    metadata = list(_metadata())
    wrong = m.number(0, 3)
    if m.chance(30):
        _odd_vocabulary(m, metadata)
    for _ in range(wrong):
        place = m.number(0, len(metadata) - 1)
        action = m.number(0, 3)
        if action == 0:
            metadata[place] = (metadata[place][0], *_odd_value(m))
        elif action == 1:
            metadata.insert(place, (m.pick(ODD_KEYS), *_odd_value(m)))
        elif action == 2:
            del metadata[place]
        elif m.chance(30):
            metadata.append(metadata[place])
    # 2. The tensors, each with its type, offset and values.
    kind = m.pick((0, 0, 1, 30, 2, 8))
    alignment = 32
    tensors: list[list[Any]] = []
    data = b""
    for name, theirs in gguf_names(1).items():
        shape = tuple(state()[name].shape)
        own = 0 if len(shape) == 1 or shape[-1] % _BLOCKS[kind][0] else kind
        values = _encoded(state()[name], own)
        tensors.append([theirs, shape[::-1], own, len(data)])
        data += values + bytes(-len(values) % alignment)
    for _ in range(m.number(0, 2) if m.chance(50) else 0):
        _change_tensor(m, tensors, len(data))
    # 3. The file.
    count = len(tensors) + m.pick((0,) * 30 + (1, -1, 2**40))
    out = struct.pack(
        "<4sIQQ", b"GGUF", m.pick((3,) * 30 + (1, 2, 4, 1 << 24)), count, len(metadata)
    )
    for key, kind, value in metadata:
        out += _scalar(_STRING, key) + _packed_value(m, kind, value)
    for name, shape, kind, offset in tensors:
        out += _scalar(_STRING, name) + struct.pack("<I", len(shape))
        out += b"".join(_scalar(10, n) for n in shape) + _scalar(4, kind) + _scalar(10, offset)
    out += bytes(-len(out) % alignment) + data
    if m.chance(8):
        out = out[: m.number(0, len(out))]
    return out, m.chance(30)


def _encoded(values: torch.Tensor, kind: int) -> bytes:
    if kind == 0:
        return values.numpy().tobytes()
    if kind == 1:
        return values.half().numpy().tobytes()
    if kind == 30:
        return values.bfloat16().view(torch.int16).numpy().tobytes()
    return gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType(kind)).tobytes()


def _change_tensor(m: Maker, tensors: list[list[Any]], size: int) -> None:
    place = m.number(0, len(tensors) - 1)
    changed = list(tensors[place])
    match m.number(0, 6):
        case 0:
            changed[0] = m.pick(NAMES_OF_TENSORS) if m.chance(60) else m.pick(tensors)[0]
        case 1:
            changed[1] = tuple(abs(m.whole()) for _ in range(m.number(0, 5)))
        case 2:
            changed[1] = changed[1][::-1]
        case 3:
            changed[2] = m.pick((*range(40), 255, 2**31))
        case 4:
            changed[3] = m.pick(
                (0, 1, 16, 31, 32, 64, size, size - 32, size + 32, 2**63, 2**64 - 32)
            )
        case 5:
            changed[3] = m.pick(tensors)[3]  # the values of two tensors overlap
        case 6:
            tensors.append([m.pick(NAMES_OF_TENSORS), *changed[1:]])
            return
    tensors[place] = changed


def check_gguf(case: tuple[bytes, bool]) -> str:
    """A file loads with the values that gguf-py reads, or is refused."""
    data, packed = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        path.write_bytes(data)
        model, tokenizer = load(path, packed)
        assert tokenizer.vocab_size <= model.config.vocab_size, "a token without a row"
        if not packed:
            _compare_with_gguf_py(path, model)
    return "loaded"


def _compare_with_gguf_py(path: Path, model: mistral.Mistral) -> None:
    try:
        theirs = {one.name: one for one in gguf.GGUFReader(path).tensors}
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError):
        return  # stricter, or it gives up
    ours = model.state_dict()
    for name in (
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.mlp.up_proj.weight",
    ):
        one = theirs[gguf_names(1)[name]]
        values = gguf.quants.dequantize(one.data, one.tensor_type)
        expected = torch.from_numpy(np.array(values, dtype=np.float32)).reshape(ours[name].shape)
        same = torch.equal(ours[name].float().nan_to_num(), expected.nan_to_num())
        assert same, f"{name} has other values than in gguf-py"


# 2. safetensors

_KINDS = ("F32", "F16", "BF16", "F64", "I32", "BOOL", "F8_E4M3", "X9", "f32", "", "U8", "C64")


def _safetensors(m: Maker) -> dict[str, bytes]:
    """The files of the weights: one, or two shards and their index."""
    names = list(state())
    in_shards = m.chance(35)
    parts = [names[:5], names[5:]] if in_shards else [names]
    files = {}
    weight_map: dict[str, Any] = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-00002.safetensors" if in_shards else "model.safetensors"
        files[file] = _one_safetensors(m, part)
        weight_map |= dict.fromkeys(part, file)
    if in_shards:
        index: Any = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        for _ in range(m.number(0, 2)):
            index = _changed_index(m, index)
        written = json.dumps(index).encode()
        files["model.safetensors.index.json"] = m.damaged(written) if m.chance(8) else written
    return files


def _changed_index(m: Maker, index: Any) -> Any:
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        return index
    if m.chance(30):
        return m.changed(index)
    places = dict(index["weight_map"])
    name = m.pick(list(places) or ["a"])
    odd = (
        "",
        ".",
        "..",
        "/",
        "../x",
        "a/b",
        "\0",
        "\ud800",
        "\x1b",
        "missing.safetensors",
        "x" * 300,
    )
    places[name if m.chance(70) else m.pick(NAMES_OF_TENSORS)] = (
        m.pick(odd) if m.chance(80) else m.json(1)
    )
    return index | {"weight_map": places}


def _one_safetensors(m: Maker, names: list[str]) -> bytes:
    entries: list[tuple[str, Any]] = []
    data = b""
    for name in names:
        values = _encoded(state()[name], 0)
        shape = list(state()[name].shape)
        entry = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(values)],
        }
        entries.append((name, entry))
        data += values
    if m.chance(30):
        entries.append(("__metadata__", {"format": "pt"} if m.chance(50) else m.json(1)))
    for _ in range(m.number(0, 2)):
        place = m.number(0, len(entries) - 1)
        name, entry = entries[place]
        action = m.number(0, 6)
        if action == 0:
            entries[place] = (m.pick(NAMES_OF_TENSORS), entry)
        elif action == 1:
            entries.append((name, entry))  # a key twice in one object
        elif action == 2 and isinstance(entry, dict):
            entries[place] = (name, entry | {"dtype": m.pick(_KINDS)})
        elif action == 3 and isinstance(entry, dict):
            offsets = [
                m.pick((0, 1, 4, len(data), len(data) + 4, 2**63, -1, None)) for _ in range(2)
            ]
            entries[place] = (name, entry | {"data_offsets": offsets})
        elif action == 4 and isinstance(entry, dict):
            shape = m.some(m.whole, 0, 3)
            entries[place] = (name, entry | {"shape": shape})
        elif action == 5:
            entries[place] = (name, m.changed(entry))
        else:
            data += b"\0" * m.number(1, 9)
    header = "{" + ", ".join(f"{json.dumps(k)}: {_dumped(v)}" for k, v in entries) + "}"
    written = header.encode()
    size = len(written) + m.pick((0,) * 30 + (1, -1, 8, 2**40, 2**63))
    out = struct.pack("<Q", size & (2**64 - 1)) + written + data
    return out[: m.number(0, len(out))] if m.chance(5) else out


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value)
    except ValueError:
        return "null"


def _folder(folder: str, files: dict[str, bytes], layout: str = "hugging_face") -> Path:
    """A checkpoint with these files; those that are not among them are right."""
    path = Path(folder) / "m"
    path.mkdir()
    name = "config.json" if layout == "hugging_face" else "params.json"
    content = CONFIG if layout == "hugging_face" else PARAMS
    for file, data in {
        name: json.dumps(content).encode(),
        "tokenizer.model": proto(),
        **files,
    }.items():
        (path / file).write_bytes(data)
    return path


def check_safetensors(files: dict[str, bytes]) -> str:
    """The files load with the values that safetensors reads, or are refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = _folder(folder, files)
        model, _ = load(path)
        expected: dict[str, torch.Tensor] = {}
        for file in sorted(files):
            if file.endswith(".safetensors") and (path / file).exists():
                expected |= load_file(path / file)
        for name, values in model.state_dict().items():
            theirs = expected[name].to(values.dtype)
            assert torch.equal(values.nan_to_num(), theirs.nan_to_num()), f"{name} has other values"
    return "loaded"


# 3. Pickles: programs for a stack machine

HOSTILE = (
    *("os\nsystem", "builtins\neval", "builtins\nbytearray", "builtins\nset", "posix\nsystem"),
    *("collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2", "torch\nFloatStorage"),
    *("torch._utils\n_rebuild_parameter", "torch\nHalfStorage", "torch.storage\nUntypedStorage"),
    *("torch._utils\n_rebuild_qtensor", "torch\nSize", "numpy\nzeros", "\x1b[2J\nx", "é\nü", "\n"),
)


def _unicode(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _int(number: int) -> bytes:
    if 0 <= number < 256:
        return b"K" + bytes([number])
    if 0 <= number < 2**31:
        return b"J" + struct.pack("<i", number)
    size = number.bit_length() // 8 + 1
    return b"\x8a" + bytes([size & 255]) + number.to_bytes(size, "little", signed=True)


def _global(name: str) -> bytes:
    return b"c" + name.encode() + b"\n"


def _odd_instruction(m: Maker) -> bytes:
    """One instruction, of any kind, with an argument that may be wrong."""
    match m.number(0, 12):
        case 0:
            return _global(m.pick(HOSTILE))
        case 1:
            return _unicode(m.text())
        case 2:
            return _int(m.pick((0, 1, -1, 2**31, 2**40, 2**62, 2**100, 10**400)))
        case 3:
            return bytes([m.pick(b"N()tu}]aesRbQ.0l2\x85\x86\x87\x88\x89\x94")])
        case 4:
            return m.pick((b"q", b"h", b"r\0\0\0", b"j\0\0\0")) + bytes([m.number(0, 255)])
        case 5:
            return bytes([m.number(0, 255)])
        case 6:
            return b"X" + struct.pack("<I", m.pick((0, 1, 5, 2**31, 2**32 - 1))) + m.bytes(6)
        case 7:
            return b"\x8b" + struct.pack("<i", m.pick((0, 1, -1, 2**31 - 1))) + m.bytes(4)
        case 8:
            return m.pick((b"(", b"]", b"}", b"\x85", b"(K\x01")) * m.pick((1, 2, 100, 3000))
        case 9:
            return _global(m.pick(HOSTILE)) + b"(" + _int(m.pick((0, 1, 2**31))) + b"tR"
        case 10:
            return m.pick(
                (b"S'a'\n", b"I1\n", b"L1L\n", b"V\\ud800\n", b"F1e999\n", b"\x95" + b"\xff" * 8)
            )
        case 11:
            return (
                b"}("
                + _unicode(m.pick(("values", "items", "__class__")))
                + _global("builtins\nset")
                + b"ub"
            )
        case _:
            return m.pick(
                (
                    b"\x81",
                    b"\x82\x01",
                    b"i os\nsystem\n",
                    b"o",
                    b"P0\n",
                    b"C\x01a",
                    b"\x8f",
                    b"\x97",
                )
            )


def _odd_size(m: Maker, size: int) -> int:
    if not m.rarely(200):
        return size
    return m.pick((0, 1, size + 1, 2**31, 2**40, 2**47, 2**48, 2**63, -1))


def _pickle(
    m: Maker, names: dict[str, torch.Tensor], old: bool = False
) -> tuple[bytes, list[bytes]]:
    """A program that builds the dictionary of the tensors, and its parts before the last."""
    out = [b"\x80\x02", _global("collections\nOrderedDict") + b")R", b"("]
    for i, (name, tensor) in enumerate(names.items()):
        key = str(i) if not m.rarely(60) else m.pick(("0", "1", "", "../data", "\ud800", "x"))
        size = _odd_size(m, tensor.numel())
        kind = "torch\nFloatStorage" if not m.rarely(40) else m.pick(HOSTILE)
        place = _unicode("storage") + _global(kind) + _unicode(key) + _unicode("cpu") + _int(size)
        storage = b"(" + place + (b"N" if old else b"") + b"tQ"
        shape = [_odd_size(m, n) for n in tensor.shape]
        strides = [_odd_size(m, n) for n in tensor.stride()]
        sizes = [b"(" + b"".join(map(_int, one)) + b"t" for one in (shape, strides)]
        offset = _int(0 if not m.rarely(60) else m.pick((1, 4, 2**40, 2**48, -1)))
        tail = b"\x89" + _global("collections\nOrderedDict") + b")R"
        call = _global("torch._utils\n_rebuild_tensor_v2")
        out.append(
            _unicode(name) + call + b"(" + storage + offset + sizes[0] + sizes[1] + tail + b"tR"
        )
    out.append(b"u")
    if m.chance(20):
        out.append(b"}" + _unicode("_metadata") + b"}sb")
    for _ in range(m.pick((0, 0, 0, 0, 0, 1, 1, 2, 4, 0)) if not m.chance(30) else 0):
        out.insert(m.number(0, len(out)), _odd_instruction(m))
    if m.rarely(100):
        out.insert(3, b"(K\x01K\x02t0" * 200_000)  # long
    if not m.rarely(25):
        out.append(b".")
    return b"".join(out), out


def _consolidated() -> dict[str, torch.Tensor]:
    from mistral.checkpoints.names import consolidated_names

    return {theirs: state()[ours] for ours, theirs in consolidated_names(1).items()}


def _zip(m: Maker) -> tuple[str, bytes]:
    """The layout, and a container with a pickle and the values."""
    layout = m.pick(("hugging_face", "consolidated"))
    tensors = state() if layout == "hugging_face" else _consolidated()
    program, _ = _pickle(m, tensors)
    root = m.pick(("archive/", "m/", "")) if m.chance(10) else "archive/"
    entries: list[list[Any]] = [[root + "data.pkl", program, 0, 0]]
    entries.append([root + "version", b"3\n", 0, 0])
    if m.chance(30):
        entries.append([root + "byteorder", m.pick((b"",) + (b"little",) * 9 + (b"big",)), 0, 0])
    for i, tensor in enumerate(tensors.values()):
        entries.append([f"{root}data/{i}", tensor.numpy().tobytes(), 0, 0])
    for _ in range(m.number(1, 2) if m.chance(40) else 0):
        place = m.number(0, len(entries) - 1)
        action = m.number(0, 5)
        if action == 0:
            entries[place][2] = m.pick((8, 8, 9, 12, 99))  # compressed
        elif action == 1:
            entries.append(list(entries[place]))
        elif action == 2:
            entries[place][0] = m.pick(
                ("", "../x", "data.pkl", root + "data/0", "\ud800", "x" * 300)
            )
        elif action == 3:
            entries[place][1] = entries[place][1][: m.number(0, 40)]
        elif action == 4:
            entries[place][3] = 1  # encrypted, says the flag
        else:
            del entries[place]
    data = _container(m, entries)
    if m.chance(10):
        data = m.damaged(data[-200:] if m.chance(5) else data, within=len(data))
    return layout, data


def _container(m: Maker, entries: list[list[Any]]) -> bytes:
    """The bytes of a ZIP archive, with fields that may be wrong."""

    def odd(number: int) -> int:
        return number if not m.rarely(250) else m.pick((0, 1, number + 1, 2**32 - 1, 2**31))

    out = b""
    directory = b""
    for name, content, method, flags in entries:
        raw = name.encode("utf-8", "surrogatepass")
        stored = zlib.compress(content)[2:-4] if method == 8 else content
        sizes = (zlib.crc32(content), odd(len(stored)), odd(len(content)))
        head = struct.pack(
            "<HHHHHIIIHH", 20, flags, method, 0, 0, *sizes, odd(len(raw)) & 0xFFFF, 0
        )
        common = struct.pack("<HHHHHHIIIHH", 20, 20, flags, method, 0, 0, *sizes, len(raw), 0)
        where = struct.pack("<HHHII", 0, 0, 0, 0, odd(len(out)))
        directory += b"PK\1\2" + common + where + raw
        out += b"PK\3\4" + head + raw + stored
    count = odd(len(entries)) & 0xFFFF
    end = struct.pack("<HHHHIIH", 0, 0, count, count, odd(len(directory)), odd(len(out)), 0)
    return out + directory + b"PK\5\6" + end


def check_pickled(case: tuple[str, bytes]) -> str:
    """A file loads with the values that torch.load reads, or is refused; nothing is executed."""
    layout, data = case
    name = "pytorch_model.bin" if layout == "hugging_face" else "consolidated.00.pth"
    with tempfile.TemporaryDirectory() as folder:
        path = _folder(folder, {name: data}, layout)
        load(path)
        ours = pickled_tensors(path / name)
        try:
            theirs = torch.load(path / name, weights_only=True, map_location="cpu")
        except Exception:  # stricter about entries and instructions that no tensor needs
            return "loaded, not by torch.load"
        assert ours.keys() == theirs.keys(), "other names than in torch.load"
        for key, tensor in ours.items():
            same = torch.equal(tensor.mapped().nan_to_num(), theirs[key].nan_to_num())
            assert same, f"{key} has other values than in torch.load"
    return "loaded"


def _legacy(m: Maker) -> tuple[str, bytes]:
    """The format before PyTorch 1.6: five pickles, then the storages."""
    layout = m.pick(("hugging_face", "consolidated"))
    tensors = state() if layout == "hugging_face" else _consolidated()
    program, _ = _pickle(m, tensors, old=True)
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    version = b"\x80\x02M\xe9\x03."
    system = (
        b"\x80\x02}(" + _unicode("little_endian") + (b"\x89" if m.rarely(20) else b"\x88") + b"u."
    )
    keys = b"\x80\x02](" + b"".join(_unicode(str(i)) for i in range(len(tensors))) + b"e."
    parts = [magic, version, system, program, keys]
    for tensor in tensors.values():
        parts.append(
            struct.pack("<q", _odd_size(m, tensor.numel()) % 2**63) + tensor.numpy().tobytes()
        )
    for _ in range(m.number(1, 2) if m.chance(40) else 0):
        place = m.number(0, len(parts) - 1)
        action = m.number(0, 3)
        if action == 0:
            parts[place] = m.damaged(parts[place])
        elif action == 1:
            parts.insert(place, parts[m.number(0, len(parts) - 1)])
        elif action == 2:
            del parts[place]
        else:
            parts[place] = b"\x80\x02" + _odd_instruction(m) + b"."
        if not parts:
            break
    return layout, b"".join(parts)


TARGETS = (
    Target(
        "gguf",
        "GGUF files: metadata of every type, odd pieces, tensors that overlap or are out of range",
        cases(_gguf),
        check_gguf,
        (mistral.CheckpointError,),
        holds="the values of gguf-py",
    ),
    Target(
        "safetensors",
        "safetensors files and indices of shards",
        cases(_safetensors),
        check_safetensors,
        (mistral.CheckpointError,),
        holds="the values of safetensors",
    ),
    Target(
        "torch-zip",
        "ZIP containers of torch.save with programs of pickle's instructions in them",
        cases(_zip),
        check_pickled,
        (mistral.CheckpointError,),
        holds="the values of torch.load",
    ),
    Target(
        "torch-old",
        "the format of torch.save before 1.6",
        cases(_legacy),
        check_pickled,
        (mistral.CheckpointError,),
        holds="the values of torch.load",
    ),
)
