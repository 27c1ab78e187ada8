"""The CPU engine against the reference: logits, greedy texts, doors, threads."""

import copy
import gc
import pickle
import time
import weakref

import numpy as np
import pytest
import small
import torch

import mistral
from mistral import Decoder, Sampling, generate, generate_batch

pytest.importorskip("numba")

from mistral_kernels import engines  # noqa: E402
from mistral_kernels.cpu import Decoder as CpuDecoder  # noqa: E402
from mistral_kernels.cpu import compiled  # noqa: E402
from mistral_kernels.cpu.team import (  # noqa: E402
    PHASE_BYTES,
    claim,
    completes,
    open_phases,
)
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


@pytest.fixture(scope="module")
def packed():
    """The demo, packed, and the same weights unpacked."""
    return mistral.load("demo", packed=True)[0], mistral.load("demo")[0]


@pytest.mark.parametrize("threads", [1, 2, 5])
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


def test_a_guess_of_many_lengths_is_verified_past_the_window():
    m = model(sliding_window=7)
    reference = Decoder(m, slack=16)
    decoder = CpuDecoder(m, slack=16, threads=2)
    for n in (1, 4, 9, 16, 17, 30, 3):
        ids = prompt(n, seed=n)
        want = reference.verify(ids)
        got = decoder.verify(ids)
        assert got.shape == want.shape
        assert distance(got, want) < 1e-5
    short = CpuDecoder(m, slack=0)  # a chunk would evict what its first tokens see
    plain = Decoder(m, slack=0)
    for n in (9, 5, 2):
        assert distance(short.verify(prompt(n, n)), plain.verify(prompt(n, n))) < 1e-5


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


def test_the_model_of_a_packed_decoder_still_works(packed):
    m, unpacked = packed
    CpuDecoder(m, 1, 50)
    tokens = small.tokens(2, 30)
    assert distance(m(tokens).detach(), unpacked(tokens).detach()) < 1e-5  # a gradient is recorded
    with torch.inference_mode():
        assert distance(m(tokens), unpacked(tokens)) < 1e-5
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
    helpers = list(decoder._team._helpers)
    assert [helper.is_alive() for helper in helpers] == [True, True]
    kept = weakref.ref(decoder._cache)
    del decoder
    gc.collect()
    for helper in helpers:
        helper.join(timeout=10)
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
    counters = np.zeros(2 * PHASE_BYTES // 8, np.int64)
    phase = counters.ctypes.data
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


def test_the_engine_opens_by_its_name():
    decoder, line = engines.open_engine("cpu", model(), 2, 60)
    assert isinstance(decoder, CpuDecoder)
    assert line.startswith("engine: cpu (cpu, ")
    with pytest.raises(ValueError, match="needs the model on the CPU"):
        engines.check_engine("cpu", torch.device("cuda"))


def test_other_sources_have_a_cache_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    folders = []
    for text in ("a", "b", "a"):
        (tmp_path / "lanes.py").write_text(text)
        folders.append(compiled._folder.__wrapped__())
    assert folders[0] == folders[2] != folders[1]


def test_a_home_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    compiled._folder.cache_clear()
    taken = tmp_path / "file"
    taken.write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(taken))
    try:
        assert "set NUMBA_CACHE_DIR" in compiled.cache_problem()
        assert not compiled.is_cached()
    finally:
        compiled._folder.cache_clear()
