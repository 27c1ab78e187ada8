"""The benchmark's kernel that only reads."""

import torch
from benchmark_parts import reading


def test_every_number_is_read_once():
    numbers, sums = reading.new_memory(3 * 4 * reading.PART + 5, torch.device("cpu"))
    assert len(numbers) == 3 * reading.PART
    expected = numbers.view(3, -1)
    while expected.shape[1] > 1:
        half = expected.shape[1] // 2
        expected = expected[:, :half] ^ expected[:, half:]
    reading.read(numbers, sums)
    assert torch.equal(sums, expected[:, 0])
