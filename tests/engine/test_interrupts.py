"""Interrupts at random places of an engine: whatever happened before, the next logits are right."""

import copy
from random import Random

import pytest
import small
import torch

import mistral
from mistral import Sampling
from mistral.engine.compiled import CompiledDecoder
from mistral_kernels.decoder import Decoder as KernelsDecoder


class EagerlyCompiled(CompiledDecoder):
    """The compiled engine without its compiler."""

    backend = "eager"


ENGINES = {
    "eager": mistral.Decoder,
    "compiled": EagerlyCompiled,
    "kernels": lambda *sizes, **options: KernelsDecoder(*sizes, **options, plain=True),
}
SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(temperature=0, repetition_penalty=1.5),
    Sampling(temperature=0, no_repeat_ngram_size=2),  # the sampling kernel does not have it
    None,
]
SEEDS = small.seeds(3, 60)


class Interrupt(BaseException):
    """Stands for KeyboardInterrupt, which pytest takes for itself."""


def interrupt(thing, name, call, after):
    """Make the `call`-th call of a method raise, before or after its work; returns the undoing."""
    method = getattr(thing, name)
    calls = []

    def interrupted(*args, **options):
        calls.append(name)
        if len(calls) == call and not after:
            raise Interrupt
        result = method(*args, **options)
        if len(calls) == call:
            raise Interrupt
        return result

    setattr(thing, name, interrupted)
    return lambda: delattr(thing, name)


def places(decoder):
    """Methods of an engine to interrupt."""
    yield from ((decoder._cache, name) for name in ("grow", "begin", "commit"))
    yield from ((decoder, name) for name in ("_next_counts", "_pending_ids", "_keep_logits"))
    if isinstance(decoder, KernelsDecoder):
        yield from ((decoder, name) for name in ("_choose", "_place", "_read_one"))
        yield decoder._step, "run"


def random_call(decoder, random):
    """A call of one of the engine's methods, with arguments that it takes."""
    rows = range(decoder.batch_size)
    kind = random.choice(["prefill", "one id", "step", "step", "step", "own", "rewind", "verify"])
    if kind == "prefill":
        prompts = [[random.randrange(101) for _ in range(random.randint(0, 9))] for _ in rows]
        return lambda: decoder.prefill(prompts)
    if kind == "one id":
        ids = [[random.randrange(101)] * random.randint(0, 1) for _ in rows]
        return lambda: decoder.prefill(ids)
    if kind == "step":
        sampling = random.choice(SAMPLINGS[:2])
        return lambda: decoder.step(sampling)
    if kind == "own":
        samplings = [random.choice(SAMPLINGS) for _ in rows]
        return lambda: decoder.step(samplings)
    if kind == "verify" and decoder.batch_size == 1:
        ids = [random.randrange(101) for _ in range(random.randint(1, 9))]
        return lambda: decoder.verify(ids)
    counts = [random.randint(0, min(3, length - 1)) for length in decoder.lengths]
    return lambda: decoder.rewind(counts)


def assert_right(model, decoder):
    for b, logits in enumerate(decoder.logits):
        ids = decoder._history[b, : decoder.lengths[b]]
        assert (ids >= 0).all()
        expected = model(ids[None], last_only=True)[0]
        assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_after_interrupts_anywhere_the_logits_are_those_of_the_ids(engine, seed):
    random = Random(seed)
    window = random.choice([4, 7, 7, None])
    sizes = dict(hidden_size=96, intermediate_size=160, head_dim=16, num_hidden_layers=2)
    model = small.model(torch.float32, sliding_window=window, max_position_embeddings=300, **sizes)
    decoder = ENGINES[engine](
        copy.deepcopy(model),
        random.choice([1, 1, 2, 3]),
        None if window else 60,
        slack=random.choice([0, 1, 3, 8]),
    )
    decoder.prefill([[random.randrange(101) for _ in range(3)] for _ in decoder.lengths])
    for _ in range(40):
        call = random_call(decoder, random)
        undo = list
        if random.random() < 0.3:
            thing, name = random.choice(list(places(decoder)))
            undo = interrupt(thing, name, random.choice([1, 1, 2]), random.random() < 0.5)
        try:
            call()
        except Interrupt:
            pass
        except ValueError as error:
            assert "interrupted" not in str(error)  # noqa: PT017
        finally:
            undo()
        if random.random() < 0.4:
            assert_right(model, decoder)
