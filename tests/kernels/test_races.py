"""No race in a step of the decode kernels, with CTAs in a shuffled order and dependent launches.

The detector is in shadow.py. That it notices faults is tested by planting three.
"""

import pytest
import shadow
import small
import torch
from test_packed_decoder import MIXES, packed_model
from triton._C.libtriton import ir
from triton.runtime import interpreter

import mistral
from mistral_kernels.decode import attention, matvec
from mistral_kernels.decoder import Decoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="watches Triton's interpreter")
SIZES = dict(
    hidden_size=96, intermediate_size=160, head_dim=16, num_hidden_layers=2, sliding_window=70
)
DRAWN = mistral.Sampling(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.1, seed=3)


@pytest.fixture
def detector(monkeypatch):
    return shadow.Detector(monkeypatch)


def watched_decoder(detector, model, rows=2):
    """A decoder with dependent launches if it has few rows; its steps begin with poisoned buffers."""
    decoder = Decoder(model, rows)
    step = decoder._step
    step._early = {"pdl": True} if rows <= matvec.MAX_BATCH else {}
    run = step.run

    def watched(positions):
        detector.mark_done()
        _poison(step)
        run(positions)

    step.run = watched
    return decoder


def one_step(detector):
    decoder = watched_decoder(detector, small.model(torch.float32, **SIZES))
    decoder.prefill([[5], [6]])
    return decoder.logits


def texts(detector, model):
    """A chunk, tokens one by one, and draws: all logits and ids."""
    decoder = watched_decoder(detector, model)
    ids = [(3 + 11 * i) % 101 for i in range(60)]
    decoder.prefill([ids[:5], ids[5:8]])
    outputs = [decoder.logits.clone()]
    decoder.prefill([[8], [9]])
    outputs += [decoder.logits.clone(), decoder.step(DRAWN).float()]
    outputs += [decoder.step(mistral.Sampling(temperature=0)).float(), decoder.logits.clone()]
    return torch.cat([output.flatten() for output in outputs])


def _poison(step):
    """NaN wherever a kernel must write before another reads."""
    for buffer in (
        step._x,
        step._y,
        step._h,
        step._q,
        step._residual,
        step._sums,
        step._cos,
        step._sin,
    ):
        buffer.fill_(torch.nan)
    step.wide_logits.fill_(torch.nan)
    step._partials.outputs.fill_(torch.nan)
    step._partials.stats.fill_(torch.nan)


def check_texts(detector, model):
    outputs = texts(detector, model)
    assert not detector.problems, detector.examples
    assert outputs.isfinite().all()
    assert detector.launches["decode_attention_kernel"] >= 3
    assert detector.launches["sample_kernel"] == 2


# The rows of 101 logits are padded.
@pytest.mark.parametrize("vocab_size", [101, pytest.param(104, marks=pytest.mark.slow)])
def test_a_step_has_no_race(detector, vocab_size):
    check_texts(detector, small.model(torch.float32, vocab_size=vocab_size, **SIZES))


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["Q4_K_M", "Q8_0", "Q2_K beside Q3_K and Q4_K"])
def test_a_step_of_a_packed_model_has_no_race(detector, mix):
    check_texts(detector, packed_model(MIXES[mix], torch.float16))


def test_a_step_of_17_rows_has_no_race(detector):
    """By the tiles: what PyTorch multiplies is not watched."""
    sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
    model = small.model(torch.float32, vocab_size=16, **SIZES | sizes | dict(num_hidden_layers=1))
    decoder = watched_decoder(detector, model, 17)
    decoder.rows_together = False
    decoder.prefill([[b % 16] for b in range(17)])
    assert decoder.logits.isfinite().all()
    assert not detector.problems, detector.examples
    assert detector.launches["short_linear_kernel"] == 5


def _never(arch):
    """A wait, or a release, that was forgotten."""


@pytest.mark.parametrize(
    ("module", "name", "problem"),
    [
        (attention, "wait_for_producer", ("a store before the wait", "decode_attention_kernel")),
        (matvec, "wait_for_producer", ("a CTA does not wait", "qkv_kernel")),
    ],
    ids=["attention", "matrices"],
)
def test_a_wait_that_was_forgotten_is_noticed(detector, monkeypatch, module, name, problem):
    monkeypatch.setattr(module, name, _never)
    one_step(detector)
    assert problem in detector.problems


def test_a_counter_that_orders_nothing_is_noticed(detector, monkeypatch):
    builder = interpreter.interpreter_builder
    atomic = builder.create_atomic_rmw

    def without_order(kind, pointer, value, mask, order, scope):
        return atomic(kind, pointer, value, mask, ir.MEM_SEMANTIC.RELAXED, scope)

    monkeypatch.setattr(builder, "create_atomic_rmw", without_order)
    one_step(detector)
    assert ("a read of an unordered write", "decode_attention_kernel") in detector.problems
