"""Hugging Face's layout: config.json, safetensors, tokenizer.model.

The files are untrusted: everything is checked before a weight is read.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from mistral.checkpoints.assemble import (
    EMBEDDING,
    OUTPUT,
    Parts,
    check_layers,
    check_tensors,
    dtype_name,
    quantized_kinds,
    require_room,
)
from mistral.checkpoints.names import tensor_shapes
from mistral.checkpoints.safetensors_files import WEIGHTS, StoredTensor, stored_tensors
from mistral.config import Config, whole_number
from mistral.errors import CheckpointError
from mistral.files import read_json, whole_file, write_json
from mistral.model import Mistral
from mistral.quantization.packed import Packed
from mistral.tokenizer import Tokenizer


def load(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    sliding_window: int | None | Literal["auto"],
    quantize: str | None = None,
) -> tuple[Mistral, Tokenizer]:
    """What `mistral.load` does for a folder in this layout.

    Where config.json and generation_config.json name no stop token, the end token of
    tokenizer.model is one.
    """
    config = read_config(folder, sliding_window)
    tokenizer = read_tokenizer(folder, config)
    config = replace(config, eos_token_id=config.eos_token_id or tokenizer.stop_ids)
    return load_model(folder, config, device, dtype, quantize), tokenizer


def read_config(folder: Path, sliding_window: int | None | Literal["auto"] = "auto") -> Config:
    """config.json and generation_config.json, as transformers 4 or 5 wrote them. CheckpointError
    where they are bad.

    Two keys may be absent, as in transformers: head_dim (then hidden_size / num_attention_heads)
    and tie_word_embeddings (then false). An absent sliding_window is transformers' default of 4096,
    with a warning; one that is null means none. The stop tokens are those of generation_config.json
    if it names any.
    """
    path = folder / "config.json"
    raw = read_json(path)
    stop = _optional_json(folder / "generation_config.json").get("eos_token_id")
    try:
        config = _config(raw, raw.get("eos_token_id") if stop is None else stop)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if sliding_window != "auto":
        return replace(config, sliding_window=sliding_window)
    if "sliding_window" not in raw:
        warnings.warn(
            f"{path} has no sliding_window; taking 4096, transformers' default "
            f"(sliding_window=None: attend to all)",
            stacklevel=4,
        )
    return config


def read_tokenizer(folder: Path, config: Config) -> Tokenizer:
    """tokenizer.model with the added tokens of added_tokens.json and tokenizer_config.json.

    CheckpointError where a file is missing or bad, or has more tokens than the model.
    """
    path = folder / "tokenizer.model"
    if not path.is_file():
        other = (
            " (tokenizer.json alone is not read)" if (folder / "tokenizer.json").exists() else ""
        )
        raise CheckpointError(
            f"{folder} has no tokenizer.model{other}; copy it from the checkpoint's base model"
        )
    try:
        tokenizer = Tokenizer(path.read_bytes(), _added_tokens(folder), config.eos_token_id or None)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: with its added tokens the tokenizer has {tokenizer.vocab_size} ids, and the "
            f"model's vocabulary "
            f"is {config.vocab_size}; they belong to different checkpoints"
        )
    return tokenizer


def load_model(
    folder: Path,
    config: Config,
    device: torch.device,
    dtype: torch.dtype | None,
    quantize: str | None = None,
) -> Mistral:
    """The weights of a folder as `mistral.load` has them, with its errors; no tokenizer is
    needed.
    """
    stored = checked_tensors(folder, config)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else stored[EMBEDDING].dtype
    kinds = quantized_kinds(folder, config, quantize)
    require_room(folder, config, device, dtype, kinds)
    if config.tie_word_embeddings and OUTPUT in stored:
        output, embedding = stored.pop(OUTPUT).read(), stored[EMBEDDING].read()
        if not output.to(dtype).equal(embedding.to(dtype)):
            raise CheckpointError(
                f"{folder}: tie_word_embeddings is true, but {OUTPUT} differs from {EMBEDDING}"
            )
    parts = Parts(config, device, dtype, kinds)
    total = sum(tensor.num_bytes for tensor in stored.values())
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="loading", leave=False, disable=None
    ) as bar:
        for name, tensor in stored.items():
            parts.add(name, tensor.read(), copy=True)
            bar.update(tensor.num_bytes)
    return parts.model()


def checked_tensors(folder: Path, config: Config) -> dict[str, StoredTensor]:
    """The tensors on disk; CheckpointError where they are not those of the config."""
    # Old checkpoints store the rotary frequencies; they follow from rope_theta.
    stored = {
        name: t
        for name, t in stored_tensors(folder).items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    check_layers(
        folder,
        len({name.split(".")[2] for name in stored if name.startswith("model.layers.")}),
        config,
    )
    known = tensor_shapes(config)
    check_tensors(
        folder, config, {name: t.shape for name, t in stored.items()}, stored.keys() - known.keys()
    )
    return stored


def save(model: Mistral, tokenizer: Tokenizer | None, folder: Path) -> None:
    """Write a checkpoint that `mistral.load`, transformers and llama.cpp's converter read. `folder`
    is made.

    Without a tokenizer only config and weights are written. ValueError for a packed model.
    """
    if any(isinstance(module, Packed) for module in model.modules()):
        raise ValueError(
            "the model is packed; load it without packed and quantize to save it in this layout"
        )
    config = model.config
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state[OUTPUT]
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "torch_dtype": dtype_name(model.dtype),
        **{name: value for name, value in vars(config).items() if name != "eos_token_id"},
        "bos_token_id": None if tokenizer is None else tokenizer.bos_id,
        "eos_token_id": config.eos_token_id[0]
        if len(config.eos_token_id) == 1
        else list(config.eos_token_id) or None,
    }
    write_json(folder / "config.json", values)
    if tokenizer is not None:
        _save_tokenizer(tokenizer, folder)
    with whole_file(folder / WEIGHTS) as file:
        save_file(state, file, metadata={"format": "pt"})
        file.chmod(
            (folder / "config.json").stat().st_mode
        )  # safetensors makes a file that only we can read


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    flags = {
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        "special": True,
    }
    values = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "added_tokens_decoder": {
            str(id): {"content": text, **flags} for id, text in tokenizer.added.items()
        },
    }
    write_json(folder / "tokenizer_config.json", values)
    (folder / "tokenizer.model").write_bytes(tokenizer.model_proto)


def _config(raw: dict[str, Any], stop: Any) -> Config:
    """A config.json as a Config; ValueError where it is bad."""
    if raw.get("model_type") != "mistral":
        raise ValueError(f"model_type is {raw.get('model_type')!r}, and 'mistral' is read here")
    if raw.get("hidden_act") not in (None, "silu"):
        raise ValueError(f"hidden_act is {raw['hidden_act']!r}; Mistral's MLP uses silu")
    if raw.get("quantization_config"):
        raise ValueError(
            "the weights are quantised (quantization_config); use the original checkpoint"
        )
    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    numbers = {
        name: whole_number(name, _required(raw, name)) for name in (*sizes, "num_key_value_heads")
    }
    head_dim = raw.get("head_dim")
    return Config(
        **numbers,
        head_dim=numbers["hidden_size"] // numbers["num_attention_heads"]
        if head_dim is None
        else head_dim,
        rms_norm_eps=_required(raw, "rms_norm_eps"),
        rope_theta=_rope_theta(raw),
        sliding_window=raw.get("sliding_window", 4096),
        max_position_embeddings=_required(raw, "max_position_embeddings"),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        eos_token_id=tuple(stop) if isinstance(stop, list) else () if stop is None else (stop,),
    )


def _required(raw: dict[str, Any], name: str) -> Any:
    if raw.get(name) is None:
        raise ValueError(f"{name} is missing, and a number of the architecture is not guessed")
    return raw[name]


def _rope_theta(raw: dict[str, Any]) -> float:
    """transformers 4 wrote rope_theta and rope_scaling, transformers 5 both inside
    rope_parameters.
    """
    inner = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    if not isinstance(inner, dict) or not isinstance(scaling, dict):
        raise ValueError("rope_parameters and rope_scaling must be objects or null")
    kinds = [
        part[key]
        for part in (inner, scaling)
        for key in ("rope_type", "type")
        if part.get(key) is not None
    ]
    if any(kind != "default" for kind in kinds) or (scaling and not kinds):
        raise ValueError(
            f"rotary scaling {inner or scaling} is not supported; no Mistral-7B uses any"
        )
    return _required({"rope_theta": inner.get("rope_theta", raw.get("rope_theta"))}, "rope_theta")


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _added_tokens(folder: Path) -> dict[int, str]:
    listed = [(id, text) for text, id in _optional_json(folder / "added_tokens.json").items()]
    described = _optional_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    if not isinstance(described, dict):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is not an object"
        )
    for id, token in described.items():
        plausible = id.isdecimal() and len(id) < 10
        listed.append(
            (
                int(id) if plausible else id,
                token.get("content") if isinstance(token, dict) else None,
            )
        )
    added: dict[int, str] = {}
    for id, text in listed:
        if not isinstance(id, int) or not isinstance(text, str):
            raise CheckpointError(
                f"{folder}: added token {text!r} with the id {id!r} is not a text with a number"
            )
        if added.setdefault(id, text) != text:
            raise CheckpointError(
                f"{folder}: two added tokens, {added[id]!r} and {text!r}, have the id {id}"
            )
    return added
