"""GGUF files: what llama.cpp wrote is read, packed or not; everything that is damaged is
refused.
"""

import functools
import json
import math
import random
import shutil
import struct
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest
import small
import torch
from safetensors.torch import load_file, save_file

import mistral
from mistral.checkpoints import gguf, gguf_export, gguf_tensor, hugging_face
from mistral.checkpoints.gguf_config import read_config
from mistral.checkpoints.gguf_header import GgufHeader, read_header
from mistral.checkpoints.gguf_tensor import GgufTensor
from mistral.checkpoints.load import open_reader, read_config_and_tokenizer
from mistral.checkpoints.names import (
    consolidated_names,
    gguf_names,
    half_split_rows,
    interleaved_rows,
    rotary_heads,
    tensor_shapes,
)
from mistral.checkpoints.sentencepiece_model import write_model
from mistral.errors import CheckpointError
from mistral.quantization.packed import Packed

FILES = small.DATA / "gguf"
EXPECTED = np.load(FILES / "expected.npz")
TOKENS = torch.from_numpy(EXPECTED["tokens"])


def load(path, **arguments):
    return mistral.load(path, **{"device": "cpu", "sliding_window": None, **arguments})


@pytest.fixture
def forge(monkeypatch):
    """A reader of q8_0.gguf with other metadata, which `mistral.load` sees, too."""

    def forged(changes, file="q8_0.gguf"):
        header = read_header(FILES / file)
        header = GgufHeader(header.metadata | changes, header.tensors)
        monkeypatch.setattr(gguf, "read_header", lambda path: header)
        return gguf.GgufReader(FILES / file)

    return forged


@pytest.fixture(scope="module")
def original():
    return mistral.load(small.DATA / "small", device="cpu", sliding_window=None)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["q8_0", "q4_k_m", "q2_k", "iq4_xs"])
def test_logits_are_those_of_the_unpacked_tensors(name, packed):
    model, _ = load(FILES / f"{name}.gguf", packed=packed)
    with torch.no_grad():
        assert (model(TOKENS) - torch.from_numpy(EXPECTED[name])).abs().max() < 2e-5


def test_logits_of_an_exported_f32_file_are_llama_cpps(original, tmp_path):
    # llama.cpp's converter writes the same tensors, byte for byte; its logits on them are recorded.
    gguf_export.export(*original, tmp_path / "m.gguf", "F32")
    model, _ = load(tmp_path / "m.gguf")
    with torch.no_grad():
        assert (model(TOKENS[:1])[0] - torch.from_numpy(EXPECTED["llamacpp"])).abs().max() < 2e-5


def test_tensors_are_the_original_ones_in_our_order(original):
    # Q8_0 moves no weight by more than half a step, so a row in the wrong place would show.
    model, _ = load(FILES / "q8_0.gguf")
    theirs = original[0].state_dict()
    for name, tensor in model.state_dict().items():
        assert (tensor - theirs[name]).abs().max() <= theirs[name].abs().max() / 127 * 0.51


def test_packed_weights_keep_the_bytes_of_the_file():
    model, _ = load(FILES / "q4_k_m.gguf", packed=True)
    header = read_header(FILES / "q4_k_m.gguf")
    held = sum(t.numel() for name, t in model.state_dict().items() if name.endswith("blocks"))
    assert held == sum(t.num_bytes for t in header.tensors.values() if t.kind.block_weights > 1)
    assert model.model.layers[0].self_attn.q_proj.kind.name == "Q4_K"
    assert model.model.layers[1].self_attn.v_proj.kind.name in ("Q4_K", "Q6_K")
    assert model.dtype == torch.float32


@pytest.mark.parametrize("packed", [False, True])
def test_tensors_that_are_read_in_pieces_are_the_same(packed, monkeypatch):
    path = FILES / "q4_k_m.gguf"
    whole = load(path, packed=packed)[0].state_dict()
    monkeypatch.setattr(gguf_tensor, "weights_at_once", lambda device: 5 * 256)
    # five rows or fewer, and the last piece is shorter
    monkeypatch.setattr(gguf_tensor, "_PACKED_AT_ONCE", 5 * 256)
    in_pieces = load(path, packed=packed)[0].state_dict()
    assert whole.keys() == in_pieces.keys()
    assert all(torch.equal(whole[name], in_pieces[name]) for name in whole)


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    shutil.copy(FILES / "q4_k_m.gguf", path)
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    last = max(header.tensors.values(), key=lambda tensor: tensor.start)
    cpu = torch.device("cpu")
    for read in (lambda: last.read_blocks(cpu), lambda: last.read(cpu, torch.float32)):
        with pytest.raises(CheckpointError, match=f"m.gguf ends inside {last.name}"):
            read()


def test_a_packed_model_generates_and_follows_a_change_of_dtype():
    model, tokenizer = load(FILES / "q4_k_m.gguf", packed=True)
    unpacked, _ = load(FILES / "q4_k_m.gguf")
    ids = tokenizer.encode("Hello")
    greedy = mistral.Sampling(temperature=0.0)
    assert list(mistral.generate(model, ids, greedy, max_new_tokens=30)) == list(
        mistral.generate(unpacked, ids, greedy, max_new_tokens=30)
    )
    model.to(torch.float64)
    with torch.no_grad():
        assert model(TOKENS).dtype == torch.float64
        assert (model(TOKENS) - unpacked.double()(TOKENS)).abs().max() < 1e-10


def test_the_tokenizer_is_that_of_the_original(original):
    _, tokenizer = load(FILES / "q8_0.gguf")
    theirs = original[1]
    for row in json.loads((small.DATA / "small/tokens.json").read_text()):
        assert tokenizer.encode(row["text"], bos=False) == row["plain"]
        assert tokenizer.encode(row["text"], bos=False, special=True) == row["special"]
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (theirs.bos_id, theirs.stop_ids)
    assert tokenizer.vocab_size == theirs.vocab_size
    assert tokenizer.control_ids == theirs.control_ids


@pytest.mark.parametrize(
    "damage", ["none", "no kinds", "no unknown", "equal scores", "user-defined", "normal"]
)
def test_the_true_vocabulary_is_rebuilt_from_unreliable_metadata(damage, forge):
    true = small.true_tokenizer()
    entries = true.vocabulary()
    pieces, scores, kinds = (list(column) for column in zip(*entries))
    if damage == "no kinds":
        kinds = None
    elif damage == "no unknown":  # what today's converters write
        kinds[0:3] = [3, 3, 3]
    elif damage == "equal scores":  # from a tokenizer.json alone
        scores = [-1000.0] * len(scores)
    elif damage == "user-defined":  # what old converters wrote for added tokens
        kinds[32000:] = [4, 4]
    elif damage == "normal":
        kinds = [1] * len(kinds)
    metadata = {
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": True,
    }
    rebuilt = forge(metadata).tokenizer(small.config(vocab_size=32002, eos_token_id=(32000,)))
    generator = random.Random(0)
    alphabet = [
        *" \n\t.,<|>{}\"'/_",
        "é",
        "語",
        "😀",
        " the",
        "The",
        "ing",
        "def",
        "42",
        "  ",
        "im_start",
    ]
    for _ in range(500):
        text = "".join(generator.choice(alphabet) for _ in range(generator.randrange(25)))
        assert rebuilt.encode(text) == true.encode(text)
        assert rebuilt.encode("<|im_start|>" + text, special=True) == true.encode(
            "<|im_start|>" + text, special=True
        )
    # Without kinds, 2 looks like any other token: it neither begins nor ends a text here.
    assert rebuilt.control_ids == true.control_ids - (
        {2} if damage in ("no kinds", "normal") else set()
    )


def test_pieces_that_are_broken_or_empty_become_unused(forge):
    tokens = list(read_header(FILES / "q8_0.gguf").metadata["tokenizer.ggml.tokens"])
    tokens[300] = tokens[301] = "\ufffd"
    tokens[302] = ""
    reader = forge({"tokenizer.ggml.tokens": tokens})
    rebuilt = reader.tokenizer(reader.config())
    assert rebuilt.token_bytes(301) is None
    assert rebuilt.token_bytes(302) is None
    assert rebuilt.decode(rebuilt.encode("Hello world")) == "Hello world"
    forge({"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.unknown_token_id": 302})
    with pytest.raises(mistral.CheckpointError, match="piece of the unknown token, 302, is empty"):
        load(FILES / "q8_0.gguf")


HOSTILE = [
    *(("tokenizer.ggml.eos_token_id", v) for v in (np.array([1]), 2.0, "2", -1, True, 2**40)),
    *(("tokenizer.ggml.bos_token_id", v) for v in (461.5, "1", 4000)),
    *(("tokenizer.ggml.unknown_token_id", v) for v in (4000, [0])),
    *(
        ("tokenizer.ggml.token_type", v)
        for v in (3, np.full(480, np.inf), np.ones(479), ["a"] * 480, np.full(480, 9))
    ),
    *(("tokenizer.ggml.scores", v) for v in (1.0, np.full(480, np.nan), np.ones(3))),
    *(("tokenizer.ggml.tokens", v) for v in ([], ["a"], np.ones(480), "abc")),
    *(("tokenizer.ggml.model", v) for v in (np.ones(2), 1, "gpt2")),
    *(("llama.attention.sliding_window", v) for v in ("x", -1, np.array([4, 4]), 1.5)),
    *(("llama.attention.head_count", v) for v in (0, np.array([8, 8]), "8", 8.0, 7)),
    *(("llama.attention.layer_norm_rms_epsilon", v) for v in (0.0, float("nan"), "x", np.ones(2))),
    *(("llama.rope.freq_base", v) for v in (0.0, float("inf"), "x", np.ones(2))),
    *(("llama.rope.scaling.factor", v) for v in (-2.0, float("nan"), True, "x", np.ones(2))),
    *(("llama.rope.scale_linear", v) for v in (-2.0, float("inf"), "x", np.ones(2))),
    *(("llama.rope.scaling.type", v) for v in ("longrope", "llama3", 3, np.ones(2))),
    *(("llama.rope.scaling.attn_factor", v) for v in (1.5, "x")),  # linear has none
    *(("llama.expert_count", v) for v in (8, "x")),
    *(("general.architecture", v) for v in ("mamba", 1, np.ones(2))),
    *(("split.count", v) for v in (2.0, np.ones(2), 3)),
]


@pytest.mark.filterwarnings("ignore:.*names no sliding window")
@pytest.mark.parametrize(
    ("key", "value"), HOSTILE, ids=[f"{key}-{i}" for i, (key, _) in enumerate(HOSTILE)]
)
def test_metadata_of_the_wrong_kind_is_refused(key, value, forge):
    with pytest.raises(mistral.CheckpointError):
        forge({key: value})
        load(FILES / "q8_0.gguf", sliding_window="auto")


def test_a_variant_of_the_architecture_is_named():
    header = read_header(FILES / "q8_0.gguf")
    experts = replace(header, metadata=header.metadata | {"llama.expert_count": 8})
    with pytest.raises(ValueError, match="mixture of experts"):
        read_config(experts)
    tensors = header.tensors | {"rope_freqs.weight": next(iter(header.tensors.values()))}
    with pytest.raises(ValueError, match=r"rotary scaling llama3\) is not supported"):
        read_config(replace(header, tensors=tensors))


@pytest.mark.filterwarnings("ignore:.*names no sliding window")
def test_a_bad_tokenizer_is_refused_before_a_weight_is_read(forge, monkeypatch):
    forge({"tokenizer.ggml.model": "gpt2"})
    monkeypatch.setattr(GgufTensor, "read", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(mistral.CheckpointError, match="gpt2"):
        load(FILES / "q8_0.gguf")


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(forge):
    tokens = [*read_header(FILES / "q8_0.gguf").metadata["tokenizer.ggml.tokens"], "more"]
    more = {"tokenizer.ggml.token_type": None, "tokenizer.ggml.scores": None}
    forge({"tokenizer.ggml.tokens": tokens} | more)
    with pytest.raises(mistral.CheckpointError, match="481 ids, and the model's vocabulary is 480"):
        load(FILES / "q8_0.gguf")


def test_a_quantised_vector_is_unpacked_even_in_a_packed_model(tmp_path):
    reader = gguf_py.GGUFReader(FILES / "q8_0.gguf")
    norm = next(tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
    block = gguf_py.quantize(norm.data.copy(), gguf_py.GGMLQuantizationType.Q8_0)
    rewrite(FILES / "q8_0.gguf", tmp_path / "m.gguf", replace={"output_norm.weight": block})
    packed, unpacked = (load(tmp_path / "m.gguf", packed=p)[0] for p in (True, False))
    with torch.no_grad():
        assert torch.allclose(packed(TOKENS), unpacked(TOKENS), atol=1e-5)


def test_a_sentencepiece_model_without_a_dummy_prefix():
    entries = [("<unk>", 0.0, 2), ("a", -1.0, 1), ("▁", -2.0, 1)]
    pieces, scores, kinds = zip(*entries)
    made = mistral.Tokenizer(
        write_model(pieces, scores, kinds, bos_id=None, eos_id=None, dummy_prefix=False)
    )
    assert made.encode("aa", bos=False) == [1, 1]


WINDOWS = [  # theta, positions, window key, what is decided
    (1e4, 32768, None, 4096),
    (1e6, 32768, None, None),
    (1e4, 4096, None, None),
    (1e4, 32768, 1000, 1000),
    (1e4, 32768, 0, None),
]


@pytest.mark.parametrize(("theta", "positions", "named", "expected"), WINDOWS)
def test_the_window_is_told_by_a_rule_that_says_what_it_decided(
    theta, positions, named, expected, forge
):
    metadata = {"llama.rope.freq_base": theta, "llama.context_length": positions}
    if named is not None:
        metadata["llama.attention.sliding_window"] = named
    forge(metadata)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, _ = load(FILES / "q8_0.gguf", sliding_window="auto")
        assert model.config.sliding_window == expected
        assert len(caught) == (named is None)
    if named is None:
        said = "attending to everything" if expected is None else "v0.1's window of 4,096"
        assert said in str(caught[0].message)
        assert caught[0].filename == __file__  # the caller's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(FILES / "q8_0.gguf", sliding_window=7)[0].config.sliding_window == 7


@functools.cache
def read_by_gguf_py(source):
    return gguf_py.GGUFReader(source)


def rewrite(
    source,
    target,
    drop=(),
    change=(),
    tensors=lambda name: True,
    replace=None,
    kind=gguf_py.GGMLQuantizationType.Q8_0,
    **split,
):
    """A copy by gguf-py with other metadata and some of the tensors; replaced ones have `kind`."""
    reader = read_by_gguf_py(source)
    writer = gguf_py.GGUFWriter(target, "llama", **split)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in drop:
            continue
        sub_type = field.types[-1] if len(field.types) > 1 else None
        value = dict(change).get(key, field.contents())
        writer.add_key_value(key, value, field.types[0], sub_type)
    for tensor in reader.tensors:
        if tensors(tensor.name):
            data = (replace or {}).get(tensor.name)
            if data is None:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            else:
                writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_a_split_set_gives_the_same_model(tmp_path):
    rewrite(FILES / "q4_k_m.gguf", tmp_path / "m.gguf", split_max_tensors=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    model, _ = load(parts[0])
    whole, _ = load(FILES / "q4_k_m.gguf")
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values())
    )
    with pytest.raises(mistral.CheckpointError, match="name the first, m-00001-of-00003.gguf"):
        load(parts[1])
    shutil.copyfile(parts[1], parts[2])
    with pytest.raises(mistral.CheckpointError, match="does not belong to the split set"):
        load(parts[0])
    parts[2].unlink()
    with pytest.raises(mistral.CheckpointError, match="00003-of-00003.gguf is missing"):
        load(parts[0])


def test_a_later_part_with_forged_metadata_is_refused(tmp_path, monkeypatch):
    rewrite(FILES / "q4_k_m.gguf", tmp_path / "m.gguf", split_max_tensors=8)
    first = tmp_path / "m-00001-of-00003.gguf"

    def forged(path):
        header = read_header(path)
        number = header.metadata["split.no"] if path == first else np.array([1, 1])
        return GgufHeader(header.metadata | {"split.no": number}, header.tensors)

    monkeypatch.setattr(gguf, "read_header", forged)
    with pytest.raises(mistral.CheckpointError, match="split.no must be a whole number"):
        load(first)


def test_an_absent_output_matrix_means_the_embedding(tmp_path):
    rewrite(
        FILES / "q4_k_m.gguf", tmp_path / "m.gguf", tensors=lambda name: name != "output.weight"
    )
    for packed in (False, True):
        model, _ = load(tmp_path / "m.gguf", packed=packed)
        with torch.no_grad():
            weight = load(FILES / "q4_k_m.gguf")[0].model.embed_tokens.weight
            hidden = torch.randn(1, 2, 256)
            assert torch.allclose(model.lm_head(hidden), hidden @ weight.T, atol=1e-5)
            assert not any(name.startswith("lm_head") for name in model.state_dict()) or not packed
            assert torch.allclose(
                model.double().lm_head(hidden.double()).float(), hidden @ weight.T, atol=1e-5
            )


def unpacked_by_gguf_py():
    """The names of all types that gguf-py can unpack."""
    names = []
    for kind, (_, size) in gguf_py.GGML_QUANT_SIZES.items():
        try:
            gguf_py.dequantize(np.zeros((1, size), "u1"), kind)
        except NotImplementedError:
            continue
        names.append(kind.name)
    return names


@pytest.mark.parametrize("name", unpacked_by_gguf_py())
def test_types_that_gguf_py_unpacks_are_loaded(name, tmp_path):
    kind = gguf_py.GGMLQuantizationType[name]
    weights, size = gguf_py.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(0)
    stored = {}
    for tensor in read_by_gguf_py(FILES / "q8_0.gguf").tensors:
        if tensor.name.startswith("blk.0.") and len(tensor.shape) == 2:
            columns, rows = (int(n) for n in tensor.shape)
            # Bytes below 64 are small finite scales in all of these types.
            stored[tensor.name] = generator.integers(0, 64, (rows, columns // weights * size), "u1")
    rewrite(FILES / "q8_0.gguf", tmp_path / "m.gguf", replace=stored, kind=kind)
    whole, packed = (load(tmp_path / "m.gguf", packed=packed)[0] for packed in (False, True))
    for ours, theirs in gguf_names(2).items():
        if theirs not in stored:
            continue
        heads = rotary_heads(ours, whole.config)
        rows = stored[theirs]
        if heads is not None:
            rows = rows[half_split_rows(len(rows), heads).numpy()]
        expected = gguf_py.dequantize(rows, kind)
        assert np.isfinite(expected).all()
        assert len(np.unique(expected)) > 2
        assert np.array_equal(whole.state_dict()[ours].numpy(), expected)
        if weights > 1:
            name = ours.removesuffix(".weight")
            assert np.array_equal(packed.state_dict()[f"{name}.blocks"].numpy(), rows)
            unpacked = packed.get_submodule(name)(torch.eye(expected.shape[1])).T
            assert np.allclose(unpacked.detach().numpy(), expected, rtol=1e-6, atol=0)
        else:
            assert np.array_equal(packed.state_dict()[ours].numpy(), expected)
    with torch.no_grad():
        for model in (whole, packed):
            assert model(TOKENS[:, :3]).shape == (len(TOKENS), 3, 480)


DEFAULTED = (
    "llama.attention.key_length",
    "llama.attention.value_length",
    "llama.rope.freq_base",
    "llama.vocab_size",
)


def test_keys_that_llama_cpp_gives_a_default_may_be_absent(tmp_path):
    rewrite(FILES / "q8_0.gguf", tmp_path / "m.gguf", drop=DEFAULTED)
    assert load(tmp_path / "m.gguf")[0].config == load(FILES / "q8_0.gguf")[0].config


REFUSED = [
    (dict(drop=["llama.block_count"]), "llama.block_count is missing"),
    (dict(drop=["llama.attention.layer_norm_rms_epsilon"]), "layer_norm_rms_epsilon is missing"),
    (dict(drop=["tokenizer.ggml.model"]), "tokenizer model None"),
    (dict(drop=["tokenizer.ggml.tokens"]), "tokens is not a list"),
    (dict(change={"llama.block_count": 3}), "the weights have 2 layers, the config says 3"),
    (
        dict(change={"llama.feed_forward_length": 511}),
        r"ffn_gate.weight is \[512, 256\] in the file and \[511, 256\]",
    ),
    (dict(change={"llama.rope.dimension_count": 16}), "a part of the head"),
    (dict(change={"tokenizer.ggml.eos_token_id": 4800}), "eos_token_id 4800 lies outside"),
    (dict(tensors=lambda name: name != "blk.1.attn_k.weight"), "blk.1.attn_k.weight is missing"),
    (dict(tensors=lambda name: name != "token_embd.weight"), "token_embd.weight is missing"),
]


@pytest.mark.parametrize(
    ("damage", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED]
)
def test_metadata_that_contradicts_itself_is_refused(damage, message, tmp_path):
    rewrite(FILES / "q8_0.gguf", tmp_path / "m.gguf", **damage)
    with pytest.raises(mistral.CheckpointError, match=message):
        load(tmp_path / "m.gguf")


RAW = (FILES / "q8_0.gguf").read_bytes()
BROKEN = [
    (b"", "is empty: the download did not finish"),
    (b"GGML" + RAW[4:], "is not a GGUF file"),
    (RAW[:4] + struct.pack(">I", 3) + RAW[8:], "big-endian"),
    (RAW[:4] + struct.pack("<I", 1) + RAW[8:], "version 1"),
    (RAW[: len(RAW) // 2], "is not complete"),
    (RAW[:40], "bytes remain|ends inside"),
    (RAW[:8] + b"\xff" * 16 + RAW[24:], "declares 18,446,744,073,709,551,615 entries"),
]


@pytest.mark.parametrize(("data", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_broken_headers_are_refused(data, message, tmp_path):
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(mistral.CheckpointError, match=message):
        load(tmp_path / "m.gguf")


@pytest.mark.filterwarnings("ignore:.*names no sliding window")
@pytest.mark.parametrize("seed", small.seeds(3, 8))
def test_mutated_files_give_a_model_or_a_checkpoint_error(seed, tmp_path):
    generator = random.Random(seed)
    path = tmp_path / "m.gguf"
    start = time.process_time()
    for _ in range(50):
        data = bytearray(RAW)
        for _ in range(generator.choice([1, 2, 4, 30])):
            data[generator.randrange(4, 24_000)] = generator.choice(
                [0, 1, 255, generator.randrange(256)]
            )
        path.write_bytes(data)
        try:
            model, tokenizer = load(path, sliding_window="auto", packed=generator.random() < 0.5)
            model(torch.tensor([[1, 2, 3]]))
            tokenizer.decode(tokenizer.encode("some <|im_start|> text", special=True))
        except mistral.CheckpointError:
            pass
    assert time.process_time() - start < 60


@pytest.mark.parametrize("kind", gguf_export.KINDS)
def test_what_is_exported_is_read_again_and_is_gguf_pys(original, kind, tmp_path):
    model, tokenizer = original
    gguf_export.export(model, tokenizer, tmp_path / "m.gguf", kind)
    again, again_tokenizer = load(tmp_path / "m.gguf")
    assert again.config.num_parameters == model.config.num_parameters
    reference = {tensor.name: tensor for tensor in gguf_py.GGUFReader(tmp_path / "m.gguf").tensors}
    assert reference["blk.0.attn_q.weight"].tensor_type.name == kind
    assert reference["output_norm.weight"].tensor_type.name == "F32"
    for name, tensor in again.state_dict().items():
        exact = kind in ("F32", "BF16") or tensor.dim() == 1
        theirs = model.state_dict()[name]
        step = {"F16": 2**-11, "Q8_0": 1 / 127, "Q4_0": 1 / 7}.get(kind, 0)
        assert (tensor - theirs).abs().max() <= (0 if exact else theirs.abs().max() * step)
    for text in ("Hello <|im_end|>", "naïve 日本"):
        assert again_tokenizer.encode(text, special=True) == tokenizer.encode(text, special=True)
    assert not list(tmp_path.glob("*.unfinished"))


def test_exported_blocks_are_llama_cpps(original, tmp_path):
    gguf_export.export(*original, tmp_path / "m.gguf", "Q8_0")
    ours, theirs = (
        gguf_py.GGUFReader(path).tensors for path in (tmp_path / "m.gguf", FILES / "q8_0.gguf")
    )
    theirs = {tensor.name: tensor.data for tensor in theirs}
    assert len(ours) == len(theirs)
    assert all(np.array_equal(tensor.data, theirs[tensor.name]) for tensor in ours)


def test_stop_tokens_and_prefix_survive_an_export(original, tmp_path):
    model, tokenizer = original
    two = mistral.Tokenizer(tokenizer.model_proto, tokenizer.added, [460, 2])
    gguf_export.export(model, two, tmp_path / "m.gguf", "F16")
    assert load(tmp_path / "m.gguf")[1].stop_ids == (460, 2)
    three = mistral.Tokenizer(two.model_proto, two.added, [460, 461, 2])
    with pytest.warns(UserWarning, match=r"two stop tokens; </s> \(2\) will not stop"):
        gguf_export.export(model, three, tmp_path / "n.gguf", "F16")
    assert load(tmp_path / "n.gguf")[1].stop_ids == (460, 461)


def test_exports_that_cannot_be_are_refused(original, tmp_path):
    model, tokenizer = original
    with pytest.raises(ValueError, match="must be one of"):
        gguf_export.export(model, tokenizer, tmp_path / "m.gguf", "Q4_K")
    with pytest.raises(ValueError, match="blocks of 32"):
        gguf_export.export(small.model(torch.float32), tokenizer, tmp_path / "m.gguf", "Q8_0")
    packed, _ = load(FILES / "q8_0.gguf", packed=True)
    with pytest.raises(ValueError, match="is packed"):
        gguf_export.export(packed, tokenizer, tmp_path / "m.gguf", "Q8_0")
    assert not list(tmp_path.iterdir())


def stream(source, path, kind, window=None, **options):
    """Write a checkpoint without loading it, as scripts/export_gguf.py does."""
    reader = open_reader(source)
    config, tokenizer = read_config_and_tokenizer(reader, window)
    gguf_export.export_checkpoint(reader, config, tokenizer, path, kind, **options)


def consolidated_copy(folder):
    """The small checkpoint in Mistral's own layout."""
    config = load(small.DATA / "small")[0].config
    names = consolidated_names(config.num_hidden_layers)
    tensors = {}
    for name, tensor in load_file(small.DATA / "small/model.safetensors").items():
        heads = rotary_heads(name, config)
        rows = tensor if heads is None else tensor[interleaved_rows(len(tensor), heads)]
        tensors[names[name]] = rows.contiguous()
    folder.mkdir()
    save_file(tensors, folder / "consolidated.safetensors")
    shutil.copyfile(small.DATA / "small/tokenizer.model", folder / "tokenizer.model.v3")
    params = dict(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        head_dim=config.head_dim,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        rope_theta=config.rope_theta,
        norm_eps=config.rms_norm_eps,
    )
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("F16", 70_000.0),
        ("F16", math.nan),
        ("Q8_0", 1e7),
        ("Q4_0", math.inf),
        ("Q8_0", 127.5 * 65504),
        ("F16", -66_000.0),
    ],
)
def test_values_that_a_type_cannot_hold_are_not_exported(kind, value, tmp_path):
    model = small.model(torch.float32, hidden_size=64, intermediate_size=96, head_dim=32)
    tokenizer = mistral.load(small.DATA / "small", device="cpu")[1]
    model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight: .* take BF16"):
        gguf_export.export(model, tokenizer, tmp_path / "out.gguf", kind)
    assert not list(tmp_path.iterdir())


def every_form_and_every_type():
    """Each form with one type, and each type with a folder; the other pairs are slow."""
    kinds = list(gguf_export.KINDS)
    for i, form in enumerate(("folder", "consolidated", "plain", "quantized", "tied")):
        for j, kind in enumerate(kinds):
            fast = form == "folder" or j == i % len(kinds)
            yield pytest.param(form, kind, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("form", "kind"), list(every_form_and_every_type()))
@pytest.mark.filterwarnings("ignore:.*rounded again")
def test_an_export_from_the_files_has_the_bytes_of_one_from_a_float32_model(
    form, kind, tmp_path, monkeypatch
):
    monkeypatch.setattr(gguf_export, "_AT_ONCE", 7 * 256)  # seven rows at a time
    source = {"folder": small.DATA / "small", "quantized": FILES / "q4_k_m.gguf"}.get(form)
    if form == "consolidated":
        source = consolidated_copy(tmp_path / "model")
    elif form == "plain":
        source = tmp_path / "plain.gguf"
        gguf_export.export(*load(small.DATA / "small"), source, "BF16")
    elif form == "tied":
        source = tmp_path / "tied"
        small.save_hf(
            source, torch.bfloat16, tie_word_embeddings=True, hidden_size=64, intermediate_size=96,
            head_dim=16, vocab_size=480,
        )  # fmt: skip
        shutil.copy(small.DATA / "small/tokenizer.model", source)
    name = open_reader(source).model_name() or source.name
    gguf_export.export(*load(source, dtype=torch.float32), tmp_path / "model.gguf", kind, name)
    stream(source, tmp_path / "files.gguf", kind)
    assert (tmp_path / "files.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


def test_a_dtype_rounds_the_values_before(tmp_path):
    stream(FILES / "q8_0.gguf", tmp_path / "a.gguf", "F32", dtype=torch.bfloat16)
    model, tokenizer = load(FILES / "q8_0.gguf", dtype=torch.bfloat16)
    gguf_export.export(model, tokenizer, tmp_path / "b.gguf", "F32", "Hf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def stored_name(path):
    return read_header(path).metadata.get("general.name")


def test_the_name_of_a_model_survives(tmp_path):
    rewrite(FILES / "q8_0.gguf", tmp_path / "a.gguf", change={"general.name": "Hermes 2 Pro"})
    with pytest.warns(UserWarning, match="a.gguf is quantized .Q8_0.: its values are rounded"):
        stream(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q8_0")
    assert stored_name(tmp_path / "b.gguf") == "Hermes 2 Pro"

    folder = shutil.copytree(small.DATA / "small", tmp_path / "fine-tune")
    stream(folder, tmp_path / "c.gguf", "Q8_0")
    assert stored_name(tmp_path / "c.gguf") == "fine-tune"
    config = json.loads((folder / "config.json").read_text())
    for number, (path, name) in enumerate(
        [
            ("NousResearch/Hermes-2-Pro-Mistral-7B", "NousResearch/Hermes-2-Pro-Mistral-7B"),
            ("/workspace/output", "fine-tune"),
            ("./out/checkpoint", "fine-tune"),
            (["no name"], "fine-tune"),
        ]
    ):
        (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": path}))
        stream(folder, tmp_path / f"d{number}.gguf", "Q8_0")
        assert stored_name(tmp_path / f"d{number}.gguf") == name

    snapshot = tmp_path / "models--owner--name/snapshots" / ("c" * 40)
    shutil.copytree(folder, snapshot)
    stream(snapshot, tmp_path / "e.gguf", "Q8_0")
    assert stored_name(tmp_path / "e.gguf") == "owner/name"


def test_what_is_not_carried_over_is_told(tmp_path, forge):
    reader = forge({"general.license": "apache-2.0", "quantize.imatrix.file": "x"})
    config, tokenizer = read_config_and_tokenizer(reader, None)
    with pytest.warns(UserWarning) as told:
        gguf_export.export_checkpoint(reader, config, tokenizer, tmp_path / "b.gguf", "Q4_0")
    texts = [str(warning.message) for warning in told]
    assert "q8_0.gguf is quantized (Q8_0): its values are rounded again, to Q4_0" in texts
    [lost] = [text for text in texts if text.startswith("not carried over to b.gguf: ")]
    assert "general.license" in lost
    assert "imatrix" not in lost
    folder = shutil.copytree(small.DATA / "small", tmp_path / "folder")
    defaults = {"eos_token_id": 460, "temperature": 0.7, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    with pytest.warns(
        UserWarning,
        match="temperature of generation_config.json, top_p of generation_config.json$",
    ):
        stream(folder, tmp_path / "c.gguf", "Q8_0")


# Each of the four is measured in a fork of one process, because a process takes 2 s to start.
MEMORY = """
import os, sys, torch, mistral
from pathlib import Path
from mistral.checkpoints.gguf_export import export_checkpoint
from mistral.checkpoints.load import open_reader, read_config_and_tokenizer
def used(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024
def in_a_fork(measure, *arguments):
    if not os.fork():
        print(measure(*arguments), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
def export(kind):
    reader = open_reader(big)
    export_checkpoint(reader, *read_config_and_tokenizer(reader), big / f"{kind}.gguf", kind)
    return used("VmHWM") - imports
def load(packed):
    options = dict(device="cpu", dtype=torch.bfloat16, packed=packed, sliding_window=None)
    mistral.load(small, **options)  # everything is imported and warm
    before = used("VmRSS")
    model, _ = mistral.load(big / "Q8_0.gguf", **options)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return (used("VmHWM") - before) / size
big, small = map(Path, sys.argv[1:])
imports = used("VmHWM")
for kind in ("Q8_0", "F32"):
    in_a_fork(export, kind)
for packed in (True, False):
    in_a_fork(load, packed)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("layers", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_an_export_holds_one_tensor_and_loading_little_more_than_stays(layers, original, tmp_path):
    config = small.config(  # 125 or 590 MB in bfloat16
        vocab_size=4000,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
    )
    model = mistral.Mistral(config).to(torch.bfloat16)
    hugging_face.save(model, original[1], tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    largest = 4000 * 1024 * 4  # in float32
    del model
    command = [sys.executable, "-c", MEMORY, tmp_path, FILES / "q8_0.gguf"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    exports, loads = map(int, lines[:2]), map(float, lines[2:])
    for taken in exports:
        assert taken < min(6 * largest, size / 1.4), f"{taken:,} of {size:,}"
    for ratio in loads:
        assert 0.9 < ratio < 1.15


def test_row_orders_are_each_others_inverse():
    ours = half_split_rows(24, 4)
    theirs = interleaved_rows(24, 4)
    assert torch.equal(ours[theirs], torch.arange(24))
    assert half_split_rows(6, 1).tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("changes", [{}, {"head_dim": 12, "num_key_value_heads": 3}])
def test_the_table_of_shapes_is_that_of_the_modules(changes):
    model = small.model(**changes)
    assert tensor_shapes(model.config) == {
        name: tuple(t.shape) for name, t in model.state_dict().items()
    }


def test_packed_is_for_gguf_files(original, tmp_path):
    with pytest.raises(ValueError, match="packed=True is for quantised GGUF"):
        mistral.load(small.DATA / "small", packed=True)
    # has no blocks: there is nothing to unpack
    gguf_export.export(*original, tmp_path / "m.gguf", "F32")
    assert not any(
        isinstance(module, Packed) for module in load(tmp_path / "m.gguf", packed=True)[0].modules()
    )


def test_the_end_of_a_turn_is_a_stop_token(forge):
    reader = forge({"tokenizer.ggml.eot_token_id": 5})
    assert reader.config().eos_token_id == (460, 5)


def test_an_exported_model_without_a_window_has_none(original, tmp_path):
    model, tokenizer = original
    assert model.config.sliding_window is None
    gguf_export.export(model, tokenizer, tmp_path / "m.gguf", "Q8_0")
    assert mistral.load(tmp_path / "m.gguf", device="cpu")[0].config.sliding_window is None
