"""Exceptions at every operation of a call, and signals at any moment: afterwards every engine
continues as if nothing had happened, sampled texts too.
"""

import contextlib
import copy
import itertools
import signal
from random import Random

import pytest
import small
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mistral import Decoder, LookupDecoder, Sampling, generate, generate_batch
from mistral.engine.compiled import CompiledDecoder
from mistral_kernels.cpu import Decoder as CpuDecoder
from mistral_kernels.decoder import Decoder as KernelsDecoder

SIZES = dict(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=6,
    eos_token_id=(),
)
SAMPLED = Sampling(seed=3, temperature=1.5, repetition_penalty=1.2)
ROWS = [SAMPLED, Sampling(temperature=0), Sampling(seed=4, typical_p=0.9)]
PROMPTS = [[5, 6, 7, 5, 6, 7, 5], [8], [9, 10, 11]]


@pytest.fixture(scope="module")
def model():
    return small.model(torch.float32, **SIZES)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """`torch.compile` returns the function itself: what interrupts the compiler is not ours."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def eager(model, rows=1, slack=16):
    return Decoder(model, rows, slack=slack)


def compiled(model, rows=1, slack=16):
    return CompiledDecoder(model, rows, slack=slack, sums=False)


def kernels(model, rows=1, slack=16):
    return KernelsDecoder(model, rows, slack=slack, plain=True)


def cpu(model, rows=1, slack=16):
    return CpuDecoder(model, rows, slack=slack, threads=2)


def lookup(inner):
    def make(model):
        return LookupDecoder(inner(model), tokens=4)

    make.__name__ = f"lookup over {inner.__name__}"
    return make


BATCHES = [eager, compiled, kernels, cpu]
ENGINES = [*BATCHES, *map(lookup, BATCHES)]


class Interrupt(BaseException):
    """Stands for KeyboardInterrupt, which pytest takes for itself."""


class RaiseAt(TorchDispatchMode):
    """Raises at the n-th operation on tensors."""

    def __init__(self, n, error):
        super().__init__()
        self.left = n
        self.error = error

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return function(*args, **(kwargs or {}))


def ids_of(decoder):
    """The ids of each row."""
    if isinstance(decoder, LookupDecoder):
        return [list(map(ord, decoder._rows[0].text))]
    return [decoder._history[b, :n].tolist() for b, n in enumerate(decoder.lengths)]


def continued(decoder, sampling, length, rows):
    """All ids after steps up to `length` in the first row, and the logits."""
    while decoder.lengths[0] < length:
        decoder.step(sampling)
    return ids_of(decoder), decoder.logits


def same(found, expected):
    return found[0] == expected[0] and torch.allclose(found[1], expected[1], atol=1e-4)


def calls_of(decoder, sampling):
    """Name -> (a call that grows the rows, by how many ids)."""
    more = [[7, 5, 6, 7, 5, 6, 1, 2, 3]] + [[4]] * (decoder.batch_size - 1)
    calls = {
        "step": (lambda decoder: decoder.step(sampling), 1),
        "prefill": (lambda decoder: decoder.prefill(more), 9),
    }
    if decoder.batch_size == 1 and not isinstance(decoder, LookupDecoder):
        calls["verify"] = (lambda decoder: decoder.verify(more[0]), 9)
    return calls


def check_every_operation(decoder, sampling, every):
    """Interrupts each call at every operation in turn (at each `every`-th)."""
    rows = decoder.batch_size
    decoder.prefill(PROMPTS[:rows])
    for _ in range(2):
        decoder.step(sampling)
    places = 0
    for name, (call, growth) in calls_of(decoder, sampling).items():
        straight = copy.deepcopy(decoder)
        before = straight.lengths[0]
        call(straight)
        expected = continued(straight, sampling, before + growth + 5, rows)
        for n in itertools.count(1 + places % every, every):
            error = (Interrupt(), RuntimeError("out of memory"))[n % 2]
            broken = copy.deepcopy(decoder)
            try:
                with RaiseAt(n, error):
                    call(broken)
            except (Interrupt, RuntimeError) as caught:
                assert caught is error  # noqa: PT017
            else:
                break
            places += 1
            assert broken.lengths[0] in (before, before + growth)
            if broken.lengths[0] == before:
                call(broken)
            assert same(continued(broken, sampling, before + growth + 5, rows), expected), (name, n)
    assert places > 5


@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", ENGINES, ids=lambda make: make.__name__)
def test_an_exception_at_any_operation_changes_no_text(model, make, every):
    check_every_operation(make(model), SAMPLED, every)


@pytest.mark.parametrize("every", [79, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", BATCHES)
def test_without_slack_an_exception_at_any_operation_changes_no_text(model, make, every):
    check_every_operation(make(model, slack=0), SAMPLED, every)


@pytest.mark.parametrize("make", BATCHES)
def test_without_slack_an_exception_in_the_head_changes_no_text(make, monkeypatch):
    model = small.model(torch.float32, **SIZES)
    expected = list(generate(make(model, slack=0), PROMPTS[0], SAMPLED, max_new_tokens=12))
    decoder = make(model, slack=0)
    stops = {6, 9, 10}  # the window has rolled
    calls = itertools.count()
    read = []

    def interrupted(kept):
        def keep(counts, new):
            read.append(max(counts))
            if next(calls) in stops:
                raise Interrupt
            kept(counts, new)

        return keep

    monkeypatch.setattr(decoder, "_keep_logits", interrupted(decoder._keep_logits))
    decoder.prefill(PROMPTS[:1])
    written = []
    while len(written) < 12:
        with contextlib.suppress(Interrupt):
            written.append(decoder.step(SAMPLED).item())
    assert written == expected
    assert set(read[1:]) == {1}  # what the last token needs is still there: it is read alone


@pytest.mark.parametrize("every", [19, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sampling", [SAMPLED, ROWS], ids=["one", "own"])
@pytest.mark.parametrize("make", BATCHES)
def test_an_exception_at_any_operation_changes_no_row(model, make, sampling, every):
    check_every_operation(make(model, 3), sampling, every)


@pytest.mark.parametrize("every", [257, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", ENGINES, ids=lambda make: make.__name__)
def test_generation_that_is_interrupted_continues(model, make, every):
    """Through `generate`: the decoder holds what was yielded, and the rest follows."""
    expected = list(generate(make(model), PROMPTS[0], SAMPLED, max_new_tokens=8))
    for n in itertools.count(1, every):
        decoder = make(model)
        written = []
        try:
            with RaiseAt(n, Interrupt()):
                for id in generate(decoder, PROMPTS[0], SAMPLED, max_new_tokens=8):
                    written.append(id)
            break
        except Interrupt:
            pass
        given = [] if decoder.lengths[0] else PROMPTS[0]
        assert decoder.lengths[0] in (0, len(PROMPTS[0]) + len(written))
        left = 8 - len(written)
        written += generate(decoder, given, SAMPLED, max_new_tokens=left)
        assert written == expected, n


@pytest.mark.parametrize("every", [809, pytest.param(11, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sampling", [SAMPLED, ROWS], ids=["one", "own"])
@pytest.mark.parametrize("make", BATCHES)
def test_a_batch_that_is_interrupted_continues(model, make, sampling, every):
    expected = make(model, 3)
    generate_batch(expected, PROMPTS, sampling, max_new_tokens=8)
    for n in itertools.count(1, every):
        decoder = make(model, 3)
        try:
            with RaiseAt(n, Interrupt()):
                generate_batch(decoder, PROMPTS, sampling, max_new_tokens=8)
            break
        except Interrupt:
            pass
        given = [[]] * 3 if decoder.lengths[0] else PROMPTS
        left = 8 - max(decoder.lengths[0] - len(PROMPTS[0]), 0)
        generate_batch(decoder, given, sampling, max_new_tokens=left)
        assert ids_of(decoder) == ids_of(expected), n


@contextlib.contextmanager
def signals():
    """Inside, SIGALRM raises Interrupt, but for moments in which PyTorch changes its modes.

    A guard of inference_mode that was interrupted there is left open, and ends whenever it is
    freed: in the middle of another test.
    """

    def ring(_, frame):
        if frame.f_code.co_filename.endswith(("grad_mode.py", "_contextlib.py")):
            signal.setitimer(signal.ITIMER_REAL, 0.0005)
            return
        raise Interrupt

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("steps", [40, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", ENGINES, ids=lambda make: make.__name__)
def test_signals_at_random_moments_change_no_text(model, make, steps):
    random = Random(5)
    expected = make(model)
    total = len(PROMPTS[0]) + steps
    list(generate(expected, PROMPTS[0], SAMPLED, max_new_tokens=steps))
    decoder = make(model)
    interrupted = 0
    while interrupted < 3:  # a fast engine may come to the end before the first signal
        decoder.rewind(decoder.lengths)
        with signals():
            while (length := decoder.lengths[0]) < total:
                given = [] if length else PROMPTS[0]
                left = total - (length or len(PROMPTS[0]))
                try:
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.001, 0.02))
                    for _ in generate(decoder, given, SAMPLED, max_new_tokens=left):
                        pass
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except Interrupt:
                    interrupted += 1
        assert ids_of(decoder) == ids_of(expected)
