"""The interpreter of these tests finds what Triton's own finds."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter on a GPU")


@triton.jit
def add(x, y):
    tl.store(y, tl.load(x) + tl.load(x))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8])
def test_an_overflow_is_found(dtype):
    largest = torch.iinfo(dtype).max
    x = torch.tensor([largest // 2], dtype=dtype)
    y = torch.empty_like(x)
    add[(1,)](x, y)
    assert y.item() == largest - 1
    with pytest.raises(triton.runtime.errors.InterpreterError, match="overflow in add"):
        add[(1,)](x + 1, y)
