"""How many slots fit is known before they are created, and is what an engine then takes."""

import pytest
import small
import torch

import mistral
from mistral import Decoder
from mistral.engine import memory
from mistral.server.memory import plan_slots


@pytest.fixture
def free(monkeypatch):
    def set_free(count):
        monkeypatch.setattr(memory, "_available_memory", lambda device: count)

    return set_free


@pytest.mark.parametrize("window", [None, 4, 300])
@pytest.mark.parametrize("max_tokens", [None, 3, 20, 450])
@pytest.mark.parametrize("slack", [0, 16])
def test_the_plan_is_what_an_engine_takes(free, window, max_tokens, slack):
    if window is max_tokens is None:
        return
    free(10**9)
    m = small.model(torch.float32, sliding_window=window)
    plan = plan_slots(m, 3, max_tokens, slack)
    engine = Decoder(m, 3, max_tokens, slack=slack)
    assert plan.limit == engine.limit
    assert plan.positions == engine._cache.num_slots
    held = engine._cache.keys[:, :, :, :-1]  # one more slot takes the pads
    assert 3 * plan.slot_bytes == 2 * held.nbytes
    assert plan.fitting == 10**9 // plan.slot_bytes


def test_the_line_says_what_a_slot_holds(free):
    m = small.model(torch.float32)
    free(10**6)
    assert plan_slots(m, 2, None, 16).line == (
        "slots: 2 of 512 tokens, 9.60 kB each and 19.20 kB in all (keys and values of the last "
        "20); 104 would fit"
    )
    free(None)
    assert plan_slots(m, 2, 10, 16).line == "slots: 2 of 10 tokens, 4.80 kB each and 9.60 kB in all"


def test_too_many_slots_are_refused_with_the_options_that_help(free):
    m = small.model(torch.float32)
    free(28_000)
    assert plan_slots(m, 2, None, 16).fitting == 2
    with pytest.raises(mistral.NotEnoughMemory) as error:
        plan_slots(m, 3, None, 16)
    assert str(error.value) == (
        "3 slots need 28.80 kB on cpu, 9.60 kB each for 20 tokens, and 2 would fit: use "
        "--slots 2, or lower --max-tokens"
    )
    free(100)
    with pytest.raises(mistral.NotEnoughMemory, match="0 would fit: use a lower --max-tokens"):
        plan_slots(m, 1, None, 16)


def test_impossible_sizes_are_refused(free):
    free(10**9)
    m = small.model(torch.float32, sliding_window=None)
    with pytest.raises(
        ValueError, match=r"--max-tokens how many \(the checkpoint was made for 512"
    ):
        plan_slots(m, 1, None, 16)
    with pytest.raises(ValueError, match="batch_size must be a whole number of 1 or more"):
        plan_slots(m, 0, 5, 16)
