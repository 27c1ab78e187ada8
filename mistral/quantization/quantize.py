"""Round values to blocks of Q8_0 and Q4_0, with tensor operations on any device.

Below, `blocks` is float32 [n, 32], and the result is uint8 [n, bytes of a block]; dequantize.py
draws the layouts. The rounding is gguf-py's and so ggml's, to the byte.

Source: gguf-py, quants.py (`Q8_0.quantize_blocks`, `Q4_0.quantize_blocks`)
"""

import torch
from torch import Tensor

from mistral.errors import CheckpointError
from mistral.quantization.ggml_types import GGML_TYPES, GgmlType
from mistral.quantization.packed import weights_at_once

Q4_0 = GGML_TYPES[2]
Q8_0 = GGML_TYPES[8]

KINDS = {"q8_0": Q8_0, "q4_0": Q4_0}


def quantize(weights: Tensor, kind: GgmlType, device: torch.device) -> Tensor:
    """Round rows of values [rows, weights] to packed rows on `device`, uint8 [rows, row bytes].

    Works on some rows at a time, so that it needs little memory in addition to the result. Raises
    CheckpointError for values that the type cannot hold: infinite ones, NaN, and those whose scale
    is too large for float16.
    """
    rows, columns = weights.shape
    row_bytes = columns // kind.block_weights * kind.block_bytes
    packed = torch.empty(rows, row_bytes, dtype=torch.uint8, device=device)
    at_once = max(1, weights_at_once(device) // columns)
    largest = torch.zeros((), device=device)
    for to, part in zip(packed.split(at_once), weights.split(at_once)):
        blocks = part.to(device).float().reshape(-1, kind.block_weights)
        to.copy_(_FUNCTIONS[kind](blocks).view(to.shape))
        largest = torch.maximum(largest, blocks.abs().max())
    # The largest float16 as the scale, times the largest q.
    limit = 65504 * (127 if kind == Q8_0 else 8)
    if not largest <= limit:  # also true for NaN
        raise CheckpointError(
            f"{kind.name} holds numbers up to {limit:,}, and there is {largest.item()}"
        )
    return packed


def _q8_0(blocks: Tensor) -> Tensor:
    """The largest of a block becomes 127 or -127; halves are rounded away from zero."""
    highest = blocks.abs().amax(1, keepdim=True)
    # A tensor: a GPU would multiply by 1/127 if this were a Python number.
    d = highest / torch.full_like(highest, 127)
    scaled = blocks * _inverse(d)
    size = scaled.abs()
    q = scaled.sign() * (size.floor() + (2 * (size - size.floor())).floor())
    return torch.cat((_bytes(d), q.to(torch.int8).view(torch.uint8)), dim=1)


def _q4_0(blocks: Tensor) -> Tensor:
    """The largest of a block, with its sign, becomes -8, stored as 0; the first of equal ones."""
    d = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    q = (blocks * _inverse(d) + 8.5).clamp(0, 15).to(torch.uint8)
    return torch.cat((_bytes(d), q[:, :16] | q[:, 16:] << 4), dim=1)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0, 1 / d)


def _bytes(d: Tensor) -> Tensor:
    """float32 [n, 1] as float16, uint8 [n, 2]."""
    return d.half().view(torch.uint8)


_FUNCTIONS = {Q8_0: _q8_0, Q4_0: _q4_0}
