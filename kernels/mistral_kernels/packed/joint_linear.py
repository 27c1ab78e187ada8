"""`short_linear` for two or three packed matrices with the same input, in one launch.

    y = x [W1; W2; W3]^T          x [T, in], T from 1 to 64

Q, K and V of a chunk, and gate and up. Alone K and V of a 7B have 64 CTAs each, for 132
multiprocessors; together with Q they are 384. A tile belongs to one of the matrices, and each
quantization type is a branch of its own. The results are columns of one tensor, which the kernels
after it take as they are.

Versions (times not measured; predictions in docs/benchmarks/README.md)
  a launch for each matrix     3 + 2 in a layer
  this one                     1 + 1
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_kernels.decode.matvec import MAX_BATCH, TILE, tile_rows
from mistral_kernels.packed import short_linear
from mistral_kernels.packed.dequantize import Matrix
from mistral_kernels.packed.planes import Planes
from mistral_kernels.packed.tile import operands, tile_of_three
from mistral_kernels.portable import Launch, arch_of, require

KIND_NAMES = ("FIRST_KIND", "SECOND_KIND", "THIRD_KIND")


@triton.jit(do_not_specialize=["T", "second_at", "third_at", "out_features"])
def joint_linear_kernel(
    x, inverse, first, second, third, outputs, T, second_at, third_at, out_features,
    B: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, CHUNKS: tl.constexpr,
    M: tl.constexpr, ARCH: tl.constexpr, FIRST_KIND: tl.constexpr, SECOND_KIND: tl.constexpr,
    THIRD_KIND: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One CTA: 16 rows of one matrix, and the 8 or 16 rows of x of one pass.

    The passes are those of `short_linear_kernel`.

    second_at, third_at  in which row of all matrices together the second and the third begin
    """
    # 1. The matrix, and the tile's rows in it.
    row = tl.program_id(0) * 16
    is_first = row < second_at
    is_third = row >= third_at
    own = row - tl.where(is_first, 0, tl.where(is_third, third_at, second_at))
    rows = tile_rows(own, own + 8, WARPS)

    # 2. The product with the rows of x of this pass: fp32 [16, M].
    stored = tl.program_id(1) * M  # rows of the passes before this one
    before = stored if SCALED else tl.minimum(stored, T - M)
    y = tile_of_three(
        is_first, is_third, x + before * COLUMNS, first, second, third, rows, FIRST_KIND,
        SECOND_KIND, THIRD_KIND, B, COLUMNS, WARPS, CHUNKS, M, ARCH,
    )  # fmt: skip

    # 3. The store.
    t = before + tl.arange(0, M)[None, :]
    if SCALED:
        y = y * tl.load(inverse + t)
    at = t * out_features + row + tl.arange(0, 16)[:, None]
    tl.store(outputs + at, y.to(outputs.dtype.element_ty), mask=(t >= stored) & (t < T))


def is_joint(matrices: Sequence[Matrix]) -> bool:
    """Whether `joint_linear` takes these matrices together."""
    return 2 <= len(matrices) <= 3 and all(
        isinstance(matrix, Planes) and matrix.rows % TILE == 0 for matrix in matrices
    )


def launch(
    T: int,
    columns: int,
    out_features: int,
    dtype: torch.dtype,
    arch: int,
    kinds: Sequence[str],
    scaled: bool = True,
) -> Launch:
    """Shape of the launch; kinds: of two or three matrices, of out_features rows together."""
    one = short_linear.launch(T, columns, out_features, dtype, arch, _slowest(kinds), scaled)
    constants = {name: value for name, value in one.constants.items() if name != "KIND"}
    constants |= dict(zip(KIND_NAMES, [*kinds, kinds[-1]]))
    return one._replace(constants=constants)


def _slowest(kinds: Sequence[str]) -> str:
    """The type whose tile takes the most registers."""
    return "Q8_0" if "Q8_0" in kinds else kinds[0]


def joint_linear(
    x: Tensor, inverse: Tensor | None, weights: Sequence[Planes], outputs: Tensor
) -> None:
    """Write the products of two or three packed matrices and some rows, side by side.

    outputs  [T, rows of all matrices], written

    The other arguments, and the bits, are those of `short_linear`. Raises ValueError as it does,
    and for matrices that `is_joint` refuses.
    """
    require(is_joint(weights), f"a launch takes two or three packed matrices of {TILE} n rows")
    T, out_features = outputs.shape
    scaled = inverse is not None
    require(scaled or T >= MAX_BATCH, f"{T} rows: fewer than {MAX_BATCH} must be scaled")
    matrices, kinds, dtype = operands(x, *weights)
    shape = launch(T, weights[0].columns, out_features, dtype, arch_of(x), kinds, scaled)
    second_at = weights[0].rows
    third_at = second_at + weights[1].rows  # after the last row, if there are only two
    matrices = [*matrices, matrices[-1]][:3]
    factors = inverse if scaled else x  # not read
    sizes = (T, second_at, third_at, out_features)
    shape.run(joint_linear_kernel, x, factors, *matrices, outputs, *sizes)


def joint_linear_reference(
    x: Tensor, inverse: Tensor | None, weights: Sequence[Planes], outputs: Tensor
) -> None:
    """`joint_linear` in plain PyTorch."""
    short_linear.short_linear_reference(x, inverse, tuple(weights), outputs)
