"""GGUF, llama.cpp's format: config, tokenizer and weights, packed or not, in one file or a split set."""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from mistral.checkpoints.assemble import (
    EMBEDDING,
    assemble,
    check_layers,
    check_tensors,
    require_room,
    skeleton,
)
from mistral.checkpoints.gguf_header import GgufHeader, GgufTensor, read_header
from mistral.checkpoints.gguf_tokenizer import read_tokenizer
from mistral.checkpoints.names import gguf_names, interleaved_rows, rotary_heads
from mistral.config import Config, whole_number
from mistral.errors import CheckpointError
from mistral.model import Mistral
from mistral.quantization.dequantize import dequantize
from mistral.quantization.ggml_types import GgmlType
from mistral.quantization.packed import PackedEmbedding, PackedLinear, weights_at_once
from mistral.tokenizer import Tokenizer

UNPACKED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load(
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    packed: bool,
    sliding_window: int | None | Literal["auto"],
) -> tuple[Mistral, Tokenizer]:
    """What `mistral.load` does for a .gguf file."""
    header = read_files(path)
    config = read_config(path, header, sliding_window)
    return load_model(path, header, config, device, dtype, packed), read_tokenizer(path, header, config)


def read_files(path: Path) -> GgufHeader:
    """The headers of a file, or of all files of a split set of which `path` is the first.

    Only the first file of a set has the metadata; each has its own tensors.
    """
    header = read_header(path)
    count = header.metadata.get("split.count", 1)
    if count in (0, 1):
        return header
    named = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if header.metadata.get("split.no", 0) != 0 or named is None or int(named[3]) != count:
        first = f"{named[1]}-00001-of-{named[3]}.gguf" if named else "the file that ends in -00001-of-....gguf"
        raise CheckpointError(f"{path} is one of {count} files of a split set; name the first, {first}")
    tensors = dict(header.tensors)
    for i in range(2, count + 1):
        part = path.with_name(f"{named[1]}-{i:05d}-of-{named[3]}.gguf")
        if not part.is_file():
            raise CheckpointError(f"{part} is missing: the split set has {count} files")
        more = read_header(part)
        if more.metadata.get("split.no") != i - 1 or tensors.keys() & more.tensors.keys():
            raise CheckpointError(f"{part} does not belong to the split set of {path.name}")
        tensors |= more.tensors
    return GgufHeader(header.metadata, tensors)


def read_config(path: Path, header: GgufHeader, sliding_window: int | None | Literal["auto"] = "auto") -> Config:
    """The metadata as a Config. CheckpointError where it is bad or not a Mistral's.

    llama.cpp's own defaults stand for keys that its files may leave out: head_count_kv (head_count), key_length
    (embedding_length / head_count), rope.freq_base (10000). For sliding_window "auto" see `window_of`.
    """
    metadata = header.metadata
    try:
        config = _config(metadata, header.tensors)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if sliding_window != "auto":
        return replace(config, sliding_window=sliding_window)
    return replace(config, sliding_window=window_of(path, metadata, config))


def window_of(path: Path, metadata: Mapping[str, Any], config: Config) -> int | None:
    """The window of a file that does not say; the rule behind sliding_window="auto".

    GGUF files of Mistral name no window (and llama.cpp applies none), so it is told from the rotary base, which
    changed when the window was given up: base 10,000 with more than 4,096 positions is v0.1 or one of its fine-tunes,
    Hermes-2-Pro among them: 4,096. Everything else, v0.2 and v0.3 with base 1,000,000 among them: none.
    """
    named = metadata.get("llama.attention.sliding_window")
    if named is not None:
        return None if named == 0 else whole_number("llama.attention.sliding_window", named)
    window = 4096 if config.rope_theta == 10000.0 and config.max_position_embeddings > 4096 else None
    decided = "attending to everything" if window is None else f"taking v0.1's window of {window:,}"
    warnings.warn(
        f"{path.name} names no sliding window; with rotary base {config.rope_theta:,.0f} and "
        f"{config.max_position_embeddings:,} positions {decided} (sliding_window=... overrides)",
        stacklevel=5,
    )
    return window


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> Config:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"architecture {architecture!r}; Mistral-7B is stored as 'llama'")
    if "token_embd.weight" not in tensors:
        raise ValueError("token_embd.weight is missing")
    _refuse_variants(metadata, tensors)
    heads = whole_number("llama.attention.head_count", _required(metadata, "attention.head_count"))
    hidden_size = whole_number("llama.embedding_length", _required(metadata, "embedding_length"))
    head_dim = metadata.get("llama.attention.key_length", hidden_size // heads)
    if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ValueError("rotary embedding of a part of the head is not supported; no Mistral-7B uses it")
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return Config(
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=hidden_size,
        intermediate_size=_required(metadata, "feed_forward_length"),
        num_hidden_layers=_required(metadata, "block_count"),
        num_attention_heads=heads,
        num_key_value_heads=metadata.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        rms_norm_eps=_required(metadata, "attention.layer_norm_rms_epsilon"),
        rope_theta=metadata.get("llama.rope.freq_base", 10000.0),
        sliding_window=None,
        max_position_embeddings=_required(metadata, "context_length"),
        tie_word_embeddings="output.weight" not in tensors,
        eos_token_id=tuple(dict.fromkeys(end for end in ends if end is not None)) or (2,),
    )


def load_model(
    path: Path, header: GgufHeader, config: Config, device: torch.device, dtype: torch.dtype | None, packed: bool
) -> Mistral:
    """The weights: in `dtype`, or with `packed` as the blocks that the file holds."""
    stored = checked_tensors(path, header, config)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else UNPACKED.get(stored[EMBEDDING].kind.name, torch.bfloat16)
    stays = {name for name, tensor in stored.items() if packed and tensor.kind.block_weights > 1}
    sizes = [t.num_bytes if name in stays else prod(t.shape) * dtype.itemsize for name, t in stored.items()]
    require_room(path, config, device, dtype, size=sum(sizes))

    model, state = skeleton(config), {}
    total = sum(tensor.num_bytes for tensor in stored.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", leave=False, disable=None) as bar:
        for name, tensor in stored.items():
            heads = rotary_heads(name, config)
            if name in stays:
                blocks = read_rows(tensor, heads, device, None, bar.update)
                state[name.removesuffix("weight") + "blocks"] = blocks
                _replace(model, name, blocks, tensor.kind, dtype)
            else:
                state[name] = read_rows(tensor, heads, device, dtype, bar.update).view(tensor.shape)
    return assemble(model, state, device)


def checked_tensors(path: Path, header: GgufHeader, config: Config) -> dict[str, GgufTensor]:
    """The tensors under our names; CheckpointError where they are not those of the config."""
    layers = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    check_layers(path, len(layers), config)
    names = gguf_names(config.num_hidden_layers)
    stored = {ours: header.tensors[theirs] for ours, theirs in names.items() if theirs in header.tensors}
    unknown = header.tensors.keys() - set(names.values())
    check_tensors(path, config, {name: t.shape for name, t in stored.items()}, unknown, names.__getitem__)
    return stored


def read_rows(
    tensor: GgufTensor,
    heads: int | None,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: Callable[[int], object] = lambda _: None,
) -> Tensor:
    """A tensor's rows on `device`: unpacked into `dtype` [rows, weights], or with dtype None as they are [rows, bytes].

    heads  rows of rotary matrices stand in another order in the file, see names.py; None: no such matrix

    Some rows at a time, so that beside the result only little memory is used.
    """
    num_rows, num_weights = prod(tensor.shape[:-1]), tensor.shape[-1]
    width = tensor.row_bytes if dtype is None else num_weights
    result = torch.empty((num_rows, width), dtype=dtype or torch.uint8, device=device)
    as_they_are = dtype is None and heads is None and device.type == "cpu"
    ours = None if heads is None else interleaved_rows(num_rows, heads).to(device)
    rows_at_once = max(1, weights_at_once(device) // num_weights)
    try:
        with tensor.path.open("rb") as file:
            file.seek(tensor.start)
            for start in range(0, num_rows, rows_at_once):
                to = slice(start, min(start + rows_at_once, num_rows))
                shape = (to.stop - to.start, tensor.row_bytes)
                rows = result[to] if as_they_are else torch.empty(shape, dtype=torch.uint8)
                if file.readinto(rows.numpy()) != rows.numel():
                    raise CheckpointError(f"{tensor.path} ends inside {tensor.name}: it is not complete")
                if not as_they_are:
                    part = rows.to(device)
                    if dtype is not None:
                        part = dequantize(part, tensor.kind).to(dtype)
                    result[to if ours is None else ours[to]] = part
                progress(rows.numel())
    except OSError as error:
        raise CheckpointError(f"{tensor.path} cannot be read: {error}") from error
    return result


def _replace(model: Mistral, name: str, blocks: Tensor, kind: GgmlType, dtype: torch.dtype) -> None:
    """Put a packed module in the place of the one that `name` is the weight of."""
    owner, _, module = name.removesuffix(".weight").rpartition(".")
    packed = PackedEmbedding(blocks, kind, dtype) if name == EMBEDDING else PackedLinear(blocks, kind)
    setattr(model.get_submodule(owner), module, packed)


def _required(metadata: dict[str, Any], name: str) -> int | float:
    value = metadata.get(f"llama.{name}")
    if value is None:
        raise ValueError(f"llama.{name} is missing, and a number of the architecture is not guessed")
    return value


def _refuse_variants(metadata: dict[str, Any], tensors: Mapping[str, GgufTensor]) -> None:
    """What the llama architecture can be besides a Mistral-7B."""
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling not in ("none", "") or metadata.get("llama.rope.scale_linear", 1) != 1 or "rope_freqs.weight" in tensors:
        raise ValueError(f"rotary scaling ({scaling}) is not supported; no Mistral-7B uses any")
    if metadata.get("llama.expert_count", 0):
        raise ValueError("this is a mixture of experts; only Mistral-7B is read")
