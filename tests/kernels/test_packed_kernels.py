"""The decode kernels on packed weights: against float64 on gguf-py's numbers, and against their
plain twins.

On a CPU they run in Triton's interpreter; `pytest -m gpu` adds the sizes of a 7B.
"""

import math

import packed
import pytest
import torch
from test_decode_kernels import CLOSE, DEVICE, EPS, check, normal, poisoned

from mistral_kernels.decode.embed import embed, embed_reference
from mistral_kernels.decode.gate_up import gate_up, gate_up_reference
from mistral_kernels.decode.head import head, head_reference
from mistral_kernels.decode.projection import project, project_reference
from mistral_kernels.decode.qkv import qkv, qkv_reference
from mistral_kernels.packed.planes import Planes, repack
from mistral_kernels.packed.tile import operands

NAMES = list(packed.KINDS)


def planes(name, blocks):
    return repack(blocks.to(DEVICE), packed.KINDS[name])


def random_planes(name, rows, columns, seed=0):
    return planes(name, packed.random_blocks(name, rows, columns, seed))


def product(name, blocks, x):
    """x W^T by the kernel of the head, whose norm is made to do nothing: [B, rows] on the CPU."""
    B, D = x.shape
    scores = poisoned(B, len(blocks))
    head(
        x.to(DEVICE),
        torch.full((B, D // 16), 16.0, device=DEVICE),
        planes(name, blocks),
        scores,
        0.0,
    )
    return scores.cpu()


def errors(ours, x, weights):
    """How far each number is off, measured by the sizes of what was added up: [B, rows]."""
    x = x.double()
    return (ours.double() - x @ weights.T).abs() / (x.abs() @ weights.abs().T)


def matrices(name):
    """Genuine blocks, 1.5 groups of columns wide; random ones, 2.5 groups, whose rows fill no
    tile.
    """
    yield packed.genuine(name)
    yield packed.random_blocks(name, 13, 2560)


@pytest.mark.parametrize("name", NAMES)
def test_in_float32_the_product_is_exact(name):
    for blocks in matrices(name):
        weights = packed.exactly(name, blocks)
        x = torch.randn(3, weights.shape[1])
        assert errors(product(name, blocks, x), x, weights).max() < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_in_float16_it_is_closer_than_with_weights_rounded_to_bfloat16(name):
    for blocks in matrices(name):
        weights = packed.exactly(name, blocks)
        x = torch.randn(16, weights.shape[1]).half()
        exact = x.double() @ weights.T
        ours = (product(name, blocks, x) - exact).norm() / exact.norm()
        rounded = (x.double() @ weights.bfloat16().double().T - exact).norm() / exact.norm()
        assert ours < 9e-4
        assert ours < 0.6 * rounded


@pytest.mark.parametrize("B", [1, 2, 7, 8, 9, 16])
def test_every_batch_from_1_to_16(B):
    x = normal(B, 256, dtype=torch.float16)
    sums = torch.rand(B, 16, device=DEVICE) * 16
    check(
        head,
        head_reference,
        [x, sums, random_planes("Q4_K", 21, 256), poisoned(B, 21), EPS, 2.0],
        (3,),
        CLOSE[torch.float16],
    )


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_very_different_scales_keep_their_digits(name):
    blocks = torch.cat([packed.random_blocks(name, 1, 256, scale=10.0**e) for e in range(-5, 3)])
    x = torch.randn(2, 256).half()
    assert errors(product(name, blocks, x), x, packed.exactly(name, blocks)).max() < 2e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_at_all_give_numbers_or_none_as_the_reference_does(name, dtype):
    blocks = packed.random_bytes(name, 16, 512)
    packed.put_scale(blocks, name, 3, math.inf)
    packed.put_scale(blocks, name, 8, math.nan)
    x = torch.randn(2, 512).to(dtype)
    weights = packed.exactly(name, blocks)
    ours = product(name, blocks, x)
    finite = weights.isfinite().all(1)
    assert not finite.all()
    assert finite.any()
    assert torch.equal(ours.isfinite().all(0), finite)
    assert torch.equal(ours.isfinite().any(0), finite)
    assert errors(ours[:, finite], x, weights[finite]).max() < (
        1e-3 if dtype == torch.float16 else 2e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("name", "columns"), [("Q6_K", 1280), ("Q4_0", 96), ("Q5_K", 2048), ("Q8_0", 3072)]
)
def test_projection_adds_to_the_residual(name, columns, dtype):
    B = 3
    D = 32
    weight = random_planes(name, D, columns)
    norm = normal(D)
    residual = torch.cat((normal(B, D), torch.full((1, D), math.nan, device=DEVICE)))[:B]
    arguments = [normal(B, columns, dtype=dtype), weight, norm, residual]
    arguments += [poisoned(B, D, dtype=dtype), poisoned(B, D // 16)]
    check(project, project_reference, arguments, (3, 4, 5), CLOSE[dtype])


@pytest.mark.parametrize("name", NAMES)
def test_gate_and_up_are_two_matrices(name):
    B = 3
    D = 256
    F = 32
    x = normal(B, D, dtype=torch.float16)
    sums = torch.rand(B, D // 16, device=DEVICE) * 16
    pair = tuple(random_planes(name, F, D, seed) for seed in (1, 2))
    check(
        gate_up,
        gate_up_reference,
        [x, sums, pair, poisoned(B, F, dtype=torch.float16), EPS, 0.5],
        (3,),
    )


@pytest.mark.parametrize(
    "names",
    [("Q4_K", "Q4_K", "Q6_K"), ("Q4_0", "Q8_0", "Q8_0"), ("Q4_K", "Q5_K", "Q6_K"), ("Q8_0",) * 3],
    ids=lambda names: " ".join(names),
)
def test_queries_keys_and_values_may_be_of_different_kinds(names):
    B = 2
    D = 256
    S = 7
    N = 3
    K = 2
    H = 16
    x = normal(B, D, dtype=torch.float16)
    sums = torch.rand(B, D // 16, device=DEVICE) * 16
    weights = tuple(random_planes(name, n * H, D, n) for name, n in zip(names, (N, K, K)))
    angles = normal(B, H // 2) * 9
    slots = torch.tensor([3, S], device=DEVICE)
    ours = [normal(B, K, S + 1, H, dtype=torch.float16) for _ in range(2)]
    theirs = [cache.clone() for cache in ours]
    q = poisoned(B, N, H, dtype=torch.float16)
    arguments = [x, sums, weights, angles.cos(), angles.sin(), slots, q]
    check(
        lambda *a: qkv(*a, *ours, EPS), lambda *a: qkv_reference(*a, *theirs, EPS), arguments, (6,)
    )
    for mine, twin in zip(ours, theirs):
        assert (mine.float() - twin.float()).abs().max() < 2e-3 * twin.abs().max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("random", [False, True])
def test_embedding_of_a_packed_table(name, random):
    B = 3
    D = 1280
    H = 16
    blocks = packed.random_blocks(name, 13, D) if random else packed.genuine(name, D)
    tokens = torch.tensor([12, 0, 7], device=DEVICE)
    positions = torch.tensor([5, -1, 3], device=DEVICE)
    arguments = [
        tokens,
        positions,
        planes(name, blocks),
        normal(D),
        torch.rand(H // 2, device=DEVICE),
    ]
    arguments += [
        poisoned(B, D),
        poisoned(B, D),
        poisoned(B, D // 16),
        poisoned(B, H // 2),
        poisoned(B, H // 2),
    ]
    slots = torch.zeros(B, dtype=torch.int64, device=DEVICE)
    check(
        lambda *a: embed(*a, slots, 4),
        lambda *a: embed_reference(*a, slots, 4),
        arguments,
        (5, 6, 7, 8, 9),
    )
    expected = packed.exactly(name, blocks)[tokens.cpu()]
    assert torch.allclose(
        arguments[5].cpu().double(), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item()
    )


def test_what_packed_weights_cannot_do_is_named():
    x = normal(1, 256, dtype=torch.bfloat16)
    sums = normal(1, 16)
    with pytest.raises(
        ValueError, match="x is torch.bfloat16: packed weights take float16 and float32"
    ):
        head(x, sums, random_planes("Q4_K", 8, 256), normal(1, 8), EPS)
    pair = (random_planes("Q4_K", 32, 256), random_planes("Q5_K", 32, 256))
    with pytest.raises(ValueError, match="gate_proj is Q4_K and up_proj Q5_K"):
        gate_up(x.half(), sums, pair, normal(1, 32), EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 3, 16])
@pytest.mark.parametrize("name", NAMES)
def test_packed_kernels_of_a_7b_on_a_gpu(name, B):
    D = 4096
    F = 14336
    V = 32002
    x = normal(B, D, dtype=torch.float16)
    sums = torch.rand(B, D // 16, device=DEVICE) * 32
    pair = tuple(random_planes(name, F, D, seed) for seed in (1, 2))
    h = poisoned(B, F, dtype=torch.float16)
    check(gate_up, gate_up_reference, [x, sums, pair, h, EPS, 1.0], (3,))
    outputs = [normal(B, D), poisoned(B, D, dtype=torch.float16), poisoned(B, D // 16)]
    arguments = [normal(B, F, dtype=torch.float16), random_planes(name, D, F), normal(D), *outputs]
    check(project, project_reference, arguments, (3, 4, 5), CLOSE[torch.float16])
    arguments = [x, sums, random_planes(name, V, D), poisoned(B, V), EPS, 1.0]
    check(head, head_reference, arguments, (3,), CLOSE[torch.float16])


def test_a_matrix_of_2_to_the_31_bytes_is_refused():
    x = torch.zeros(1, 1024)
    kind = packed.KINDS["Q4_0"]
    for size, fits in ((2**31 - 1, True), (2**31, False)):
        data = torch.empty(1, size, dtype=torch.uint8, device="meta")
        matrix = Planes(kind, 8, 1024, data)
        if fits:
            assert operands(x, matrix)[1] == ["Q4_0"]
            continue
        with pytest.raises(ValueError, match="2,147,483,648 bytes"):
            operands(x, matrix)
