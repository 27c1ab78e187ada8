"""Small tokenizer.json files of every form that fine-tunes of Mistral have, and texts for them."""

import copy
import json
import random
from functools import cache
from pathlib import Path

import small
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

import mistral
from mistral.checkpoints.added_tokens import tokens_of_list
from mistral.pieces import JsonPieces

SPACE = "▁"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROLS = ["<unk>", "<s>", "</s>"]
ADDED = ["<|im_end|>", "<|im_start|>", "[INST]"]
FORMS = (
    "legacy",
    "none",
    "never",
    "first",
    "always",
    "bytes",
    "bytes_prefix",
    "split",
    "whole_words",
)
TEXTS = [
    "",
    " ",
    "Hello world",
    " Hello",
    "  two  spaces  and three   ",
    "tab\tnewline\n\n\r\n",
    "naïve café – “quotes” … €",
    "日本語のテキスト、한국어, العربية, עברית",
    "😀 👩‍👩‍👧 \U0001f1e8\U0001f1ed",
    "def f(x):\n    return x ** 2  # comment\n",
    '{"name": "f", "arguments": {"x": [1, 2.5e-3, null]}}',
    "<s></s><unk> [INST] <|im_start|>user\nhi<|im_end|>\n",
    "<|im_start|> user <|im_end|><|im_end|> x",
    "\x00\x01\x7f\u200b\ufeff\u00ad",
    "\n",
    "the capital of <think> the capital</think> thecapital capitalcapital",
    "don't 1234567 I'LL",
]


def texts():
    """Some 300 texts: those above, and random ones."""
    generator = random.Random(0)
    parts = [
        *" \n\t<>|/_{}\"'",
        "im_end",
        *CONTROLS,
        *ADDED,
        "<think>",
        "capital",
        " capital",
        "é",
        "語",
        "😀",
        "the",
        " The",
        "12",
        "▂",
        "ß",
        "\u0301",
        "א",
        "don't",
        chr(0x10FFFF),
    ]
    made = ["".join(generator.choices(parts, k=generator.randrange(20))) for _ in range(300)]
    return TEXTS + made


@cache
def _trained(byte_level: bool, vocab_size: int = 700) -> tuple[dict, list]:
    """(vocab, merges) trained on this project's README."""
    library = tokenizers.Tokenizer(models.BPE(unk_token=None if byte_level else "<unk>"))
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    names = [] if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    if byte_level:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        library.normalizer = normalizers.Replace(" ", SPACE)
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=CONTROLS + names,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    library.train_from_iterator([(small.ROOT / "README.md").read_text()], trainer)
    model = json.loads(library.to_str())["model"]
    return model["vocab"], model["merges"]


def content(form: str, words: bool = True, added=ADDED) -> dict:
    """The object in a tokenizer.json of one of FORMS.

    words  with added tokens that are text
    """
    byte_level = form in ("bytes", "bytes_prefix", "split", "whole_words")
    vocab, merges = _trained(byte_level)
    flags = dict(single_word=False, lstrip=False, rstrip=False)
    listed = [
        dict(id=i, content=t, normalized=False, special=True, **flags)
        for i, t in enumerate(CONTROLS)
    ]
    listed += [
        dict(id=len(vocab) + i, content=t, normalized=False, special=True, **flags)
        for i, t in enumerate(added)
    ]
    if words:
        first = len(vocab) + len(added)
        listed.append(dict(id=first, content="<think>", normalized=False, special=False, **flags))
        listed.append(
            dict(id=first + 1, content="capital", normalized=True, special=False, **flags)
        )
    model = dict(
        type="BPE",
        dropout=None,
        unk_token=None,
        fuse_unk=False,
        byte_fallback=False,
        vocab=vocab,
        merges=merges,
    )
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    made = dict(
        version="1.0", truncation=None, padding=None, added_tokens=listed, post_processor=None
    )
    made |= dict(normalizer=None, pre_tokenizer=None, decoder=None, model=model)
    if byte_level:
        bytes_step = {
            "type": "ByteLevel",
            "add_prefix_space": form == "bytes_prefix",
            "trim_offsets": True,
            "use_regex": form.startswith("bytes"),
        }
        made["decoder"] = bytes_step
        made["pre_tokenizer"] = bytes_step
        if not form.startswith("bytes"):
            split = {
                "type": "Split",
                "pattern": {"Regex": LLAMA3},
                "behavior": "Isolated",
                "invert": False,
            }
            made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_step]}
        model["ignore_merges"] = form == "whole_words"
        return made
    model |= dict(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if form == "legacy":
        made["normalizer"] = {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace],
        }
    elif form == "none":
        made["normalizer"] = replace
    else:
        made["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": form,
            "split": False,
        }
    made["decoder"] = {"type": "Sequence", "decoders": steps}
    return made


def content_with_begin(form: str, **options) -> dict:
    """The same with a post-processor that adds <s>."""
    made = content(form, **options)
    token = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    made["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [token, text],
        "pair": [token, text],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return made


def tokenizer(form: str, **options) -> mistral.Tokenizer:
    """The tokenizer of `content`, which stops at <|im_end|>."""
    made = content(form, **options)
    added = tokens_of_list(made["added_tokens"])
    return mistral.Tokenizer(JsonPieces(made), added, [len(made["model"]["vocab"])], bos_id=1)


def of_sentencepiece(path: Path, form: str = "legacy") -> dict:
    """The object in a tokenizer.json with the pieces of a tokenizer.model; added tokens after them."""
    entries = mistral.Tokenizer(path.read_bytes()).vocabulary()
    vocab = {text: id for id, (text, _, _) in enumerate(entries)}
    merges = [
        (id, text[:at], text[at:])
        for text, id in vocab.items()
        for at in range(1, len(text))
        if text[:at] in vocab and text[at:] in vocab and id >= 259
    ]
    made = copy.deepcopy(content(form, words=False))
    made["model"]["vocab"] = vocab
    by_score = sorted(merges, key=lambda merge: (-entries[merge[0]][1], merge[0]))
    made["model"]["merges"] = [[left, right] for _, left, right in by_score]
    for i, entry in enumerate(made["added_tokens"][3:]):
        entry["id"] = len(entries) + i
    return made
