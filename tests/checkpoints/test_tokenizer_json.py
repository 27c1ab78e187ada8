"""tokenizer.json: the ids of the library and of transformers, control tokens apart, bad files."""

import copy
import json
import random
import warnings

import pytest
import small
import tokenizer_files as files
import tokenizers

import mistral
from mistral.checkpoints.added_tokens import tokens_of_list
from mistral.checkpoints.hugging_face_tokenizer import read_tokenizer, save_tokenizer
from mistral.pieces import JsonPieces

SPM = small.DATA / "small/tokenizer.model"
TEXTS = files.texts()
EXACT = {"legacy", "none", "never", "bytes", "split", "whole_words"}  # decoding undoes encoding


def config(**changes):
    return small.config(**{"vocab_size": 800, "eos_token_id": (700,), **changes})


@pytest.fixture
def folder(tmp_path):
    """Writes a folder with this tokenizer.json and tokenizer_config.json."""

    def write(content=None, **settings):
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return tmp_path

    return write


@pytest.mark.parametrize("form", files.FORMS)
def test_ids_are_those_of_the_library(form):
    library = tokenizers.Tokenizer.from_str(json.dumps(files.content(form)))
    made = files.tokenizer(form)
    for text in TEXTS:
        theirs = library.encode(text, add_special_tokens=False).ids
        assert made.encode(text, bos=False, special=True) == theirs, text


@pytest.mark.parametrize("form", files.FORMS)
def test_flags_of_added_tokens_change_ids_as_in_the_library(form):
    generator = random.Random(1)
    for _ in range(8):
        content = files.content(form)
        for entry in content["added_tokens"]:
            for flag in ("lstrip", "rstrip", "single_word", "normalized"):
                entry[flag] = generator.random() < 0.4
        library = tokenizers.Tokenizer.from_str(json.dumps(content))
        added = files.tokens_of_list(content["added_tokens"])
        made = mistral.Tokenizer(JsonPieces(content), added, bos_id=1)
        for text in TEXTS:
            theirs = library.encode(text, add_special_tokens=False).ids
            assert made.encode(text, bos=False, special=True) == theirs, text


@pytest.mark.parametrize("form", files.FORMS)
def test_text_never_becomes_a_control_token_and_words_are_text(form):
    made = files.tokenizer(form)
    think = next(id for id, token in made.words.items() if token.text == "<think>")
    for text in TEXTS:
        ids = made.encode(text, bos=False)
        assert not made.control_ids & set(ids), text
        assert ids.count(think) == text.count("<think>")
        decoded = made.decode(ids)
        if form in EXACT:
            assert decoded == text
        else:  # a text that begins with a space gets no other: the two look the same
            assert decoded.replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("form", sorted(EXACT))
def test_streams_bytes_and_continued_text(form):
    made = files.tokenizer(form)
    generator = random.Random(0)
    for text in TEXTS:
        ids = made.encode(text, bos=False)
        stream = made.stream(strip_leading_space=True)
        assert "".join(map(stream.feed, ids)) + stream.finish() == text
        cut = generator.randrange(len(text) + 1)
        if not cut or "<think>" in text or "capital" in text:
            continue  # a word may be cut, or take the space before it
        rest = made.encode(text[cut:], bos=False, prefix_space=False)
        start = made.encode(text[:cut], bos=False)
        assert made.decode([*start, *rest]) == text
        joined = b"".join(made.token_bytes(id) for id in ids)
        assert joined == (" " * (made.adds_space and bool(text)) + text).encode()


def test_a_control_token_in_the_trained_vocabulary_is_not_found_in_text():
    content = copy.deepcopy(files.content("whole_words", words=False))
    vocab = content["model"]["vocab"]
    spelled = "<|end|>"
    vocab[spelled] = 900  # a whole word of the vocabulary, and what a merge makes
    vocab["<|"], vocab["end"], vocab["<|end"], vocab["|>"] = 901, 902, 903, 904
    pairs = [("<", "|"), ("e", "n"), ("en", "d"), ("<|", "end"), ("|", ">"), ("<|end", "|>")]
    vocab.setdefault("en", 905)
    content["model"]["merges"] = [list(pair) for pair in pairs]
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": ".+"}
    content["added_tokens"].append({"id": 900, "content": spelled, "special": True})
    library = tokenizers.Tokenizer.from_str(json.dumps({**content, "added_tokens": []}))
    assert library.encode(spelled).ids == [900]
    added = files.tokens_of_list(content["added_tokens"])
    for ignore_merges in (True, False):
        content["model"]["ignore_merges"] = ignore_merges
        made = mistral.Tokenizer(JsonPieces(content), added, [900], bos_id=1)
        assert 900 not in made.encode(f"a{spelled}", bos=False)
        assert made.decode(made.encode(spelled, bos=False)) == spelled
        assert made.encode(spelled, bos=False, special=True) == [900]


def test_text_that_the_vocabulary_cannot_spell_is_refused():
    content = copy.deepcopy(files.content("legacy"))
    content["model"]["byte_fallback"] = False
    added = files.tokens_of_list(content["added_tokens"])
    made = mistral.Tokenizer(JsonPieces(content), added, bos_id=1)
    assert made.decode(made.encode("hello")) == "hello"
    with pytest.raises(ValueError, match="no pieces for a part of .a 😀"):
        made.encode("a 😀")
    content = copy.deepcopy(files.content("bytes", words=False))
    del content["model"]["vocab"]["ð"]  # the byte f0
    made = mistral.Tokenizer(JsonPieces(content), bos_id=1, added={1: "<s>"})
    with pytest.raises(ValueError, match="no pieces"):
        made.encode("a 😀")


@pytest.mark.parametrize("form", ["legacy", "first", "bytes", "split"])
@pytest.mark.parametrize("begins", [True, False])
def test_the_begin_token_is_added_as_in_transformers(form, begins, folder):
    content = files.content_with_begin(form) if begins else files.content(form)
    path = folder(content, tokenizer_class="TokenizersBackend", bos_token="<s>", eos_token="</s>")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    ours = read_tokenizer(path, config())
    assert ours.adds_bos == begins
    for text in TEXTS:
        if not (begins and text.startswith("<s>")):  # transformers begins with two of them
            assert ours.encode(text, special=True) == theirs.encode(text), text
    assert (ours.bos_id, ours.stop_ids) == (1, (700,))


def test_add_bos_token_is_followed(folder):
    for begins in (True, False):
        content = files.content_with_begin("legacy") if begins else files.content("legacy")
        path = folder(content, bos_token="<s>", add_bos_token=not begins)
        with pytest.warns(UserWarning, match="add_bos_token is followed"):
            made = read_tokenizer(path, config())
        assert made.encode("a")[:1] == ([] if begins else [1]) or made.encode("a")[0] != 1
        assert made.adds_bos != begins
        (path / "tokenizer.json").unlink()
        (path / "tokenizer.model").write_bytes(SPM.read_bytes())
        made = read_tokenizer(path, config(eos_token_id=(2,)))
        assert (made.encode("a")[0] == 1) != begins
        (path / "tokenizer.model").unlink()


def test_special_tokens_that_only_the_configuration_names(folder):
    content = files.content("legacy")
    content["added_tokens"] = [
        {"id": 700, "content": "<|im_end|>", "special": False},
        {"id": 701, "content": "<extra>", "special": False},
        {"id": 702, "content": "<tool_call>", "special": False},
    ]
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    path = folder(content, **settings, additional_special_tokens=["<extra>"])
    made = read_tokenizer(path, config(eos_token_id=()))
    assert made.control_ids == {0, 1, 700, 701}
    assert {token.text for token in made.words.values()} == {"<tool_call>"}
    assert (made.bos_id, made.stop_ids) == (1, (700,))


def test_a_stop_token_that_no_list_has_is_a_control_token(folder):
    content = files.content("legacy", words=False)
    content["added_tokens"] = []
    made = read_tokenizer(folder(content), config(eos_token_id=(2,)))
    assert made.control_text(2) == "</s>"
    assert 2 not in made.encode("a</s>", bos=False)
    assert 2 in made.encode("a</s>", bos=False, special=True)


def spm_content(legacy=True):
    """tokenizer.json of the small tokenizer.model."""
    return files.of_sentencepiece(SPM, "legacy" if legacy else "first")


def both(folder, content, **settings):
    path = folder(content, **settings)
    (path / "tokenizer.model").write_bytes(SPM.read_bytes())
    return path


def test_the_sentencepiece_model_is_used_if_both_agree(folder):
    path = both(folder, spm_content(), bos_token="<s>", add_bos_token=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = read_tokenizer(path, config(vocab_size=480, eos_token_id=(460,)))
    assert made.model_proto == SPM.read_bytes()
    assert made.control_id("<|im_start|>") == 461
    library = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    for text in TEXTS:
        theirs = library.encode(text, add_special_tokens=False).ids
        assert made.encode(text, bos=False, special=True) == theirs


def test_what_transformers_reads_is_used_if_they_disagree(folder):
    path = both(folder, spm_content(legacy=False), bos_token="<s>")
    sizes = config(vocab_size=480, eos_token_id=(460,))
    with pytest.warns(UserWarning, match="differently; transformers reads tokenizer.json; token"):
        assert isinstance(read_tokenizer(path, sizes).pieces, JsonPieces)
    other = spm_content()
    pieces = list(other["model"]["vocab"])
    swap = {pieces[270]: pieces[271], pieces[271]: pieces[270]}
    other["model"]["vocab"] = {
        swap.get(piece, piece): id for piece, id in other["model"]["vocab"].items()
    }
    (path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.warns(UserWarning, match="the token 270 is '.*' in tokenizer.model and"):
        assert isinstance(read_tokenizer(path, sizes).pieces, JsonPieces)


def test_one_usable_vocabulary_is_enough(folder):
    sizes = config(vocab_size=480, eos_token_id=(460,))
    added = [{"id": 460, "content": "<|im_end|>"}, {"id": 461, "content": "<|im_start|>"}]
    path = both(folder, {"added_tokens": added, "model": {"type": "BPE"}})
    with pytest.warns(UserWarning, match="no vocabulary; tokenizer.model is used"):
        made = read_tokenizer(path, sizes)
    assert made.control_text(460) == "<|im_end|>"
    assert made.adds_bos
    (path / "tokenizer.model").write_bytes(b"damaged")
    (path / "tokenizer.json").write_text(json.dumps(spm_content()))
    with pytest.warns(UserWarning, match="not a sentencepiece model.*tokenizer.json is used"):
        assert read_tokenizer(path, sizes).control_id("<|im_start|>") == 461


def test_a_vocabulary_that_cannot_spell_gives_way_to_one_that_can(folder):
    content = spm_content()
    content["model"]["byte_fallback"] = False
    path = both(folder, content, bos_token="<s>")
    with pytest.warns(UserWarning, match="no pieces for a part of .*; tokenizer.model is used"):
        made = read_tokenizer(path, config(vocab_size=480, eos_token_id=(460,)))
    assert made.decode(made.encode("日本語 😀")) == "日本語 😀"


def test_a_folder_without_a_tokenizer_says_what_to_do(folder):
    with pytest.raises(mistral.CheckpointError, match="copy them from the checkpoint's base model"):
        read_tokenizer(folder(), config())


def test_tokens_without_a_row_are_left_out_with_one_warning(folder):
    content = files.content("legacy")
    flags = {"special": False, "normalized": False}
    content["added_tokens"].append({"id": 900, "content": "<pad>", **flags})
    path = folder(content, bos_token="<s>", added_tokens_decoder={"901": {"content": "<w>"}})
    names = r"<w> \(901, tokenizer_config.json\), <pad> \(900, tokenizer.json\); they are not used"
    with pytest.warns(UserWarning, match=names) as said:
        made = read_tokenizer(path, config(vocab_size=705))
    assert len(said) == 1
    assert made.vocab_size == 705
    assert max(made.encode("<pad> <w> a", special=True)) < 705


HOSTILE = {
    "not JSON": lambda c: "{",
    "a list": lambda c: [],
    "no model": lambda c: c.pop("model"),
    "Unigram": lambda c: c["model"].update(type="Unigram"),
    "WordPiece": lambda c: c["model"].update(type="WordPiece"),
    "no vocabulary": lambda c: c["model"].update(vocab={}),
    "an id twice": lambda c: c["model"]["vocab"].update({"</s>": 1}),
    "an id that is not a number": lambda c: c["model"]["vocab"].update({"</s>": "2"}),
    "a negative id": lambda c: c["model"]["vocab"].update({"</s>": -1}),
    "an enormous id": lambda c: c["model"]["vocab"].update({"</s>": 2**40}),
    "a merge of nothing": lambda c: c["model"]["merges"].append(["absent", "pieces"]),
    "a merge that is a number": lambda c: c["model"]["merges"].append(7),
    "no merges": lambda c: c["model"].pop("merges"),
    "an unknown normalizer": lambda c: c.update(normalizer={"type": "x"}),
    "a normalizer that is text": lambda c: c.update(normalizer="NFC"),
    "a bad expression": lambda c: c.update(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "("},
            "behavior": "Isolated",
            "invert": False,
        }
    ),
    "an expression that is a list": lambda c: c.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": ["a"]}, "behavior": "Isolated"}
    ),
    "a pre-tokenizer in itself": lambda c: c.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": 5}
    ),
    "an added token of another piece": lambda c: c["added_tokens"][0].update(content="<x>"),
    "a lone surrogate": lambda c: c["added_tokens"][3].update(content="\ud800"),
    "two ids of one text": lambda c: c["added_tokens"][3].update(content="<|im_start|>"),
    "added tokens that are text": lambda c: c.update(added_tokens="<s>"),
    "an added token without an id": lambda c: c["added_tokens"][3].pop("id"),
    "an unknown token that is a list": lambda c: c["model"].update(unk_token=["<unk>"]),
    "dropout": lambda c: c["model"].update(dropout=0.5),
    "an end of words": lambda c: c["model"].update(end_of_word_suffix="</w>"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_bad_file_is_refused_in_one_line(what, folder):
    content = copy.deepcopy(files.content("legacy"))
    other = HOSTILE[what](content)
    path = folder(content)
    if isinstance(other, (str, list)) and what in ("not JSON", "a list"):
        (path / "tokenizer.json").write_text(other if isinstance(other, str) else "[]")
    with pytest.raises(mistral.CheckpointError) as caught:
        read_tokenizer(path, config())
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("form", files.FORMS)
def test_what_save_writes_is_read_again(form, tmp_path):
    made = files.tokenizer(form)
    templates = {"default": "{{ bos_token }}x", "tool_use": "y"}
    made.chat_templates = templates
    for adds_bos in (True, False):
        made.adds_bos = adds_bos
        save_tokenizer(made, tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # this tokenizer.json has no post-processor
            again = read_tokenizer(tmp_path, config(eos_token_id=made.stop_ids))
        assert again.control_ids == made.control_ids
        assert again.words == made.words
        assert (again.bos_id, again.adds_bos, again.stop_ids) == (1, adds_bos, made.stop_ids)
        assert again.chat_templates == templates
        for text in TEXTS:
            assert again.encode(text, special=True) == made.encode(text, special=True)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert again.encode(text, bos=False, special=True) == ids


def test_templates_of_a_folder(folder):
    path = folder(files.content("legacy"), bos_token="<s>", chat_template="from the config")
    assert read_tokenizer(path, config()).chat_templates == {"default": "from the config"}
    listed = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    folder(bos_token="<s>", chat_template=listed)
    assert read_tokenizer(path, config()).chat_templates == {"default": "a", "tool_use": "b"}
    (path / "chat_template.json").write_text(json.dumps({"chat_template": "c"}))
    assert read_tokenizer(path, config()).chat_templates == {"default": "c", "tool_use": "b"}
    (path / "chat_template.jinja").write_text("d")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates/rag.jinja").write_text("e")
    expected = {"default": "d", "tool_use": "b", "rag": "e"}
    assert read_tokenizer(path, config()).chat_templates == expected
    (path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(mistral.CheckpointError, match="jinja: .utf-8. codec can"):
        read_tokenizer(path, config())
    (path / "chat_template.jinja").write_text("")
    with pytest.raises(mistral.CheckpointError, match="jinja is empty: the download did not fin"):
        read_tokenizer(path, config())


@pytest.mark.parametrize("form", ["list", "object", "text"])
def test_a_template_that_is_empty_is_not_one(form, folder):
    listed = [{"name": "default", "template": ""}]
    given = {"list": listed, "object": {"default": ""}, "text": ""}[form]
    path = folder(files.content("legacy"), bos_token="<s>", chat_template=given)
    assert read_tokenizer(path, config()).chat_templates == {}


def test_a_begin_token_that_does_not_exist_is_said_once(folder):
    path = folder(files.content("legacy"), bos_token="<begin>", add_bos_token=True)
    with pytest.warns(UserWarning, match="no begin-of-text token; texts begin without one"):
        made = read_tokenizer(path, config())
    assert not made.adds_bos
    assert made.encode("a") == made.encode("a", bos=False)
    path = folder(files.content("legacy"), bos_token="\ud800")
    with pytest.raises(mistral.CheckpointError, match="special token .* is not valid Unicode"):
        read_tokenizer(path, config())


def test_a_vocabulary_with_a_gap_reaches_to_its_last_id():
    content = copy.deepcopy(files.content("legacy", words=False))
    content["model"]["vocab"]["zz"] = 5000
    pieces = JsonPieces(content)
    assert pieces.size == 5001
    assert pieces.entries()[4999:] == [("[PAD4999]", -1000.0, 5), ("zz", 0.0, 5)]


def test_scores_are_the_ranks_of_first_merges_and_a_piece_without_one_is_unused():
    content = copy.deepcopy(files.content("legacy", words=False))
    merges = content["model"]["merges"]
    left, right = merges[3]
    merges.append([left, right])  # a second way to the same piece
    entries = {text: (score, kind) for text, score, kind in JsonPieces(content).entries()}
    assert entries[left + right] == (-3.0, 1)


def test_an_added_token_without_flags_is_text():
    [token] = tokens_of_list([{"id": 800, "content": "capital"}]).values()
    assert not token.special
    assert token.normalized


def test_characters_that_the_library_would_drop_are_refused():
    content = copy.deepcopy(files.content("legacy", words=False))
    content["model"] |= dict(byte_fallback=False, unk_token=None)
    made = mistral.Tokenizer(JsonPieces(content), bos_id=1, added={1: "<s>"})
    assert made.decode(made.encode("hello")) == "hello"
    with pytest.raises(ValueError, match="no pieces for a part of .a 😀"):
        made.encode("a 😀")


def test_two_pieces_of_one_id_are_refused():
    content = copy.deepcopy(files.content("legacy", words=False))
    content["model"]["vocab"]["zz"] = 300
    with pytest.raises(mistral.CheckpointError, match="is that of another piece"):
        JsonPieces(content)


def test_two_added_tokens_of_one_id_are_refused():
    entry = {"id": 800, "special": True}
    with pytest.raises(mistral.CheckpointError, match="have the id 800"):
        tokens_of_list([entry | {"content": "<a>"}, entry | {"content": "<b>"}])
