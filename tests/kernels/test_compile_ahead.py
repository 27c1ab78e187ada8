"""Every decode kernel compiles for GPUs that are not here, and the code keeps what the design
promises.
"""

import pytest
from ahead import FORMS, compiled_by

MATRICES = ("qkv", "output", "gate_up", "down", "head")
KERNELS = ("embed", "attention", *MATRICES)
# (target, dtype, batch)
WHOLE = [
    (90, "bfloat16", 1),
    (80, "bfloat16", 1),
    (90, "float16", 16),
    (80, "float16", 16),
    (90, "float32", 3),
]
IN_PART = {
    (90, "bfloat16", 8): ("qkv", "down"),
    (120, "bfloat16", 1): ("embed", "qkv", "attention", "gate_up"),
}
ROOM = 65536  # registers of a multiprocessor


@pytest.fixture(scope="module", params=FORMS)
def compiled(request):
    """The facts about each kernel, by (name, target, dtype, batch)."""
    lines = compiled_by("compile_decode_kernels.py", request.param)
    return {(line["name"], line["target"], line["dtype"], line["batch"]): line for line in lines}


def test_every_kernel_compiles_for_every_target(compiled, request):
    form = request.node.callspec.params["compiled"]
    whole = WHOLE[:1] if form == "short" else WHOLE
    in_part = {(80, "bfloat16", 1): ("down",)} if form == "short" else IN_PART
    expected = {(name, *variant) for name in KERNELS for variant in whole}
    expected |= {(name, *variant) for variant, names in in_part.items() for name in names}
    expected.add(("attention ahead", 90, "bfloat16", 1))
    if form == "full":
        expected.add(("attention ahead", 90, "float16", 16))
    assert set(compiled) == expected


def test_nothing_spills(compiled):
    assert {key: made["spilled"] for key, made in compiled.items() if made["spilled"]} == {}


def test_the_model_of_a_multiprocessor_takes_what_a_gpu_may_take(compiled):
    """At least as long as the memory, and not much longer."""
    made = compiled["output", 90, "bfloat16", 1]
    of_memory = 2 * 4096 * 4096 / 4.3e12
    assert of_memory < made["predicted"] < 1.5 * of_memory


def test_two_blocks_of_threads_fit_a_multiprocessor(compiled):
    for key, made in compiled.items():
        if key[2] != "float32":  # it serves comparisons, not speed
            assert 2 * made["threads"] * made["registers"] <= ROOM, key
        # Of shared memory there are 164 KB on Ampere and 228 on Hopper, less 1 KB a block; 100 on
        # the smaller Blackwells, where attention is alone on a multiprocessor.
        blocks, room = {80: (2, 164), 90: (2, 228), 120: (1, 100)}[key[1]]
        assert blocks * (made["shared"] + 1024) <= room * 1024, key


def test_keys_and_values_are_loaded_before_the_wait_if_launched_early(compiled):
    for (name, *_), made in compiled.items():
        if name == "attention ahead":
            # 64 keys and 64 values of 256 bytes, on 128 threads
            assert made["wide_loads_before_wait"] == 16
            assert made["registers"] <= 128
        elif name == "attention":
            assert made["wide_loads_before_wait"] == 0


def products(compiled):
    """The kernels of 16-bit matrices: the tensor cores do not take others."""
    return [made for key, made in compiled.items() if key[0] in MATRICES and key[2] != "float32"]


def test_weights_are_loaded_wide_and_ahead_of_their_use(compiled):
    for made in products(compiled):
        # Each chunk is two loads of 16 bytes per lane; at least the first round is loaded before the
        # first product.
        assert made["wide_loads_ahead"] >= 2 * made["chunks"]
        assert made["chunks"] >= 4


def test_weights_go_straight_into_the_tensor_cores(compiled):
    for made in products(compiled):
        assert made["products"] >= 16
        assert made["widths"] == [2]
        # neither shared memory nor shuffles between the first product and the last
        assert made["detours"] == 0
        # Bandwidth leaves time for 13 instructions per weight in 16 bits; a vector unit would take
        # 3.6 for one row.
        assert made["a_weight"] < 3.6


def test_hopper_waits_for_the_producer_and_ampere_does_not_know_how(compiled):
    for (_, target, *_), made in compiled.items():
        assert (made["waits"] > 0) == (target == 90)
