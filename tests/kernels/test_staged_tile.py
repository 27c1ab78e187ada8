"""The study of weights that pass through shared memory computes what the tile in use computes."""

import pytest
import staged_tile
import torch
from test_decode_kernels import normal, poisoned
from test_packed_kernels import random_planes

from mistral_kernels.decode import projection
from mistral_kernels.portable import arch_of


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("name", staged_tile.KINDS)
def test_the_bits_are_those_of_the_projection(name, B):
    """Three groups for two warps: the last round of one of them has no weights."""
    D = 32
    columns = 3072
    weight = random_planes(name, D, columns)
    y = normal(B, columns, dtype=torch.float16)
    norm = normal(D, dtype=torch.float16)
    before = normal(B, D, dtype=torch.float32)
    launch = projection.launch(B, D, columns, y.dtype, arch_of(y), name)
    staged = staged_tile.launch(launch, warps=2, stages=2)
    launch = launch._replace(
        constants=launch.constants | dict(WARPS=2), options=dict(num_warps=2, num_stages=1)
    )
    found = []
    for shape, kernel, rounds in (
        (launch, projection.projection_kernel, ()),
        (staged, staged_tile.staged_kernel, (staged_tile.rounds(staged),)),
    ):
        residual = before.clone()
        x = poisoned(B, D).half()
        sums = poisoned(B, D // 16)
        shape.run(kernel, y, weight.data, norm, residual, x, sums, *rounds)
        found.append((residual, x, sums))
    assert all(map(torch.equal, *found))
    assert torch.isfinite(found[0][0]).all()
    assert not torch.equal(found[0][0], before)
