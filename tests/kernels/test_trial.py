"""The trial of a new decoder: it does everything twice, compares numbers, and leaves no trace."""

import copy
import math

import pytest
import small
import torch
from test_packed_decoder import Q4_K_M, packed_model

import mistral
from mistral_kernels.decoder import Decoder
from mistral_kernels.trial import WrongLogits, expected_logits, try_out

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = DEVICE == "cpu"
GREEDY = mistral.Sampling(temperature=0)
SIZES = dict(
    hidden_size=96, intermediate_size=160, head_dim=16, num_hidden_layers=2, sliding_window=7
)


def dense_model(**changes):
    return small.model(torch.float32, **SIZES | changes).to(DEVICE)


def tried(model, *sizes):
    """A decoder that was tried, and the chunks that it read."""
    expected = expected_logits(model)
    decoder = Decoder(model, *sizes, plain=PLAIN)
    chunks = []
    prefill = decoder._read_chunk
    decoder._read_chunk = lambda tokens, counts: (
        chunks.append(tokens.numel()) or prefill(tokens, counts)
    )
    try_out(decoder, expected)
    return decoder, chunks


@pytest.mark.parametrize(
    ("batch_size", "lengths"),
    [(1, [2, 16, 64, 65]), (3, [2, 5, 21, 22, 65]), (5, [2, 3, 12, 13, 65]), (16, [2, 4, 5, 65])],
)
def test_it_reads_a_chunk_for_each_kind_of_kernel_and_forgets_it(batch_size, lengths):
    # and two tokens that see the ring
    rows = [batch_size * n for length in lengths for n in (length, 2)]
    decoder, chunks = tried(dense_model(sliding_window=None), batch_size, 80)
    assert chunks == [*rows, *rows]
    assert decoder.lengths == [0] * batch_size


@pytest.mark.parametrize(
    ("room", "chunks"), [(25, (2, 16)), pytest.param(100, (2, 16, 64), marks=pytest.mark.slow)]
)
def test_it_does_everything_twice_so_that_graphs_are_recorded(room, chunks):
    model = dense_model(sliding_window=None)
    expected = expected_logits(model)
    decoder = Decoder(model, max_tokens=room, plain=True)
    done = []
    decoder._plain = False  # short chunks are graphs, too
    run = decoder.works.run
    decoder.works.run = lambda name, work: done.append(name) or run(name, work)
    try_out(decoder, expected)
    kinds = {
        "sample",
        "forward and sample",
        "forward",
        *(f"chunk of {T}, last logits" for T in chunks),
    }
    assert kinds <= set(done)
    assert all(done.count(name) >= 2 for name in kinds)


@pytest.mark.parametrize(
    "make", [dense_model, lambda: packed_model(Q4_K_M)], ids=["dense", "packed"]
)
def test_a_decoder_that_was_tried_writes_the_text_of_a_new_one(make):
    model = make()
    options = dict(max_new_tokens=20, stop_tokens=())
    wanted = list(mistral.generate(copy.deepcopy(model), [5, 6, 7], GREEDY, **options))
    decoder, _ = tried(model)
    assert list(mistral.generate(decoder, [5, 6, 7], GREEDY, **options)) == wanted


@pytest.mark.parametrize("seed", [None, 0, 5])
def test_a_decoder_that_was_tried_draws_the_random_numbers_of_a_new_one(seed):
    rules = mistral.Sampling(temperature=1.0, seed=seed)
    texts = []
    for make in (lambda: tried(dense_model())[0], lambda: Decoder(dense_model(), plain=PLAIN)):
        torch.manual_seed(7)
        texts.append(
            list(mistral.generate(make(), [5, 6, 7], rules, max_new_tokens=20, stop_tokens=()))
        )
    assert texts[0] == texts[1]


def test_a_graph_that_does_not_fit_is_told_before_a_text_is_begun(monkeypatch):
    model = dense_model()
    expected = expected_logits(model)
    decoder = Decoder(model, plain=True)
    decoder.works._graphs = {}

    def no_room(work):
        raise torch.OutOfMemoryError("tried 9 GB")

    monkeypatch.setattr(decoder.works._recorder, "record", no_room)
    with pytest.raises(torch.OutOfMemoryError, match="no memory for the CUDA graph of"):
        try_out(decoder, expected)


def test_a_graph_that_does_not_fit_in_the_midst_of_a_text_is_done_without(monkeypatch):
    model = dense_model()
    wanted = list(
        mistral.generate(copy.deepcopy(model), [5, 6, 7], GREEDY, max_new_tokens=20, stop_tokens=())
    )
    decoder = Decoder(model, plain=True)
    decoder.works._graphs = {}

    def no_room(work):
        raise torch.OutOfMemoryError("tried 9 GB")

    monkeypatch.setattr(decoder.works._recorder, "record", no_room)
    assert (
        list(mistral.generate(decoder, [5, 6, 7], GREEDY, max_new_tokens=20, stop_tokens=()))
        == wanted
    )
    assert "forward and sample" in decoder.works.unrecorded


@pytest.mark.parametrize("room", range(1, 12))
def test_a_decoder_with_little_room_is_tried_within_it(room):
    decoder, _ = tried(dense_model(sliding_window=None), 1, room)
    assert decoder.lengths == [0]


@pytest.mark.parametrize("work", ["_read_chunk", "_read_tokens"])
@pytest.mark.parametrize("wrong", [-0.4, float("nan")])
def test_wrong_numbers_of_a_chunk_or_of_a_step_are_told(work, wrong):
    model = dense_model()
    expected = expected_logits(model)
    decoder = Decoder(model, plain=True)
    if work == "_read_chunk":
        prefill = decoder._read_chunk
        decoder._read_chunk = lambda *arguments: prefill(*arguments) * wrong
    else:
        read = decoder._read_tokens
        decoder._read_tokens = lambda: (read(), decoder._step.logits.mul_(wrong))
    with pytest.raises(WrongLogits, match="logits are (140|nan)% away from the model's own"):
        try_out(decoder, expected)


def test_rounding_that_a_random_model_amplifies_is_told_and_not_refused():
    model = dense_model()
    expected = expected_logits(model)
    decoder = Decoder(model, plain=True)
    read = decoder._read_tokens
    decoder._read_tokens = lambda: (read(), decoder._step.logits.mul_(1.11))
    assert try_out(decoder, expected) == pytest.approx(0.11, abs=1e-5)
    assert try_out(Decoder(model, plain=True), expected) < 1e-5
    assert try_out(Decoder(model, 1, 3, plain=True), expected) == 0.0  # no room to compare


def test_numbers_that_the_model_itself_does_not_have_are_no_fault_of_the_kernels():
    model = dense_model()
    model.model.norm.weight.data.fill_(torch.nan)
    assert math.isnan(try_out(Decoder(model, plain=PLAIN), expected_logits(model)))
