"""What every kind of checkpoint goes through: checks before anything is read, and putting the model
together.
"""

from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mistral.checkpoints.names import tensor_shapes
from mistral.config import Config
from mistral.engine.memory import format_bytes, require_memory
from mistral.errors import CheckpointError
from mistral.model import Mistral
from mistral.quantization.ggml_types import GgmlType
from mistral.quantization.packed import PackedEmbedding, PackedLinear, TiedOutput
from mistral.quantization.quantize import KINDS, Q8_0, quantize

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def check_layers(source: Path, found: int, config: Config) -> None:
    """CheckpointError where the file has another number of layers than its config.

    Before anything is made for each layer: a forged number must not keep us busy for ever.
    """
    if found != config.num_hidden_layers:
        raise CheckpointError(
            f"{source}: the weights have {found} layers, the config says {config.num_hidden_layers}"
        )


def check_tensors(
    source: Path,
    config: Config,
    shapes: Mapping[str, tuple[int, ...]],
    unknown: Iterable[str],
    spelled: Callable[[str], str] = str,
) -> None:
    """CheckpointError, with names and both shapes, where the tensors on disk are not those of the
    config.

    shapes   of the tensors on disk, under our names
    unknown  names on disk that no Mistral has
    spelled  our name to the file's, for the message
    """
    expected = tensor_shapes(config)
    optional = {OUTPUT} if config.tie_word_embeddings else set()
    wrong = [
        f"{spelled(name)} is missing"
        for name in expected
        if name not in shapes and name not in optional
    ]
    wrong += [f"{name} is not part of a Mistral" for name in sorted(unknown)]
    wrong += [
        f"{spelled(name)} is {list(shapes[name])} in the file and {list(shape)} by the config"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise CheckpointError(f"{source}: {'; '.join(wrong[:3])}{more}")


def require_room(
    source: Path,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    kinds: Mapping[str, GgmlType],
) -> None:
    """Room for the weights in `dtype`, those in `kinds` packed.

    ValueError for a dtype that weights cannot have; NotEnoughMemory, with what would fit, where
    they do not fit.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, not {dtype}")
    shapes, size = tensor_shapes(config), config.num_parameters * dtype.itemsize
    for name, kind in kinds.items():
        weights = prod(shapes[name])
        size += weights // kind.block_weights * kind.block_bytes - weights * dtype.itemsize
    what = f"{source.resolve().stem} in {dtype_name(dtype)}"
    require_memory(size, device, what, lambda free: _what_fits(config.num_parameters, free))


def quantized_kinds(source: Path, config: Config, name: str | None) -> dict[str, GgmlType]:
    """The format that each tensor is rounded to for `mistral.load(..., quantize=name)`; none for
    None.

    All matrices, as llama.cpp does it, the embedding included. The output matrix is kept finer
    there too: llama.cpp gives it Q6_K beside Q4_0, for which there is no rounding in Python, so
    here it gets Q8_0.

    ValueError for an unknown name and for rows that are no whole blocks.
    """
    if name is None:
        return {}
    if name not in KINDS:
        raise ValueError(f"quantize must be {' or '.join(map(repr, KINDS))}, not {name!r}")
    shapes = {tensor: shape for tensor, shape in tensor_shapes(config).items() if len(shape) == 2}
    kinds = dict.fromkeys(shapes, KINDS[name]) | {OUTPUT: Q8_0}
    if config.tie_word_embeddings:
        kinds[EMBEDDING] = kinds.pop(OUTPUT)
    for tensor, kind in kinds.items():
        if (columns := shapes[tensor][1]) % kind.block_weights:
            raise ValueError(
                f"{source}: {kind.name} stores blocks of {kind.block_weights} weights, and "
                f"{tensor} has rows of "
                f"{columns}: leave out quantize"
            )
    return kinds


class Parts:
    """A model that gets its tensors one by one.

    kinds  the tensors that `add` rounds to a packed format
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        kinds: Mapping[str, GgmlType],
    ):
        with torch.device("meta"):
            self._model = Mistral(config)
        self._state: dict[str, Tensor] = {}
        self._device, self._dtype, self._kinds = device, dtype, kinds

    def add(self, name: str, data: Tensor, copy: bool = False) -> None:
        """A tensor as numbers. CheckpointError for numbers that its format cannot hold.

        copy  the model must not keep `data` itself, which is mapped from a file
        """
        if name not in self._kinds:
            self._state[name] = data.to(device=self._device, dtype=self._dtype, copy=copy)
            return
        try:
            self.add_packed(
                name, quantize(data, self._kinds[name], self._device), self._kinds[name]
            )
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error

    def add_packed(self, name: str, blocks: Tensor, kind: GgmlType) -> None:
        """A matrix as packed rows on the device, which stay what they are."""
        packed = (
            PackedEmbedding(blocks, kind, self._dtype)
            if name == EMBEDDING
            else PackedLinear(blocks, kind)
        )
        owner, _, module = name.removesuffix(".weight").rpartition(".")
        setattr(self._model.get_submodule(owner), module, packed)
        self._state[name.removesuffix("weight") + "blocks"] = blocks

    def model(self) -> Mistral:
        """The model, when it has got them all; a tied output matrix becomes the embedding."""
        model, state = self._model, self._state
        tied, embedding = model.config.tie_word_embeddings, model.model.embed_tokens
        if tied and isinstance(embedding, PackedEmbedding):
            model.lm_head = TiedOutput(embedding)
        elif tied:
            state[OUTPUT] = state[EMBEDDING]
        model.load_state_dict(state, assign=True)
        if tied and not isinstance(embedding, PackedEmbedding):
            model.lm_head.weight = (
                embedding.weight
            )  # one parameter again, not two that share memory
        return model.to(self._device)  # what is no weight: the rotary frequencies


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> 'bfloat16', as config.json spells it."""
    return str(dtype).removeprefix("torch.")


def _what_fits(num_parameters: int, free: int) -> str:
    for dtype in (torch.float32, torch.bfloat16):
        if num_parameters * dtype.itemsize <= free:
            return (
                f"in {dtype_name(dtype)} ({format_bytes(num_parameters * dtype.itemsize)}) it "
                f"would fit"
            )
    return (
        f"at 2 bytes a weight {free // 2 / 1e9:.2f} billion weights would fit, and it has "
        f"{num_parameters / 1e9:.2f}"
    )
