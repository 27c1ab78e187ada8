"""Mistral's own layout: params.json, consolidated.safetensors or consolidated.00.pth,
tokenizer.model.

Source: mistral-inference, `args.py` and `transformer.py`,
https://github.com/mistralai/mistral-inference
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from mistral.checkpoints.assemble import (
    EMBEDDING,
    Parts,
    check_layers,
    check_tensors,
    quantized_kinds,
    require_room,
)
from mistral.checkpoints.names import consolidated_names, half_split_rows, rotary_heads
from mistral.checkpoints.safetensors_files import StoredTensor, headers
from mistral.config import Config, whole_number
from mistral.errors import CheckpointError
from mistral.files import read_json
from mistral.model import Mistral
from mistral.tokenizer import Tokenizer

SAFETENSORS, PICKLE = "consolidated.safetensors", "consolidated.00.pth"
# Every Mistral-7B was made for so many positions; params.json does not say.
POSITIONS = 32768


def load(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    sliding_window: int | None | Literal["auto"],
    quantize: str | None = None,
) -> tuple[Mistral, Tokenizer]:
    """What `mistral.load` does for a folder in this layout."""
    tensors = read_tensors(folder)
    tokenizer = read_tokenizer(folder)
    config = read_config(folder, tensors, tokenizer, sliding_window)
    return load_model(folder, tensors, config, device, dtype, quantize), tokenizer


def read_tensors(folder: Path) -> Mapping[str, StoredTensor | Tensor]:
    """The weights by their names in the file, not read yet.

    CheckpointError where they cannot be.
    """
    if (folder / SAFETENSORS).is_file():
        return headers(folder / SAFETENSORS, None)
    path = folder / PICKLE
    if not path.is_file():
        raise CheckpointError(f"{folder} has params.json, but neither {SAFETENSORS} nor {PICKLE}")
    try:
        # weights_only: tensors and nothing else, so that no code in the file can run. mmap: read
        # when they are used.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a forged pickle can raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or holds more than tensors ({reason})") from error
    if not isinstance(tensors, dict) or not all(map(_is_plain, tensors, tensors.values())):
        raise CheckpointError(f"{path} is not a dictionary of floating-point tensors")
    return tensors


def read_config(
    folder: Path,
    tensors: Mapping[str, StoredTensor | Tensor],
    tokenizer: Tokenizer,
    sliding_window: int | None | Literal["auto"] = "auto",
) -> Config:
    """params.json as a Config. CheckpointError where it is bad.

    Published copies are wrong about hidden_dim and silent about vocab_size, so those two come from
    the tensors. Where rope_theta is missing, it is 10,000 with a sliding window and 1,000,000
    without: the rule of mistral-inference until May 2024. (Today's would take 1,000,000 for v0.1,
    whose params.json does not name it.)
    """
    path = folder / "params.json"
    params = read_json(path)
    try:
        config = _config(
            params, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tokenizer
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return config if sliding_window == "auto" else replace(config, sliding_window=sliding_window)


def read_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.model, or .model.v1 to .model.v3 as newer checkpoints name it.

    CheckpointError without a good one.
    """
    for name in (
        "tokenizer.model",
        "tokenizer.model.v3",
        "tokenizer.model.v2",
        "tokenizer.model.v1",
    ):
        path = folder / name
        if path.is_file():
            try:
                return Tokenizer(path.read_bytes())
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from error
    raise CheckpointError(f"{folder} has no tokenizer.model")


def load_model(
    folder: Path,
    tensors: Mapping[str, StoredTensor | Tensor],
    config: Config,
    device: torch.device,
    dtype: torch.dtype | None,
    quantize: str | None = None,
) -> Mistral:
    """The weights as `mistral.load` has them, with the rows of Q and K in our order (see
    names.py).
    """
    stored = checked_tensors(folder, tensors, config)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else stored[EMBEDDING].dtype
    kinds = quantized_kinds(folder, config, quantize)
    require_room(folder, config, device, dtype, kinds)
    parts = Parts(config, device, dtype, kinds)
    with tqdm(total=len(stored), unit=" tensors", desc="loading", leave=False, disable=None) as bar:
        for name, tensor in stored.items():
            data = tensor.read() if isinstance(tensor, StoredTensor) else tensor
            heads = rotary_heads(name, config)
            if heads is not None:
                data = data[half_split_rows(len(data), heads)]
            parts.add(name, data, copy=heads is None)
            bar.update()
    return parts.model()


def checked_tensors(
    folder: Path, tensors: Mapping[str, StoredTensor | Tensor], config: Config
) -> dict[str, StoredTensor | Tensor]:
    """The tensors under our names; CheckpointError where they are not those of the config."""
    layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    check_layers(folder, len(layers), config)
    names = consolidated_names(config.num_hidden_layers)
    stored = {ours: tensors[theirs] for ours, theirs in names.items() if theirs in tensors}
    unknown = {
        name for name in tensors.keys() - set(names.values()) if not name.startswith("rope.")
    }
    check_tensors(
        folder,
        config,
        {name: tuple(t.shape) for name, t in stored.items()},
        unknown,
        names.__getitem__,
    )
    return stored


def _is_plain(name: Any, tensor: Any) -> bool:
    """Whether an entry is a name and a dense floating-point tensor with its numbers on the CPU."""
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        return False
    return (
        tensor.is_floating_point()
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
    )


def _config(
    params: dict[str, Any], shapes: dict[str, tuple[int, ...]], tokenizer: Tokenizer
) -> Config:
    gate, embedding = (
        shapes.get("layers.0.feed_forward.w1.weight"),
        shapes.get("tok_embeddings.weight"),
    )
    if gate is None or embedding is None or len(gate) != 2 or len(embedding) != 2:
        raise ValueError(
            "the weights beside it have no layers.0.feed_forward.w1.weight or tok_embeddings.weight"
        )
    if embedding[0] < tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary is "
            f"{embedding[0]}"
        )
    for key in ("moe", "mamba", "yarn", "rope_scaling", "quantization", "lora", "vision_encoder"):
        if params.get(key) is not None:
            raise ValueError(f"{key} is not supported; no Mistral-7B has it")
    sizes = {
        name: whole_number(name, params.get(name))
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads")
    }
    window = _window(params)
    theta = params.get("rope_theta")
    return Config(
        vocab_size=embedding[0],
        hidden_size=sizes["dim"],
        intermediate_size=gate[0],
        num_hidden_layers=sizes["n_layers"],
        num_attention_heads=sizes["n_heads"],
        num_key_value_heads=sizes["n_kv_heads"],
        head_dim=whole_number("head_dim", params.get("head_dim", sizes["dim"] // sizes["n_heads"])),
        rms_norm_eps=params.get("norm_eps"),
        rope_theta=theta if theta is not None else 1e6 if window is None else 1e4,
        sliding_window=window,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=params.get("tied_embeddings", False),
        eos_token_id=tokenizer.stop_ids,
    )


def _window(params: dict[str, Any]) -> int | None:
    """One number for all layers; newer files may spell it as a list with one entry a layer."""
    window = params.get("sliding_window", params.get("_sliding_window"))
    if isinstance(window, list):
        if len({str(entry) for entry in window}) != 1:
            raise ValueError(
                f"sliding_window {window} differs between the layers, which no Mistral-7B has"
            )
        window = window[0]
    return window
