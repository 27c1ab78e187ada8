"""The tokenizer of a GGUF file: its vocabulary, made into a sentencepiece model again."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mistral.checkpoints.gguf_header import GgufHeader, array, whole
from mistral.checkpoints.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    write_model,
)
from mistral.config import Config
from mistral.errors import CheckpointError
from mistral.tokenizer import SPACE, Tokenizer

BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


def read_tokenizer(path: Path, header: GgufHeader, config: Config) -> Tokenizer:
    """The tokenizer rebuilt from the vocabulary in the metadata. CheckpointError where that is bad.

    llama.cpp's own defaults stand for ids that are left out: 1 begins a text, 0 is the unknown
    token.
    """
    try:
        return _tokenizer(header.metadata, config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _tokenizer(metadata: Mapping[str, Any], config: Config) -> Tokenizer:
    model, pieces = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if not isinstance(model, str) or model != "llama":
        raise ValueError(f"tokenizer model {model!r}; Mistral-7B's is 'llama' (sentencepiece)")
    if (
        not isinstance(pieces, list)
        or not pieces
        or not all(isinstance(piece, str) for piece in pieces)
    ):
        raise ValueError("tokenizer.ggml.tokens is not a list of strings")
    if len(pieces) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(pieces)} tokens, the model's vocabulary is {config.vocab_size}"
        )
    bos = whole(metadata, "tokenizer.ggml.bos_token_id", 1)
    unknown = whole(metadata, "tokenizer.ggml.unknown_token_id", 0)
    if max(bos, unknown) >= len(pieces):
        raise ValueError(
            f"the begin token {bos} or the unknown token {unknown} is none of {len(pieces)} tokens"
        )

    stored = array(metadata, "tokenizer.ggml.token_type", len(pieces))
    pieces, kinds = repair_kinds(pieces, stored, unknown, {bos, *config.eos_token_id})
    size = count_ordinary(pieces, kinds)
    if unknown >= size:
        raise ValueError(f"the unknown token {unknown} stands behind the {size} ordinary ones")
    scores = repair_scores(pieces, kinds, array(metadata, "tokenizer.ggml.scores", len(pieces)))
    proto = write_model(
        pieces[:size],
        scores[:size],
        kinds[:size],
        bos_id=bos if bos < size else None,
        eos_id=config.eos_token_id[0] if config.eos_token_id[0] < size else None,
        dummy_prefix=metadata.get("tokenizer.ggml.add_space_prefix", True) is not False,
    )
    added = {i: pieces[i] for i in range(size, len(pieces)) if kinds[i] != UNUSED}
    return Tokenizer(proto, added, config.eos_token_id, bos)


def repair_kinds(
    pieces: Sequence[str], stored: Sequence[float] | None, unknown: int, control: set[int]
) -> tuple[list[str], list[int]]:
    """Pieces and their kinds. Those in files are not reliable:

    - today's converters call the unknown piece a control piece, and others leave kinds out
      altogether;
    - tokens that begin or end a text are control tokens whatever a file says;
    - pieces that are empty, or occur twice (broken characters do), cannot be told apart: they
      become unused.

    ValueError for a kind that does not exist, and where no unknown piece is left.
    """
    kinds = [NORMAL] * len(pieces) if stored is None else [int(kind) for kind in stored]
    if not all(NORMAL <= kind <= BYTE for kind in kinds):
        raise ValueError("tokenizer.ggml.token_type holds a kind of token that there is not")
    if BYTE not in kinds:
        kinds = [
            BYTE if BYTE_PIECE.fullmatch(piece) else kind for piece, kind in zip(pieces, kinds)
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
        raise ValueError(
            f"the piece of the unknown token, {unknown}, is empty or that of another token"
        )
    return pieces, kinds


def count_ordinary(pieces: Sequence[str], kinds: Sequence[int]) -> int:
    """How many pieces stand before the tokens that were added later, which sentencepiece must not
    merge text into.

    From the end those are control, unused and user-defined ones, and whatever no merge of two
    pieces can make. ValueError where nothing is left.
    """
    ordinary = {piece for piece, kind in zip(pieces, kinds) if kind == NORMAL}
    for size in range(len(pieces), 0, -1):
        piece, kind = pieces[size - 1], kinds[size - 1]
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        if kind == BYTE or (
            kind == NORMAL and (len(piece) == 1 or any(ordinary.issuperset(cut) for cut in cuts))
        ):
            return size
    raise ValueError("tokenizer.ggml.tokens has no ordinary piece")


def repair_scores(
    pieces: Sequence[str], kinds: Sequence[int], stored: Sequence[float] | None
) -> list[float]:
    """The order of merges. Converters that had no tokenizer.model wrote one score for all; then it
    is the order of ids.

    Pieces of nothing but spaces come last of all, as in the models that Mistral trained.
    """
    normal = (
        {stored[i] for i, kind in enumerate(kinds) if kind == NORMAL}
        if stored is not None
        else set()
    )
    if stored is not None and (len(normal) > 1 or kinds.count(NORMAL) < 2):
        return list(stored)
    return [-1e9 if not piece.strip(SPACE) else -float(i) for i, piece in enumerate(pieces)]
