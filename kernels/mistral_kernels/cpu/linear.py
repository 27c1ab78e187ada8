"""x W^T for many rows of x, with W in tiles, as a prompt needs it, by several threads."""

from torch import Tensor

from mistral_kernels.cpu import compiled
from mistral_kernels.cpu.activations import Activations
from mistral_kernels.cpu.layout import AT_ONCE, TILES_AT_ONCE
from mistral_kernels.cpu.pool import share
from mistral_kernels.cpu.tiles import ROWS, Tiles


def linear(x: Tensor, tiles: Tiles) -> Tensor:
    """x W^T: float32 [n, in] -> float32 [n, out]; the activations are rounded (activations.py)."""
    out = x.new_empty(len(x), ROWS * len(tiles.data))  # [n, out, padded]
    for first in range(0, len(x), AT_ONCE):
        rows = slice(first, first + AT_ONCE)
        activations = Activations(x[rows].contiguous())
        activations.round()
        multiply(activations, tiles, out[rows])
    return out[:, : tiles.rows]


def multiply(activations: Activations, tiles: Tiles, out: Tensor) -> None:
    """The product of rounded activations [n, in] with tiles, into out [n, 8 * tiles]."""
    n, width = activations.values.shape
    product = compiled.function(f"product of {tiles.kind.name}")
    sizes = width // 32, n, activations.table
    to = out.data_ptr(), out.stride(0) * out.itemsize
    weights = tiles.data.data_ptr()
    share(lambda a, b: product(weights, a, b, *sizes, *to), len(tiles.data), TILES_AT_ONCE)
