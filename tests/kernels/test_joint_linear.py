"""Two or three packed matrices and the rows of a short chunk in one launch: the bits of a launch each.

On a CPU the kernels run in Triton's interpreter; `pytest -m gpu` adds the sizes of a 7B.
"""

import packed
import pytest
import torch
from test_decode_kernels import DEVICE, poisoned, whole
from test_packed_kernels import NAMES, errors, planes

from mistral_kernels.packed.joint_linear import is_joint, joint_linear
from mistral_kernels.packed.short_linear import scale_rows, short_linear


def matrices(names, rows, columns):
    blocks = [
        packed.random_blocks(name, n, columns, seed=i)
        for i, (name, n) in enumerate(zip(names, rows))
    ]
    return [planes(name, own) for name, own in zip(names, blocks)], blocks


def compare(names, rows, columns, T, dtype=torch.float32, scaled=True):
    """Joint and apart: the same bits, and nothing is written after them."""
    together, blocks = matrices(names, rows, columns)
    x = torch.randn(T, columns).to(dtype).to(DEVICE)
    inputs = scale_rows(x) if scaled else (x.half() if dtype != torch.float32 else x, None)
    y = poisoned(T, sum(rows), dtype=dtype)
    joint_linear(*inputs, together, y)
    assert whole(y)[T:].isnan().all()
    for matrix, own in zip(together, y.split(list(rows), dim=-1)):
        apart = poisoned(T, matrix.rows, dtype=dtype)
        short_linear(*inputs, matrix, apart)
        assert torch.equal(own, apart)
    return x, blocks, y


@pytest.mark.parametrize("T", [1, 9, 33])
def test_three_matrices_of_one_type(T):
    name = NAMES[T % len(NAMES)]
    x, blocks, y = compare([name] * 3, (32, 16, 16), 256, T)
    weights = torch.cat([packed.exactly(name, own) for own in blocks])
    assert errors(y.cpu(), x.cpu(), weights).max() < 2e-6


@pytest.mark.parametrize(
    "names",
    [
        ("Q4_K", "Q4_K", "Q6_K"),
        ("Q8_0", "Q4_0"),
        *(
            pytest.param(names, marks=pytest.mark.slow)
            for names in (("Q6_K", "Q4_K", "Q4_K"), ("Q4_K", "Q5_K", "Q6_K"), ("Q5_K", "Q5_K"))
        ),
    ],
)
def test_matrices_of_several_types_and_sizes(names):
    compare(names, (48, 16, 32)[: len(names)], 256, 10)


def test_rows_that_are_not_scaled():
    compare(("Q4_K", "Q6_K"), (16, 32), 256, 18, scaled=False)


def test_rows_of_inputs_may_be_columns_of_a_wider_tensor():
    wide = torch.randn(5, 600)
    apart = wide[:, 300:556].contiguous()
    for ours, theirs in zip(scale_rows(wide[:, 300:556].to(DEVICE)), scale_rows(apart.to(DEVICE))):
        assert torch.equal(ours, theirs)


def test_what_is_not_for_one_launch_is_refused():
    together, _ = matrices(("Q4_K", "Q4_K"), (16, 16), 256)
    ragged, _ = matrices(("Q4_K",), (24,), 256)
    assert is_joint(together)
    for others in (
        together[:1],
        together * 2,
        [*together, *ragged],
        [together[0], torch.ones(16, 256)],
    ):
        assert not is_joint(others)
    with pytest.raises(ValueError, match="two or three packed matrices of 16 n rows"):
        joint_linear(*scale_rows(torch.ones(1, 256, device=DEVICE)), ragged, poisoned(1, 24))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 8, 16, 64])
@pytest.mark.parametrize("names", [("Q4_K", "Q4_K", "Q6_K"), ("Q6_K",) * 3, ("Q8_0",) * 3])
def test_q_k_and_v_of_a_7b(names, T):
    compare(names, (4096, 1024, 1024), 4096, T, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [8, 16])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0"])
def test_gate_and_up_of_a_7b(name, T):
    compare([name] * 2, (14336, 14336), 4096, T, torch.bfloat16)
