"""The added tokens that the JSON files of a tokenizer describe."""

from collections.abc import Iterable, Mapping
from typing import Any

from mistral.errors import CheckpointError, shown
from mistral.pieces import AddedToken, is_control_spelling
from mistral.pieces.json_pieces import MOST_IDS

_FLAGS = ("lstrip", "rstrip", "normalized", "single_word")


def added_token(text: Any, id: Any, flags: Mapping[str, Any]) -> tuple[int, AddedToken]:
    """(id, token) as a file describes them. CheckpointError for what is not a token.

    Flags that are left out are those of the library `tokenizers`: a token that is not special is
    normalized.
    """
    if type(id) is not int or not 0 <= id < MOST_IDS or not isinstance(text, str) or not text:
        raise CheckpointError(
            f"added token {shown(text)} with the id {shown(id)} is not a text with a number"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise CheckpointError(f"added token {shown(text)} is not valid Unicode") from None
    special = flags.get("special") is True
    defaults = {"normalized": not (special or is_control_spelling(text))}
    known = {name: flags.get(name, defaults.get(name, False)) is True for name in _FLAGS}
    return id, AddedToken(text, special=special, **known)


def tokens_of_list(listed: Any) -> dict[int, AddedToken]:
    """Those of `added_tokens` in a tokenizer.json."""
    if not isinstance(listed, list):
        raise CheckpointError("added_tokens is not a list")
    tokens: dict[int, AddedToken] = {}
    for entry in listed:
        if not isinstance(entry, dict):
            raise CheckpointError(f"added token {shown(entry)} is not an object")
        add(tokens, added_token(entry.get("content"), entry.get("id"), entry))
    return tokens


def tokens_of_decoder(described: Any) -> dict[int, AddedToken]:
    """Those of `added_tokens_decoder` in a tokenizer_config.json."""
    if not isinstance(described, dict):
        raise CheckpointError("added_tokens_decoder is not an object")
    tokens: dict[int, AddedToken] = {}
    for id, entry in described.items():
        is_number = id.isdecimal() and id.isascii() and len(id) < 10
        is_object = isinstance(entry, dict)
        text = entry.get("content") if is_object else None
        add(tokens, added_token(text, int(id) if is_number else id, entry if is_object else {}))
    return tokens


def tokens_of_map(ids: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Those of added_tokens.json, which has no flags: text -> id."""
    tokens: dict[int, AddedToken] = {}
    for text, id in ids.items():
        add(tokens, added_token(text, id, {}))
    return tokens


def add(tokens: dict[int, AddedToken], more: tuple[int, AddedToken]) -> None:
    """Adds a token that is not known; one that is keeps its flags, and must have the same text."""
    id, token = more
    known = tokens.setdefault(id, token)
    if known.text != token.text:
        raise CheckpointError(
            f"two added tokens, {shown(known.text)} and {shown(token.text)}, have the id {id}"
        )


def named_tokens(files: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """bos_token, eos_token, pad_token, ... -> text; the lists of further ones as NAME.0, ...

    files  tokenizer_config.json and special_tokens_map.json; the first that names one counts

    Raises ValueError for a text that is not valid Unicode.
    """
    found: dict[str, str] = {}
    for values in files:
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            if text := _text(values.get(name)):
                found.setdefault(name, text)
        for name in ("additional_special_tokens", "extra_special_tokens"):
            listed = values.get(name)
            listed = list(listed.values()) if isinstance(listed, dict) else listed
            for i, entry in enumerate(listed if isinstance(listed, list) else []):
                if text := _text(entry):
                    found.setdefault(f"{name}.{i}", text)
    return found


def _text(entry: Any) -> str | None:
    """The text of a token that is a string or an object."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        return None
    if not text.isascii() and text.encode("utf-8", "replace").decode() != text:
        raise ValueError(f"the special token {shown(text)} is not valid Unicode")
    return text
