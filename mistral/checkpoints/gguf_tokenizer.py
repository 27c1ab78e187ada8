"""The tokenizer of a GGUF file, rebuilt from its vocabulary.

`llama` is a sentencepiece model. `gpt2` is a byte-level vocabulary, which becomes the content of a
tokenizer.json.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mistral.checkpoints.chat_templates import gguf_templates
from mistral.checkpoints.gguf_header import array, whole
from mistral.checkpoints.pre_tokenizers import BYTES, PRE_TOKENIZERS, begin_template, json_steps
from mistral.checkpoints.sentencepiece_model import write_model
from mistral.config import Config
from mistral.errors import one_line, shown
from mistral.pieces import SPACE, AddedToken, JsonPieces, is_control_spelling
from mistral.pieces.model_proto import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from mistral.tokenizer import Tokenizer

_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_READ = ("llama", "gpt2")


def read_tokenizer(metadata: Mapping[str, Any], config: Config) -> Tokenizer:
    """The tokenizer rebuilt from the vocabulary in the metadata. ValueError if that is bad.

    llama.cpp's own defaults replace ids that are left out: in a sentencepiece vocabulary 1 begins a
    sequence, 0 is the unknown token. Warns of tokens for which the model has no row.
    """
    model = metadata.get("tokenizer.ggml.model")
    if not isinstance(model, str) or model not in _READ:
        raise ValueError(
            f"tokenizer model {shown(model)}; Mistral-7B's is 'llama' (sentencepiece), and 'gpt2' "
            "(byte-level) is read, too"
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    strings = isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)
    if not strings or not tokens:
        raise ValueError("tokenizer.ggml.tokens is not a list of strings")
    is_llama = model == "llama"
    bos = whole(metadata, "tokenizer.ggml.bos_token_id", 1 if is_llama else None)
    unknown = whole(metadata, "tokenizer.ggml.unknown_token_id", 0 if is_llama else None)

    kinds = array(metadata, "tokenizer.ggml.token_type", len(tokens))
    size = _count_with_rows(tokens, kinds, config.vocab_size)
    if max(bos or 0, unknown or 0) >= size:
        raise ValueError(
            f"the begin token {bos} or the unknown token {unknown} is not one of {size} ids"
        )
    scores = array(metadata, "tokenizer.ggml.scores", len(tokens)) if is_llama else None
    tokens = tokens[:size]
    kinds = None if kinds is None else kinds[:size]
    if is_llama:
        scores = None if scores is None else scores[:size]
        return _sentencepiece(metadata, tokens, kinds, scores, bos, unknown, config.eos_token_id)
    return _byte_level(metadata, tokens, kinds, bos, config.eos_token_id)


def _sentencepiece(  # noqa: PLR0913
    metadata: Mapping[str, Any],
    tokens: list[str],
    stored: list[float] | None,
    scores: list[float] | None,
    bos: int,
    unknown: int,
    stop_ids: tuple[int, ...],
) -> Tokenizer:
    pieces, kinds = _repair_kinds(tokens, stored, unknown, {bos, *stop_ids})
    size = _count_ordinary(pieces, kinds)
    if unknown >= size:
        raise ValueError(f"the unknown token {unknown} comes after the {size} ordinary ones")
    scores = _repair_scores(pieces, kinds, scores)
    proto = write_model(
        pieces[:size],
        scores[:size],
        kinds[:size],
        bos_id=bos if bos < size else None,
        eos_id=stop_ids[0] if stop_ids[0] < size else None,
        dummy_prefix=metadata.get("tokenizer.ggml.add_space_prefix", True) is not False,
    )
    added = {
        id: AddedToken(pieces[id], special=kinds[id] == CONTROL)
        for id in range(size, len(pieces))
        if kinds[id] != UNUSED
    }
    return Tokenizer(
        proto,
        added,
        stop_ids,
        bos,
        adds_bos=_adds_bos(metadata, True),
        chat_templates=gguf_templates(metadata),
    )


def _byte_level(
    metadata: Mapping[str, Any],
    tokens: list[str],
    stored: list[float] | None,
    bos: int | None,
    stop_ids: tuple[int, ...],
) -> Tokenizer:
    # 1. How text is split, and the merges.
    name = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre is {shown(name)}; byte-level (gpt2) vocabularies are "
            f"read with {', '.join(PRE_TOKENIZERS)}"
        )
    pre_tokenizer = PRE_TOKENIZERS[name]
    adds_bos = _adds_bos(metadata, pre_tokenizer.adds_bos and bos is not None)
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise ValueError("the tokenizer model is 'gpt2', and tokenizer.ggml.merges is not a list")

    # 2. The tokens: control tokens and words are searched for before the text is split.
    kinds = [NORMAL] * len(tokens) if stored is None else [int(kind) for kind in stored]
    vocab: dict[str, int] = {}
    added: dict[int, AddedToken] = {}
    for id, (token, kind) in enumerate(zip(tokens, kinds)):
        if kind == UNUSED or not token or token in vocab:
            continue
        vocab[token] = id
        is_added = kind in (CONTROL, UNKNOWN, USER_DEFINED) or is_control_spelling(token)
        if is_added or id == bos or id in stop_ids:
            added[id] = AddedToken(token, special=kind != USER_DEFINED)

    # 3. The content of a tokenizer.json.
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": token.text} | token.flags() for id, token in added.items()
        ],
        "normalizer": None,
        "pre_tokenizer": json_steps(pre_tokenizer),
        "post_processor": begin_template(tokens[bos], bos) if adds_bos else None,
        "decoder": BYTES,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre_tokenizer.ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }
    return Tokenizer(
        JsonPieces(content),
        added,
        stop_ids,
        bos,
        adds_bos=adds_bos,
        chat_templates=gguf_templates(metadata),
    )


def _adds_bos(metadata: Mapping[str, Any], default: bool) -> bool:
    stated = metadata.get("tokenizer.ggml.add_bos_token", default)
    if not isinstance(stated, bool):
        raise ValueError(f"tokenizer.ggml.add_bos_token must be true or false, not {shown(stated)}")
    return stated


def _count_with_rows(tokens: Sequence[str], kinds: Sequence[float] | None, rows: int) -> int:
    """How many tokens the tokenizer has: added ones at the end need a row of the model."""
    size = len(tokens)
    while kinds and size > rows and kinds[size - 1] in (CONTROL, USER_DEFINED, UNUSED):
        size -= 1
    named = [f"{tokens[id]} ({id})" for id in range(size, len(tokens)) if kinds[id] != UNUSED]
    if named:
        warnings.warn(
            f"the model has {rows} rows and none for the added tokens {one_line(', '.join(named))} "
            "in tokenizer.ggml.tokens; they are not used",
            stacklevel=4,
        )
    return size


def _repair_kinds(
    pieces: Sequence[str], stored: Sequence[float] | None, unknown: int, control: set[int]
) -> tuple[list[str], list[int]]:
    """Pieces and their types, corrected, because those in files are not reliable.

    - today's converters call the unknown piece a control piece, and others leave all types out;
    - tokens that begin or end a sequence are control tokens whatever a file says;
    - pieces that are empty, or occur twice (broken characters do), cannot be told apart: they
      become unused.

    Raises ValueError for a type that does not exist, and if no unknown piece is left.
    """
    kinds = [NORMAL] * len(pieces) if stored is None else [int(kind) for kind in stored]
    if not all(NORMAL <= kind <= BYTE for kind in kinds):
        raise ValueError("tokenizer.ggml.token_type holds a type of token that does not exist")
    if BYTE not in kinds:
        kinds = [
            BYTE if _BYTE_PIECE.fullmatch(piece) else kind for piece, kind in zip(pieces, kinds)
        ]
    kinds = [CONTROL if kind == UNKNOWN or id in control else kind for id, kind in enumerate(kinds)]
    kinds[unknown] = UNKNOWN
    seen: set[str] = set()
    pieces = list(pieces)
    for id, piece in enumerate(pieces):
        if not piece or piece in seen:
            pieces[id] = f"<unused {id}>"
            kinds[id] = UNUSED
        seen.add(piece)
    if kinds[unknown] != UNKNOWN:
        raise ValueError(f"the piece of the unknown token, {unknown}, is empty or occurs twice")
    return pieces, kinds


def _count_ordinary(pieces: Sequence[str], kinds: Sequence[int]) -> int:
    """How many pieces come before the tokens that were added later.

    sentencepiece must not merge text into those. From the end they are the control, unused and
    user-defined ones, and all that no merge of two pieces can make. Raises ValueError if nothing is
    left.
    """
    ordinary = [piece for piece, kind in zip(pieces, kinds) if kind == NORMAL]
    begins = _beginnings(ordinary)
    ends = _beginnings(piece[::-1] for piece in ordinary)
    for size in range(len(pieces), 0, -1):
        piece = pieces[size - 1]
        kind = kinds[size - 1]
        if kind == BYTE or (kind == NORMAL and len(piece) == 1):
            return size
        if kind != NORMAL:
            continue
        lengths = set(_chain(begins, piece))
        if any(len(piece) - length in lengths for length in _chain(ends, piece[::-1])):
            return size
    raise ValueError("tokenizer.ggml.tokens has no ordinary piece")


def _beginnings(pieces: Iterable[str]) -> dict[str, str]:
    """Piece -> the longest other piece that it begins with.

    Time grows with the length of all: no piece is compared with each of its beginnings.
    """
    found: dict[str, str] = {}
    inside: list[str] = []  # each begins with the one before it
    for piece in sorted(pieces):
        while inside and not piece.startswith(inside[-1]):
            inside.pop()
        if inside:
            found[piece] = inside[-1]
        inside.append(piece)
    return found


def _chain(beginnings: Mapping[str, str], piece: str) -> Iterator[int]:
    """The lengths of all pieces that a piece begins with, from the longest."""
    while (piece := beginnings.get(piece)) is not None:
        yield len(piece)


def _repair_scores(
    pieces: Sequence[str], kinds: Sequence[int], stored: Sequence[float] | None
) -> list[float]:
    """The scores, which are the order of merges.

    Converters that had no tokenizer.model wrote one score for all. Then it is the order of ids, and
    pieces that are only spaces come last of all, as in the models that Mistral trained.
    """
    if stored is not None:
        different = {stored[i] for i, kind in enumerate(kinds) if kind == NORMAL}
        if len(different) > 1 or kinds.count(NORMAL) < 2:
            return list(stored)
    return [-1e9 if not piece.strip(SPACE) else -float(i) for i, piece in enumerate(pieces)]
