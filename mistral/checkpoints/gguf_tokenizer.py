"""The tokenizer of a GGUF file: its vocabulary, made into a sentencepiece model again."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mistral.checkpoints.gguf_header import GgufHeader
from mistral.checkpoints.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, write_model
from mistral.config import Config
from mistral.errors import CheckpointError
from mistral.tokenizer import SPACE, Tokenizer


def read_tokenizer(path: Path, header: GgufHeader, config: Config) -> Tokenizer:
    """The tokenizer rebuilt from the vocabulary in the metadata."""
    metadata = header.metadata
    try:
        kind = metadata.get("tokenizer.ggml.model")
        if kind != "llama":
            raise ValueError(f"tokenizer model {kind!r}; Mistral-7B's is 'llama' (sentencepiece)")
        pieces = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
            raise ValueError("tokenizer.ggml.tokens is not a list of strings")
        if len(pieces) > config.vocab_size:
            raise ValueError(f"the tokenizer has {len(pieces)} tokens, the model's vocabulary is {config.vocab_size}")
        kinds = piece_kinds(pieces, metadata.get("tokenizer.ggml.token_type"), metadata)
        # What stands behind the last ordinary piece was added later, and sentencepiece must not merge text into it.
        size = 1 + max((i for i, kind in enumerate(kinds) if kind in (NORMAL, BYTE)), default=-1)
        scores = piece_scores(pieces[:size], kinds, metadata.get("tokenizer.ggml.scores"))
        proto = write_model(
            pieces[:size],
            scores,
            kinds[:size],
            bos_id=_inside(metadata.get("tokenizer.ggml.bos_token_id", 1), size),
            eos_id=_inside(config.eos_token_id[0], size),
            dummy_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        )
        added = {i: pieces[i] for i in range(size, len(pieces)) if kinds[i] != UNUSED and pieces[i]}
        return Tokenizer(proto, added, config.eos_token_id)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def piece_kinds(pieces: Sequence[str], stored: Any, metadata: dict[str, Any]) -> list[int]:
    """The kind of each piece: as stored, but one must be the unknown piece; told from its form if none is stored."""
    kinds = [NORMAL] * len(pieces) if stored is None else [int(kind) for kind in stored]
    if len(kinds) != len(pieces) or not all(NORMAL <= kind <= BYTE for kind in kinds):
        raise ValueError("tokenizer.ggml.token_type does not fit tokenizer.ggml.tokens")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if not isinstance(unknown, int) or not 0 <= unknown < len(kinds):
        raise ValueError(f"tokenizer.ggml.unknown_token_id {unknown!r} is no token")
    if stored is None:
        byte = re.compile("<0x[0-9A-F]{2}>")
        kinds = [BYTE if byte.fullmatch(piece) else NORMAL for piece in pieces]
        for id in (metadata.get("tokenizer.ggml.bos_token_id", 1), metadata.get("tokenizer.ggml.eos_token_id", 2)):
            if isinstance(id, int) and 0 <= id < len(kinds):
                kinds[id] = CONTROL
    kinds = [CONTROL if kind == UNKNOWN else kind for kind in kinds]
    kinds[unknown] = UNKNOWN
    return kinds


def piece_scores(pieces: Sequence[str], kinds: Sequence[int], stored: Any) -> list[float]:
    """The order of merges. Converters that had no tokenizer.model wrote one score for all; then it is the order of ids.

    Pieces of nothing but spaces come last of all, as in the models that Mistral trained.
    """
    normal = [i for i, kind in enumerate(kinds[: len(pieces)]) if kind == NORMAL]
    if stored is not None and len(stored) < len(pieces):
        raise ValueError("tokenizer.ggml.scores does not fit tokenizer.ggml.tokens")
    if stored is not None and (len(normal) < 2 or len({float(stored[i]) for i in normal}) > 1):
        return [float(score) for score in stored[: len(pieces)]]
    return [-1e9 if piece and not piece.strip(SPACE) else -float(i) for i, piece in enumerate(pieces)]


def _inside(id: Any, size: int) -> int | None:
    return id if isinstance(id, int) and 0 <= id < size else None
