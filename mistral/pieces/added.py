"""Tokens that were added to a trained vocabulary: control tokens and words.

They are found in the text before it is split into pieces. The rules are those of the library
`tokenizers` (added_vocabulary.rs): https://github.com/huggingface/tokenizers
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tokenizers import AddedToken as LibraryToken
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE

_BRACKETED = (
    "INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS|TOOL_CONTENT|ARGS|CALL_ID|THINK|"
    "IMG|IMG_BREAK|IMG_END|AUDIO|BEGIN_AUDIO|PREFIX|MIDDLE|SUFFIX|MODEL_SETTINGS"
)
_CONTROL = re.compile(
    rf"<\|.*\|>|</?s>|<unk>|<pad\d*>|\[/?({_BRACKETED})\]|\[control_\d+\]", re.DOTALL
)
# Unicode's White_Space; Python's own has four control characters more
_WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_SPACES = re.compile(f"[{_WHITESPACE}]*")
_JOINERS = ("\u200c", "\u200d")


def is_control_spelling(text: str) -> bool:
    """Whether a token with this text is a control token whatever its file says.

    `<s>`, `</s>`, `<unk>`, `<pad>`, all of the form `<|...|>`, and Mistral's `[INST]` and the like.
    """
    return _CONTROL.fullmatch(text) is not None


@dataclass(frozen=True)
class AddedToken:
    """A token that is found whole in the text. The flags are those of tokenizer.json.

    special      a control token, which stands for no text
    lstrip       it absorbs the whitespace before it; rstrip: after it
    normalized   it is searched for in the normalized text, itself normalized: with Mistral's
                 tokenizers a space before it belongs to it
    single_word  it is found only between characters that are not part of a word
    """

    text: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False

    def flags(self) -> dict[str, bool]:
        """The flags by the names that JSON files use."""
        return {name: value for name, value in vars(self).items() if name != "text"}


class Splitter:
    """Finds added tokens in a text: from left to right, the longest first.

    tokens  id -> the token
    spelled id -> how it is spelled in the text to split; None: as in the token
    """

    def __init__(self, tokens: Mapping[int, AddedToken], spelled: Mapping[int, str] | None = None):
        self._found: dict[str, tuple[int, AddedToken]] = {}
        for id, token in tokens.items():
            self._found[token.text if spelled is None else spelled[id]] = (id, token)
        # The library's search takes time for the text alone, however many tokens there are. Without
        # a vocabulary of its own it drops what is between them.
        self._library = Library(BPE())
        self._library.add_tokens([LibraryToken(text, normalized=False) for text in self._found])

    def __bool__(self) -> bool:
        return bool(self._found)

    def split(self, text: str) -> Iterator[tuple[int | None, str]]:
        """(None, text between tokens) and (id, the text that the token takes), in their order."""
        at = 0
        found = self._library.encode(text).offsets if self._found else []
        for start, end in found:
            id, token = self._found[text[start:end]]
            before = text[start - 1 : start] if start else ""
            inside_word = _is_of_word(before) or _is_of_word(text[end : end + 1])
            if token.single_word and inside_word:
                continue
            if token.lstrip:
                start = at + len(text[at:start].rstrip(_WHITESPACE))
            if token.rstrip:
                end = _SPACES.match(text, end).end()
            if at < start:
                yield None, text[at:start]
            yield id, text[start:end]
            at = end
        if at < len(text):
            yield None, text[at:]


def _is_of_word(character: str) -> bool:
    """Whether a character is part of a word: `\\w` of the library, which has accents in it."""
    category = unicodedata.category(character) if character else ""
    return category[:1] in ("L", "M") or category in ("Nd", "Nl", "Pc") or character in _JOINERS
