"""Packed matrices for the tests: genuine ones, and random ones with scales as models have them."""

import numpy as np
import pytest
import small
import torch

from mistral.quantization.ggml_types import GGML_TYPES
from mistral_kernels.packed.planes import FAST_KINDS

KINDS = {kind.name: kind for kind in GGML_TYPES.values() if kind.name in FAST_KINDS}
# The offsets of a block's fp16 values
_SCALES = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def genuine(name, columns=1536):
    """A real matrix, packed by llama.cpp: uint8 [16, bytes of `columns` weights], columns <= 3,072."""
    matrices = np.load(small.DATA / "packed_matrices.npz")
    kind = KINDS[name]
    blocks = torch.from_numpy(matrices[name])
    row_bytes = columns // kind.block_weights * kind.block_bytes
    return torch.cat((blocks, blocks.flip(0)), dim=1)[:, :row_bytes].contiguous()


def random_bytes(name, rows, columns, seed=0):
    """Random bytes: uint8 [rows, bytes of a row]."""
    kind = KINDS[name]
    generator = torch.Generator().manual_seed(seed)
    size = rows, columns // kind.block_weights * kind.block_bytes
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)


def random_blocks(name, rows, columns, seed=0, scale=1e-3):
    """Random bytes, except the scales: those are `scale` times 0.1 to 1.1, of either sign."""
    blocks = random_bytes(name, rows, columns, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for at in _SCALES[name]:
        view = blocks.view(-1, KINDS[name].block_bytes)[:, at : at + 2]
        d = (torch.rand(len(view), 1, generator=generator) + 0.1) * scale
        sign = torch.randint(0, 2, d.shape, generator=generator) * 2 - 1
        view.copy_((d * sign).half().view(torch.uint8))
    return blocks


def scales(name, blocks):
    """All fp16 scales d of some blocks, flat."""
    at = _SCALES[name][0]
    d = blocks.reshape(-1, KINDS[name].block_bytes)[:, at : at + 2]
    return d.contiguous().view(torch.float16).flatten()


def put_scale(blocks, name, row, value, block=0):
    """Write a scale into one block of a row."""
    kind = KINDS[name]
    at = block * kind.block_bytes + _SCALES[name][0]
    blocks[row, at : at + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)


def exactly(name, blocks):
    """The weights as gguf-py unpacks them, float64 [rows, columns]; skips the test without it."""
    gguf = pytest.importorskip("gguf")
    with np.errstate(all="ignore"):
        weights = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name])
    return torch.from_numpy(weights).double()
