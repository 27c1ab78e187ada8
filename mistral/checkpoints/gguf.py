"""GGUF, llama.cpp's format: config, tokenizer and weights in one file or in a split set."""

import re
from collections.abc import Mapping
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


class GgufReader(Reader):
    """A GGUF file, or the first file of a split set. All headers are read when it is opened."""

    layer_prefix = "blk."
    pairs_neighbours = True

    def __init__(self, path: Path):
        self.path = path
        self.header = _read_files(path)
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
        return (
            f"{self.path.name} names no sliding window; with rotary base {config.rope_theta:,.0f} "
            f"and {config.max_position_embeddings:,} positions {decided} "
            "(sliding_window=... overrides)"
        )

    def tokenizer(self, stop_ids: tuple[int, ...]) -> Tokenizer:
        """The tokenizer rebuilt from the vocabulary in the metadata."""
        with blaming(self.path):
            return read_tokenizer(self.header.metadata, stop_ids)

    def tensors(self) -> Mapping[str, StoredTensor]:
        return self.header.tensors

    def names(self, num_layers: int) -> dict[str, str]:
        return gguf_names(num_layers)


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
        if not part.is_file():
            raise CheckpointError(f"{part} is missing: the split set has {count} files")
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
