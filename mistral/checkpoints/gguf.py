"""GGUF, llama.cpp's format: config, tokenizer and weights in one file or in a split set."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from mistral.checkpoints.gguf_config import names_window, read_config
from mistral.checkpoints.gguf_header import GgufHeader, read_header, whole
from mistral.checkpoints.gguf_tokenizer import read_tokenizer
from mistral.checkpoints.names import gguf_names
from mistral.checkpoints.reader import Reader, StoredTensor, blaming
from mistral.config import Config
from mistral.errors import CheckpointError
from mistral.quantization.dequantize import dequantize
from mistral.tokenizer import Tokenizer
from mistral.unreadable import is_there

# Keys that describe one file or its quantization, not the model
_OF_THE_FILE = ("general.size_label", "general.type", "quantize.", "split.")
# Files without a model, by general.type or general.architecture
_OTHER_TYPES = {
    "adapter": "a LoRA adapter, not a model: merge it into its base model (llama-export-lora)",
    "imatrix": "an importance matrix for quantizing, not a model: name the model's GGUF",
    "mmproj": "a projector of images (mmproj), not a model: name the model's GGUF",
    "clip": "a projector of images (mmproj), not a model: name the model's GGUF",
    "controlvector": "a control vector, not a model: name the model's GGUF",
}


class GgufReader(Reader):
    """A GGUF file, or the first file of a split set. All headers are read when it is opened."""

    layer_prefix = "blk."
    pairs_neighbours = True

    def __init__(self, path: Path):
        self.path = path
        self.header = _read_files(path)
        with blaming(path):
            _require_model(self.header)
        for kind, name in {t.kind: t.name for t in self.header.tensors.values()}.items():
            with blaming(f"{path}: {name}"):
                dequantize(torch.zeros(1, kind.block_bytes, dtype=torch.uint8), kind)

    def config(self) -> Config:
        """The metadata as a Config, see `gguf_config.read_config`."""
        with blaming(self.path):
            return read_config(self.header)

    def window_note(self, config: Config) -> str | None:
        if names_window(self.header):
            return None
        window = config.sliding_window
        decided = "attending to everything"
        if window is not None:
            decided = f"taking v0.1's window of {window:,}"
        scaled = "" if config.rope_scaling is None else "scaled angles, "
        return (
            f"{self.label()} names no sliding window; with {scaled}rotary base "
            f"{config.rope_theta:,.0f} and {config.max_position_embeddings:,} positions {decided} "
            "(sliding_window=... overrides)"
        )

    def tokenizer(self, config: Config) -> Tokenizer:
        """The tokenizer rebuilt from the vocabulary in the metadata."""
        with blaming(self.path):
            return read_tokenizer(self.header.metadata, config)

    def model_name(self) -> str | None:
        """general.name"""
        name = self.header.metadata.get("general.name")
        return name if isinstance(name, str) and name.strip() else None

    def not_exported(self, written: Collection[str]) -> list[str]:
        lost = self.header.metadata.keys() - set(written)
        return sorted(key for key in lost if not key.startswith(_OF_THE_FILE))

    def tensors(self) -> Mapping[str, StoredTensor]:
        return self.header.tensors

    def names(self, num_layers: int) -> dict[str, str]:
        return gguf_names(num_layers)


def _require_model(header: GgufHeader) -> None:
    """ValueError for a file with something else."""
    for key in ("general.type", "general.architecture"):
        value = header.metadata.get(key)
        if isinstance(value, str) and value in _OTHER_TYPES:
            raise ValueError(f"it is {_OTHER_TYPES[value]}")
    if any(name.endswith(".lora_a") for name in header.tensors):  # before there was general.type
        raise ValueError(f"it is {_OTHER_TYPES['adapter']}")
    if not header.tensors:
        raise ValueError(
            "it has a vocabulary and no weights (llama.cpp's --vocab-only): name the model's GGUF"
        )


def _read_files(path: Path) -> GgufHeader:
    """The headers of a file, or of all files of a split set of which `path` is the first.

    Only the first file of a set has the metadata; each has its own tensors. Raises CheckpointError
    if a file is missing, damaged, or not part of the set.
    """
    header, count, number = _read_part(path)
    if count in (0, 1):
        return header
    named = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if number != 0 or named is None or int(named[3]) != count:
        first = "the file that ends in -00001-of-....gguf"
        if named is not None:
            first = f"{named[1]}-00001-of-{named[3]}.gguf"
        raise CheckpointError(
            f"{path} is one of {count} files of a split set; name the first, {first}"
        )
    tensors = dict(header.tensors)
    for i in range(2, count + 1):
        part = path.with_name(f"{named[1]}-{i:05d}-of-{named[3]}.gguf")
        if not is_there(part):
            raise CheckpointError(
                f"{part} is missing: the split set has {count} files; download it into this folder"
            )
        more, _, number = _read_part(part)
        if number != i - 1 or tensors.keys() & more.tensors.keys():
            raise CheckpointError(f"{part} does not belong to the split set of {path.name}")
        tensors |= more.tensors
    return GgufHeader(header.metadata, tensors)


def _read_part(path: Path) -> tuple[GgufHeader, int, int]:
    """A file's header, how many files its set has, and its number in the set, counted from 0."""
    header = read_header(path)
    with blaming(path):
        count = whole(header.metadata, "split.count", 1)
        number = whole(header.metadata, "split.no", 0)
    return header, count, number
