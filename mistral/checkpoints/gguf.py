"""GGUF, llama.cpp's format: config, tokenizer and weights, packed or not, in one file or a split
set.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Literal

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
from mistral.checkpoints.gguf_config import read_config
from mistral.checkpoints.gguf_header import GgufHeader, GgufTensor, read_header, whole
from mistral.checkpoints.gguf_tokenizer import read_tokenizer
from mistral.checkpoints.names import gguf_names, interleaved_rows, rotary_heads
from mistral.config import Config
from mistral.errors import CheckpointError
from mistral.model import Mistral
from mistral.quantization.dequantize import dequantize
from mistral.quantization.packed import weights_at_once
from mistral.tokenizer import Tokenizer

# Formats that hold plain numbers
UNPACKED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MOVED_AT_ONCE = (
    1 << 24
)  # packed weights that are read at a time where they stay packed: 9 MB of Q4_K


def load(
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    packed: bool,
    sliding_window: int | None | Literal["auto"],
    quantize: str | None = None,
) -> tuple[Mistral, Tokenizer]:
    """What `mistral.load` does for a .gguf file."""
    header = read_files(path)
    config = read_config(path, header, sliding_window)
    tokenizer = read_tokenizer(path, header, config)
    return load_model(path, header, config, device, dtype, packed, quantize), tokenizer


def read_files(path: Path) -> GgufHeader:
    """The headers of a file, or of all files of a split set of which `path` is the first.

    Only the first file of a set has the metadata; each has its own tensors. CheckpointError where a
    file is missing, damaged, or not of the set.
    """
    header, count, number = _read_part(path)
    if count in (0, 1):
        return header
    named = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if number != 0 or named is None or int(named[3]) != count:
        first = (
            f"{named[1]}-00001-of-{named[3]}.gguf"
            if named
            else "the file that ends in -00001-of-....gguf"
        )
        raise CheckpointError(
            f"{path} is one of {count} files of a split set; name the first, {first}"
        )
    tensors = dict(header.tensors)
    for i in range(2, count + 1):
        part = path.with_name(f"{named[1]}-{i:05d}-of-{named[3]}.gguf")
        if not part.is_file():
            raise CheckpointError(f"{part} is missing: the split set has {count} files")
        more, _, number = _read_part(part)
        if number != i - 1 or tensors.keys() & more.tensors.keys():
            raise CheckpointError(f"{part} does not belong to the split set of {path.name}")
        tensors |= more.tensors
    return GgufHeader(header.metadata, tensors)


def _read_part(path: Path) -> tuple[GgufHeader, int, int]:
    """A file's header, how many files its set has, and which of them it is, counted from 0."""
    header = read_header(path)
    try:
        return (
            header,
            whole(header.metadata, "split.count", 1),
            whole(header.metadata, "split.no", 0),
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_model(
    path: Path,
    header: GgufHeader,
    config: Config,
    device: torch.device,
    dtype: torch.dtype | None,
    packed: bool,
    quantize: str | None = None,
) -> Mistral:
    """The weights: in `dtype`, or with `packed` as the blocks that the file holds, or rounded as
    `quantize` says.
    """
    stored = checked_tensors(path, header, config)
    if dtype is None:
        dtype = (
            torch.float32
            if device.type == "cpu"
            else UNPACKED.get(stored[EMBEDDING].kind.name, torch.bfloat16)
        )
    blocks = {
        name: t.kind for name, t in stored.items() if t.kind.block_weights > 1 and len(t.shape) == 2
    }
    rounded = quantized_kinds(path, config, quantize)
    if rounded and blocks:
        name, kind = next(iter(blocks.items()))
        raise ValueError(
            f"{path} is quantised ({name} is {kind.name}): keep it as it is with packed, without "
            f"quantize"
        )
    stays = blocks if packed else {}
    require_room(path, config, device, dtype, stays | rounded)

    parts = Parts(config, device, dtype, rounded)
    total = sum(tensor.num_bytes for tensor in stored.values())
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="loading", leave=False, disable=None
    ) as bar:
        for name, tensor in stored.items():
            heads = rotary_heads(name, config)
            if name in stays:
                parts.add_packed(
                    name, read_rows(tensor, heads, device, None, bar.update), tensor.kind
                )
            else:
                to = UNPACKED.get(tensor.kind.name, torch.float32) if name in rounded else dtype
                parts.add(name, read_rows(tensor, heads, device, to, bar.update).view(tensor.shape))
    return parts.model()


def checked_tensors(path: Path, header: GgufHeader, config: Config) -> dict[str, GgufTensor]:
    """The tensors under our names; CheckpointError where they are not those of the config."""
    layers = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    check_layers(path, len(layers), config)
    names = gguf_names(config.num_hidden_layers)
    stored = {
        ours: header.tensors[theirs] for ours, theirs in names.items() if theirs in header.tensors
    }
    unknown = header.tensors.keys() - set(names.values())
    check_tensors(
        path, config, {name: t.shape for name, t in stored.items()}, unknown, names.__getitem__
    )
    for kind, name in {tensor.kind: tensor.name for tensor in stored.values()}.items():
        try:
            dequantize(torch.zeros(1, kind.block_bytes, dtype=torch.uint8), kind)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {name}: {error}") from error
    return stored


def read_rows(
    tensor: GgufTensor,
    heads: int | None,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: Callable[[int], object] = lambda _: None,
) -> Tensor:
    """A tensor's rows on `device`: unpacked into `dtype` [rows, weights], or with dtype None as
    they are [rows, bytes].

    heads  rows of rotary matrices stand in another order in the file, see names.py; None: no such
           matrix

    Rows that stay as they are on a CPU are read where they stay. All others go through a buffer,
    some at a time, so that beside the result only little memory is used.
    """
    num_rows, num_weights = prod(tensor.shape[:-1]), tensor.shape[-1]
    width = tensor.row_bytes if dtype is None else num_weights
    result = torch.empty((num_rows, width), dtype=dtype or torch.uint8, device=device)
    # Few pieces where nothing is unpacked: on a CPU with other work each costs a wait for PyTorch's
    # other threads.
    rows_at_once = max(
        1, (MOVED_AT_ONCE if dtype is None else weights_at_once(device)) // num_weights
    )
    if dtype is None and heads is None and device.type == "cpu":
        for rows in _read_bytes(tensor, result.split(rows_at_once)):
            progress(rows.numel())
        return result
    # Row f of the file is our row places[f]: writing there is the same as reading in the order of
    # `half_split_rows`.
    places = None if heads is None else interleaved_rows(num_rows, heads).to(device)
    buffer = torch.empty((min(rows_at_once, num_rows), tensor.row_bytes), dtype=torch.uint8)
    at = 0
    for rows in _read_bytes(
        tensor, (buffer[: num_rows - start] for start in range(0, num_rows, rows_at_once))
    ):
        part = rows.to(device)
        if dtype is not None:
            part = dequantize(part, tensor.kind).to(dtype)
        to = slice(at, at + len(rows))
        result[to if places is None else places[to]] = part
        at = to.stop
        progress(rows.numel())
    return result


def _read_bytes(tensor: GgufTensor, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Fill pieces of memory with a tensor's bytes, each from where the last one ended, and give
    each when it is full.

    pieces  contiguous uint8 tensors on the CPU
    """
    try:
        with tensor.path.open("rb") as file:
            file.seek(tensor.start)
            for piece in pieces:
                if file.readinto(piece.numpy()) != piece.numel():
                    raise CheckpointError(
                        f"{tensor.path} ends inside {tensor.name}: it is not complete"
                    )
                yield piece
    except OSError as error:
        raise CheckpointError(f"{tensor.path} cannot be read: {error}") from error
