"""A packed matrix times the rows of a short chunk: against float64 on gguf-py's weights, and
against the plain twins.

On a CPU the kernels run in Triton's interpreter; `pytest -m gpu` adds the sizes of a 7B.
"""

import math

import packed
import pytest
import torch
from test_decode_kernels import DEVICE, normal, poisoned, whole
from test_packed_kernels import NAMES, errors, planes, random_planes

from mistral_kernels.packed.short_linear import (
    scale_rows,
    scale_rows_reference,
    short_linear,
    short_linear_reference,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The rounding of the stored result included.
CLOSE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def product(name, blocks, x, dtype=None):
    """x W^T [T, rows] on the CPU, in the dtype of x or another; nothing may be written after it."""
    y = poisoned(len(x), len(blocks), dtype=dtype or x.dtype)
    short_linear(*scale_rows(x.to(DEVICE)), planes(name, blocks), y)
    assert whole(y)[len(x) :].isnan().all()
    return y.cpu()


@pytest.mark.parametrize("name", NAMES)
def test_in_float32_the_product_is_exact(name):
    for T, blocks in ((2, packed.genuine(name)), (9, packed.random_blocks(name, 13, 2560))):
        weights = packed.exactly(name, blocks)
        x = torch.randn(T, weights.shape[1])
        assert errors(product(name, blocks, x), x, weights).max() < 2e-6


FEW_T = (1, 2, 7, 8, 9, 15, 16, 17, 32, 33, 64)
MORE_T = (3, 4, 5, 6, 10, 11, 12, 13, 14, 31, 48, 50, 63)


@pytest.mark.parametrize("T", [*FEW_T, *(pytest.param(T, marks=pytest.mark.slow) for T in MORE_T)])
def test_numbers_of_rows_from_one_to_four_passes(T):
    name = NAMES[T % len(NAMES)]
    blocks = packed.random_blocks(name, 9 + T, 256, seed=T)
    x = torch.randn(T, 256)
    assert errors(product(name, blocks, x), x, packed.exactly(name, blocks)).max() < 2e-6


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", NAMES)
def test_in_16_bits_it_is_closer_than_with_weights_rounded_to_bfloat16(name, dtype):
    for T, blocks in ((3, packed.genuine(name)), (16, packed.random_blocks(name, 21, 1280))):
        weights = packed.exactly(name, blocks)
        x = torch.randn(T, weights.shape[1]).to(dtype)
        exact = x.double() @ weights.T
        ours = (product(name, blocks, x, torch.float32) - exact).norm() / exact.norm()
        rounded = (x.double() @ weights.bfloat16().double().T - exact).norm() / exact.norm()
        assert ours < 9e-4
        assert ours < 0.6 * rounded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size",
    [
        1e-30,
        1e-4,
        1.0,
        1e30,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (1e-12, 1e4, 1e12)),
    ],
)
def test_rows_of_any_size_keep_their_digits(size, dtype):
    if dtype == torch.float16 and not 1e-5 < size < 1e4:
        pytest.skip("float16 has no such numbers, or not their sums")
    blocks = packed.random_blocks("Q5_K", 13, 256)
    weights = packed.exactly("Q5_K", blocks)
    x = torch.randn(5, 256)
    x[1] *= size  # between rows of ordinary size
    x[3] *= size
    x[3, ::7] *= 1e-3  # and a row with a few large numbers among small ones
    x = x.to(dtype)
    assert errors(product("Q5_K", blocks, x), x, weights).max() < CLOSE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_is_undone_to_the_bit_and_brings_every_row_to_the_same_size(dtype):
    # the interpreter reads bfloat16's subnormal numbers wrong
    tiny = -40 if dtype == torch.float32 else -33
    sizes = [10.0**e for e in (tiny, -30, -7, 0, 4, 30, 37)] + [0.0]
    inputs = torch.cat([normal(1, 100, scale=size) for size in sizes]).to(dtype)
    inputs[0, 5] = math.nan
    inputs[3, 6] = math.inf
    inputs[4, 7] = -math.inf
    for x, inverse in (scale_rows(inputs), scale_rows_reference(inputs)):
        assert x.dtype == (torch.float32 if dtype == torch.float32 else torch.float16)
        again = x.double() * inverse.double()[:, None]
        assert x[len(inputs) :].count_nonzero() == 0
        x = x[: len(inputs)]
        again = again[: len(inputs)]
        finite = inputs.isfinite()
        largest = torch.where(finite, x.abs(), 0).amax(1)
        assert (largest < 2**15).all()
        sizes = torch.where(finite, inputs.double().abs(), 0).amax(1)
        assert (largest[sizes > 1e-34] >= 2**14).all()
        lost = torch.where(finite, again - inputs.double(), 0).abs().amax(1)
        assert (lost <= (0 if dtype == torch.float32 else 2.0**-38) * sizes + 1e-45).all()
        assert torch.equal(again[~finite].nan_to_num(7), inputs[~finite].double().nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan_spoil_their_own_row_and_no_other(dtype):
    blocks = packed.random_blocks("Q4_K", 13, 1536)
    weights = packed.exactly("Q4_K", blocks)
    x = torch.randn(9, 1536).to(dtype)
    x[1, 1535] = math.inf
    x[4, 7] = math.nan
    x[8, 1030] = -math.inf
    ours = product("Q4_K", blocks, x)
    spoilt = [1, 4, 8]
    assert not ours[spoilt].isfinite().any()
    assert ours[4].isnan().all()
    fine = [t for t in range(9) if t not in spoilt]
    assert errors(ours[fine], x[fine], weights).max() < CLOSE[dtype]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_in_float16_a_product_out_of_range_is_infinite_as_in_pytorch():
    blocks = packed.genuine("Q8_0", 256)
    weights = packed.exactly("Q8_0", blocks)
    x = torch.randn(2, 256).half()
    x[1] *= 1e4
    exact = x.double() @ weights.T * 1e2
    blocks.view(-1, 34)[:, :2] = (
        blocks.view(-1, 34)[:, :2].contiguous().view(torch.float16) * 100
    ).view(torch.uint8)
    ours = product("Q8_0", blocks, x)
    beyond = exact.abs() > 66000
    assert beyond.any()
    assert torch.equal(ours[beyond].double(), exact[beyond].sign() * math.inf)
    assert ours[exact.abs() < 65000].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_and_plain_twin_agree(dtype):
    for T in (11, 35):
        weight, y, twin = (
            random_planes("Q6_K", 21, 1280),
            *(poisoned(T, 21, dtype=dtype) for _ in range(2)),
        )
        rows = scale_rows(normal(T, 1280, dtype=dtype))
        short_linear(*rows, weight, y)
        short_linear_reference(*rows, weight, twin)
        assert (y.double() - twin.double()).abs().max() < CLOSE[dtype] * twin.double().abs().max()


def test_what_it_cannot_do_is_named():
    with pytest.raises(
        ValueError,
        match="a chunk of 65 rows: packed matrices are multiplied as they are by 1 to 64",
    ):
        scale_rows(normal(65, 32))
    with pytest.raises(
        ValueError, match="inputs in torch.float64: the kernels take bfloat16, float16 and float32"
    ):
        scale_rows(normal(2, 32, dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [2, 9, 16, 40, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_matrices_of_a_7b_on_a_gpu(name, dtype, T):
    for columns, rows in ((4096, 14336), (14336, 4096), (4096, 32002)):
        weight = random_planes(name, rows, columns)
        scaled = scale_rows(normal(T, columns, dtype=dtype, scale=50.0))
        y, twin = (poisoned(T, rows, dtype=dtype) for _ in range(2))
        short_linear(*scaled, weight, y)
        short_linear_reference(*scaled, weight, twin)
        assert (y.double() - twin.double()).abs().max() < CLOSE[dtype] * twin.double().abs().max()
