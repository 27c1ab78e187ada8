"""The steps of loading that every layout shares: checks, memory, and assembling the model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mistral.checkpoints.foreign import what_else
from mistral.checkpoints.names import EMBEDDING, OUTPUT, tensor_shapes
from mistral.checkpoints.reader import Reader, StoredTensor, blaming
from mistral.config import Config
from mistral.errors import CheckpointError, one_line
from mistral.model import Mistral
from mistral.quantization.ggml_types import GgmlType
from mistral.quantization.packed import PackedEmbedding, PackedLinear, TiedOutput
from mistral.quantization.quantize import KINDS, Q8_0, quantize


def match_tensors(reader: Reader, config: Config) -> dict[str, StoredTensor]:
    """The tensors of the checkpoint by our names, in the order of the files.

    Raises CheckpointError, with names and both shapes, if they are not those of the config.
    """
    found = {name: t for name, t in reader.tensors().items() if not reader.ignores(name)}
    if described := what_else(found, reader.layer_prefix):
        raise CheckpointError(f"{reader.path}: {described}")
    in_layers = [name for name in found if name.startswith(reader.layer_prefix)]
    layers = len({name.removeprefix(reader.layer_prefix).split(".")[0] for name in in_layers})
    # First, since the next steps take time for each layer: a forged number could be huge.
    if layers != config.num_hidden_layers:
        raise CheckpointError(
            f"{reader.path}: the weights have {layers} layers, the config says "
            f"{config.num_hidden_layers}"
        )
    theirs = reader.names(config.num_hidden_layers)
    ours = {name: our_name for our_name, name in theirs.items()}
    problems = []
    for name, shape in tensor_shapes(config).items():
        tensor = found.get(theirs[name])
        if tensor is None and not (name == OUTPUT and config.tie_word_embeddings):
            problems.append(f"{theirs[name]} is missing")
        elif tensor is not None and tensor.shape != shape:
            both = f"{list(tensor.shape)} in the file and {list(shape)} by the config"
            problems.append(f"{theirs[name]} is {both}")
    unknown = sorted(name for name in found if name not in ours)
    problems += [f"{one_line(name, 100)} is not part of a Mistral" for name in unknown]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{reader.path}: {'; '.join(problems[:3])}{more}")
    return {ours[name]: tensor for name, tensor in found.items() if name in ours}


def rounded_types(
    source: Path, stored: Mapping[str, StoredTensor], name: str | None
) -> dict[str, GgmlType]:
    """The type that each matrix is rounded to for `mistral.load(..., quantize=name)`.

    All matrices are rounded, as llama.cpp does it, the embedding included. The output matrix (the
    embedding in a tied model) keeps more digits there too: llama.cpp gives it Q6_K beside Q4_0,
    which has no rounding in Python, so here it gets Q8_0. Empty for None.

    Raises ValueError for an unknown name and for rows that are not whole blocks.
    """
    if name is None:
        return {}
    if name not in KINDS:
        raise ValueError(f"quantize must be {' or '.join(map(repr, KINDS))}, not {name!r}")
    kinds = {tensor: KINDS[name] for tensor, t in stored.items() if len(t.shape) == 2}
    kinds[OUTPUT if OUTPUT in stored else EMBEDDING] = Q8_0
    for tensor, kind in kinds.items():
        columns = stored[tensor].shape[1]
        if columns % kind.block_weights:
            raise ValueError(
                f"{source}: {kind.name} stores blocks of {kind.block_weights} weights, and "
                f'{tensor} has rows of {columns}: leave out quantize="{name}"'
            )
    return kinds


def check_tied_output(
    source: Path, output: StoredTensor, embedding: StoredTensor, dtype: torch.dtype
) -> None:
    """Raises CheckpointError if the stored output matrix of a tied model is not the embedding."""
    cpu = torch.device("cpu")
    if not output.read(cpu, dtype).equal(embedding.read(cpu, dtype)):
        raise CheckpointError(
            f"{source}: tie_word_embeddings is true, but {OUTPUT} differs from {EMBEDDING}"
        )


class _Uninitialized(TorchFunctionMode):
    """Skips torch.nn.init: modules on "meta" have no values, and its imports take seconds there."""

    def __torch_function__(
        self, function: Callable, types: Any, arguments: tuple = (), named: dict | None = None
    ) -> Any:
        named = named or {}
        if function in (nn.init.normal_, nn.init.kaiming_uniform_):  # nn.Embedding's, nn.Linear's
            return named["tensor"]
        return function(*arguments, **named)


class Parts:
    """A model that gets its tensors one by one."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype):
        with torch.device("meta"), _Uninitialized():
            self._model = Mistral(config)
        self._state: dict[str, Tensor] = {}
        self._device = device
        self._dtype = dtype

    def add(self, name: str, values: Tensor) -> None:
        """A tensor in the model's dtype, on its device."""
        self._state[name] = values

    def add_blocks(self, name: str, blocks: Tensor, kind: GgmlType) -> None:
        """A matrix that stays packed: uint8 [rows, bytes of a row] on the model's device."""
        if name == EMBEDDING:
            packed = PackedEmbedding(blocks, kind, self._dtype)
        else:
            packed = PackedLinear(blocks, kind)
        owner, _, module = name.removesuffix(".weight").rpartition(".")
        setattr(self._model.get_submodule(owner), module, packed)
        self._state[name.removesuffix("weight") + "blocks"] = blocks

    def add_rounded(self, name: str, values: Tensor, kind: GgmlType) -> None:
        """A matrix to round to blocks. CheckpointError for values that the type cannot hold."""
        with blaming(name):
            blocks = quantize(values, kind, self._device)
        self.add_blocks(name, blocks, kind)

    def model(self) -> Mistral:
        """The model, once it has all tensors; a tied output matrix becomes the embedding."""
        model = self._model
        tied = model.config.tie_word_embeddings
        embedding = model.model.embed_tokens
        if tied and isinstance(embedding, PackedEmbedding):
            model.lm_head = TiedOutput(embedding)
        elif tied:
            self._state[OUTPUT] = self._state[EMBEDDING]
        model.load_state_dict(self._state, assign=True)
        if tied and not isinstance(embedding, PackedEmbedding):
            # One parameter again, not two that share memory.
            model.lm_head.weight = embedding.weight
        return model.to(self._device)  # moves what is not a weight: the rotary frequencies
