"""The metadata of a GGUF file as a Config, and the rule for the window that it does not name."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mistral.checkpoints.gguf_header import GgufHeader, GgufTensor, whole
from mistral.config import Config
from mistral.errors import CheckpointError


def read_config(
    path: Path, header: GgufHeader, sliding_window: int | None | Literal["auto"] = "auto"
) -> Config:
    """The metadata as a Config. CheckpointError where it is bad or not a Mistral's.

    llama.cpp's own defaults stand for keys that its files may leave out: head_count_kv
    (head_count), key_length (embedding_length / head_count), rope.freq_base (10000), eos_token_id
    (2). For sliding_window "auto" see `window_of`.
    """
    metadata = header.metadata
    try:
        config = _config(metadata, header.tensors)
        window = window_of(path, metadata, config) if sliding_window == "auto" else None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return replace(config, sliding_window=window if sliding_window == "auto" else sliding_window)


def window_of(path: Path, metadata: Mapping[str, Any], config: Config) -> int | None:
    """The rule behind sliding_window="auto": what the file names, else what its rotary base tells,
    with a warning.

    Files that `gguf_export` wrote name a window (0: none). Others of Mistral do not (and llama.cpp
    applies none), so it is told from the rotary base, which changed when the window was given up:
    base 10,000 with more than 4,096 positions is v0.1 or one of its fine-tunes, Hermes-2-Pro among
    them: 4,096. Everything else, v0.2 and v0.3 with base 1,000,000 among them: none. ValueError for
    a window that is no whole number.
    """
    named = whole(metadata, "llama.attention.sliding_window")
    if named is not None:
        return named or None
    window = (
        4096 if config.rope_theta == 10000.0 and config.max_position_embeddings > 4096 else None
    )
    decided = "attending to everything" if window is None else f"taking v0.1's window of {window:,}"
    warnings.warn(
        f"{path.name} names no sliding window; with rotary base {config.rope_theta:,.0f} and "
        f"{config.max_position_embeddings:,} positions {decided} (sliding_window=... overrides)",
        stacklevel=5,
    )
    return window


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> Config:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture != "llama":
        raise ValueError(f"architecture {architecture!r}; Mistral-7B is stored as 'llama'")
    if "token_embd.weight" not in tensors:
        raise ValueError("token_embd.weight is missing")
    _refuse_variants(metadata, tensors)

    def size(name: str) -> int:
        key = f"llama.{name}"
        if key not in metadata:
            raise ValueError(f"{key} is missing, and a number of the architecture is not guessed")
        return whole(metadata, key, least=1)

    heads, hidden_size = size("attention.head_count"), size("embedding_length")
    head_dim = whole(metadata, "llama.attention.key_length", hidden_size // heads, least=1)
    if whole(metadata, "llama.rope.dimension_count", head_dim) != head_dim:
        raise ValueError(
            "rotary embedding of a part of the head is not supported; no Mistral-7B uses it"
        )
    if "llama.attention.layer_norm_rms_epsilon" not in metadata:
        raise ValueError("llama.attention.layer_norm_rms_epsilon is missing, and it is not guessed")
    ends = [whole(metadata, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return Config(
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=hidden_size,
        intermediate_size=size("feed_forward_length"),
        num_hidden_layers=size("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=whole(metadata, "llama.attention.head_count_kv", heads, least=1),
        head_dim=head_dim,
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=metadata.get("llama.rope.freq_base", 10000.0),
        sliding_window=None,
        max_position_embeddings=size("context_length"),
        tie_word_embeddings="output.weight" not in tensors,
        eos_token_id=tuple(dict.fromkeys(end for end in ends if end is not None)) or (2,),
    )


def _refuse_variants(metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> None:
    """What the llama architecture can be besides a Mistral-7B."""
    # A factor without a type is linear scaling in llama.cpp; 0 and 1 are none.
    factors = [metadata.get(f"llama.rope.{key}", 1) for key in ("scaling.factor", "scale_linear")]
    kind = metadata.get("llama.rope.scaling.type", "none")
    if (
        not isinstance(kind, str)
        or kind not in ("none", "linear", "")
        or not all(type(f) in (int, float) and f in (0, 1) for f in factors)
        or "rope_freqs.weight" in tensors
    ):
        raise ValueError(
            f"rotary scaling ({kind}, {factors}) is not supported; no Mistral-7B uses any"
        )
    if whole(metadata, "llama.expert_count", 0):
        raise ValueError("this is a mixture of experts; only Mistral-7B is read")
