import copy
import json
import random

import numpy as np
import pytest
import sentencepiece
import small
import tokenizer_files
import tokenizers
import torch

import mistral
from mistral.checkpoints.sentencepiece_model import write_model
from mistral.pieces import AddedToken, Splitter, is_control_spelling

HERMES = (
    "<|im_start|>system\nYou are Hermes 2.<|im_end|>\n<|im_start|>user\nHello, who are "
    "you?<|im_end|>\n"
)
HERMES += "<|im_start|>assistant\n"
HERMES_IDS = [
    1,
    32001,
    1587,
    13,
    1976,
    460,
    14741,
    274,
    28705,
    28750,
    28723,
    32000,
    28705,
    13,
    32001,
    2188,
    13,
]
HERMES_IDS += [16230, 28725, 693, 460, 368, 28804, 32000, 28705, 13, 32001, 13892, 13]
TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces  and three   ",
    "tab\tnewline\n\n\r\n",
    "naïve café – “quotes” … €",
    "日本語のテキスト、한국어, العربية, עברית",
    "😀 👩‍👩‍👧 \U0001f1e8\U0001f1ed",
    "def f(x):\n    return x ** 2  # comment\n",
    '{"name": "f", "arguments": {"x": [1, 2.5e-3, null]}}',
    "<s></s><unk> [INST] <|im_start|>user\nhi<|im_end|>",
    "\x00\x01\x7f\u200b\ufeff\u00ad",
    "\n",
    " leading and trailing ",
]


@pytest.fixture(scope="module")
def tokenizer():
    return small.true_tokenizer(stop_ids=[32000])


def random_text(generator):
    alphabet = [
        *" \n\t<>|/_{}\"'",
        "im_end",
        "<s>",
        "é",
        "語",
        "😀",
        "the",
        " The",
        "▂",
        "ß",
        "\u0301",
        chr(0x10FFFF),
    ]
    return "".join(generator.choice(alphabet) for _ in range(generator.randrange(20)))


def test_ids_are_those_that_llama_cpp_gave():
    folder = small.DATA / "small"
    _, made = mistral.load(folder, device="cpu")
    for row in json.loads((folder / "tokens.json").read_text()):
        assert made.encode(row["text"], bos=False) == row["plain"]
        assert made.encode(row["text"], bos=False, special=True) == row["special"]
        assert made.decode(row["special"], control=True) == row["text"]


def test_chatml_splits_as_hermes_was_trained(tokenizer):
    assert tokenizer.encode(HERMES, special=True) == HERMES_IDS
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>\n", bos=False, special=True) == [
        *(32001, 2188, 13, 32000),
        *(28705, 13),
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, special=True, bos=False), control=True) == text


def test_random_text_survives_the_round_trip_and_is_split_as_by_sentencepiece(tokenizer):
    reference = sentencepiece.SentencePieceProcessor()
    generator = random.Random(0)
    reference.LoadFromSerializedProto(tokenizer.model_proto)
    for _ in range(3000):
        text = random_text(generator)
        assert tokenizer.encode(text, bos=False) == reference.encode(text)
        assert (
            tokenizer.decode(tokenizer.encode(text, special=True, bos=False), control=True) == text
        )


@pytest.mark.parametrize("text", [*TEXTS, HERMES])
def test_text_never_becomes_a_control_token_unless_asked(tokenizer, text):
    assert not tokenizer.control_ids & set(tokenizer.encode(text, bos=False))
    assert tokenizer.encode(text)[0] == tokenizer.bos_id


def test_text_without_a_prefix_space_continues_other_text(tokenizer):
    newline = tokenizer.encode("\n", bos=False)
    for text in [*TEXTS, *(random_text(random.Random(i)) for i in range(500))]:
        rest = tokenizer.encode(text, bos=False, prefix_space=False)
        assert tokenizer.decode(newline + rest) == "\n" + text
        assert tokenizer.encode("\n" + text, bos=False) == newline + rest
    assert tokenizer.encode("Hello there", bos=False, prefix_space=False) == [16230, 736]
    assert tokenizer.encode("Hello there", bos=False) == [22557, 736]


def test_there_is_exactly_one_begin_token(tokenizer):
    assert tokenizer.encode("<s>[INST] hi", special=True)[:2] == [1, 733]
    assert tokenizer.encode("<s>[INST] hi", special=True, bos=False)[:2] == [1, 733]
    assert tokenizer.encode("<s>[INST] hi")[:2] == [1, 523]  # text


def test_facts_of_the_true_tokenizer(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 32000, (32000,))
    assert tokenizer.vocab_size == 32002
    assert tokenizer.control_ids == {0, 1, 2, 32000, 32001}
    assert tokenizer.control_text(32001) == "<|im_start|>"
    assert small.true_tokenizer().stop_ids == (2,)


def test_the_tokenizer_of_v3_has_its_control_tokens_inside():
    made = mistral.Tokenizer(
        (small.TRUE_TOKENIZERS / "mistral_instruct_tokenizer_240323.model.v3").read_bytes()
    )
    assert made.vocab_size == 32768
    assert made.encode("[INST] a[/INST]", special=True)[1] == 3
    assert made.encode("[INST] a[/INST]", special=True)[-1] == 4
    assert not made.control_ids & set(made.encode("[INST] a[/INST]", bos=False))
    assert made.encode("\n", bos=False) == [29473, 781]


def test_bytes_of_a_text_are_the_bytes_of_its_tokens(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=False)
        joined = b"".join(tokenizer.token_bytes(id) for id in ids)
        assert joined == ((" " if text else "") + text).encode()
    assert tokenizer.token_bytes(13) == b"\n"
    assert [tokenizer.token_bytes(id) for id in (0, 1, 2, 32000, 32001, 32031, -1)] == [None] * 7


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_gives_the_text_piece_by_piece(tokenizer, text):
    ids = tokenizer.encode(text)
    stream = tokenizer.stream(strip_leading_space=True)
    assert "".join(stream.feed(id) for id in ids) + stream.finish() == text


def test_a_stream_behind_a_prompt_keeps_the_first_space(tokenizer):
    stream = tokenizer.stream()
    assert [stream.feed(id) for id in tokenizer.encode("Paris is", bos=False)] == [" Paris", " is"]


def test_a_stream_holds_back_half_a_character(tokenizer):
    ids = tokenizer.encode("𓀀", bos=False)[1:]
    assert len(ids) == 4  # not in the vocabulary: four byte pieces
    stream = tokenizer.stream()
    assert [stream.feed(id) for id in ids] == ["", "", "", "𓀀"]
    assert stream.feed(ids[0]) == ""
    assert stream.feed(tokenizer.encode("a", bos=False, prefix_space=False)[0]) == "\ufffda"
    assert stream.feed(ids[0]) == ""
    assert stream.feed(32000) == "\ufffd"
    assert stream.finish() == ""


def test_no_ids_can_break_decoding(tokenizer):
    generator = random.Random(0)
    reference = sentencepiece.SentencePieceProcessor()
    reference.LoadFromSerializedProto(tokenizer.model_proto)
    for _ in range(3000):
        ids = [generator.choice([0, 1, 2, 3, 258, 28705, 32001, 32031, 99999]) for _ in range(3)]
        ids += [generator.randrange(3, 32000) for _ in range(4)]
        stream = tokenizer.stream(strip_leading_space=True)
        assert "".join(stream.feed(id) for id in ids) + stream.finish() == tokenizer.decode(ids)
        pieces = [generator.randrange(259, 32000) for _ in range(6)]
        assert tokenizer.decode(pieces) == reference.decode(pieces)


def test_stop_at_control_tokens_is_left_to_the_caller(tokenizer):
    ids = tokenizer.encode("a", bos=False) + [32000] + tokenizer.encode("b", bos=False)
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, control=True) == "a<|im_end|>b"


@pytest.mark.parametrize("proto", [b"", b"nonsense", b"\x0a\xff\xff\xff\xff\x0f"])
def test_bytes_that_are_no_tokenizer_are_refused(proto):
    with pytest.raises(mistral.CheckpointError):
        mistral.Tokenizer(proto)


@pytest.mark.parametrize(
    "added", [{5: "<|im_end|>"}, {32000: ""}, {-1: "x"}, {32000: "x", 32001: "x"}]
)
def test_added_tokens_that_contradict_the_model_are_refused(added):
    with pytest.raises(mistral.CheckpointError, match="added token"):
        small.true_tokenizer(added=added)


def test_text_that_is_not_unicode_is_refused(tokenizer):
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("\udcff")


WORDS = {
    32002: AddedToken("<think>", special=False),
    32003: AddedToken("capital", special=False, normalized=True),
    32004: AddedToken("<tool_call>", special=False),
}


@pytest.fixture(scope="module")
def with_words():
    added = {32000: "<|im_end|>", 32001: AddedToken("<|im_start|>", special=False)}
    return small.true_tokenizer(added=added | WORDS, stop_ids=[32000])


def test_added_tokens_that_are_text_are_text(with_words):
    assert with_words.control_ids == {0, 1, 2, 32000, 32001}
    assert with_words.encode("<think> a", bos=False) == [32002, 28705, 264]
    assert with_words.encode("the capital gain", bos=False) == [272, 32003, 8356]
    assert with_words.encode("thecapital", bos=False) == small.true_tokenizer().encode(
        "thecapital", bos=False
    )
    assert with_words.token_bytes(32002) == b"<think>"
    assert with_words.token_bytes(32003) == b" capital"
    assert with_words.token_bytes(32001) is None
    for text in (*TEXTS, "<think>a</think> <think>", "capital capital <tool_call>\n{}"):
        ids = with_words.encode(text, bos=False)
        assert with_words.decode(ids) == text
        assert not with_words.control_ids & set(ids)
        ids = with_words.encode(text, bos=False, special=True)
        assert with_words.decode(ids, control=True) == text


def test_words_are_found_as_in_a_legacy_tokenizer_json(with_words):
    pieces = [with_words.pieces.spelling(id) for id in range(32000)]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    merges = sorted(
        (-entry[1], entry[0][:at], entry[0][at:])
        for entry in with_words.vocabulary()[259:32000]
        for at in range(1, len(entry[0]))
        if entry[0][:at] in vocab and entry[0][at:] in vocab
    )
    content = copy.deepcopy(tokenizer_files.content("legacy", words=False))
    content["model"] |= {"vocab": vocab, "merges": [list(merge[1:]) for merge in merges]}
    content["added_tokens"] = [
        {"id": id, "content": token.text} | token.flags()
        for id, token in sorted(with_words.added_tokens.items())
    ]
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    for text in tokenizer_files.texts():
        theirs = library.encode(text, add_special_tokens=False).ids
        assert with_words.encode(text, bos=False, special=True) == theirs, text


def test_the_vocabulary_names_words_and_control_tokens(with_words):
    types = {id: type for id, (_, _, type) in enumerate(with_words.vocabulary()) if id >= 32000}
    assert types == {32000: 3, 32001: 3, 32002: 4, 32003: 4, 32004: 4}
    assert with_words.vocabulary()[32002][0] == "<think>"


@pytest.mark.parametrize(
    ("text", "is_control"),
    [
        *((text, True) for text in ("<|im_start|>", "<s>", "</s>", "<unk>", "<pad>", "<pad2>")),
        *((text, True) for text in ("[INST]", "[/INST]", "[TOOL_CALLS]", "[control_8]")),
        *((text, False) for text in ("<think>", "[x]", "<tool_call>", "capital", "<b>", "[inst]")),
    ],
)
def test_a_control_token_is_known_by_its_spelling(text, is_control):
    made = small.true_tokenizer(added={32000: AddedToken(text, special=False)})
    known = text in ("<s>", "</s>", "<unk>")  # ids 0 to 2 are, too
    assert (32000 in made.control_ids) == is_control
    assert known or (32000 in made.words) != is_control


def test_user_defined_pieces_inside_the_model_are_added_tokens():
    entries = small.true_tokenizer(added={}).vocabulary()
    pieces, scores, kinds = (list(column) for column in zip(*entries))
    pieces[300:302] = ["[INST]", "<think>"]
    kinds[300:302] = [4, 4]
    proto = write_model(pieces, scores, kinds, bos_id=1, eos_id=2)
    made = mistral.Tokenizer(proto)
    assert made.control_id("[INST]") == 300
    assert 300 not in made.encode("hi [INST] x", bos=False)
    assert 300 in made.encode("hi [INST] x", bos=False, special=True)
    assert made.decode(made.encode("hi [INST] <think>x")) == "hi [INST] <think>x"
    assert made.encode("<think>", bos=False) == [301]
    assert {301: 4, 300: 3}.items() <= dict(
        enumerate(kind for _, _, kind in made.vocabulary())
    ).items()


def test_the_begin_token_is_added_if_the_checkpoint_wants_it():
    made = mistral.Tokenizer(
        (small.TRUE_TOKENIZERS / "tokenizer.model.v1").read_bytes(), adds_bos=False
    )
    assert made.encode("Hello") == made.encode("Hello", bos=False)
    assert made.encode("<s>Hello", special=True)[0] == 1
    assert made.bos_id == 1


def test_text_after_a_control_token(tokenizer):
    assert tokenizer.encode_after_control("user\n") == [2188, 13]
    for form in tokenizer_files.FORMS:
        made = tokenizer_files.tokenizer(form)
        start = made.control_id("<|im_start|>")
        for text in ("user\nhi", " user", "<think> capital", "\n"):
            expected = made.encode(f"<|im_start|>{text}", bos=False, special=True)
            assert [start, *made.encode_after_control(text)] == expected


def test_ids_of_every_integer_type_are_decoded_and_other_things_refused():
    tokenizer = small.true_tokenizer()
    ids = tokenizer.encode("Hello 日本", bos=True)
    assert tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(np.array(ids)) == "Hello 日本"
    for given in ("abc", 5, None, [1.0], ["a"]):
        with pytest.raises(ValueError, match="needed|whole number"):
            tokenizer.decode(given)
    for given in (None, b"abc", 5, ["a"]):
        with pytest.raises(ValueError, match="a str is needed"):
            tokenizer.encode(given)


def test_an_id_without_text_that_begins_a_stream_ends_its_beginning(tokenizer):
    hello = tokenizer.encode("Hello", bos=False)
    assert tokenizer.decode([1, *hello]) == "Hello"  # the begin token does not end it
    assert tokenizer.decode([99999, *hello]) == " Hello"


def test_a_text_that_begins_with_a_space_in_bytes_keeps_it(tokenizer):
    space = tokenizer.pieces.id_of("<0x20>")
    assert tokenizer.decode([space]) == " "
    assert tokenizer.decode(tokenizer.encode("a", bos=False)) == "a"


def test_an_id_without_a_token_is_unused_in_the_vocabulary():
    made = small.true_tokenizer(added={32002: "<|x|>"})
    assert made.vocab_size == 32003
    assert made.vocabulary()[32000:] == [
        ("[PAD32000]", -1000.0, 5),
        ("[PAD32001]", -1000.0, 5),
        ("<|x|>", -1000.0, 3),
    ]


def test_a_piece_that_does_not_exist_has_no_id(tokenizer):
    assert tokenizer.pieces.id_of("▁the") == tokenizer.encode("the", bos=False)[0]
    assert tokenizer.pieces.id_of("no such piece") is None


def test_text_after_a_word_has_its_space_even_if_the_text_continues_another(with_words):
    ids = with_words.encode("a<think>b", bos=False, prefix_space=False)
    [a] = with_words.encode("a", bos=False, prefix_space=False)
    [b] = with_words.encode("b", bos=False)
    assert ids == [a, 32002, b]


def test_the_first_added_token_comes_right_after_the_pieces():
    made = small.true_tokenizer(added={32000: "<|im_end|>"})
    assert made.added == {32000: "<|im_end|>"}
    assert made.vocab_size == 32001


def test_the_longest_of_added_tokens_is_found():
    splitter = Splitter({1: AddedToken("<a>"), 2: AddedToken("<a><b>"), 3: AddedToken("<b>")})
    assert list(splitter.split("<b><a><b><a>")) == [(3, "<b>"), (2, "<a><b>"), (1, "<a>")]


def test_a_spelling_with_more_after_it_is_not_a_control_token():
    assert is_control_spelling("<s>") and is_control_spelling("<|x|>")
    assert not is_control_spelling("<s>x")
    assert not is_control_spelling("[INST] ")


def test_a_model_without_a_begin_token_has_none():
    pieces, scores, kinds = zip(*small.true_tokenizer(added={}).vocabulary())
    pieces = ("<unk>", "<a>", "<b>", *pieces[3:])  # <s> and </s> would be found by their names
    made = mistral.Tokenizer(write_model(pieces, scores, kinds, bos_id=None, eos_id=None))
    assert (made.bos_id, made.eos_id, made.stop_ids) == (None, None, ())
