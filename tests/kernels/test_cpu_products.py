"""The CPU's tiles and products against gguf-py's weights in float64."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import small
import torch

pytest.importorskip("numba")
gguf = pytest.importorskip("gguf")

from mistral.quantization.ggml_types import GGML_TYPES  # noqa: E402
from mistral_kernels.cpu import compiled, linear  # noqa: E402
from mistral_kernels.cpu.activations import Activations  # noqa: E402
from mistral_kernels.cpu.blocks import FORMS  # noqa: E402
from mistral_kernels.cpu.tiles import KINDS, repack, restore, restore_rows, tiles_shape  # noqa: E402
from mistral_kernels.cpu.weights import InTiles  # noqa: E402

TYPES = {kind.name: kind for kind in GGML_TYPES.values()}
GENUINE = np.load(small.DATA / "gguf/genuine_blocks.npz")  # packed by llama.cpp
# One of each encoding and each form of scales; the others differ in one of the two alone.
SHORT = ("Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS")
EACH = [pytest.param(k, marks=() if k in SHORT else pytest.mark.slow, id=k) for k in KINDS]
# Where the fp16 scales are in a block, and their size for weights near 0.02
SCALES = {
    "Q4_0": ((0, 4e-3),),
    "Q4_1": ((0, 4e-3), (2, -0.03)),
    "Q5_0": ((0, 2e-3),),
    "Q5_1": ((0, 2e-3), (2, -0.03)),
    "Q8_0": ((0, 3e-4),),
    "Q2_K": ((80, 9e-4), (82, 2e-3)),
    "Q3_K": ((108, 4e-4),),
    "Q4_K": ((0, 1.3e-4), (2, 1e-3)),
    "Q5_K": ((0, 7e-5), (2, 1e-3)),
    "Q6_K": ((208, 1.7e-5),),
    "IQ4_NL": ((0, 3e-4),),
    "IQ4_XS": ((0, 1.5e-5),),
}


@pytest.fixture(autouse=True, scope="module")
def compiled_together():
    """All that is compiled here, by several processes, if no earlier run has done it."""
    products = [f"product of {kind}" for kind in (*SHORT, "Q4_0")]
    products += [f"row of {kind}" for kind in SHORT]
    tiles = [f"tiles of {kind}" for kind in KINDS]
    compiled.prepare([*products, *tiles, "plain product of bfloat16", "round rows"])


def rounded_rows(x):
    """Rows of activations [C, k] as products take them."""
    rounded = Activations(x)
    rounded.round()
    return rounded


def blocks_of(kind, rows, columns, seed=0):
    """Random bytes with scales as models have them: uint8 [rows, bytes of a row]."""
    generator = torch.Generator().manual_seed(seed)
    size = rows, columns // TYPES[kind].block_weights * TYPES[kind].block_bytes
    blocks = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    for at, scale in SCALES[kind]:
        field = blocks.view(-1, TYPES[kind].block_bytes)[:, at : at + 2]
        d = (torch.rand(len(field), 1, generator=generator) + 0.5) * scale
        field.copy_(d.half().view(torch.uint8))
    return blocks


def exactly(kind, blocks):
    """The weights as gguf-py unpacks them, in float64."""
    weights = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(weights).double()


def multiplied(kernel, data, x, tiles):
    """The product of `tiles` tiles with x [C, k]: float32 [C, 8 * tiles]."""
    product = compiled.function(kernel)
    rounded = rounded_rows(x)
    out = torch.full((len(x), 8 * tiles), torch.nan)
    table = rounded.table
    stride = 4 * out.shape[1]
    half = tiles // 2  # as two threads would
    for first, last in ((0, half), (half, tiles)):
        groups = x.shape[1] // 32
        product(data.data_ptr(), first, last, groups, len(x), table, out.data_ptr(), stride)
    return out


def distance(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [8, 13])
def test_tiles_hold_the_blocks_to_the_bit(kind, rows):
    size = 3 * TYPES[kind].block_bytes, rows
    blocks = torch.randint(0, 256, size, dtype=torch.uint8).T  # not contiguous
    tiles = repack(blocks, TYPES[kind])
    assert torch.equal(restore(tiles), blocks)
    which = torch.tensor([0, rows - 1, 3, 3])
    assert torch.equal(restore_rows(tiles, which), blocks[which])
    assert tiles.data.numel() == -(-rows // 8) * 8 * blocks.shape[1]  # not a byte more


def test_a_product_with_several_rows_reads_nothing_after_the_last_tile():
    columns = 3 * 32  # of the 8 groups that are unpacked at a time
    blocks = blocks_of("Q8_0", 16, columns)
    size = blocks.numel()
    memory = torch.full((size + 8192,), 0xFF, dtype=torch.uint8)  # scales that are NaN
    data = memory[:size].view(tiles_shape(blocks))
    repack(blocks, TYPES["Q8_0"], data)
    got = multiplied("product of Q8_0", data, torch.ones(5, columns), tiles=2)
    want = exactly("Q8_0", blocks).sum(-1)
    assert (got[:, :16] - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("kind", EACH)
def test_a_product_is_within_3e_5_of_float64(kind):
    rows, columns = 40, 768
    blocks = blocks_of(kind, rows, columns)
    weights = exactly(kind, blocks)
    tiles = repack(blocks, TYPES[kind])
    generator = torch.Generator().manual_seed(1)
    for C in (1, 2, 5, 16, 64):
        x = torch.randn(C, columns, generator=generator)
        got = multiplied(f"product of {kind}", tiles.data, x, 5)
        assert distance(got, x.double() @ weights.T) < 3e-5, C
        if C > 1:  # a row of activations has the result that it has alone, up to rounding
            alone = multiplied(f"product of {kind}", tiles.data, x[1:2], 5)
            assert distance(got[1:2], alone) < 1e-6


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("weight, scale", [(0x00, 0x80), (0xFF, 0x7F), (0xFF, 0xFF)])
def test_the_largest_weights_and_activations_overflow_no_sum_of_integers(kind, weight, scale):
    blocks = torch.full_like(blocks_of(kind, 16, 512), weight)
    each = blocks.view(-1, TYPES[kind].block_bytes)
    for field in FORMS[kind].copied:
        if field.unit == 1:
            each[:, field.at : field.at + field.count] = scale
    for at, value in SCALES[kind]:
        each[:, at : at + 2] = torch.tensor([value]).half().view(torch.uint8)
    weights = exactly(kind, blocks)
    tiles = repack(blocks, TYPES[kind])
    for C in (1, 5):
        x = torch.ones(C, 512)
        got = multiplied(f"product of {kind}", tiles.data, x, 2)
        want = x.double() @ weights.T
        assert (got - want).norm() <= 3e-5 * want.norm()


@pytest.mark.parametrize("kind", EACH)
def test_genuine_blocks_are_multiplied_and_restored(kind):
    blocks = torch.from_numpy(GENUINE[kind]).view(8, -1)  # 3 in a row
    layer = InTiles(repack(blocks, TYPES[kind]))
    assert torch.equal(layer.blocks(), blocks)
    weights = exactly(kind, blocks)
    for rows in (1, 7):
        x = torch.randn(rows, weights.shape[1], generator=torch.Generator().manual_seed(rows))
        assert distance(layer.linear(x, TYPES[kind]), x.double() @ weights.T) < 3e-5


@pytest.mark.parametrize(
    "rows, tiles, columns", [(512, 34, 64), (509, 18, 352), (12, 3, 352), (3, 2, 352), (20, 9, 576)]
)
def test_any_number_of_rows_tiles_and_groups_is_multiplied(rows, tiles, columns):
    blocks = blocks_of("Q8_0", 8 * tiles, columns)
    data = repack(blocks, TYPES["Q8_0"]).data
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    got = multiplied("product of Q8_0", data, x, tiles)
    assert distance(got, x.double() @ exactly("Q8_0", blocks).T) < 3e-5


@pytest.mark.parametrize("kind", EACH)
def test_one_row_is_unpacked_to_the_reference_weights(kind):
    blocks = blocks_of(kind, 16, 768)
    tiles = repack(blocks, TYPES[kind])
    unpack = compiled.function(f"row of {kind}")
    weights = exactly(kind, blocks)
    for row in (0, 13):
        out = torch.empty(768)
        unpack(tiles.data.data_ptr(), row, 768 // 32, out.data_ptr())
        assert distance(out, weights[row]) < 1e-6


@pytest.mark.parametrize("kind", EACH)
def test_a_prompt_is_multiplied_within_3e_5_of_float64(kind):
    blocks = blocks_of(kind, 301, 512)  # 38 tiles: an odd number of rows and of pieces
    layer = InTiles(repack(blocks, TYPES[kind]))
    for shape in ((1, 512), (2, 3, 512), (131, 512)):
        x = torch.randn(shape)
        got = layer.linear(x, TYPES[kind])
        assert got.shape == (*shape[:-1], 301)
        assert distance(got, x.double() @ exactly(kind, blocks).T) < 3e-5


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_threads_and_pieces_change_no_bit_of_a_prompts_product(threads, monkeypatch):
    tiles = repack(blocks_of("Q4_K", 301, 512), TYPES["Q4_K"])
    x = torch.randn(131, 512)
    before = torch.get_num_threads()
    whole = linear.linear(x, tiles)
    monkeypatch.setattr(linear, "AT_ONCE", 64)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(linear.linear(x, tiles), whole)
        # Columns that are not contiguous, and no rows at all
        assert torch.equal(linear.linear(x.T.contiguous().T, tiles), whole)
        assert linear.linear(x[:0], tiles).shape == (0, 301)
    finally:
        torch.set_num_threads(before)


def test_a_child_process_multiplies_although_it_has_no_threads_of_its_parent():
    tiles = repack(blocks_of("Q8_0", 301, 64), TYPES["Q8_0"])
    x = torch.randn(5, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        whole = linear.linear(x, tiles)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            is_same = torch.equal(linear.linear(x, tiles), whole)
            os._exit(0 if is_same and threading.active_count() == 2 else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_scale_that_is_not_finite_spoils_its_own_row_alone(kind, value):
    blocks = blocks_of(kind, 16, 512)
    at = SCALES[kind][0][0]
    broken = torch.tensor([value]).half().view(torch.uint8)
    blocks[5, at : at + 2] = broken
    for C in (1, 3):
        tiles = repack(blocks, TYPES[kind])
        got = multiplied(f"product of {kind}", tiles.data, torch.ones(C, 512), 2)
        finite = got.isfinite().all(0)
        assert not finite[5]
        assert finite.sum() == 15


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_matrix_that_is_not_packed_is_widened(dtype):
    weights = torch.randn(16, 96).to(getattr(torch, dtype))
    x = torch.randn(3, 96)
    got = multiplied(f"plain product of {dtype}", weights, x, 2)
    assert distance(got, x.double() @ weights.double().T) < 1e-6


def test_rounding_is_to_15_bits_of_the_largest_of_32():
    x = torch.randn(4, 512) * torch.logspace(-20, 20, 4)[:, None]
    rounded = rounded_rows(x)
    # 256 columns of all rows lie together
    q = rounded.q.view(2, 4, 256).transpose(0, 1).reshape(4, 16, 32)
    d, s = (part.view(2, 4, 8).transpose(0, 1).reshape(4, 16) for part in (rounded.d, rounded.s))
    most = x.view(4, 16, 32).abs().amax(-1, keepdim=True)
    assert ((q * d[..., None] - x.view(4, 16, 32)).abs() <= most * 1.6e-5).all()
    assert torch.allclose(s, q.sum(-1) * d)
    sixteens = rounded.sixteens.view(2, 4, 16).transpose(0, 1).reshape(4, 32)
    assert torch.equal(sixteens.long(), q.reshape(4, 32, 16).sum(-1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_activation_that_is_not_finite_makes_all_that_depends_on_it_nan(value):
    x = torch.ones(1, 512)
    x[0, 77] = value
    tiles = repack(blocks_of("Q8_0", 16, 512), TYPES["Q8_0"])
    assert multiplied("product of Q8_0", tiles.data, x, 2).isnan().all()
    assert rounded_rows(torch.zeros(1, 64)).d.eq(0).all()
    assert rounded_rows(torch.full((1, 32), 1e-36)).q.eq(0).all()
    assert rounded_rows(torch.full((1, 32), 3e38)).d.isfinite().all()


def test_more_rows_of_activations_than_products_take_are_an_error():
    with pytest.raises(ValueError, match="513 rows of activations, but 512 are the most"):
        Activations(torch.zeros(513, 32))


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["haswell", "skylake-avx512", "icelake-server"])
def test_products_are_right_with_other_sizes_of_registers(processor, tmp_path):
    """Without AVX-512; with it; with its products of pairs, the only one that takes the wide form."""
    able = torch.cpu.get_capabilities()
    needed = {"haswell": "avx2", "skylake-avx512": "avx512_f", "icelake-server": "avx512_vnni"}
    if not able.get(needed[processor]):
        pytest.skip(f"needs {needed[processor]}")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # also xdist's
    env |= {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": ""}
    env["NUMBA_CACHE_DIR"] = str(tmp_path)
    tests = "within_3e_5 or overflow or own_row or reference_weights"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    ended = subprocess.run(
        [*command, "-k", tests, "-m", "not slow"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-2000:]
