"""The kernels of packed models compile for GPUs that are not here, and keep what packed_tile.py
promises.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MATRICES = ("qkv", "output", "gate_up", "down", "head")
SHORT = ("short up", "short down", "short head")
KINDS = ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
ROOM = 65536  # registers of a multiprocessor
# Instructions that there is time for while the bytes of a weight arrive, at 4.3 TB/s on an H200
TIME = {"Q4_0": 3.9, "Q4_K": 4.2, "Q5_K": 4.9, "Q6_K": 5.7, "Q8_0": 7.3}
# A head and the pieces of a group, two lines of the tile a lane each
LOADS = {"Q4_0": 18, "Q4_K": 18, "Q5_K": 22, "Q6_K": 26, "Q8_0": 34}


@pytest.fixture(scope="module")
def compiled():
    """What became of each kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, Path(__file__).with_name("compile_packed_kernels.py")]
    result = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_kind_compiles_for_every_target(compiled):
    for target in (90, 80):
        made = [line for line in compiled if line["target"] == target]
        assert {kind for line in made if line["name"] == "down" for kind in line["kinds"]} == set(
            KINDS
        )
        assert {line["name"] for line in made} >= set(MATRICES)
        assert ["Q4_K", "Q6_K"] in [line["kinds"] for line in made if line["name"] == "qkv"]
        assert {line["name"] for line in made} >= {"scale", *SHORT}
    assert {
        kind for line in compiled if line["name"] == "short down" for kind in line["kinds"]
    } == set(KINDS)


def test_nothing_spills_that_is_needed_and_two_blocks_of_threads_fit_a_multiprocessor(compiled):
    for made in compiled:
        if made["dtype"] == "float16":  # float32 is there to be compared, not to be fast
            if made["batch"] == 8:  # one register may wait in memory until the loop is over
                assert made["spilled"] == 0 or (made["spilled"], made["spilled_in_loops"]) == (
                    8,
                    0,
                ), made
            else:
                assert made["spilled"] == 0, made
            assert 2 * made["threads"] * made["registers"] <= ROOM, made


def test_weights_are_loaded_wide_and_ahead_of_their_use(compiled):
    for made in products(compiled):
        assert made["wide_loads_ahead"] >= min(LOADS[kind] for kind in made["kinds"]), made


def test_weights_go_from_memory_to_the_tensor_cores_without_a_detour(compiled):
    for made in products(compiled):
        assert made["products"] >= 64
        assert made["widths"] == [2]
        if (
            len(made["kinds"]) == 1
        ):  # else the end of one branch stands between the products of the two
            assert made["detours"] == 0, made


def test_unpacking_takes_less_time_than_the_memory(compiled):
    rated = [made for made in products(compiled) if made["a_weight"]]
    assert {kind for made in rated for kind in made["kinds"]} == set(KINDS)
    for made in rated:
        assert made["a_weight"] < 0.8 * TIME[made["kinds"][0]], made


def products(compiled):
    return [
        made for made in compiled if made["name"] in MATRICES + SHORT and made["dtype"] == "float16"
    ]
