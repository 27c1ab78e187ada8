"""Memory that is just enough, and the message if it is not."""

import pytest
import small
import torch

from mistral.engine import memory
from mistral.errors import NotEnoughMemory


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free."""

    def set_free(count):
        monkeypatch.setattr(memory, "_available_memory", lambda device: count)

    return set_free


def test_what_fits_to_the_byte_fits(free):
    cpu = torch.device("cpu")
    free(1000)
    memory.require_memory(1000, cpu, "this", str)
    assert memory.has_room(1000, cpu) and not memory.has_room(1001, cpu)
    with pytest.raises(NotEnoughMemory, match=r"this needs 1\.00 kB on cpu"):
        memory.require_memory(1001, cpu, "this", str)


def test_a_cache_that_does_not_fit_says_how_much_would(free):
    model = small.model(torch.float32, sliding_window=None)
    row = model.config.cache_bytes(100, 4)
    free(2 * row)
    memory.checked_cache(model, 2, 100, 0)
    with pytest.raises(NotEnoughMemory, match="50 positions, or 2 rows, would fit"):
        memory.checked_cache(model, 4, 100, 0)
