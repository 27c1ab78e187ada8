"""The pre-tokenizers of byte-level vocabularies that GGUF files name, as regular expressions.

They split a text before byte pairs are merged: a merge never crosses the border of two parts.
llama.cpp knows them by name (`tokenizer.ggml.pre`), a tokenizer.json has them written out.

Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp, with the expressions
of the original tokenizer.json for those that llama.cpp had to adapt to its own engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mistral.pieces.json_pieces import leaves

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The last step: bytes are spelled as letters. It is the decoder, too.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level vocabulary splits text.

    patterns       regular expressions; each splits what the one before has left together
    ignore_merges  a part that is a piece as a whole is not split, whatever the merges are
    adds_bos       what llama.cpp assumes if the file does not say
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False


_DIGITS_APART = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA_BPE = PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True)
PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((_GPT2,)),
    "smollm": _DIGITS_APART,
    "starcoder": _DIGITS_APART,
    "refact": _DIGITS_APART,
    "command-r": _DIGITS_APART,
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, adds_bos=True),
    "qwen2": PreTokenizer((_QWEN2,)),
    "stablelm2": PreTokenizer((_QWEN2,)),
}


def json_steps(pre_tokenizer: PreTokenizer) -> dict[str, Any]:
    """The pre-tokenizer as a tokenizer.json has it."""
    steps: list[dict[str, Any]] = [
        {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        for pattern in pre_tokenizer.patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*steps, BYTES]}


def begin_template(text: str, id: int) -> dict[str, Any]:
    """The post-processor of a tokenizer.json that adds a begin token."""
    token = {"SpecialToken": {"id": text, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [token, first],
        "pair": [token, first, token, second],
        "special_tokens": {text: {"id": text, "ids": [id], "tokens": [text]}},
    }


def name_of(content: Mapping[str, Any]) -> str:
    """The name in GGUF files of the pre-tokenizer that a tokenizer.json has written out.

    Raises ValueError, with the known names, for one that no name stands for.
    """
    patterns: list[str | None] = []
    for step in leaves(content.get("pre_tokenizer"), "pretokenizers"):
        patterns += _patterns_of(step)
    for name, known in PRE_TOKENIZERS.items():
        if list(known.patterns) == patterns:
            return name
    raise ValueError(
        "GGUF has no name for the pre-tokenizer of this tokenizer.json; those known here are "
        f"{', '.join(PRE_TOKENIZERS)}"
    )


def _patterns_of(step: Mapping[str, Any]) -> list[str | None]:
    """The regular expressions that a step splits by; [None] for a step of another kind."""
    type = step.get("type")
    if type == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        pattern = step.get("pattern")
        return [pattern.get("Regex") if isinstance(pattern, dict) else None]
    if type == "Digits" and step.get("individual_digits"):
        return [r"\p{N}"]
    if type == "ByteLevel" and not step.get("add_prefix_space"):
        return [_GPT2] if step.get("use_regex", True) else []
    return [None]
