"""Slots: every request gets the ids that it gets alone, in its turn, whatever happens to others."""

import gc
import itertools
import random
import resource

import pytest
import small
import torch

import mistral
from mistral import Decoder, LookupDecoder, Sampling
from mistral.engine.base import Constraint
from mistral.engine.compiled import CompiledDecoder
from mistral.server import QueueFull, Request, Slots
from mistral.server.rows import common_prefix
from mistral.server.warm_up import warm_up
from mistral_kernels import Decoder as KernelDecoder
from mistral_kernels.cpu import Decoder as CpuDecoder

GREEDY = Sampling(temperature=0)
SIZES = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=24,
)


def lookup(model, rows, **sizes):
    """Guesses: the answers of a random model repeat themselves."""
    return LookupDecoder(Decoder(model, rows, **sizes), tokens=6)


ENGINES = {
    "lookup": lookup,
    "eager": Decoder,
    "compiled": lambda model, rows, **sizes: CompiledDecoder(model, rows, sums=False, **sizes),
    "kernels": lambda model, rows, **sizes: KernelDecoder(model, rows, plain=True, **sizes),
    "cpu": CpuDecoder,
}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """The compiled engine's functions as they are: the compiler takes seconds."""
    monkeypatch.setattr(CompiledDecoder, "backend", "eager")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture(scope="module")
def model():
    return small.model(torch.float32, **SIZES)


def prompt(n, seed=0):
    return small.tokens(n, seed=seed, vocab_size=SIZES["vocab_size"]).tolist()


def request(prompt_ids, n=8, sampling=GREEDY, **options):
    return Request(prompt_ids=prompt_ids, sampling=sampling, max_new_tokens=n, **options)


def slots(model, rows=2, make=Decoder, *, chunk=8, queue=64, **sizes):
    return Slots(make(model, rows, **sizes), chunk=chunk, queue=queue)


def finish(slots, *runs):
    """Turn until all runs have ended; the ids of each."""
    for _ in range(10_000):
        if all(run.state == "ended" for run in runs):
            return [[chosen.id for chosen in run.take()] for run in runs]
        slots.turn()
    raise AssertionError("some run never ends")


def alone(model, request, make=Decoder):
    """The ids that a request gets without company."""
    room = None if model.config.sliding_window else 400
    engine = Decoder if make is lookup else make
    generated = mistral.generate(
        engine(model, 1, max_tokens=room),
        request.prompt_ids,
        request.sampling,
        max_new_tokens=request.max_new_tokens,
        stop_tokens=request.stop_tokens,
        constraint=request.constraint,
        logprobs=request.top_logprobs is not None,
    )
    return [getattr(token, "id", token) for token in generated]


class Pattern(Constraint):
    """Ids of one remainder by 3, the next after each; every fourth and fifth id is forced."""

    def __init__(self, start=0):
        self.seen = start
        self.asked = 0  # how often the model was to choose

    def mask(self):
        self.asked += 1
        if forced := self.forced():
            return torch.arange(SIZES["vocab_size"]) == forced[0]
        return torch.arange(SIZES["vocab_size"]) % 3 == self.seen % 3

    def accept(self, id):
        assert id % 3 == self.seen % 3
        self.seen += 1

    def forced(self):
        at = self.seen % 6
        return [33 + (self.seen + i) % 3 for i in range(6 - at)] if at >= 4 else []


class Broken(Constraint):
    """Raises in one of its methods at the third token."""

    def __init__(self, method):
        self.method = method
        self.seen = 0

    def mask(self):
        self.fail("mask")

    def accept(self, id):
        self.fail("accept")
        self.seen += 1

    def forced(self):
        self.fail("forced")
        return []

    def fail(self, method):
        if method == self.method and self.seen == 2:
            raise ZeroDivisionError(method)


# The same ids as alone


def random_request(rng, shared):
    """Of any sort; half of the prompts begin with one of the shared ones."""
    ids = prompt(rng.choice([1, 3, 20, 30, 75]), rng.randrange(1000))
    if rng.random() < 0.5:
        ids = rng.choice(shared) + ids[: rng.choice([1, 9])]
    sampling = rng.choice(
        [
            GREEDY,
            Sampling(seed=rng.randrange(3)),
            Sampling(temperature=0.7, top_k=9, repetition_penalty=1.2, seed=rng.randrange(3)),
            Sampling(temperature=0, frequency_penalty=0.5, logit_bias={7: 2.0}),
        ]
    )
    options = {}
    if rng.random() < 0.25:
        options["constraint"] = rng.randrange(3)
    if rng.random() < 0.2:
        options["top_logprobs"] = 2
    if rng.random() < 0.3:
        options["stop_tokens"] = range(20, 30)
    return ids, rng.choice([0, 1, 6, 14, 40]), sampling, options


def made(ids, n, sampling, options):
    """A request with a constraint of its own."""
    options = dict(options)
    if "constraint" in options:
        options["constraint"] = Pattern(options["constraint"])
    return request(ids, n, sampling, **options)


def check_schedule(seed, model, make):
    """Requests that come and go at random: each gets what it gets alone, or the beginning of it."""
    rng = random.Random(seed)
    shared = [prompt(25, 7), prompt(40, 8)]
    s = slots(model, rng.choice([2, 3]), make, chunk=rng.choice([4, 8, 32]))
    todo = [random_request(rng, shared) for _ in range(5)]
    # Several answers to one prompt, which differ by their random numbers.
    todo += [(todo[-1][0], 9, Sampling(seed=n), {}) for n in range(2)]
    runs = []
    cancelled = set()
    while len(runs) < len(todo) or any(run.state != "ended" for run in runs):
        while len(runs) < len(todo) and rng.random() < 0.3:
            runs.append(s.submit(made(*todo[len(runs)])))
        if runs and rng.random() < 0.03:
            cancelled.add(run := rng.choice(runs))
            s.cancel(run)
        s.turn()
        assert s.engine.lengths == [len(ids) for ids in s._held.ids]
    for run, of in zip(runs, todo):
        ids = [chosen.id for chosen in run.take()]
        expected = alone(model, made(*of), make)
        if run in cancelled and run.reason == "cancelled":
            expected = expected[: len(ids)]
        assert ids == expected, (seed, of)
    return runs


@pytest.mark.parametrize("name", ENGINES)
def test_random_schedules_change_no_ids(name, model):
    runs = check_schedule(1, model, ENGINES[name])
    assert any(run.cached_tokens for run in runs)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("name", ENGINES)
def test_200_random_schedules_change_no_ids(name, part, model):
    for seed in range(25 * part, 25 * part + 25):
        check_schedule(1000 + seed, model, ENGINES[name])


@pytest.mark.parametrize("name", ENGINES)
def test_each_request_gets_the_ids_that_it_gets_alone(name, model):
    make = ENGINES[name]
    lengths = [(5, 12), (70, 9), (1, 30), (23, 20), (24, 1), (40, 5)]
    requests = [
        request(prompt(n, seed=i), new, Sampling(seed=i) if i % 2 else GREEDY)
        for i, (n, new) in enumerate(lengths)
    ]
    s = slots(model, 3, make)
    runs = [s.submit(r) for r in requests]
    assert finish(s, *runs) == [alone(model, r, make) for r in requests]
    assert [run.reason for run in runs] == ["length"] * 6
    assert not s.turn()


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "lookup"])
def test_the_same_bits_in_any_company(name, model):
    """The log-probabilities of a run are equal, not nearly equal, with others and without."""

    def run_all(requests):
        s = Slots(ENGINES[name](model, 3), chunk=8, same_bits=True)
        runs = [s.submit(made(*of)) for of in requests]
        while s.turn():
            pass
        assert {run.cached_tokens for run in runs} == {0}
        return [run.take() for run in runs]

    requests = []
    for i, n in enumerate((30, 5, 41, 30, 18)):
        options = {"top_logprobs": 4} | ({"constraint": 1} if i == 1 else {})
        sampling = Sampling(seed=i) if i % 2 else GREEDY
        requests.append((prompt(n, i % 3), 9, sampling, options))
    together = run_all(requests)
    assert together == [run_all([alone])[0] for alone in requests]
    assert ENGINES[name](model, 3).steps_keep_bits == (name in ("kernels", "cpu"))
    if name == "eager":
        s = slots(model, 3)
        near = [s.submit(made(*of)) for of in requests]
        while s.turn():
            pass
        assert [run.take() for run in near] != together  # what the option is for


def test_log_probabilities_are_those_of_generate(model):
    requests = [
        request(prompt(9), top_logprobs=3),
        request(prompt(5, 1), sampling=Sampling(temperature=0, repetition_penalty=3.0)),
        request(prompt(7, 2), top_logprobs=0, sampling=Sampling(seed=4)),
    ]
    s = slots(model, 3)
    runs = [s.submit(r) for r in requests]
    while s.turn():
        pass
    for run in (runs[0], runs[2]):
        r = run.request
        expected = mistral.generate(
            model, r.prompt_ids, r.sampling, max_new_tokens=8, stop_tokens=(), logprobs=True
        )
        for chosen, token in zip(run.take(), expected, strict=True):
            assert chosen.id == token.id
            assert chosen.logprob == pytest.approx(token.logprob, abs=1e-4)
            assert len(chosen.top) == (3 if run is runs[0] else 0)
            values = [value for _, value in chosen.top]
            assert values == sorted(values, reverse=True)
            if run is runs[0]:  # greedy
                assert chosen.top[0] == (chosen.id, chosen.logprob)
    assert {chosen.logprob for chosen in runs[1].take()} == {None}


@pytest.mark.parametrize("name", ENGINES)
def test_a_prompt_is_scored_in_company(name, model):
    s = slots(model, 2, ENGINES[name], chunk=16)
    ids = prompt(40)
    runs = [s.submit(request(ids, 3)), s.submit(request(prompt(30, 3), 9))]
    runs += [s.submit(request(ids, n, top_logprobs=2, score_prompt=True)) for n in (3, 0)]
    answers = finish(s, *runs)
    assert answers == [alone(model, run.request, ENGINES[name]) for run in runs]
    log_p = model(torch.tensor([ids]))[0].log_softmax(dim=-1)
    for run in runs[2:]:
        assert run.cached_tokens == 0
        assert [chosen.id for chosen in run.prompt] == ids[1:]
        for i, chosen in enumerate(run.prompt):
            assert chosen.logprob == pytest.approx(log_p[i, chosen.id].item(), abs=1e-3)
            assert [id for id, _ in chosen.top] == log_p[i].topk(2).indices.tolist()
    assert runs[0].prompt == []


def test_forced_ids_are_read_together_and_told(model):
    s = slots(model, 2, chunk=64)
    run = s.submit(request(prompt(9), 12, constraint=Pattern()))
    other = s.submit(request(prompt(5, 1), 12))
    turns = 0
    while s.turn():
        turns += 1
    chosen = run.take()
    assert [c.origin for c in chosen] == (["sampled"] * 4 + ["forced"] * 2) * 2
    assert run.request.constraint.asked == 8
    assert [c.id for c in other.take()] == alone(model, other.request)
    assert turns == 11  # both prompts in the first, and a step; forced ids are read before a step


def test_forced_ids_take_half_of_a_chunk_at_most(model):
    class Dictated(Pattern):
        def forced(self):
            return [id for id in range(60, 90) if id >= 60 + self.seen]

        def mask(self):
            raise AssertionError("there is no choice")

        def accept(self, id):
            assert id == 60 + self.seen
            self.seen += 1

    s = slots(model, 3, Watched, chunk=8)
    runs = [s.submit(request(prompt(2 + i, i), 20, constraint=Dictated())) for i in range(2)]
    runs.append(s.submit(request(prompt(60, 5), 5)))
    assert finish(s, *runs) == [[*range(60, 80)]] * 2 + [alone(model, runs[2].request)]
    reads = [what for name, *what in s.engine.asked if name == "read"]
    assert [n for b, n in reads if b < 2 and n != 2 and n != 3] == [4] * 10  # in turns
    assert [n for b, n in reads if b == 2][:4] == [3, 4, 4, 4]  # 3: after two short prompts


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.3, top_k=3, seed=2)])
def test_right_guesses_are_told_and_save_forward_passes(model, sampling):
    """Rows of unequal lengths, past the window: the ids of a plain engine, with fewer passes."""
    s = slots(model, 3, lookup)
    runs = [s.submit(request(prompt(n, n), 40, sampling, top_logprobs=n % 2)) for n in (9, 44, 2)]
    while s.turn():
        pass
    chosen = [run.take() for run in runs]
    assert [[c.id for c in row] for row in chosen] == [alone(model, run.request) for run in runs]
    origins = [c.origin for row in chosen for c in row]
    assert set(origins) == {"sampled", "drafted"}
    assert s.engine.forwards < s.engine.plain_forwards


def test_right_guesses_take_no_turn_of_their_own(model):
    s = slots(model, 1, lookup)
    run = s.submit(request(prompt(9, 9), 100))
    turns = 0
    while s.turn():
        turns += 1
    drafted = sum(chosen.origin == "drafted" for chosen in run.take())
    assert drafted > 0
    assert turns == 100 - drafted


def test_a_step_with_guesses_reads_a_bounded_number_of_ids(model):
    reads = []

    class Counted(Decoder):
        def verify_rows(self, rows):
            reads.append((sum(map(len, rows)), sum(map(bool, rows))))
            return super().verify_rows(rows)

    s = Slots(LookupDecoder(Counted(model, 4), tokens=6), chunk=8)
    runs = [s.submit(request([*prompt(6, n), *prompt(6, n)], 30)) for n in range(4)]
    finish(s, *runs)
    assert any(rows == 4 for _, rows in reads)
    assert all(ids <= rows + 6 for ids, rows in reads)


def test_guesses_exclude_the_same_bits(model):
    with pytest.raises(ValueError, match="same_bits excludes lookup"):
        Slots(lookup(model, 2), same_bits=True)


def test_penalties_count_the_answer_of_each_run(model):
    sampling = Sampling(temperature=0, frequency_penalty=1.5)
    s = slots(model)
    runs = [s.submit(request(prompt(20, i), 12, sampling)) for i in range(3)]
    assert finish(s, *runs) == [alone(model, run.request) for run in runs]


def test_the_time_of_the_first_token_stays(model):
    s = slots(model)
    run = s.submit(request(prompt(4)))
    while not run.generated:
        s.turn()
    first = run.times["first"]
    finish(s, run)
    assert run.times["first"] == first < run.times["ended"]


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_that_was_warmed_up_is_empty_and_answers_as_a_new_one(name, model):
    for sizes in ({}, {"max_tokens": 10}):
        engine = ENGINES[name](model, 3, **sizes)
        warm_up(engine, chunk=32)
        assert engine.lengths == [0, 0, 0]
    s = slots(model, 3, lambda *_: engine)
    runs = [s.submit(request(prompt(n, n), 3, Sampling(seed=n))) for n in (7, 1, 4, 5)]
    assert finish(s, *runs) == [alone(model, run.request, ENGINES[name]) for run in runs]


# The end of a run


def test_each_run_says_why_it_ended(model):
    m = small.model(torch.float32, **{**SIZES, "sliding_window": None})
    free = alone(m, request(prompt(9)))
    s = slots(m, 2, max_tokens=20)
    runs = [
        s.submit(request(prompt(9), stop_tokens=[free[2]])),
        s.submit(request(prompt(9))),
        s.submit(request(prompt(15), 50)),
        s.submit(request(prompt(20), 0)),
    ]
    ids = finish(s, *runs)
    assert [run.reason for run in runs] == ["stop", "length", "full", "length"]
    assert ids[:2] == [free[:3], free]
    assert list(map(len, ids)) == [3, 8, 5, 0]
    assert [run.generated for run in runs] == [3, 8, 5, 0]


def test_a_constraint_is_not_told_a_stop_token(model):
    told = []

    class Noting(Constraint):
        def accept(self, id):
            told.append(id)

    free = alone(model, request(prompt(9)))
    s = slots(model)
    run = s.submit(request(prompt(9), stop_tokens=[free[3]], constraint=Noting()))
    assert finish(s, run) == [free[:4]]
    assert told == free[:3]


@pytest.mark.parametrize("method", ["mask", "accept", "forced"])
def test_an_exception_of_a_constraint_ends_its_run_alone(method, model):
    s = slots(model)
    broken = s.submit(request(prompt(9), constraint=Broken(method)))
    other = s.submit(request(prompt(5, 1), 20))
    third = s.submit(request(prompt(30, 2)))
    ids = finish(s, broken, other, third)
    assert broken.reason == "error"
    assert isinstance(broken.error, ZeroDivisionError)
    assert len(ids[0]) == (3 if method == "accept" else 2)
    assert ids[1:] == [alone(model, run.request) for run in (other, third)]
    assert (other.reason, other.error) == ("length", None)


def test_a_mask_of_another_shape_ends_its_run_alone(model):
    class Wrong(Constraint):
        def mask(self):
            return torch.ones(5, dtype=torch.bool)

    s = slots(model)
    wrong = s.submit(request(prompt(9), constraint=Wrong()))
    other = s.submit(request(prompt(5, 1)))
    assert finish(s, wrong, other)[1] == alone(model, other.request)
    assert "mask must be bool [128]" in str(wrong.error)


def test_masks_are_not_copied_to_the_host(model):
    """A copy from the device waits for it: the type meta refuses one."""
    taken = []

    class Placed(Constraint):
        def __init__(self, device):
            self.device = device

        def mask(self):
            return torch.ones(SIZES["vocab_size"], dtype=torch.bool, device=self.device)

    class Noting(Decoder):
        def step(self, sampling, mask=None, active=None):
            taken.append((mask.device.type, tuple(mask.shape)))
            return super().step(sampling, None, active)

    s = slots(model, 3, Noting)
    devices = ("cpu", "meta")
    runs = [s.submit(request(prompt(2), 2, constraint=Placed(device))) for device in devices]
    other = s.submit(request(prompt(2, 1), 2))
    finish(s, *runs, other)
    assert taken == [("meta", (3, SIZES["vocab_size"]))] * 2


def test_log_probabilities_are_read_back_for_all_rows_together(model, monkeypatch):
    reads = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (reads.append(t.shape), to_list(t))[1])
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda t: (reads.append(t.shape), item(t))[1])
    s = slots(model, 3)
    for n in range(3):
        s.submit(request(prompt(2, n), 5, top_logprobs=n))
    s.turn()
    reads.clear()
    s.turn()
    assert reads == [(3,), (3, 3), (3, 2)]  # the ids, their log-probabilities, the highest ids


def test_a_row_without_a_choice_ends_alone(model):
    class Nothing(Constraint):
        def mask(self):
            return torch.zeros(SIZES["vocab_size"], dtype=torch.bool)

    s = slots(model)
    nothing = s.submit(request(prompt(9), constraint=Nothing()))
    other = s.submit(request(prompt(5, 1)))
    assert finish(s, nothing, other) == [[], alone(model, other.request)]
    assert str(nothing.error) == (
        "constraint and penalties forbid every token, so none can be chosen"
    )
    assert s.engine.lengths[0] == 9


@pytest.mark.parametrize("name", ENGINES)
def test_a_row_whose_keys_are_nan_is_erased(name, model):
    m = small.model(torch.float32, **SIZES)
    m.model.embed_tokens.weight[5] = float("nan")
    s = slots(m, 2, ENGINES[name])
    bad = s.submit(request([*prompt(29), 5, 6], 4))
    assert finish(s, bad) == [[]]
    assert str(bad.error).startswith("the logits are NaN or infinite")
    # The second of these gets the row, and the longer first one makes it read masked slots.
    later = [s.submit(request(prompt(n, 50 + n), 12)) for n in (43, 3, 23)]
    for run, ids in zip(later, finish(s, *later)):
        assert ids == alone(m, run.request, ENGINES[name])


def test_an_exception_of_the_engine_ends_the_runs_that_have_a_row(model, monkeypatch):
    s = slots(model, 2)
    runs = [s.submit(request(prompt(9, seed), 20)) for seed in range(4)]
    for _ in range(4):
        s.turn()
    broken = torch.OutOfMemoryError("tried 9 GB")

    def fail(*_):
        step([GREEDY, GREEDY])  # what the engine holds is not what was noted
        raise broken

    step = s.engine.step

    with monkeypatch.context() as patch:
        patch.setattr(s.engine, "step", fail)
        s.turn()
    assert [run.state for run in runs] == ["ended", "ended", "waiting", "waiting"]
    assert runs[0].error is runs[1].error is broken
    assert s.engine.lengths == [0, 0]
    assert finish(s, *runs[2:]) == [alone(model, run.request) for run in runs[2:]]


def test_an_interrupt_ends_the_runs_and_goes_on_to_the_caller(model, monkeypatch):
    s = slots(model, 1)
    run = s.submit(request(prompt(9)))

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(s.engine, "prefill", interrupt)
        s.turn()
    assert run.reason == "error"
    again = s.submit(request(prompt(9)))
    assert finish(s, again) == [alone(model, again.request)]


def test_cancelling_frees_the_row_before_the_next_step(model):
    s = slots(model, 1)
    first = s.submit(request(prompt(9), 50))
    second = s.submit(request(prompt(5, 1)))
    third = s.submit(request(prompt(5, 2)))
    for _ in range(4):
        s.turn()
    generated = first.generated
    s.cancel(first)
    s.cancel(third)
    assert s.state()[0]["state"] == "free"
    assert [run.reason for run in (first, third)] == ["cancelled"] * 2
    s.turn()
    assert second.state == "running"
    assert first.generated == generated > 0
    assert finish(s, second) == [alone(model, second.request)]
    s.cancel(second)
    assert second.reason == "length"


def test_cancelling_a_row_that_reads_its_prompt_leaves_its_turn_to_the_next(model):
    s = slots(model, 2)
    reading = s.submit(request(prompt(60, 5)))
    s.turn()
    s.cancel(reading)
    later = [s.submit(request(prompt(9, 6)))]
    s.turn()
    later += [s.submit(request(prompt(9, seed))) for seed in (7, 8)]
    assert finish(s, *later) == [alone(model, run.request) for run in later]


def test_cancelling_a_row_with_forced_ids_leaves_none_to_its_next_run(model):
    class Dictated(Constraint):
        def forced(self):
            return [70] * 20

    s = slots(model, 1)
    run = s.submit(request(prompt(4), 20, constraint=Dictated()))
    s.turn()
    s.cancel(run)
    later = s.submit(request(prompt(6, 2)))
    assert finish(s, later) == [alone(model, later.request)]


# Order and waiting


class Watched(Decoder):
    """Notes what is asked of it: ("read", row, how many ids) and ("step", rows)."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.asked = []

    def prefill(self, rows):
        self.asked += [("read", b, len(ids)) for b, ids in enumerate(rows) if ids]
        super().prefill(rows)

    def step(self, sampling, mask=None, active=None):
        self.asked.append(("step", [b for b, own in enumerate(sampling) if own]))
        return super().step(sampling, mask, active)


def test_between_two_tokens_of_a_row_there_is_one_chunk_at_most(model):
    s = slots(model, 3, Watched, chunk=8)
    first = s.submit(request(prompt(4), 60))
    others = [s.submit(request(prompt(50, i), 15, constraint=Pattern())) for i in range(4)]
    finish(s, first, *others)
    between = 0
    steps = 0
    for name, *what in s.engine.asked[1:]:  # after the first prompt
        if name == "step" and 0 in what[0]:
            assert between <= 8
            between = 0
            steps += 1
        elif name == "read":
            between += what[1]
        if steps == 60:
            break
    assert steps == 60


def test_prompts_are_read_in_the_order_of_arrival(model):
    s = slots(model, 3, Watched, chunk=8)
    runs = [s.submit(request(prompt(n, n), 3)) for n in (40, 3, 20, 9, 5)]
    finish(s, *runs)
    admitted = [run.times["admitted"] for run in runs]
    assert admitted == sorted(admitted)
    reads = [what[0] for name, *what in s.engine.asked if name == "read"]
    assert [b for b, _ in itertools.groupby(reads)][:3] == [0, 1, 2]
    assert reads[:5] == [0] * 5


def test_nobody_starves(model):
    """50 requests on 4 rows: each waits for no more than the work of those before it."""
    s = slots(model, 4, chunk=8)
    runs = [s.submit(request(prompt(1 + i % 20, i), 1 + i % 7)) for i in range(50)]
    turns = {}
    for turn in range(1000):
        for i, run in enumerate(runs):
            if run.state != "waiting":
                turns.setdefault(i, turn)
        if not s.turn():
            break
    work = 0  # turns, if only one row were served
    for i, run in enumerate(runs):
        assert turns[i] <= work + 1
        work += -(-run.prompt_tokens // 8) + run.generated
    assert {run.reason for run in runs} == {"length"}


def test_the_queue_is_bounded(model):
    s = slots(model, 2, queue=3)
    runs = [s.submit(request(prompt(4, i))) for i in range(5)]
    with pytest.raises(QueueFull, match="5 requests are waiting already"):
        s.submit(request(prompt(4)))
    s.turn()
    assert s.waiting == 3
    with pytest.raises(QueueFull, match="3 requests are waiting already"):
        s.submit(request(prompt(4)))
    s.cancel(runs[4])
    s.submit(request(prompt(4)))
    finish(s, *runs)


# Prefixes


def test_a_row_is_continued_where_a_prompt_agrees_with_it(model):
    m = small.model(torch.float32, **{**SIZES, "sliding_window": None})
    s = slots(m, 2, Watched, chunk=512, max_tokens=200)
    first = s.submit(request(prompt(30)))
    (answer,) = finish(s, first)
    second = s.submit(request([*prompt(30), *answer, 11, 12]))
    third = s.submit(request([*prompt(20), 13]))
    s.engine.asked.clear()
    ids = finish(s, second, third)
    assert (second.cached_tokens, third.cached_tokens) == (38, 20)  # of a busy row: a copy
    assert ids == [alone(m, second.request), alone(m, third.request)]
    assert s.engine.asked[:2] == [("read", 0, 2), ("read", 1, 1)]
    again = s.submit(request([*prompt(20), 13]))
    assert finish(s, again) == [ids[1]]
    assert again.cached_tokens == 20  # one token is left to read
    short = s.submit(request([*prompt(9), 14]))
    assert finish(s, short) == [alone(m, short.request)]
    assert short.cached_tokens == 0


def test_beyond_the_window_a_row_is_rewound_as_far_as_its_slack(model):
    for kept, cached in ((60, 60), (48, 48), (40, 0)):
        s = slots(model, 1)
        first = s.submit(request(prompt(60), 4))
        finish(s, first)
        second = s.submit(request([*prompt(60)[:kept], 11, 12]))
        assert finish(s, second) == [alone(model, second.request)]
        assert second.cached_tokens == cached


def test_the_longest_prefix_counts(model):
    m = small.model(torch.float32, **{**SIZES, "sliding_window": None})
    s = slots(m, 3, max_tokens=200)
    runs = [s.submit(request([*prompt(n), 11, 12], 1)) for n in (20, 50, 30)]
    finish(s, *runs)
    last = s.submit(request([*prompt(60)], 1))
    finish(s, last)
    assert last.cached_tokens == 50


def test_another_row_is_taken_if_the_best_cannot_be_rewound(model):
    s = slots(model, 2)
    long = s.submit(request(prompt(60), 1))
    short = s.submit(request(prompt(20), 1))
    finish(s, long, short)
    third = s.submit(request([*prompt(40), 11], 1))
    finish(s, third)
    assert third.cached_tokens == 20


def test_without_a_prefix_the_oldest_row_is_taken(model):
    s = slots(model, 3)
    for seed in (1, 2, 3, 1, 4):
        finish(s, s.submit(request(prompt(18, seed), 1)))
    assert [ids[:18] for ids in s._held.ids] == [prompt(18, seed) for seed in (1, 4, 3)]


@pytest.mark.parametrize("name", ENGINES)
def test_a_prefix_of_a_row_that_runs_is_copied(name, model):
    make = ENGINES[name]
    s = slots(model, 3, make)
    first = s.submit(request(prompt(21), 20, Sampling(seed=4)))
    while first.generated < 5:
        s.turn()
    second = s.submit(request([*prompt(19), 11, 12], 9, Sampling(seed=4)))
    finish(s, second)
    third = s.submit(request([*prompt(19), 13, 12, 11], 30))
    runs = [first, second, third]
    ids = finish(s, *runs)
    expected = [alone(model, run.request, make) for run in runs]
    assert ids[0] == expected[0][-len(ids[0]) :]
    assert second.cached_tokens == third.cached_tokens == 19
    assert ids[2] == expected[2]


@pytest.mark.parametrize("name", ENGINES)
def test_several_answers_to_one_prompt_read_it_once(name, model):
    make = ENGINES[name]
    s = slots(model, 3, make, chunk=16)
    reads = []
    prefill = s._held.prefill
    s._held.prefill = lambda ids_of: (reads.append(ids_of), prefill(ids_of))
    for n in (50, 17):  # past the window, and not
        runs = [s.submit(request(prompt(n, n), 12, Sampling(seed=seed))) for seed in range(3)]
        ids = finish(s, *runs)
        assert ids == [alone(model, run.request, make) for run in runs]
        assert [run.cached_tokens for run in runs] == [0, n - 1, n - 1]
        assert sum(len(ids) for chunk in reads for ids in chunk.values()) == n + 2
        assert [len(reads[-1][b]) for b in (1, 2)] == [1, 1]  # in one turn
        reads.clear()


def test_a_row_that_would_lose_more_is_copied_to_an_older_one(model):
    m = small.model(torch.float32, **{**SIZES, "sliding_window": None})
    s = slots(m, 2, max_tokens=200)
    long = s.submit(request(prompt(60), 1))
    finish(s, long)
    other = s.submit(request([*prompt(20), 11, 12], 1))
    finish(s, other)
    assert [ids[:60] for ids in s._held.ids] == [prompt(60), [*prompt(20), 11, 12, *ids_of(s, 1)]]
    again = s.submit(request([*prompt(60), 5], 1))
    finish(s, again)
    assert (other.cached_tokens, again.cached_tokens) == (20, 60)


def ids_of(s, b):
    """The last id of a row."""
    return s._held.ids[b][-1:]


def test_a_prompt_waits_only_for_one_that_it_shares_enough_with(model):
    s = slots(model, 3, Watched, chunk=64)
    runs = [s.submit(request(ids, 1)) for ids in (prompt(20), [*prompt(10), 11], prompt(9, 3))]
    s.turn()
    assert s.engine.asked == [("read", 0, 20), ("read", 1, 11), ("read", 2, 9), ("step", [0, 1, 2])]
    assert finish(s, *runs) == [alone(model, run.request) for run in runs]


@pytest.mark.parametrize("name", ENGINES)
def test_a_seed_begins_anew_on_a_row_that_is_continued(name, model):
    make = ENGINES[name]
    s = slots(model, 1, make)
    ids = prompt(17)
    sampling = Sampling(seed=5)
    for _ in range(3):
        run = s.submit(request(ids, 4, sampling))
        (answer,) = finish(s, run)
        assert answer == alone(model, run.request, make)
        ids = [*ids, *answer]
    assert run.cached_tokens > 17


def test_common_prefixes():
    for a, b in itertools.product([[], [1], [1, 2], [1, 2, 3], [2, 2, 3], [1, 2, 4, 5]], repeat=2):
        same = [x == y for x, y in zip(a, b)]
        assert common_prefix(a, tuple(b)) == (same + [False]).index(False)


# What is refused, what is told


def test_impossible_requests_are_refused(model):
    for changes, message in [
        (dict(prompt_ids=[]), "the prompt is empty"),
        (dict(prompt_ids="text"), "the prompt is text"),
        (dict(max_new_tokens=-1), "max_new_tokens must be a whole number, 0 or more, not -1"),
        (dict(max_new_tokens=True), "max_new_tokens must be a whole number"),
        (dict(sampling=None), "sampling must be a mistral.Sampling"),
        (dict(top_logprobs=1025), "top_logprobs must be a whole number from 0 to 1024"),
        (dict(constraint=5), "a constraint has mask and accept"),
        (dict(stop_tokens="x"), "stop_tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            Request(**dict(prompt_ids=[5], sampling=GREEDY, max_new_tokens=1) | changes)
    s = slots(small.model(torch.float32, **{**SIZES, "sliding_window": None}), max_tokens=20)
    for ids, n, message in [
        ([128], 1, "token id 128 lies outside the vocabulary of 128"),
        (prompt(20), 1, "a prompt of 20 tokens leaves no room for an answer: a slot holds 20"),
        (prompt(21), 0, "a prompt of 21 tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            s.submit(request(ids, n))
    with pytest.raises(ValueError, match="logit_bias: token id 128"):
        s.submit(request([5], sampling=Sampling(logit_bias={128: 1})))
    assert s.waiting == 0
    s.submit(request(prompt(20), 0))
    for options in (dict(chunk=1), dict(queue=-1)):
        with pytest.raises(ValueError, match="slots need chunk >= 2 and queue >= 0"):
            slots(model, **options)
    engine = Decoder(model)
    engine.prefill([[5]])
    with pytest.raises(ValueError, match="holds tokens already"):
        Slots(engine)


def test_the_state_says_how_far_each_row_is(model):
    s = slots(model, 3, chunk=8)
    for n in (4, 20):
        s.submit(request(prompt(n), 5))
    s.turn()
    s.turn()
    assert s.state() == [
        {
            "id": 0,
            "state": "running",
            "held_tokens": 6,
            "prompt_tokens": 4,
            "cached_tokens": 0,
            "generated": 2,
            "max_new_tokens": 5,
        },
        {
            "id": 1,
            "state": "reading",
            "held_tokens": 12,
            "prompt_tokens": 20,
            "cached_tokens": 0,
            "generated": 0,
            "max_new_tokens": 5,
        },
        {"id": 2, "state": "free", "held_tokens": 0},
    ]


@pytest.mark.slow
def test_2000_requests_take_no_memory(model):
    s = slots(model, 4, queue=8)
    for i in range(2200):
        run = s.submit(request(prompt(1 + i % 30, i), 1 + i % 5, Sampling(seed=i)))
        if i % 7 == 0:
            s.turn()
            s.cancel(run)
        while s.waiting == 8:
            s.turn()
        if i == 200:
            gc.collect()
            objects = len(gc.get_objects())
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while s.turn():
        pass
    del run
    gc.collect()
    assert len(gc.get_objects()) < objects + 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 4096  # KiB
