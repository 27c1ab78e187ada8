"""Files that would hang a reader, fill memory, or end in another error than CheckpointError."""

import collections
import copy
import json
import os
import struct
import time
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import small
import tokenizer_files as files
import torch
from safetensors.torch import save_file

import mistral
from mistral import files as files_module
from mistral.checkpoints import gguf_header, safetensors_files
from mistral.checkpoints.added_tokens import named_tokens, tokens_of_decoder, tokens_of_map
from mistral.checkpoints.assemble import match_tensors
from mistral.checkpoints.gguf import GgufReader
from mistral.checkpoints.gguf_export import add_vocabulary
from mistral.checkpoints.gguf_header import GgufHeader, read_header
from mistral.checkpoints.gguf_tokenizer import read_tokenizer as read_gguf_tokenizer
from mistral.checkpoints.hub import _is_plain
from mistral.checkpoints.hugging_face import HuggingFaceReader
from mistral.checkpoints.hugging_face_tokenizer import read_tokenizer, save_tokenizer
from mistral.checkpoints.hugging_face_weights import shards
from mistral.checkpoints.load import open_reader, read_config_and_tokenizer
from mistral.checkpoints.names import consolidated_names
from mistral.checkpoints.paths import local_path
from mistral.checkpoints.pickle_files import pickled_tensors
from mistral.checkpoints.pre_tokenizers import PRE_TOKENIZERS
from mistral.checkpoints.sentencepiece_model import write_model
from mistral.files import read_json
from mistral.pieces import AddedToken, JsonPieces, SentencePieces, Splitter, regex_cost
from mistral.pieces.library import without_messages
from mistral.pieces.model_proto import bytes_field
from mistral.pieces.regex_cost import require_linear
from mistral.rotary import Rotary

SMALL = small.DATA / "small"
GGUF = small.DATA / "gguf/q8_0.gguf"


@pytest.fixture
def folder(tmp_path):
    """The small checkpoint, of links."""
    for file in SMALL.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def replace(path, content):
    path.unlink(missing_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def refusal(action):
    with pytest.raises(mistral.CheckpointError) as caught:
        action()
    message = str(caught.value)
    message.encode()
    assert "\n" not in message
    assert len(message) < 700
    return message


def assert_linear(action, small_size, factor=8):
    """Time grows with the size, not with its square: `factor` times the size, less than its half
    times that factor more. One of five comparisons must show it: others may disturb some."""
    took = []
    for _ in range(5):
        times = []
        for size in (small_size, small_size * factor):
            start = time.process_time()
            action(size)
            times.append(time.process_time() - start)
        if times[1] < times[0] * factor * factor / 2 + 0.05:
            return
        took.append(times)
    pytest.fail(f"seconds of the small and the large size: {took}")


def gguf_string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_file(path, tensors, data=128, keys=()):
    """A file of F32 tensors: (name, values, offset). Its data begins at a multiple of 32."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for key, value in keys:
        header += gguf_string(key) + struct.pack("<I", 8) + gguf_string(value)
    for name, values, offset in tensors:
        header += gguf_string(name) + struct.pack("<IQIQ", 1, values, 0, offset)
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(data))
    return path


# Files that are not files


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.model", "model.safetensors"]
)
def test_a_pipe_or_a_device_is_not_opened(name, folder):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name} is a pipe" in refusal(lambda: mistral.load(folder, device="cpu"))
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert f"{name} is a pipe" in refusal(lambda: mistral.load(folder, device="cpu"))


@pytest.mark.parametrize("name", ["x.gguf", "pytorch_model.bin", "a.safetensors", "t.jinja"])
def test_a_pipe_of_another_form_is_not_opened(name, folder):
    path = folder / name
    if name == "t.jinja":
        path = folder / "chat_template.jinja"
    else:
        (folder / "model.safetensors").unlink()
    os.mkfifo(path)
    replace(folder / "model.safetensors.index.json", {"weight_map": {"x": name}})
    if name == "pytorch_model.bin":
        (folder / "model.safetensors.index.json").unlink()
    source = path if name == "x.gguf" else folder
    assert "is a pipe" in refusal(lambda: mistral.load(source, device="cpu"))


@pytest.mark.parametrize("name", ["m.gguf", "m.safetensors", "m.bin"])
def test_a_pipe_in_the_place_of_a_file_is_not_opened(name, tmp_path):
    path = tmp_path / name
    if name == "m.gguf":
        tensors = read_header(gguf_file(path, [("x", 8, 0)])).tensors
    elif name == "m.safetensors":
        save_file({"x": torch.ones(8)}, path)
        tensors = safetensors_files.tensors_in(path)
    else:
        torch.save({"x": torch.ones(8)}, path)
        tensors = pickled_tensors(path)
    path.unlink()
    os.mkfifo(path)
    read = partial(tensors["x"].read, torch.device("cpu"), torch.float32)
    assert f"{name} is a pipe" in refusal(read)


@pytest.mark.parametrize("name", ["adapter_config.json", "snapshots", "inner"])
def test_a_link_that_no_system_call_follows_is_ignored(name, folder):
    """Path.exists and Path.is_dir raise for it."""
    (folder / name).symlink_to("/" + "a" * 4000)
    if name == "adapter_config.json":
        open_reader(folder)
    else:
        (folder / "model.safetensors").unlink()
        assert "model.safetensors" in refusal(lambda: open_reader(local_path(folder)))


def test_templates_that_cannot_be_listed_are_one_line(folder):
    (folder / "additional_chat_templates").symlink_to("/" + "a" * 4000)
    assert "the name is too long" in refusal(lambda: mistral.load(folder, device="cpu"))


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.model"])
def test_a_file_that_is_too_large_is_not_read(name, folder):
    (folder / name).unlink()
    with (folder / name).open("wb") as file:
        file.write(b" ")
        file.truncate(1 << 40)  # sparse: it takes no space
    assert "is too large" in refusal(lambda: mistral.load(folder, device="cpu"))


# JSON


@pytest.mark.parametrize("part", ["[],", "0,", '"{i}":1,'], ids=["arrays", "numbers", "keys"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_json_with_more_values_than_any_is_not_parsed(name, part, folder, monkeypatch):
    monkeypatch.setattr(files_module, "_MOST_JSON_PARTS", 500)
    values = "".join(part.replace("{i}", str(i)) for i in range(501)).rstrip(",")
    replace(folder / name, f'{{"a": {{{values}}}}}' if ":" in part else f'{{"a": [{values}]}}')
    monkeypatch.setattr(files_module.json, "loads", lambda data: pytest.fail("it is parsed"))
    assert "such files have at most 500" in refusal(lambda: read_json(folder / name))


def test_a_vocabulary_as_large_as_the_largest_in_use_is_read(tmp_path):
    vocab = {f"p{i}": i for i in range(2560)}
    merges = [["a", "b"]] * 5140
    text = json.dumps({"model": {"vocab": vocab, "merges": merges}})
    parts = sum(map(text.count, ",:[{"))  # in a hundredth of its pieces and merges
    assert 100 * parts < files_module._MOST_JSON_PARTS
    assert 200 * files_module._MOST_JSON_PARTS / 2 <= 300e6  # bytes: the memory that they take


def test_a_large_header_of_safetensors_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(safetensors_files, "_LARGEST_HEADER", 100)
    monkeypatch.setattr(safetensors_files, "safe_open", lambda *_, **__: pytest.fail("it is read"))
    message = refusal(lambda: safetensors_files.tensors_in(folder / "model.safetensors"))
    assert "its header has 2.22 kB, and that of a checkpoint at most 100 bytes" in message


def test_a_path_that_safetensors_cannot_open_is_named(folder):
    path = folder / "b\udcff.safetensors"
    path.symlink_to(SMALL / "model.safetensors")
    message = refusal(lambda: safetensors_files.tensors_in(path))
    assert r"b\udcff.safetensors: its path is not valid UTF-8" in message


@pytest.mark.parametrize("depth", [64, 200, 950, 985, 100_000])
def test_nested_json_is_refused(depth, folder):
    for opening, closing in (("[", "]"), ('{"x":', "}")):
        nested = opening * depth + "0" + closing * depth
        replace(folder / "config.json", f'{{"hidden_size": {nested}}}')
        assert "JSON" in refusal(lambda: read_json(folder / "config.json"))
    replace(folder / "config.json", {"a": json.loads("[" * 63 + "]" * 63)})
    assert read_json(folder / "config.json")


@pytest.mark.parametrize(
    "text", ['{"a": 1, "b": 2, "a": 1}', '{"x": [{"a\\u001b": 1, "a\\u001b": 2}]}']
)
def test_a_key_that_occurs_twice_is_named(text, folder):
    replace(folder / "config.json", text)
    message = refusal(lambda: read_json(folder / "config.json"))
    assert "the key 'a" in message
    assert "occurs twice in one object" in message
    assert "\x1b" not in message


@pytest.mark.parametrize(
    "value",
    [list(range(100_000)), "x" * 100_000, "\ud800\n" * 9999, {"\n\ud800": "\ud800"}, 10**4000],
    ids=["list", "string", "surrogates", "object", "integer"],
)
def test_a_message_shows_a_part_of_a_value(value, folder):
    original = json.loads((SMALL / "config.json").read_text())
    for name in ("model_type", "hidden_size", "rms_norm_eps", "tie_word_embeddings"):
        replace(folder / "config.json", original | {name: value})
        assert str(folder) in refusal(lambda: HuggingFaceReader(folder).config())
    for scaling in ({"rope_type": value}, {"type": "yarn", "factor": value}, {"a\n" * 9999: 1}):
        changes = {"rope_scaling": scaling, "rope_parameters": None}
        replace(folder / "config.json", original | changes)
        refusal(lambda: HuggingFaceReader(folder).config())


def strings_of(value, at=()):
    """Where a JSON value has strings, as keys and as values: (path, whether it is the key)."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in parts:
        if isinstance(value, dict):
            yield (*at, key), True
        if isinstance(inner, str):
            yield (*at, key), False
        elif isinstance(inner, (dict, list)):
            yield from strings_of(inner, (*at, key))


def with_half_a_character(value, path, is_key):
    """A copy with half a character in one string."""
    value = copy.deepcopy(value)
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    if is_key:
        inside["\ud800"] = inside.pop(path[-1])
    else:
        inside[path[-1]] += "\udfff"
    return value


class Header:
    """Takes the strings of a vocabulary, as gguf.GGUFWriter does."""

    def __getattr__(self, name):
        return lambda value: json.dumps(value, ensure_ascii=False, default=str).encode()


TEMPLATES = [{"name": "default", "template": "a"}, {"name": "b", "template": "c"}]
NAMED = {
    "tokenizer_config.json": {"pad_token": {"content": "<x>"}, "chat_template": TEMPLATES},
    "special_tokens_map.json": {"eos_token": "</s>", "additional_special_tokens": ["<a>"]},
    "chat_template.json": {"chat_template": "x"},
}


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer_config.json", "added_tokens.json", "generation_config.json"]
    + ["special_tokens_map.json", "chat_template.json", "tokenizer.json"],
)
def test_half_a_character_is_refused_or_harmless_at_load_and_at_export(name, folder, tmp_path):
    path = folder / name
    if name == "tokenizer.json":
        original = files.of_sentencepiece(SMALL / "tokenizer.model", "legacy")
        original["model"]["vocab"] = dict(list(original["model"]["vocab"].items())[::25])
        original["model"]["merges"] = original["model"]["merges"][::99]
        (folder / "tokenizer.model").unlink()
    else:
        original = json.loads(path.read_text()) if path.exists() else {}
        original |= NAMED.get(name, {})
    out = tmp_path / "out"
    out.mkdir()
    for place in strings_of(original):
        replace(path, with_half_a_character(original, *place))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                _, tokenizer = read_config_and_tokenizer(open_reader(folder))
                save_tokenizer(tokenizer, out)
                try:
                    add_vocabulary(Header(), tokenizer, 480)
                except ValueError as error:  # GGUF has no key for a normalizer
                    assert not isinstance(error, UnicodeError), place
            except mistral.CheckpointError as error:
                str(error).encode()
        for warning in caught:
            str(warning.message).encode()


EXTREMES = [0, -1, 2**31 - 1, 2**31, 2**63, 10**400, 1.5, 1e300, float("nan"), float("inf")]
EXTREMES += [-0.0, True, None, "1", [], [1], {}]
PARAMS = dict(dim=256, n_layers=2, head_dim=32, n_heads=8, n_kv_heads=2, norm_eps=1e-5)
PARAMS |= dict(hidden_dim=512, vocab_size=480, rope_theta=1e4, sliding_window=16)
OTHERS = ("rope_scaling", "moe", "tied_embeddings", "_sliding_window", "yarn", "quantization")


def read_and_match(reader):
    """The config, held against the tensors; False for a CheckpointError."""
    try:
        config = reader.config()
        match_tensors(reader, config)
    except mistral.CheckpointError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 700
        return False
    assert config.num_parameters < 2_000_000
    return Rotary(config.head_dim, config.rope_theta, config.rope_scaling).frequencies.isfinite()


@pytest.fixture(scope="module")
def consolidated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("consolidated")
    reader = HuggingFaceReader(SMALL)
    names = consolidated_names(2)
    cpu = torch.device("cpu")
    state = {names[n]: t.read(cpu, torch.bfloat16) for n, t in reader.tensors().items()}
    torch.save(state, folder / "consolidated.00.pth")
    return folder


def test_no_value_of_params_json_gets_past_the_checks(consolidated):
    replace(consolidated / "params.json", PARAMS)
    assert read_and_match(open_reader(consolidated)).all()
    for name in (*PARAMS, *OTHERS):
        for value in EXTREMES:
            replace(consolidated / "params.json", PARAMS | {name: value})
            read_and_match(open_reader(consolidated))


def test_no_number_of_a_gguf_gets_past_the_checks(monkeypatch):
    reader = GgufReader(GGUF)
    original = reader.header.metadata
    numbers = {key for key, value in original.items() if isinstance(value, (int, float))}
    scaling = ("factor", "attn_factor", "yarn_ext_factor", "original_context_length")
    assert read_and_match(reader).all()
    for key in numbers | {f"llama.rope.scaling.{name}" for name in scaling} | {"split.count"}:
        for value in [*EXTREMES, np.arange(5000), np.ones(1, np.float32)]:
            for kind in ("none", "linear", "yarn"):
                changes = {key: value, "llama.rope.scaling.type": kind}
                reader.header = GgufHeader(original | changes, reader.header.tensors)
                read_and_match(reader)


# Names


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/a", "a/", "a//b", "a/../b", "../a", "./a", "a\\b", "C:a", "C:\\a", "\0"]
    + ["a\nb", "\x1b[2J", "\ud800", "\u202ea"],
)
def test_names_that_leave_a_repository_are_not_in_its_listing(name):
    assert not _is_plain(name)
    assert not _is_plain(f"folder/{name}")
    for plain in ("a.gguf", "Q4_K_M/a-00001-of-00002.gguf", "日本.json", ".gitattributes"):
        assert _is_plain(plain)


@pytest.mark.parametrize("file", ["a\\b", "..\\x", "C:x", "a" * 300, "\x1b", "\u202ea"])
def test_no_other_name_of_a_shard_is_opened(file, folder):
    (folder / "model.safetensors").unlink()
    replace(folder / "model.safetensors.index.json", {"weight_map": {"x": file}})
    refusal(lambda: mistral.load(folder, device="cpu"))


# Time


def gguf_metadata(pieces):
    texts = read_header(GGUF).metadata["tokenizer.ggml.tokens"]
    keys = {"model": "llama", "tokens": [*texts[:400], *pieces]}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


@pytest.mark.parametrize(
    "pieces",
    [
        lambda n: ["a" * n],
        lambda n: ["ab" * (n // 2), "b" * n],
        lambda n: ["a" * i for i in range(2, int((2 * n) ** 0.5))],
        lambda n: ["a" * 1000 + str(i) for i in range(n // 1000)],
        lambda n: [f"xq{i}" for i in range(n // 8)],
    ],
    ids=["one", "two", "a chain", "long ones", "many"],
)
def test_the_ordinary_pieces_of_a_gguf_are_counted_in_linear_time(pieces):
    from mistral.checkpoints.gguf_tokenizer import _count_ordinary

    def count(size):
        found = ["c", "d", *pieces(size)]
        return _count_ordinary(found, [1] * len(found))

    assert_linear(count, 20_000)


def test_the_ordinary_pieces_are_those_that_merges_make():
    from mistral.checkpoints.gguf_tokenizer import _count_ordinary

    for last, size in (("ab", 3), ("aa", 3), ("abab", 2), ("ba", 3), ("axb", 2), ("b", 3)):
        assert _count_ordinary(["a", "b", last], [1, 1, 1]) == size
    assert _count_ordinary(["a", "ab", "b", "abb", "abbb"], [1] * 5) == 5
    assert _count_ordinary(["a", "ab", "b", "abb", "<x>", "y"], [1, 1, 1, 1, 3, 5]) == 4


def test_a_long_last_piece_is_read():
    config = small.config(vocab_size=401, eos_token_id=(2,))
    made = read_gguf_tokenizer(gguf_metadata(["word" * 20_000]), config)
    assert 400 in made.encode("word" * 20_000)


@pytest.mark.parametrize(
    "tokens",
    [
        lambda n: [f"t{i}" for i in range(n // 4)],
        lambda n: [f"<|{i}|>" for i in range(n // 8)],
        lambda n: ["a" * n + "b"],
        lambda n: ["a" * i + "b" for i in range(1, int((2 * n) ** 0.5))],
    ],
    ids=["many", "control", "one", "a chain"],
)
def test_added_tokens_are_read_and_found_in_linear_time(tokens):
    def split(size):
        found = tokens(size)
        tokens_of_map({text: i for i, text in enumerate(found)})
        splitter = Splitter({i: AddedToken(text) for i, text in enumerate(found)})
        text = "a" * size + found[-1] + "t<" * size
        assert (len(found) - 1, found[-1]) in splitter.split(text)

    assert_linear(split, 4000)


def read_gguf(size, path):
    tensors = [(f"t{i}", 8, 32 * i) for i in range(size)]
    keys = [(f"k{i}", "x" * 20) for i in range(size)]
    assert len(read_header(gguf_file(path, tensors, 32 * size, keys)).tensors) == size


def read_index(size, path):
    replace(path, {"weight_map": {f"x{i}": f"{i % (size // 2)}.bin" for i in range(size)}})
    assert len(shards(path)) == size // 2


def read_json_pieces(size, path):
    content = copy.deepcopy(files.content("legacy", words=False))
    model = content["model"]
    model["vocab"] |= {"a" + "b" * (i % 40) + f"{i}": 1000 + i for i in range(size)}
    model["merges"] += [["a", "b"]] * size if "ab" in model["vocab"] else []
    mistral.Tokenizer(JsonPieces(content), {1: "<s>"}, bos_id=1)


def read_sentence_pieces(size, path):
    pieces = [(f"a{i}", -1.0, 4 if i % 2 else 1) for i in range(size)]
    proto = write_model(*zip(("<unk>", 0.0, 2), *pieces), bos_id=None, eos_id=None)
    mistral.Tokenizer(proto)


def read_settings(size, path):
    named = [f"<{i}>" for i in range(size)]
    described = {f"{i}": {"content": text} for i, text in enumerate(named)}
    replace(path, {"added_tokens_decoder": described, "additional_special_tokens": named})
    settings = read_json(path)
    assert len(tokens_of_decoder(settings["added_tokens_decoder"])) == size
    assert len(named_tokens([settings])) == size


@pytest.mark.parametrize(
    "read", [read_gguf, read_index, read_json_pieces, read_sentence_pieces, read_settings]
)
def test_a_file_is_read_in_linear_time(read, tmp_path):
    assert_linear(lambda size: read(size, tmp_path / "file"), 500)


@pytest.fixture(scope="module")
def tokenizers():
    added = {32000: "<|im_end|>", 32001: AddedToken("capital", special=False, normalized=True)}
    forms = {form: files.tokenizer(form) for form in ("legacy", "bytes", "split")}
    return {"sentencepiece": small.true_tokenizer(added=added)} | forms


@pytest.mark.parametrize("text", ["a", " ", "\n", "<", "語", "the cat "])
def test_a_long_text_is_split_in_linear_time(text, tokenizers):
    for made in tokenizers.values():
        assert_linear(lambda size: made.encode(text * size, special=True), 1000)  # noqa: B023


def test_a_text_of_400000_characters_is_split(tokenizers):
    for form in ("sentencepiece", "legacy"):
        assert len(tokenizers[form].encode(" " * 400_000)) > 1000


# Memory


def test_scores_that_are_strings_are_not_made_a_table():
    # NumPy would give each of the 402 strings the 4 MB of the longest.
    tokens = [f"{i}" for i in range(400)] + ["b" * 1_000_000]
    keys = gguf_metadata([]) | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": tokens}
    with pytest.raises(ValueError, match="scores is not a list of 401 numbers"):
        read_gguf_tokenizer(keys, small.config(vocab_size=401))


GROWING = {
    "a long string": [{"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 1000}],
    "twice as long, often": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 8,
    "bytes of bytes": [{"type": "ByteLevel"}] * 8,
    "many steps": [{"type": "NFC"}] * 17,
    "many expressions": [
        {"type": "Replace", "pattern": {"Regex": f"a{i}"}, "content": ""} for i in range(11)
    ],
}


@pytest.mark.parametrize("what", GROWING)
def test_a_normalizer_without_bound_is_refused(what):
    content = copy.deepcopy(files.content("legacy"))
    content["normalizer"] = {"type": "Sequence", "normalizers": GROWING[what]}
    assert "it" in refusal(lambda: JsonPieces(content))


# What reads a run of characters again from each of them, or in every way
TOO_LONG = {
    "exponential": "(a+)+b",
    "exponential by a choice": "(a|aa)+$",
    "a run before an end": r"\s+$",
    "a run before what other texts have": r"\p{L}+@",
    "a run that a shorter match follows": r"\s+x|\s",
    "a period": "(ab)+c",
    "a word and all after it": "foo.*bar",
    "a long look ahead": r"\d{1,3}(?=(\d{3})+(?!\d))",
    "what the library looks for again": r"(.)\1*#",
}


@pytest.mark.parametrize("what", TOO_LONG)
def test_an_expression_that_takes_too_long_is_refused(what, capfd):
    assert "may take hours for a long text" in refusal(lambda: require_linear(TOO_LONG[what]))
    assert capfd.readouterr().err == ""  # the library panics in some


def test_without_messages_nothing_else_is_lost(capfd):
    with without_messages():
        os.write(2, b"a message")
    os.write(2, b"after it")
    with pytest.raises(KeyError), without_messages():
        raise KeyError
    os.write(2, b", and after an error")
    assert capfd.readouterr().err == "after it, and after an error"


@pytest.mark.parametrize("step", ["normalizer", "pre_tokenizer"])
def test_every_step_with_an_expression_is_checked(step):
    content = copy.deepcopy(files.content("split"))
    pattern = {"Regex": "(a+)+b"}
    if step == "normalizer":
        content[step] = {"type": "Replace", "pattern": pattern, "content": ""}
    else:
        content[step]["pretokenizers"][0]["pattern"] = pattern
    assert "may take hours for a long text" in refusal(lambda: JsonPieces(content))


# The expressions of GPT-4o and DeepSeek-V3, which GGUF files here have no name for
OTHERS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m"
    r"|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t"
    r"|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    *(r"[一-龥\u3040-ゟ゠-ヿ]+", " {2,}", r"\s+", "."),
)


def test_the_expressions_in_use_are_read():
    in_use = {pattern for known in PRE_TOKENIZERS.values() for pattern in known.patterns}
    for pattern in sorted({*in_use, *OTHERS}):
        require_linear(pattern)


@pytest.fixture
def timed(monkeypatch):
    """Checks an expression on a machine whose CPU seconds are those that a function returns."""

    def check(seconds):
        now = 0.0

        def split(expression):
            def call(text):
                nonlocal now
                now += seconds(expression, text)

            return call

        clock = SimpleNamespace(thread_time=lambda: now, sleep=lambda seconds: None)
        monkeypatch.setattr(regex_cost, "_split", split)
        monkeypatch.setattr(regex_cost, "time", clock)
        require_linear.__wrapped__("a+")

    return check


@pytest.mark.parametrize(
    ("of_a_character", "times", "is_refused"),
    [(1e-7, 9, False), (1e-6, 7, False), (1e-6, 9, True), (1e-4, 7, False), (1e-4, 9, True)],
)
def test_an_expression_is_refused_beyond_both_limits(timed, of_a_character, times, is_refused):
    def seconds(expression, text):
        return len(text) * of_a_character * (1 if expression == "." else times)

    if is_refused:
        assert "may take hours for a long text" in refusal(lambda: timed(seconds))
    else:
        timed(seconds)


@pytest.mark.parametrize(("slow", "is_refused"), [(7, False), (8, True)])
def test_the_quickest_of_eight_calls_counts(timed, slow, is_refused):
    calls = collections.Counter()

    def seconds(expression, text):
        calls[expression] += 1
        is_slow = expression != "." and (calls[expression] - 1) % 8 < slow
        return len(text) * (1e-4 if is_slow else 1e-7)

    if is_refused:
        assert "may take hours for a long text" in refusal(lambda: timed(seconds))
    else:
        timed(seconds)


def test_an_expression_that_is_too_long_is_refused():
    assert "more than 20000 characters" in refusal(lambda: require_linear("a" * 20_001))


def test_an_id_far_beyond_the_vocabulary_makes_no_list(folder):
    config = json.loads((SMALL / "config.json").read_text()) | {"vocab_size": 1 << 30}
    replace(folder / "config.json", config)
    replace(folder / "tokenizer.json", files.of_sentencepiece(SMALL / "tokenizer.model", "legacy"))
    replace(folder / "added_tokens.json", {"<x>": (1 << 30) - 1})
    assert "'<x>' with the id 1073741823" in refusal(lambda: mistral.load(folder, device="cpu"))


# GGUF headers and sentencepiece models


def test_tensors_of_a_gguf_share_no_bytes(tmp_path):
    path = tmp_path / "m.gguf"
    apart = [("a", 8, 32), ("b", 8, 0), ("c", 16, 64)]
    assert list(read_header(gguf_file(path, apart)).tensors) == ["a", "b", "c"]
    for tensors in (
        [("a", 8, 0), ("b", 8, 0)],
        [("a", 9, 0), ("b", 8, 32)],
        [("b", 8, 32), ("a", 9, 0)],
        [("a", 32, 0), ("b", 8, 64)],
    ):
        message = refusal(lambda: read_header(gguf_file(path, tensors)))  # noqa: B023
        assert "has a and b in the same bytes" in message


def test_no_name_is_there_twice(tmp_path):
    path = tmp_path / "m.gguf"
    gguf_file(path, [("a", 8, 0), ("a", 8, 32)])
    assert "has the tensor a twice" in refusal(lambda: read_header(path))
    gguf_file(path, [("a", 8, 0)], keys=[("k", "x"), ("k", "y")])
    assert "has the key k twice" in refusal(lambda: read_header(path))


@pytest.mark.parametrize(
    ("limit", "most", "words"),
    [
        ("_MOST_TENSORS", 1, "has 2 tensors and 3 keys, too many"),
        ("_MOST_KEYS", 2, "has 2 tensors and 3 keys, too many"),
        ("_MOST_STRINGS", 3, "has 4 strings in arrays, too many"),
    ],
)
def test_a_gguf_with_more_of_something_than_any_is_refused(
    limit, most, words, tmp_path, monkeypatch
):
    strings = struct.pack("<IIQ", 9, 8, 2) + 2 * gguf_string("a")
    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 3)
    header += gguf_string("x") + strings + gguf_string("y") + strings
    header += gguf_string("z") + struct.pack("<IB", 0, 1)
    for name, offset in (("a", 0), ("b", 32)):
        header += gguf_string(name) + struct.pack("<IQIQ", 1, 8, 0, offset)
    path = tmp_path / "m.gguf"
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(64))
    monkeypatch.setattr(gguf_header, limit, most + 1)
    assert len(read_header(path).tensors) == 2
    monkeypatch.setattr(gguf_header, limit, most)
    assert words in refusal(lambda: read_header(path))


@pytest.mark.parametrize("axes", [0, 5])
def test_a_tensor_has_one_to_four_axes(axes, tmp_path):
    path = tmp_path / "m.gguf"
    sizes = struct.pack("<Q", 1) * axes
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + gguf_string("a")
    header += struct.pack("<I", axes) + sizes + struct.pack("<IQ", 0, 0)
    path.write_bytes(header + bytes(160 - len(header)))
    assert f"declares {axes} dimensions for a" in refusal(lambda: read_header(path))


@pytest.mark.parametrize("missing", [1, 4, 16, 31, 32])
def test_a_gguf_that_lacks_its_last_bytes_is_refused(missing, tmp_path):
    path = tmp_path / "m.gguf"
    tensors = [("a", 8, 0), ("b", 24, 32)]
    assert read_header(gguf_file(path, tensors)).tensors["b"].num_bytes == 96
    gguf_file(path, tensors, data=128 - missing)
    assert "b would end after its" in refusal(lambda: read_header(path))


@pytest.mark.parametrize(
    "name", ["a\x1b[2J", "a\nb", "\u202ea", "", b"\xed\xa0\x80\x00", "x" * 257]
)
def test_a_name_that_cannot_be_printed_is_refused(name, tmp_path):
    path = tmp_path / "m.gguf"
    for file in ([(name, 8, 0)], []), ([("a", 8, 0)], [(name, "x")]):
        gguf_file(path, file[0], keys=file[1])
        message = refusal(lambda: read_header(path))
        assert "impossible name" in message
        assert message.isprintable()


def test_strings_of_a_gguf_that_are_not_unicode_are_replaced(tmp_path):
    bad = b"<|\xff\xed\xa0\x80|>"
    path = tmp_path / "m.gguf"
    path.write_bytes(GGUF.read_bytes().replace(b"<|im_end|>", bad + b"x" * (10 - len(bad))))
    reader = GgufReader(path)
    made = reader.tokenizer(reader.config())
    assert "\ufffd" in made.control_text(460)
    add_vocabulary(Header(), made, 480)


def test_a_sentencepiece_model_with_old_fields_is_refused():
    entries = [("<unk>", 0.0, 2), ("a", -1.0, 1), ("b", -2.0, 4)]
    proto = write_model(*zip(*entries), bos_id=None, eos_id=None)
    assert SentencePieces(proto + bytes_field(200, b"x")).words
    group = b"\xc3\x0c\xc4\x0c"  # field 200: the beginning of a group, and its end
    assert "has a group" in refusal(lambda: SentencePieces(proto + group))


def test_a_tokenizer_of_a_folder_reads_the_line_ends_of_a_template(folder):
    (folder / "chat_template.jinja").write_bytes(b"a\r\nb\rc\n")
    made = read_tokenizer(folder, HuggingFaceReader(folder).config())
    assert made.chat_templates == {"default": "a\nb\nc\n"}
