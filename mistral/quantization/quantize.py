"""Numbers to blocks: Q8_0 and Q4_0, with whole tensors on whatever device the numbers are.

`blocks` below is float32 [n, 32], the result uint8 [n, bytes of a block]; the layouts are drawn in
dequantize.py. The rounding is gguf-py's and so ggml's, to the byte.

Source: gguf-py, quants.py (`Q8_0.quantize_blocks`, `Q4_0.quantize_blocks`)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mistral.errors import CheckpointError
from mistral.quantization.ggml_types import GGML_TYPES, GgmlType
from mistral.quantization.packed import weights_at_once

Q4_0, Q8_0 = GGML_TYPES[2], GGML_TYPES[8]

KINDS = {"q8_0": Q8_0, "q4_0": Q4_0}


def quantize(weights: Tensor, kind: GgmlType, device: torch.device) -> Tensor:
    """Rows of numbers [rows, weights] to packed rows on `device`, uint8 [rows, bytes of a row].

    Some rows at a time, so that beside the result only little memory is used. CheckpointError for
    numbers that the format cannot hold: infinite ones, nan, and what is too large for a float16
    scale.
    """
    rows, columns = weights.shape
    packed = torch.empty(
        rows, columns // kind.block_weights * kind.block_bytes, dtype=torch.uint8, device=device
    )
    at_once, largest = max(1, weights_at_once(device) // columns), torch.zeros((), device=device)
    for to, part in zip(packed.split(at_once), weights.split(at_once)):
        blocks = part.to(device).float().reshape(-1, kind.block_weights)
        to.copy_(FUNCTIONS[kind](blocks).view(to.shape))
        largest = torch.maximum(largest, blocks.abs().max())
    limit = 65504 * (
        127 if kind == Q8_0 else 8
    )  # the largest float16 as scale, times the largest q
    if not largest <= limit:  # true for nan, too
        raise CheckpointError(
            f"{kind.name} holds numbers up to {limit:,}, and there is {largest.item()}"
        )
    return packed


def q8_0(blocks: Tensor) -> Tensor:
    """The largest of a block becomes 127 or -127; halves are rounded away from zero."""
    highest = blocks.abs().amax(1, keepdim=True)
    d = highest / torch.full_like(
        highest, 127
    )  # a GPU would multiply by 1/127 if this were a plain number
    scaled = blocks * _inverse(d)
    size = scaled.abs()
    q = scaled.sign() * (size.floor() + (2 * (size - size.floor())).floor())
    return torch.cat((_bytes(d), q.to(torch.int8).view(torch.uint8)), dim=1)


def q4_0(blocks: Tensor) -> Tensor:
    """The largest of a block, with its sign, becomes -8, stored as 0; of two that are equally large
    the first.
    """
    d = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    q = (blocks * _inverse(d) + 8.5).clamp(0, 15).to(torch.uint8)
    return torch.cat((_bytes(d), q[:, :16] | q[:, 16:] << 4), dim=1)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0, 1 / d)


def _bytes(d: Tensor) -> Tensor:
    """float32 [n, 1] as float16, uint8 [n, 2]."""
    return d.half().view(torch.uint8)


FUNCTIONS: dict[GgmlType, Callable[[Tensor], Tensor]] = {Q8_0: q8_0, Q4_0: q4_0}
