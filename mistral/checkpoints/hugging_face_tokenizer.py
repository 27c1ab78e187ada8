"""The tokenizer of a folder in Hugging Face's layout: tokenizer.model, tokenizer.json, or both.

tokenizer.model is used unless tokenizer.json, which transformers reads, disagrees with it. The
added tokens of all files count.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mistral.checkpoints.added_tokens import (
    add,
    named_tokens,
    tokens_of_decoder,
    tokens_of_list,
    tokens_of_map,
)
from mistral.checkpoints.chat_templates import folder_templates, saved_templates
from mistral.checkpoints.reader import blaming
from mistral.config import Config
from mistral.errors import CheckpointError, one_line, shown
from mistral.files import optional_json, read_file, read_json, whole_file, write_json
from mistral.pieces import AddedToken, JsonPieces, Pieces, SentencePieces
from mistral.pieces.json_pieces import leaves
from mistral.pieces.sentence_pieces import LARGEST_MODEL
from mistral.tokenizer import Tokenizer
from mistral.unreadable import is_there

_MODEL = "tokenizer.model"
_JSON = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_ADDED = "added_tokens.json"
_MARKED = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_PROBES = (
    "Hello world",
    " two  spaces and\n\nlines\t",
    "naïve café 日本語 😀",
    "def f(x):\n    return x ** 2",
)


@dataclass(frozen=True)
class _Files:
    """What the JSON files of a folder say about its tokenizer.

    settings   tokenizer_config.json
    named      the text of bos_token, eos_token, ...
    content    tokenizer.json; None without a usable one
    problem    why tokenizer.json cannot be used
    added      the added tokens of all files for which the model has a row
    templates  chat templates by name
    adds_bos   whether a text begins with the begin token
    """

    folder: Path
    config: Config
    settings: Mapping[str, Any]
    named: Mapping[str, str]
    content: Mapping[str, Any] | None
    problem: str | None
    added: Mapping[int, AddedToken]
    templates: Mapping[str, str]
    adds_bos: bool


def read_tokenizer(folder: Path, config: Config) -> Tokenizer:
    """The tokenizer of a folder for a model with this config.

    Raises CheckpointError for files that are missing, damaged or contradictory. Warns of tokens for
    which the model has no row, and if tokenizer.model and tokenizer.json disagree.
    """
    path = folder / _MODEL
    has_model = is_there(path)
    if not has_model and not is_there(folder / _JSON):
        raise CheckpointError(
            f"{folder} has no {_MODEL} and no {_JSON}; copy them from the checkpoint's base model"
        )
    files = _read_files(folder, config)
    if not has_model:
        if files.content is None:
            raise CheckpointError(f"{folder / _JSON}: {files.problem}")
        return _from_json(files)
    try:
        with blaming(path):
            ours = _tokenizer(SentencePieces(read_file(path, LARGEST_MODEL)), files)
    except CheckpointError as error:
        if files.content is None:
            raise
        return _chosen(files, f"{_MODEL} cannot be used: {error}", _from_json(files), _JSON)
    if files.problem is not None:
        return _chosen(files, f"{_JSON} cannot be used: {files.problem}", ours, _MODEL)
    if files.content is None:
        return ours
    return _agreed(files, ours)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that `read_tokenizer` and transformers read."""
    pieces = tokenizer.pieces
    is_json = isinstance(pieces, JsonPieces)
    described = {}
    for id, token in sorted(tokenizer.added_tokens.items()):
        if id >= pieces.size or (id not in pieces.control and id not in pieces.words):
            described[str(id)] = {"content": token.text} | token.flags()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast" if is_json else "LlamaTokenizer",
        "add_bos_token": tokenizer.adds_bos,
        "add_eos_token": False,
        "bos_token": _optional_text(tokenizer, tokenizer.bos_id),
        "eos_token": _optional_text(tokenizer, tokenizer.eos_id),
        "added_tokens_decoder": described,
    }
    if not is_json:
        settings["legacy"] = True
    if templates := saved_templates(tokenizer.chat_templates):
        settings["chat_template"] = templates
    write_json(folder / _CONFIG, {key: v for key, v in settings.items() if v is not None})
    if is_json:
        write_json(folder / _JSON, pieces.content)
    else:
        with whole_file(folder / _MODEL) as file:
            file.write_bytes(tokenizer.model_proto)


def _optional_text(tokenizer: Tokenizer, id: int | None) -> str | None:
    return None if id is None else tokenizer.control_text(id)


def _read_files(folder: Path, config: Config) -> _Files:
    settings = optional_json(folder / _CONFIG)
    special_tokens = optional_json(folder / "special_tokens_map.json")
    with blaming(folder):
        named = named_tokens((settings, special_tokens))
    content, problem = _read_content(folder / _JSON)
    by_text = optional_json(folder / _ADDED)
    added: dict[int, AddedToken] = {}
    beyond: dict[int, str] = {}
    with blaming(folder):
        listed = {
            _CONFIG: tokens_of_decoder(settings.get("added_tokens_decoder") or {}),
            _JSON: tokens_of_list((content or {}).get("added_tokens") or []),
            _ADDED: tokens_of_map(by_text),
        }
        for name, tokens in listed.items():
            for id, token in tokens.items():
                add(added, (id, token))
                if id >= config.vocab_size:
                    beyond.setdefault(id, name)
    if beyond:
        tokens = ", ".join(f"{added[id].text} ({id}, {name})" for id, name in beyond.items())
        warnings.warn(
            f"{folder}: the model has {config.vocab_size} rows and none for the added tokens "
            f"{one_line(tokens)}; they are not used",
            stacklevel=4,
        )
    special = set(named.values())
    added = {
        id: replace(token, special=token.special or token.text in special)
        for id, token in added.items()
        if id not in beyond
    }
    if problem is None and content is not None:
        try:
            JsonPieces(content)
        except CheckpointError as error:
            content, problem = None, str(error)
    return _Files(
        folder=folder,
        config=config,
        settings=settings,
        named=named,
        content=content,
        problem=problem,
        added=added,
        templates=folder_templates(folder, settings),
        adds_bos=_adds_bos(folder, settings, content),
    )


def _tokenizer(pieces: Pieces, files: _Files) -> Tokenizer:
    """The tokenizer with this vocabulary."""
    added = dict(files.added)
    ids = {token.text: id for id, token in added.items()}
    # Special tokens that no list of added tokens has
    ends = [pieces.spelling(id) or "" for id in files.config.eos_token_id]
    for text in (*files.named.values(), *ends):
        id = pieces.id_of(text)
        is_marked = _MARKED.fullmatch(text) and id is not None and not pieces.is_byte(id)
        if is_marked and text not in ids:
            added[id] = AddedToken(text)
            ids[text] = id
    bos_id = ids.get(files.named.get("bos_token", _begin_of_post_processor(files.content)))
    end_id = ids.get(files.named.get("eos_token")) if pieces.eos_id is None else pieces.eos_id
    stop_ids = files.config.eos_token_id or (() if end_id is None else (end_id,))
    has_begin = bos_id is not None or pieces.bos_id is not None
    if files.adds_bos and not has_begin:
        warnings.warn(
            f"{files.folder}: there is no begin-of-text token; texts begin without one",
            stacklevel=5,
        )
    return Tokenizer(
        pieces,
        added,
        stop_ids or None,
        bos_id,
        adds_bos=files.adds_bos and has_begin,
        chat_templates=files.templates,
    )


def _from_json(files: _Files) -> Tokenizer:
    with blaming(files.folder / _JSON):
        return _tokenizer(JsonPieces(files.content), files)


def _adds_bos(folder: Path, settings: Mapping[str, Any], content: Mapping[str, Any] | None) -> bool:
    """Whether a text begins with the begin token.

    add_bos_token of tokenizer_config.json decides, as in llama.cpp; without it tokenizer.json's
    post-processor, as in transformers; without both Mistral's tokenizers add it.
    """
    stated = settings.get("add_bos_token")
    by_json = None if content is None else _begin_of_post_processor(content) is not None
    if not isinstance(stated, bool):
        return True if by_json is None else by_json
    if by_json is not None and by_json != stated:
        warnings.warn(
            f"{folder}: add_bos_token is {str(stated).lower()} in {_CONFIG}, and the "
            f"post-processor of {_JSON} says otherwise; add_bos_token is followed",
            stacklevel=5,
        )
    return stated


def _begin_of_post_processor(content: Mapping[str, Any] | None) -> str | None:
    """The text of the token that tokenizer.json's post-processor adds before a text."""
    for step in leaves((content or {}).get("post_processor"), "processors"):
        single = step.get("single") if step.get("type") == "TemplateProcessing" else None
        first = single[0] if isinstance(single, list) and single else None
        token = first.get("SpecialToken") if isinstance(first, dict) else None
        if isinstance(token, dict) and isinstance(token.get("id"), str):
            return token["id"]
    return None


def _agreed(files: _Files, ours: Tokenizer) -> Tokenizer:
    """The tokenizer of tokenizer.model, or tokenizer.json's if the two disagree."""
    try:
        theirs = _from_json(files)
        difference = _difference(ours, theirs)
    except ValueError as error:  # a CheckpointError, or it cannot spell one of the texts
        return _chosen(files, f"{_JSON} cannot be used: {error}", ours, _MODEL)
    if difference is None:
        return ours
    silent = [id for id in files.config.eos_token_id if id not in theirs.control_ids]
    known = all(id in ours.control_ids for id in silent)
    if silent and known:
        why = f"{difference}, and {_JSON} has no token for the stop id {silent[0]}"
        return _chosen(files, why, ours, _MODEL)
    return _chosen(files, f"{difference}; transformers reads {_JSON}", theirs, _JSON)


def _difference(ours: Tokenizer, theirs: Tokenizer) -> str | None:
    """In what two tokenizers differ; None: they seem to be the same.

    Raises ValueError if one of them cannot spell an ordinary text.
    """
    texts = [[text for text, _, _ in tokenizer.vocabulary()] for tokenizer in (ours, theirs)]
    for id, (mine, other) in enumerate(zip(*texts)):
        if mine != other:
            return f"the token {id} is {shown(mine)} in {_MODEL} and {shown(other)} in {_JSON}"
    if len(texts[0]) != len(texts[1]):
        return f"{_MODEL} has {len(texts[0])} tokens and {_JSON} has {len(texts[1])}"
    control = next((ours.control_text(id) for id in ours.stop_ids), None) or ""
    for probe in _PROBES:
        for text in (probe, f"{control}user\n{probe}{control} {probe}"):
            ids = [made.encode(text, bos=False, special=True) for made in (ours, theirs)]
            if ids[0] != ids[1]:
                return f"{_MODEL} and {_JSON} split {shown(text)} differently"
    return None


def _chosen(files: _Files, why: str, tokenizer: Tokenizer, name: str) -> Tokenizer:
    warnings.warn(f"{files.folder}: {one_line(why)}; {name} is used", stacklevel=4)
    return tokenizer


def _read_content(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """(tokenizer.json, None), or (None, why it cannot be read); (None, None) without the file."""
    try:
        if not is_there(path):
            return None, None
        return read_json(path), None
    except CheckpointError as error:
        return None, str(error)
