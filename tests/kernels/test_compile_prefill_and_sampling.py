"""The prefill's kernels and the sampler compile for GPUs that are not here, as their headers
promise.
"""

import pytest
from ahead import FORMS, compiled_by


@pytest.fixture(scope="module", params=FORMS)
def compiled(request):
    """The facts about each kernel, by (name, target)."""
    lines = compiled_by("compile_prefill_and_sampling.py", request.param)
    return {(line["name"], line["target"]): line for line in lines}


def test_all_of_them_compile_and_nothing_spills(compiled, request):
    full = request.node.callspec.params["compiled"] == "full"
    assert len(compiled) == (2 * 29 + 1 if full else 7)
    assert {key: made["spilled"] for key, made in compiled.items() if made["spilled"]} == {}


def test_each_fits_a_multiprocessor_of_its_kind(compiled):
    for (name, target), made in compiled.items():
        assert made["threads"] * made["registers"] <= 65536, name
        # What one block of threads may have: 99 KB on the smaller Amperes, Ada and smaller
        # Blackwells, 227 on Hopper
        assert made["shared"] <= (227 if target == 90 else 99) * 1024, name


def test_the_sampler_loads_four_logits_at_once(compiled):
    for (name, _), made in compiled.items():
        if name.startswith("sample"):
            # 64 scores a thread: 16 loads, from the logits or the penalised ones
            assert made["wide_loads"] >= 32


def test_what_goes_over_numbers_once_takes_sixteen_bytes_at_a_time(compiled):
    numbers = {
        "rotate 128": (4, 4),
        "rotate 64": (2, 2),
        "store 128": (8, 8),
        "store 64": (4, 4),
        "swiglu": (4, 2),
    }
    angles = {"rotate 128": 8, "rotate 64": 4}  # cosines and sines, which are float32
    for (name, _), made in compiled.items():
        kind, dtype = name.rsplit(" ", 1)
        if kind in numbers:
            loads, stores = (n * (2 if dtype == "torch.float32" else 1) for n in numbers[kind])
            assert (made["wide_loads"], made["wide_stores"]) == (
                loads + angles.get(kind, 0),
                stores,
            ), name


def test_prefill_multiplies_on_tensor_cores_while_it_loads(compiled):
    for (name, _), made in compiled.items():
        if name.startswith(("prefill", "few tokens")) and "16" in name:
            assert made["products"] > 0, name
            assert made["copies_ahead"] > 0, name
