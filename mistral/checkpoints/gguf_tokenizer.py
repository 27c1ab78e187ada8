"""The tokenizer of a GGUF file: a sentencepiece model rebuilt from its vocabulary."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mistral.checkpoints.gguf_header import array, whole
from mistral.checkpoints.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    write_model,
)
from mistral.tokenizer import SPACE, Tokenizer

_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


def read_tokenizer(metadata: Mapping[str, Any], stop_ids: tuple[int, ...]) -> Tokenizer:
    """The tokenizer rebuilt from the vocabulary in the metadata. ValueError if that is bad.

    llama.cpp's own defaults replace ids that are left out: 1 begins a sequence, 0 is the unknown
    token.
    """
    model = metadata.get("tokenizer.ggml.model")
    pieces = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(model, str) or model != "llama":
        raise ValueError(f"tokenizer model {model!r}; Mistral-7B's is 'llama' (sentencepiece)")
    strings = isinstance(pieces, list) and all(isinstance(piece, str) for piece in pieces)
    if not strings or not pieces:
        raise ValueError("tokenizer.ggml.tokens is not a list of strings")
    bos = whole(metadata, "tokenizer.ggml.bos_token_id", 1)
    unknown = whole(metadata, "tokenizer.ggml.unknown_token_id", 0)
    if max(bos, unknown) >= len(pieces):
        raise ValueError(
            f"the begin token {bos} or the unknown token {unknown} is not one of {len(pieces)} ids"
        )

    stored = array(metadata, "tokenizer.ggml.token_type", len(pieces))
    pieces, kinds = _repair_kinds(pieces, stored, unknown, {bos, *stop_ids})
    size = _count_ordinary(pieces, kinds)
    if unknown >= size:
        raise ValueError(f"the unknown token {unknown} comes after the {size} ordinary ones")
    scores = _repair_scores(pieces, kinds, array(metadata, "tokenizer.ggml.scores", len(pieces)))
    proto = write_model(
        pieces[:size],
        scores[:size],
        kinds[:size],
        bos_id=bos if bos < size else None,
        eos_id=stop_ids[0] if stop_ids[0] < size else None,
        dummy_prefix=metadata.get("tokenizer.ggml.add_space_prefix", True) is not False,
    )
    added = {i: pieces[i] for i in range(size, len(pieces)) if kinds[i] != UNUSED}
    return Tokenizer(proto, added, stop_ids, bos)


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
    ordinary = {piece for piece, kind in zip(pieces, kinds) if kind == NORMAL}
    for size in range(len(pieces), 0, -1):
        piece = pieces[size - 1]
        kind = kinds[size - 1]
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        if kind == BYTE or (kind == NORMAL and len(piece) == 1):
            return size
        if kind == NORMAL and any(ordinary.issuperset(cut) for cut in cuts):
            return size
    raise ValueError("tokenizer.ggml.tokens has no ordinary piece")


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
