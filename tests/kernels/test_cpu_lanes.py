"""The vectors of the CPU kernels, each operation on values at its borders."""

import pytest
import torch

numba = pytest.importorskip("numba")

from mistral_kernels.cpu import lanes, wide  # noqa: E402

NAN = float("nan")


@numba.njit
def _run(floats, ints, brains, halves, out, whole, sums):
    value = lanes.floats_at(floats)
    lanes.store_brains(brains, value)
    lanes.store_halves(halves, value)
    lanes.store_floats(out, lanes.floats_of_brains_at(brains))
    lanes.store_floats(out + 32, lanes.floats_of_halves_at(halves))
    lanes.store_floats(out + 64, lanes.power_of_two(lanes.signed_bytes_at(ints)))
    lanes.store_floats(out + 96, lanes.as_floats(lanes.bytes_at(ints)))
    lanes.store_floats(out + 128, lanes.larger(value, lanes.floats_of(numba.float32(1.0))))
    lanes.store_floats(out + 160, lanes.smaller(value, lanes.floats_of(numba.float32(1.0))))
    lanes.store_low_words(whole, lanes.rounded(value))
    lanes.store_float(sums, lanes.total(value))
    lanes.store_float(sums + 4, lanes.largest(value))


@numba.njit
def _totals(rows, out):
    a, b = lanes.floats_at(rows), lanes.floats_at(rows + 32)
    c, d = lanes.floats_at(rows + 64), lanes.floats_at(rows + 96)
    e, f = lanes.floats_at(rows + 128), lanes.floats_at(rows + 160)
    g, h = lanes.floats_at(rows + 192), lanes.floats_at(rows + 224)
    lanes.store_floats(out, lanes.totals(a, b, c, d, e, f, g, h))


def run(values, small=(0,) * 8):
    """float32 [8] and bytes [8] through every operation."""
    floats = torch.as_tensor(values)
    ints = torch.tensor(small, dtype=torch.int8)
    brains = torch.zeros(8, dtype=torch.bfloat16)
    halves = torch.zeros(8, dtype=torch.float16)
    out = torch.zeros(6, 8)
    whole = torch.zeros(8, dtype=torch.int16)
    sums = torch.zeros(2)
    arrays = (floats, ints, brains, halves, out, whole, sums)
    _run(*(array.data_ptr() for array in arrays))
    return floats, ints, brains, halves, out, whole, sums


def test_floats_are_rounded_to_16_bits_as_torch_rounds_them():
    ties = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 3e38, 1e-40, 0.1, -0.0]
    floats, _, brains, halves, out, _, _ = run(ties)
    assert torch.equal(brains, floats.bfloat16())
    assert torch.equal(halves, floats.half())
    assert torch.equal(out[0], floats.bfloat16().float())
    assert torch.equal(out[1], floats.half().float())
    nans = torch.tensor([0x7FFFFFFF, 0x7FC00000] * 4, dtype=torch.int32).view(torch.float32)
    assert run(nans)[2].isnan().all()  # rounded up the first would be -0


def test_whole_numbers_are_the_nearest_and_ties_are_even():
    floats, _, _, _, _, whole, sums = run([0.5, 1.5, 2.5, -0.5, -1.5, 2.625, -7.25, 100.0])
    assert whole.tolist() == floats.round().tolist() == [0, 2, 2, 0, -2, 3, -7, 100]
    assert sums.tolist() == [float(floats.sum()), 100.0]


def test_powers_of_two_and_bytes_are_exact():
    small = (-126, -1, 0, 1, 2, 63, 127, -100)
    _, ints, _, _, out, _, _ = run([0.0] * 8, small)
    assert torch.equal(out[2], torch.exp2(torch.tensor(small, dtype=torch.float64)).float())
    assert torch.equal(out[3], ints.view(torch.uint8).float())


_looked_up = lanes.table_of(tuple(range(-128, 128, 17)), wide.WideWords)


@numba.njit
def _look_up(left, right, low, high):
    found = _looked_up(wide.wide_words_at(left, right))
    wide.store_wide_words(low, wide.wide_low_bytes(found))
    wide.store_wide_words(high, wide.wide_high_bytes(found))


def test_bytes_of_two_tiles_are_looked_up_and_widened():
    indices = torch.tensor([*range(16), *reversed(range(16))], dtype=torch.uint8).repeat(2)
    indices[32:] = indices[32:].roll(5)
    low, high = torch.zeros(2, 32, dtype=torch.int16)
    left = indices.data_ptr()
    _look_up(left, left + 32, low.data_ptr(), high.data_ptr())
    want = -128 + 17 * indices.int()
    assert torch.equal(low.int(), want[0::2])
    assert torch.equal(high.int(), want[1::2])


def test_of_a_number_and_a_nan_the_number_is_larger_and_smaller():
    _, _, _, _, out, _, _ = run([NAN, 0.0, 1.0, 2.0, NAN, -3.0, 5.0, NAN])
    assert out[4].tolist() == [1, 1, 1, 2, 1, 1, 5, 1]
    assert out[5].tolist() == [1, 0, 1, 1, 1, -3, 1, 1]


def test_eight_sums_at_once_are_each_in_its_own_lane():
    rows = torch.arange(64.0).view(8, 8) ** 2  # whole numbers: sums of any order are exact
    out = torch.zeros(8)
    _totals(rows.data_ptr(), out.data_ptr())
    assert torch.equal(out, rows.sum(-1))
