"""A packed matrix times the few rows of a short chunk, or of a step of many rows.

    y = x W^T          x [T, in], T from 1 to 64

As in a decode step, no weight is unpacked to memory.

Short chunks are a guess together with the last token (mistral/engine/speculation.py), tokens that a
grammar forces, a short message, and, of any prompt, the rows whose logits are needed. A step of
more than 16 rows is multiplied here, too (decode/many_rows.py). 16 rows take one pass over the
bytes of the matrix, 64 take four, one after another: the CTAs that run at the same time share their
rows of x in the caches.

The tile multiplies packed weights in float16 (in float32 if x is). bfloat16 has fewer digits and a
far larger range. So each row is multiplied by the power of two that brings its largest value to
between 2^14 and 2^15, and the sums are divided by it. A bfloat16 value loses digits only below
2^-31 of its row's largest. Infinities and NaN are kept and do not count as largest; a sum over an
infinity is infinite or NaN, not always as in PyTorch.

Bytes: those of W in every pass (7B, Q4_K_M: 4.4 GB, 17.6 for 64 rows; unpacked, written and read
again they are 33).

Versions (times not measured)
  unpack, then cuBLAS          for longer chunks, see packed/dequantize.py. By bytes 7 passes would
                               still be faster; by instructions a pass takes up to three quarters of
                               the time of its bytes, which the L2 cache does not shorten. A limit
                               of 4 leaves room for error on both sides
  this one                     2 launches; matrices with the same input share the first, and the
                               second, too, if their rows are whole tiles (joint_linear.py). The
                               numbers of rows of x and of W are not constants: every T up to 8 runs
                               the same code, and so does every T above
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_kernels.decode.matvec import MAX_BATCH, MAX_ROWS, TILE, tile_launch, tile_rows
from mistral_kernels.packed.planes import Planes, dense
from mistral_kernels.packed.tile import matrix_tile, operands
from mistral_kernels.portable import TRITON_DTYPES, Launch, arch_of, require, spaced


def scale_rows_reference(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """`scale_rows` in plain PyTorch."""
    x, inverse = _new(inputs)
    wide = x.new_zeros(x.shape, dtype=torch.float32)
    wide[: len(inputs)] = inputs
    largest = torch.where(wide.isfinite(), wide.abs(), 0.0).amax(-1)  # [M]
    exponent = (15 - torch.frexp(largest).exponent).clamp(max=126)  # largest < 2^frexp
    inverse.copy_(torch.exp2(-exponent.float()))
    x.copy_(wide * torch.exp2(exponent.float())[:, None])
    return x, inverse


@triton.jit(do_not_specialize=["T"])
def scale_rows_kernel(inputs, x, inverse, T, stride, COLUMNS: tl.constexpr):
    """One CTA: one row; rows >= T become zeros."""
    row = tl.program_id(0)
    column = tl.arange(0, triton.next_power_of_2(COLUMNS))
    at = row * COLUMNS + column
    real = column < COLUMNS
    v = tl.load(inputs + row * stride + column, mask=real & (row < T), other=0.0).to(tl.float32)
    size = tl.abs(v)
    largest = tl.max(tl.where(size < float("inf"), size, 0.0), 0)
    # The scale is 2^(14 - exponent of the largest). It and its inverse are built from their bits,
    # 127 + exponent.
    scale = tl.minimum(127 + 14 + 127 - (largest.to(tl.int32, bitcast=True) >> 23), 253)
    v = v * (scale << 23).to(tl.float32, bitcast=True)
    tl.store(x + at, v.to(x.dtype.element_ty), mask=real)
    tl.store(inverse + row, ((254 - scale) << 23).to(tl.float32, bitcast=True))


def scale_launch(T: int, columns: int) -> Launch:
    """Shape of the launch that scales T rows."""
    return Launch((_padded(T),), dict(COLUMNS=columns), dict(num_warps=8))


def scale_rows(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The inputs of packed matrices: [T, in] -> x [R, in] and inverse, fp32 [R].

    inputs may be columns of a wider tensor.

    R is 8, 16, 32, 48 or 64. x is fp32 if the inputs are, else fp16. Row t is
    inputs[t] / inverse[t]; rows >= T are zeros.

    Raises ValueError for more than 64 rows, for dtypes other than bfloat16, float16 and float32,
    and for rows that are not contiguous.
    """
    T, columns = inputs.shape
    require(
        1 <= T <= MAX_ROWS,
        f"a chunk of {T} rows: packed matrices are multiplied as they are by 1 to {MAX_ROWS}",
    )
    require(
        inputs.dtype in TRITON_DTYPES,
        f"inputs in {inputs.dtype}: the kernels take bfloat16, float16 and float32",
    )
    arch_of(inputs)  # raises if no kernel can run on this device
    x, inverse = _new(inputs)
    inputs, stride = spaced("inputs", inputs)
    scale_launch(T, columns).run(scale_rows_kernel, inputs, x, inverse, T, stride)
    return x, inverse


def _new(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the results of `scale_rows`."""
    T, columns = inputs.shape
    dtype = torch.float32 if inputs.dtype == torch.float32 else torch.float16
    x = torch.empty(_padded(T), columns, dtype=dtype, device=inputs.device)
    return x, torch.empty(len(x), dtype=torch.float32, device=inputs.device)


def _padded(T: int) -> int:
    """T rounded up to whole tiles."""
    return 8 if T <= 8 else triton.cdiv(T, MAX_BATCH) * MAX_BATCH


def short_linear_reference(
    x: Tensor, inverse: Tensor | None, weight: Tensor | Planes, outputs: Tensor
) -> None:
    """`short_linear` in plain PyTorch."""
    scale = 1.0 if inverse is None else inverse[:, None]
    outputs.copy_(((x.float() @ dense(weight).T) * scale)[: len(outputs)])


@triton.jit(do_not_specialize=["T", "out_features"])
def short_linear_kernel(
    x, inverse, weight, outputs, T, out_features,
    B: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, CHUNKS: tl.constexpr,
    M: tl.constexpr, ARCH: tl.constexpr, KIND: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One CTA: 16 rows of the matrix, and the 8 or 16 rows of x of one pass.

    Scaled rows are padded to whole passes. Of others the last pass takes the last 16, and stores
    those that the pass before it has not stored.
    """
    first = tl.program_id(0) * 16
    rows = tl.minimum(tile_rows(first, first + 8, WARPS), out_features - 1)
    stored = tl.program_id(1) * M  # rows of the passes before this one
    before = stored if SCALED else tl.minimum(stored, T - M)
    x += before * COLUMNS
    y = matrix_tile(x, weight, rows, KIND, B, COLUMNS, WARPS, CHUNKS, M, ARCH)  # [16, M]
    t = before + tl.arange(0, M)[None, :]
    if SCALED:
        y = y * tl.load(inverse + t)
    row = first + tl.arange(0, 16)[:, None]
    real = (t >= stored) & (t < T) & (row < out_features)
    tl.store(outputs + t * out_features + row, y.to(outputs.dtype.element_ty), mask=real)


def launch(
    T: int,
    columns: int,
    out_features: int,
    dtype: torch.dtype,
    arch: int,
    kind: str,
    scaled: bool = True,
) -> Launch:
    """Shape of the launch; dtype: of x. ValueError for a dtype that the kernel cannot do."""
    tile = tile_launch(
        triton.cdiv(out_features, TILE), min(_padded(T), MAX_BATCH), columns, dtype, arch, (kind,)
    )
    grid = (*tile.grid, triton.cdiv(_padded(T), MAX_BATCH))
    warps = min(tile.constants["WARPS"], 4)
    # By default the assembler aims at 128 registers, and spills. With 168 it spills for 16 rows,
    # and with 192 in Q8_0.
    most = 224 if kind == "Q8_0" else 192
    options = dict(num_warps=warps, num_stages=1, maxnreg=168 if T <= 8 else most)
    constants = tile.constants | dict(KIND=kind, WARPS=warps, SCALED=scaled)
    return tile._replace(grid=grid, constants=constants, options=options)


def short_linear(
    x: Tensor, inverse: Tensor | None, weight: Tensor | Planes, outputs: Tensor
) -> None:
    """Write the products of a matrix and some rows.

    x, inverse  from `scale_rows`; or the rows themselves, 16 or more, and None: fp16 or fp32
                beside a packed matrix
    weight      [out, in], packed or plain
    outputs     [T, out] in any of the kernels' dtypes, written; a value too large for fp16 becomes
                infinite

    A row of the outputs has the same bits whatever the other rows are, and how many.

    Raises ValueError for a matrix of 2^31 bytes, and for fewer than 16 rows that are not scaled.
    """
    T, out_features = outputs.shape
    scaled = inverse is not None
    require(scaled or T >= MAX_BATCH, f"{T} rows: fewer than {MAX_BATCH} must be scaled")
    (matrix,), (kind,), dtype = operands(x, weight)
    shape = launch(T, weight.shape[1], out_features, dtype, arch_of(x), kind, scaled)
    factors = inverse if scaled else x  # not read
    shape.run(short_linear_kernel, x, factors, matrix, outputs, T, out_features)
