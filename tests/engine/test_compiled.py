"""The compiled engine is the reference: same logits, same ids, whatever is read, sampled and taken
back.

Only the first tests make the compiler write C++, which takes it seconds; for what stands around the
compiled code it is enough to trace it.
"""

import copy
import time

import pytest
import small
import torch

import mistral
from mistral.engine import compiled
from mistral.engine.compiled import CompiledDecoder, _sizes, _sums_are_faster

GREEDY = mistral.Sampling(temperature=0.0)


TRACES = []


def trace_only(graph, _):
    TRACES.append(graph)
    return graph.forward


@pytest.fixture
def traced(monkeypatch):
    """The compiled functions are traced, which is counted, and not compiled."""
    monkeypatch.setattr(CompiledDecoder, "backend", staticmethod(trace_only))
    TRACES.clear()
    return TRACES


def pair(model, **options):
    return CompiledDecoder(model, **options), mistral.Decoder(model, **options)


def assert_equal(ours, reference):
    assert ours.lengths == reference.lengths
    allowed = 2e-5 if reference.logits.dtype == torch.float32 else 1e-10
    assert (ours.logits - reference.logits).abs().max() < allowed


def go_on(decoders, steps):
    """Greedy steps of both, compared at each."""
    for _ in range(steps):
        assert_equal(*decoders)
        ids, expected = (decoder.step(GREEDY) for decoder in decoders)
        assert torch.equal(ids, expected)


@pytest.mark.parametrize("sums", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_code_gives_the_references_logits_past_the_window(sums):
    model, _ = mistral.load(small.DATA / "small", device="cpu", sliding_window=8)
    decoders = CompiledDecoder(model, sums=sums), mistral.Decoder(model)
    for decoder in decoders:
        decoder.prefill([small.tokens(1, 5)[0].tolist()])
    go_on(decoders, 30)  # the ring of 8 + 17 slots is full after 25 tokens


def test_compiled_steps_scale_the_angles_as_the_reference(traced):
    decoders = pair(small.model(torch.float64, rope_scaling=small.YARN))
    for decoder in decoders:
        decoder.prefill([small.tokens(1, 5)[0].tolist()])
    go_on(decoders, 30)


@pytest.mark.parametrize(("slow", "faster"), [("linear", True), ("summed", False)])
def test_whose_products_are_faster_is_measured(slow, faster, monkeypatch):
    def product(x, weight):
        time.sleep(0.01 if slow == "summed" else 0)
        return x @ weight.T

    def linear(x, weight):
        time.sleep(0.01 if slow == "linear" else 0)
        return x @ weight.T

    monkeypatch.setattr(compiled.torch, "compile", lambda function, **_: product)
    monkeypatch.setattr(compiled.F, "linear", linear)
    assert _sums_are_faster(small.model()) is faster


def test_without_a_compiler_no_product_is_compiled(monkeypatch):
    def fail(x, weight):
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler")

    monkeypatch.setattr(compiled.torch, "compile", lambda function, **_: fail)
    assert not _sums_are_faster(small.model())


def test_sums_replace_every_product_with_a_matrix(traced):
    CompiledDecoder(small.model(hidden_size=36))  # of a size that no other test has traced
    counts = []
    for graph in traced:
        compiled._spell_out(graph)
        targets = [node.target for node in graph.graph.nodes]
        assert torch.nn.functional.linear not in targets
        counts.append(targets.count(compiled._summed))
    assert counts == [7, 1]  # a block's and the head's


def test_a_batch_of_unequal_rows_is_read_and_taken_back(traced):
    decoders = pair(small.model(), batch_size=3)
    ids = small.tokens(3, 20).tolist()
    for decoder in decoders:
        decoder.prefill([ids[0][:3], ids[1][:17], ids[2][:1]])
    go_on(decoders, 6)
    for decoder in decoders:
        decoder.rewind([2, 0, 5])
    go_on(decoders, 12)
    for decoder in decoders:
        decoder.rewind(3)
        decoder.prefill([[], ids[1][:4], [5]])
    go_on(decoders, 12)


def test_everything_can_be_taken_back(traced):
    decoders = pair(small.model())
    for decoder in decoders:
        decoder.prefill([[7]])  # the first token of all is read by the compiled step, too
    go_on(decoders, 30)
    for decoder in decoders:
        decoder.rewind(decoder.lengths)
        decoder.prefill([[9, 4]])
    go_on(decoders, 5)


def test_no_trace_is_left_by_compiling(traced):
    model = small.model()
    decoder = CompiledDecoder(model)
    assert decoder.lengths == [0]
    with pytest.raises(ValueError, match="row 0 is empty"):
        decoder.logits  # noqa: B018
    assert not any(hasattr(module, "_orig_mod") for module in model.modules())


def test_a_growing_text_is_compiled_a_bounded_number_of_times(traced, monkeypatch):
    monkeypatch.setattr("mistral.engine.compiled._SMALLEST", 4)
    # of a size that no other test has traced
    model = small.model(sliding_window=None, hidden_size=44)
    decoders = pair(model, max_tokens=30)
    assert len(traced) == 2  # the block and the head
    for decoder in decoders:
        decoder.prefill([small.tokens(1, 2)[0].tolist()])
    go_on(decoders, 27)
    assert _sizes(30) == [4, 8, 15, 30]
    assert len(traced) == 5  # the block once a size, the head once
    again = CompiledDecoder(model, max_tokens=30)
    again.prefill([[3]])
    again.step(GREEDY)
    assert len(traced) == 5  # a second decoder finds what the first one has compiled


@pytest.mark.parametrize("num_slots", [1, 255, 511, 512, 4113, 32768, 10**6])
def test_sizes_end_with_the_whole_ring_and_are_few(num_slots):
    found = _sizes(num_slots)
    assert found == sorted(set(found))
    assert found[-1] == num_slots
    assert len(found) <= 6
    assert all(bigger <= 2 * smaller for smaller, bigger in zip(found, found[1:]))


def test_no_room_is_an_error_and_changes_nothing(traced):
    decoder = CompiledDecoder(small.model(sliding_window=None), max_tokens=4)
    decoder.prefill([[3, 4, 5, 6]])
    logits = decoder.logits
    with pytest.raises(ValueError, match="the limit here is 4"):
        decoder.step(GREEDY)
    assert torch.equal(decoder.logits, logits)


def test_a_compiler_that_fails_is_one_clear_error(monkeypatch):
    def backend(graph, _):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(CompiledDecoder, "backend", staticmethod(backend))
    with pytest.raises(
        ValueError,
        match="No working C.. compiler found; it needs a C.. compiler .* the eager engine",
    ) as info:
        CompiledDecoder(small.model())
    assert "\n" not in str(info.value)


def test_packed_weights_are_refused():
    model, _ = mistral.load(
        small.DATA / "gguf/q8_0.gguf", device="cpu", packed=True, sliding_window=None
    )
    with pytest.raises(ValueError, match="packed weights cannot be compiled"):
        CompiledDecoder(model)


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_graph_gives_the_references_logits(batch_size):
    model = small.model(torch.float32, sliding_window=8).to("cuda")
    decoders = pair(model, batch_size=batch_size)
    for decoder in decoders:
        decoder.prefill(small.tokens(batch_size, 5).tolist())
    go_on(decoders, 30)
    for decoder in decoders:
        decoder.rewind(4)
    go_on(decoders, 10)


@pytest.mark.gpu
def test_a_copy_records_graphs_of_its_own():
    model = small.model(torch.float32, sliding_window=8).to("cuda")
    decoder = CompiledDecoder(model)
    decoder.prefill([[4, 5, 6]])
    decoder.step(GREEDY)
    branch = copy.deepcopy(decoder)
    texts = [[d.step(GREEDY).item() for _ in range(12)] for d in (branch, decoder)]
    assert texts[0] == texts[1]
    assert branch._graphs[branch._sizes[0]].graph is not decoder._graphs[decoder._sizes[0]].graph
