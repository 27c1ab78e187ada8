"""What every kind of checkpoint goes through: checks before anything is read, and putting the model together."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mistral.checkpoints.names import tensor_shapes
from mistral.config import Config
from mistral.errors import CheckpointError
from mistral.memory import format_bytes, require_memory
from mistral.model import Mistral
from mistral.quantization.packed import PackedEmbedding, TiedOutput

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def check_layers(source: Path, found: int, config: Config) -> None:
    """CheckpointError where the file has another number of layers than its config.

    Before anything is made for each layer: a forged number must not keep us busy for ever.
    """
    if found != config.num_hidden_layers:
        raise CheckpointError(f"{source}: the weights have {found} layers, the config says {config.num_hidden_layers}")


def check_tensors(
    source: Path,
    config: Config,
    shapes: Mapping[str, tuple[int, ...]],
    unknown: Iterable[str],
    spelled: Callable[[str], str] = str,
) -> None:
    """CheckpointError, with names and both shapes, where the tensors on disk are not those of the config.

    shapes   of the tensors on disk, under our names
    unknown  names on disk that no Mistral has
    spelled  our name to the file's, for the message
    """
    expected = tensor_shapes(config)
    optional = {OUTPUT} if config.tie_word_embeddings else set()
    wrong = [f"{spelled(name)} is missing" for name in expected if name not in shapes and name not in optional]
    wrong += [f"{name} is not part of a Mistral" for name in sorted(unknown)]
    wrong += [
        f"{spelled(name)} is {list(shapes[name])} in the file and {list(shape)} by the config"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise CheckpointError(f"{source}: {'; '.join(wrong[:3])}{more}")


def skeleton(config: Config) -> Mistral:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return Mistral(config)


def require_room(
    source: Path, config: Config, device: torch.device, dtype: torch.dtype, size: int | None = None
) -> None:
    """Room for the weights in `dtype`, or for `size` bytes where some of them stay packed.

    ValueError for a dtype that weights cannot have; NotEnoughMemory, with what would fit, where they do not fit.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, not {dtype}")
    what = f"{source.resolve().stem} in {dtype_name(dtype)}"
    size = config.num_parameters * dtype.itemsize if size is None else size
    require_memory(size, device, what, lambda free: _what_fits(config.num_parameters, free))


def assemble(model: Mistral, state: dict[str, Tensor], device: torch.device) -> Mistral:
    """Give the skeleton its tensors, by name; a tied output matrix becomes the embedding."""
    tied = model.config.tie_word_embeddings
    embedding = model.model.embed_tokens
    if tied and isinstance(embedding, PackedEmbedding):
        model.lm_head = TiedOutput(embedding)
    elif tied:
        state[OUTPUT] = state[EMBEDDING]
    model.load_state_dict(state, assign=True)
    if tied and not isinstance(embedding, PackedEmbedding):
        model.lm_head.weight = embedding.weight  # one parameter again, not two that share memory
    return model.to(device)  # what is no weight: the rotary frequencies


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> 'bfloat16', as config.json spells it."""
    return str(dtype).removeprefix("torch.")


def _what_fits(num_parameters: int, free: int) -> str:
    for dtype in (torch.float32, torch.bfloat16):
        if num_parameters * dtype.itemsize <= free:
            return f"in {dtype_name(dtype)} ({format_bytes(num_parameters * dtype.itemsize)}) it would fit"
    return f"at 2 bytes a weight {free // 2 / 1e9:.2f} billion weights would fit, and it has {num_parameters / 1e9:.2f}"
