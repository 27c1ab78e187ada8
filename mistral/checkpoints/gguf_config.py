"""The metadata of a GGUF file as a Config, and the rule for a window that it does not name."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mistral.checkpoints.gguf_header import GgufHeader, whole
from mistral.checkpoints.gguf_tensor import GgufTensor
from mistral.config import Config, RotaryScaling, positive_number
from mistral.errors import shown
from mistral.rotary import attention_factor

_WINDOW = "llama.attention.sliding_window"
_SCALING = "llama.rope.scaling."


def read_config(header: GgufHeader) -> Config:
    """The metadata as a Config. ValueError if it is bad or not a Mistral's.

    llama.cpp's own defaults replace the keys that its files may leave out: head_count_kv
    (head_count), key_length (embedding_length / head_count), rope.freq_base (10000), eos_token_id
    (2). `window_of` has the rule for the window.
    """
    config = _config(header.metadata, header.tensors)
    return replace(config, sliding_window=window_of(header.metadata, config))


def names_window(header: GgufHeader) -> bool:
    """Whether the file itself says what the window is."""
    return _WINDOW in header.metadata


def window_of(metadata: Mapping[str, Any], config: Config) -> int | None:
    """The window that the file names, or else what its rotary base tells.

    Files that `gguf_export` wrote name a window (0: none). Others of Mistral do not (and llama.cpp
    applies none), so it is told from the rotary base, which changed when the window was given up:
    base 10,000 with more than 4,096 positions is v0.1 or one of its fine-tunes, Hermes-2-Pro among
    them: 4,096. Everything else, v0.2 and v0.3 with base 1,000,000 among them: none. A model whose
    angles are scaled was made to attend to more: none. Raises ValueError for a window that is not a
    whole number.
    """
    named = whole(metadata, _WINDOW)
    if named is not None:
        return named or None
    if config.rope_scaling is not None:
        return None
    if config.rope_theta == 10000.0 and config.max_position_embeddings > 4096:
        return 4096
    return None


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> Config:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture != "llama":
        raise ValueError(
            f"the architecture {shown(architecture)} is another model's: Mistral-7B is stored as "
            "'llama'"
        )
    if "token_embd.weight" not in tensors:
        raise ValueError("token_embd.weight is missing")
    _refuse_variants(metadata, tensors)

    def size(name: str) -> int:
        key = f"llama.{name}"
        if key not in metadata:
            raise ValueError(f"{key} is missing, and a number of the architecture is not guessed")
        return whole(metadata, key, least=1)

    heads = size("attention.head_count")
    hidden_size = size("embedding_length")
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
        rope_scaling=_rope_scaling(metadata, size("context_length")),
    )


def _rope_scaling(metadata: Mapping[str, Any], context_length: int) -> RotaryScaling | None:
    """The rotary scaling with llama.cpp's defaults: a factor without a type is linear."""
    kind = metadata.get(_SCALING + "type", "linear")
    if not isinstance(kind, str) or kind not in ("none", "linear", "yarn", ""):
        raise ValueError(f"rotary scaling {shown(kind)} is not supported; linear and yarn are")
    factor = _number(metadata, _SCALING + "factor", _number(metadata, "llama.rope.scale_linear", 1))
    if kind == "yarn":
        return _yarn(metadata, factor, context_length)
    if _number(metadata, _SCALING + "attn_factor", 1) != 1:
        raise ValueError(
            f"{_SCALING}attn_factor is supported for yarn, and the type is {shown(kind)}"
        )
    if kind == "none" or factor == 1:
        return None
    return RotaryScaling(rope_type="linear", factor=factor)


def _yarn(metadata: Mapping[str, Any], factor: float, context_length: int) -> RotaryScaling:
    """YaRN. llama.cpp's converter stores Hugging Face's attention_factor as yarn_attn_factor.

    llama.cpp itself reads attn_factor, and multiplies YaRN's default factor by it. `gguf_export`
    writes both.
    """
    for key, neutral in (("yarn_ext_factor", 1), ("yarn_log_multiplier", 0)):
        value = metadata.get(_SCALING + key, neutral)
        is_unset = key == "yarn_ext_factor" and type(value) is float and value < 0
        if type(value) not in (int, float) or (value != neutral and not is_unset):
            raise ValueError(f"{_SCALING}{key} {shown(value)} is not supported; {neutral} is")
    scaling = RotaryScaling(
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=(
            whole(metadata, _SCALING + "original_context_length") or context_length
        ),
        beta_fast=metadata.get(_SCALING + "yarn_beta_fast", 32.0),
        beta_slow=metadata.get(_SCALING + "yarn_beta_slow", 1.0),
        attention_factor=metadata.get(_SCALING + "yarn_attn_factor"),
    )
    relative = _number(metadata, _SCALING + "attn_factor", 1)
    if relative == 1:
        return scaling
    named = relative * attention_factor(replace(scaling, attention_factor=None))
    if scaling.attention_factor is None:
        return replace(scaling, attention_factor=named)
    if abs(named - scaling.attention_factor) > 1e-5 * named:
        raise ValueError(
            f"{_SCALING}attn_factor and yarn_attn_factor contradict each other: with the first the "
            f"factor of the angles is {named:.5f}, with the second {scaling.attention_factor:.5f}"
        )
    return scaling


def _number(metadata: Mapping[str, Any], key: str, default: float) -> float:
    """A positive number, or the default if the key is absent or 0, as llama.cpp takes it."""
    value = metadata.get(key, default)
    if type(value) in (int, float) and value == 0:
        return default
    return positive_number(key, value)


def _refuse_variants(metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> None:
    """ValueError for other models of the llama architecture."""
    if "rope_freqs.weight" in tensors:
        raise ValueError("rope_freqs.weight (rotary scaling llama3) is not supported")
    if whole(metadata, "llama.expert_count", 0):
        raise ValueError("this is a mixture of experts; only Mistral-7B is read")
