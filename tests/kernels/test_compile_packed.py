"""The kernels of packed models compile for GPUs that are not here, and keep what packed/tile.py
promises.
"""

import pytest
from ahead import FORMS, compiled_by

MATRICES = ("qkv", "output", "gate_up", "down", "head")
SHORT = ("short up", "short qkv", "short gate up", "short down", "short head")
ROWS = ("rows up", "rows gate up", "rows down")
POINTWISE = {"normalise", "rotate store", "add", "silu"}
KINDS = ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
ROOM = 65536  # registers of a multiprocessor
# Instructions for which there is time while the bytes of a weight arrive, at 4.3 TB/s on an H200
TIME = {"Q4_0": 3.9, "Q4_K": 4.2, "Q5_K": 4.9, "Q6_K": 5.7, "Q8_0": 7.3}
# A head and the pieces of half a group; each lane has two lines of the tile
LOADS = {"Q4_0": 10, "Q4_K": 10, "Q5_K": 12, "Q6_K": 14, "Q8_0": 18}


@pytest.fixture(scope="module", params=FORMS)
def compiled(request):
    """The facts about each kernel."""
    return compiled_by("compile_packed_kernels.py", request.param)


def is_full(request):
    return request.node.callspec.params["compiled"] == "full"


def test_every_kind_compiles_for_every_target(compiled, request):
    if not is_full(request):
        assert {made["name"] for made in compiled} == {
            "qkv", "gate_up", "down", "scale", "short gate up", "rows up", *POINTWISE,
        }  # fmt: skip
        return
    for target in (90, 80):
        made = [line for line in compiled if line["target"] == target]
        assert {kind for line in made if line["name"] == "down" for kind in line["kinds"]} == set(
            KINDS
        )
        assert {line["name"] for line in made} >= set(MATRICES)
        assert ["Q4_K", "Q6_K"] in [line["kinds"] for line in made if line["name"] == "qkv"]
        assert {line["name"] for line in made} >= {"scale", *SHORT, *ROWS, *POINTWISE}
    assert {
        kind for line in compiled if line["name"] == "short down" for kind in line["kinds"]
    } == set(KINDS)


def test_nothing_spills_that_is_needed_and_two_blocks_of_threads_fit_a_multiprocessor(compiled):
    for made in compiled:
        if made["dtype"] == "float16":  # float32 is there to be compared, not to be fast
            if made["batch"] >= 8:  # one register may wait in memory until the loop is over
                assert made["spilled"] == 0 or (made["spilled"], made["spilled_in_loops"]) == (
                    8,
                    0,
                ), made
            else:
                assert made["spilled"] == 0, made
            assert 2 * made["threads"] * made["registers"] <= ROOM, made


def test_four_blocks_of_threads_of_gate_and_up_fit_a_multiprocessor(compiled):
    """Half of a step's bytes: while some of them multiply, the others load."""
    made = [line for line in compiled if line["name"] == "gate_up" and line["batch"] <= 8]
    assert made
    for line in made:
        assert 4 * line["threads"] * line["registers"] <= ROOM, line


def test_weights_are_loaded_wide_and_ahead_of_their_use(compiled):
    for made in products(compiled):
        assert made["wide_loads_ahead"] >= min(LOADS[kind] for kind in made["kinds"]), made


def test_weights_go_from_memory_to_the_tensor_cores_without_a_detour(compiled):
    for made in products(compiled):
        assert made["products"] >= 64
        assert made["widths"] == [2]
        # With two types the end of one branch is between the products of the two.
        if len(made["kinds"]) == 1:
            assert made["detours"] == 0, made


def test_unpacking_takes_less_time_than_the_memory(compiled, request):
    rated = [made for made in products(compiled) if made["a_weight"]]
    kinds = set(KINDS) if is_full(request) else {"Q4_K", "Q6_K"}
    assert {kind for made in rated for kind in made["kinds"]} == kinds
    for made in rated:
        assert made["a_weight"] < 0.8 * TIME[made["kinds"][0]], made


def products(compiled):
    return [
        made
        for made in compiled
        if made["name"] in MATRICES + SHORT + ROWS and made["dtype"] == "float16"
    ]
