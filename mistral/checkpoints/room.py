"""Whether a checkpoint's weights fit into memory, in which dtype, and what would fit instead."""

import warnings
from collections.abc import Mapping
from math import prod

import torch

from mistral.checkpoints.assemble import rounded_types
from mistral.checkpoints.names import EMBEDDING
from mistral.checkpoints.reader import Reader, StoredTensor, dtype_name
from mistral.config import Config
from mistral.engine.memory import has_room, require_memory
from mistral.files import format_bytes
from mistral.quantization.ggml_types import GgmlType
from mistral.quantization.quantize import KINDS

_SEQUENCE = 4096  # tokens of the one sequence that float32 must leave room for


def weight_bytes(
    stored: Mapping[str, StoredTensor], dtype: torch.dtype, kinds: Mapping[str, GgmlType]
) -> int:
    """The memory of all weights.

    kinds  types of the matrices that are packed; all other tensors are in `dtype`
    """
    size = 0
    for name, tensor in stored.items():
        weights = prod(tensor.shape)
        if (kind := kinds.get(name)) is None:
            size += weights * dtype.itemsize
        else:
            size += weights // kind.block_weights * kind.block_bytes
    return size


def packed_blocks(stored: Mapping[str, StoredTensor]) -> dict[str, GgmlType]:
    """The matrices that are quantized in the file, and their types."""
    return {
        name: tensor.block_type
        for name, tensor in stored.items()
        if tensor.block_type is not None and len(tensor.shape) == 2
    }


def default_dtype(
    reader: Reader,
    config: Config,
    stored: Mapping[str, StoredTensor],
    device: torch.device,
    kinds: Mapping[str, GgmlType],
) -> torch.dtype:
    """The dtype to load in if none was asked for.

    Elsewhere than on a CPU it is the checkpoint's own, bfloat16 for a quantized one. On a CPU it is
    float32 if that fits into the free memory: the weights, and twice the cache of one sequence of
    4,096 tokens (or the window, if it is shorter), for the cache and for activations. Otherwise it
    is the checkpoint's own there too, with a warning.

    kinds  types of the matrices that are packed: float32 makes the weights no larger then
    """
    own = torch.bfloat16 if packed_blocks(stored) else stored[EMBEDDING].dtype
    if device.type != "cpu":
        return own
    if kinds or own.itemsize >= torch.float32.itemsize:
        return torch.float32
    lengths = (_SEQUENCE, config.sliding_window, config.max_position_embeddings)
    slots = min(length for length in lengths if length is not None)
    size = weight_bytes(stored, torch.float32, {})
    if has_room(size + 2 * config.cache_bytes(slots, torch.float32.itemsize), device):
        return torch.float32
    own_size = weight_bytes(stored, own, {})
    if has_room(own_size, device):
        forms = {form: n for form, n in _smaller_forms(reader, stored).items() if n < own_size}
        warnings.warn(
            f"{reader.label()} needs {format_bytes(size)} in float32, the default on a CPU, and "
            f"does not fit into the free memory with room for a sequence: it is loaded in "
            f"{dtype_name(own)} ({format_bytes(own_size)}). Less memory: {_listed(forms)}"
            + ("" if packed_blocks(stored) else ", or a quantized GGUF with packed=True"),
            stacklevel=4,
        )
    return own


def require_room(
    reader: Reader,
    stored: Mapping[str, StoredTensor],
    device: torch.device,
    dtype: torch.dtype,
    kinds: Mapping[str, GgmlType],
) -> None:
    """Raises NotEnoughMemory, which tells what would fit, if the weights do not fit on the device.

    kinds  types of the matrices that are packed; all other tensors are in `dtype`
    """
    size = weight_bytes(stored, dtype, kinds)

    def what_fits(free: int) -> str:
        smaller = {form: n for form, n in _smaller_forms(reader, stored).items() if n < size}
        fitting = {form: n for form, n in smaller.items() if n <= free}
        if fitting:
            return f"it would fit with {_listed(fitting)}"
        if smaller:
            return f"it does not fit with {_listed(smaller)} either"
        return "it has no smaller form"

    require_memory(size, device, f"{reader.label()} in {dtype_name(dtype)}", what_fits)


def _smaller_forms(reader: Reader, stored: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Arguments of `mistral.load` that make a checkpoint smaller -> bytes of its weights then."""
    sizes = {"dtype=torch.bfloat16": weight_bytes(stored, torch.bfloat16, {})}
    if blocks := packed_blocks(stored):
        return sizes | {"packed=True": weight_bytes(stored, torch.float32, blocks)}
    for name in KINDS:
        try:
            kinds = rounded_types(reader.path, stored, name)
        except ValueError:  # rows that are not whole blocks
            continue
        sizes[f'quantize="{name}"'] = weight_bytes(stored, torch.float32, kinds)
    return sizes


def _listed(sizes: Mapping[str, int]) -> str:
    """packed=True (4.37 GB) or ..."""
    return " or ".join(f"{form} ({format_bytes(size)})" for form, size in sizes.items())
