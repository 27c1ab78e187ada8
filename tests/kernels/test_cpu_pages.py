"""Where the CPU's tiles lie, and which threads PyTorch uses beside those of a step."""

import threading

import pytest
import torch

pytest.importorskip("numba")

import mistral  # noqa: E402
from mistral_kernels.cpu import Decoder  # noqa: E402
from mistral_kernels.cpu.pages import Pages, ask_for_large  # noqa: E402
from mistral_kernels.cpu.pool import short_waits, torch_threads  # noqa: E402

LARGE = 1 << 21


def test_pieces_lie_one_after_another_at_cache_lines_and_begin_at_a_large_page():
    pages = Pages(3 * 65 + 1000, pieces=3)
    pieces = [pages.take(5, 13), pages.take(1000), pages.take(65, 2)]
    assert [tuple(piece.shape) for piece in pieces] == [(5, 13), (1000,), (65, 2)]
    assert pieces[0].data_ptr() % LARGE == 0
    for i, piece in enumerate(pieces):
        piece.fill_(i + 1)
        assert piece.data_ptr() % 64 == 0
    assert [int(piece.sum()) for piece in pieces] == [65, 2000, 390]


def test_memory_smaller_than_a_large_page_stays_as_it_is():
    small = torch.arange(100)
    ask_for_large(small)
    assert small.tolist() == list(range(100))


def test_the_tiles_of_a_model_lie_together_in_the_order_of_a_step():
    model, _ = mistral.load("demo", packed=True)
    Decoder(model, 1, 40)
    first = model.model.layers[0]
    modules = [first.self_attn.q_proj, first.self_attn.k_proj, first.mlp.down_proj]
    modules += [model.model.layers[-1].mlp.down_proj, model.model.embed_tokens]
    data = [module.keeper.tiles.data for module in modules]
    places = [tiles.data_ptr() for tiles in data]
    assert places == sorted(places)
    assert len({tiles.untyped_storage().data_ptr() for tiles in data}) == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_pytorch_has_its_threads_again_after_a_step_that_failed(threads):
    with torch_threads(threads):
        model, _ = mistral.load("demo", packed=True)
        decoder = Decoder(model, 1, 40, threads=2)
        decoder.prefill([[1, 5, 6]])
        decoder.step(mistral.Sampling(temperature=0))
        decoder.verify([7, 8])
        assert torch.get_num_threads() == threads
        with pytest.raises(ValueError, match="mask"):
            decoder.step(mistral.Sampling(temperature=0), mask=torch.ones(3, dtype=torch.bool))
        assert torch.get_num_threads() == threads


def test_a_prompt_leaves_no_thread_behind():
    def is_held():
        return "mistral-short-waits" in [thread.name for thread in threading.enumerate()]

    with short_waits():
        assert is_held()
    assert not is_held()
    with pytest.raises(KeyError), short_waits():
        raise KeyError
    assert not is_held()
