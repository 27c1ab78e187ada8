"""The base classes of the readers: one reader per layout, and the tensors that it finds.

`load.py` has the recipe that uses them.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mistral.checkpoints.labels import checkpoint_name
from mistral.checkpoints.names import half_split_rows
from mistral.config import Config
from mistral.errors import one_line
from mistral.quantization.ggml_types import GgmlType
from mistral.tokenizer import Tokenizer
from mistral.unreadable import unreadable


class StoredTensor(ABC):
    """A tensor in a file, as the file's header describes it. Nothing is read before `read`."""

    path: Path
    name: str  # in the file
    shape: tuple[int, ...]
    num_bytes: int
    dtype: torch.dtype | None  # None: PyTorch has no dtype for the values, as for quantized blocks
    block_type: GgmlType | None = None  # of quantized blocks

    @property
    def type_name(self) -> str:
        """The type of the values in the file, as listings show it."""
        return dtype_name(self.dtype)

    @abstractmethod
    def read(self, device: torch.device, dtype: torch.dtype, heads: int | None = None) -> Tensor:
        """The values in `dtype` on `device`, in memory of their own.

        heads  of a matrix whose rows pair neighbours in the file (names.py); the result has our
               order. None: the rows keep the order of the file.

        Raises CheckpointError if the file cannot be read.
        """

    def read_blocks(self, device: torch.device, heads: int | None = None) -> Tensor:
        """The quantized blocks as they are, uint8 [rows, bytes of a row]; else like `read`."""
        raise NotImplementedError(f"{self.name} has no blocks")


class MappedTensor(StoredTensor):
    """Plain values in a file that can be mapped into memory."""

    @abstractmethod
    def mapped(self) -> Tensor:
        """The values on the CPU as they are; their memory may be that of the file."""

    def read(self, device: torch.device, dtype: torch.dtype, heads: int | None = None) -> Tensor:
        values = self.mapped()
        if heads is not None:
            values = values[half_split_rows(len(values), heads)]  # a copy
        return values.to(device=device, dtype=dtype, copy=heads is None)


class Reader(ABC):
    """An opened checkpoint of one layout.

    All methods raise CheckpointError for files that are missing, damaged or contradictory.
    """

    path: Path  # the folder, or the first file
    layer_prefix: str  # the names of a layer's tensors in the files begin so, before its number
    pairs_neighbours: bool  # whether the rows of Q and K are in the files' order of names.py

    @abstractmethod
    def config(self) -> Config:
        """The config. `eos_token_id` is empty if the files leave the stop tokens to the tokenizer.

        If the files do not name a sliding window, it follows from a rule; `window_note` has text.
        """

    def window_note(self, config: Config) -> str | None:
        """What was decided about the window of `config`, if the files do not name one."""
        return None

    def notes(self) -> list[str]:
        """What in the config the files leave to a default, or name without effect: a line each."""
        return []

    @abstractmethod
    def tokenizer(self, config: Config) -> Tokenizer:
        """The tokenizer for a model with this config.

        Its stop tokens are the config's, or its own end token if the config names none. Tokens for
        which the model has no row are left out, with a warning.
        """

    @abstractmethod
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors by their names in the files."""

    @abstractmethod
    def names(self, num_layers: int) -> dict[str, str]:
        """Our name of each tensor of a model with so many layers -> its name in the files."""

    def model_name(self) -> str | None:
        """The model's name if the files store one, which an export stores again."""
        return None

    def label(self) -> str:
        """What messages call the checkpoint."""
        return one_line(checkpoint_name(self.path, self.model_name()))

    def not_exported(self, written: Collection[str]) -> list[str]:
        """What a GGUF file with the metadata keys `written` does not say of what these files say.

        Config, tokenizer and weights do not count.
        """
        return []

    def ignores(self, name: str) -> bool:
        """Whether a tensor that no Mistral has may be in the files."""
        return False


@contextmanager
def blaming(what: str | Path, *errors: type[Exception]) -> Iterator[None]:
    """Turns an OSError, a ValueError or one of a parser's `errors` into a CheckpointError.

    what  the file that is read, or how the message begins; see unreadable.py
    """
    try:
        yield
    except (OSError, ValueError, *errors) as error:
        raise unreadable(what, error) from error


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> 'bfloat16', as config.json spells it."""
    return str(dtype).removeprefix("torch.")
