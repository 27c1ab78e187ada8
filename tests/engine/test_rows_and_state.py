"""What rows hold after anything: another turn, no choice left, copies, what is attached."""

import copy
import functools
import gc
import math
import pickle
import threading
import weakref

import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F

import mistral
from mistral import Decoder, LookupDecoder, Sampling, generate, generate_batch, generate_naive
from mistral.engine.compiled import CompiledDecoder
from mistral.engine.ids import token_ids, unpadded
from mistral.engine.loop import batch_loop
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
)


@pytest.fixture
def traced():
    """The compiled engine is traced, for what depends on that; it takes seconds."""


@pytest.fixture(autouse=True)
def uncompiled(request, monkeypatch):
    monkeypatch.setattr(CompiledDecoder, "backend", "eager")
    if "traced" not in request.fixturenames:
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def model(**changes):
    return small.model(torch.float32, **SIZES, **changes)


def prompt(n, seed=0):
    return small.tokens(n, seed=seed, vocab_size=SIZES["vocab_size"]).tolist()


def eager(model, rows=1, max_tokens=200):
    return Decoder(model, rows, max_tokens)


def compiled(model, rows=1, max_tokens=200):
    return CompiledDecoder(model, rows, max_tokens, sums=False)


def kernels(model, rows=1, max_tokens=200):
    return KernelDecoder(model, rows, max_tokens, plain=True)


def cpu(model, rows=1, max_tokens=200):
    return CpuDecoder(model, rows, max_tokens)


def lookup(model, rows=1, max_tokens=200):
    return LookupDecoder(Decoder(model, rows, max_tokens, slack=16), tokens=4)


BATCHES = pytest.mark.parametrize("make", [eager, compiled, kernels, cpu])
ENGINES = pytest.mark.parametrize("make", [eager, compiled, kernels, cpu, lookup])


def run(model_or_decoder, ids, n=8, sampling=GREEDY, **options):
    options = {"stop_tokens": (), **options}
    return list(generate(model_or_decoder, ids, sampling, max_new_tokens=n, **options))


# Turns of a batch


@BATCHES
@pytest.mark.parametrize("sampling", [GREEDY, [GREEDY, Sampling(seed=4), GREEDY]])
def test_a_second_turn_of_a_batch_continues_each_row_where_it_ended(make, sampling):
    m = model(sliding_window=6)
    prompts = [prompt(9), prompt(5, 3), prompt(1, 7)]
    stop = [run(m, prompts[0])[2]]
    decoder = make(m, 3)
    first = generate_batch(decoder, prompts, sampling, max_new_tokens=10, stop_tokens=stop)
    assert len({len(answer) for answer in first}) > 1
    assert decoder.lengths == [len(p) + len(a) for p, a in zip(prompts, first)]
    more = [[11, 12, 13], [14, 15], [16]]
    second = generate_batch(decoder, more, GREEDY, max_new_tokens=5, stop_tokens=())
    expected = [run(m, p + a + n, 5) for p, a, n in zip(prompts, first, more)]
    assert second == expected


@BATCHES
def test_each_row_says_why_it_ended(make):
    m = model(sliding_window=None)
    prompts = [prompt(9), prompt(12, 3), prompt(20, 5)]
    stop = run(m, prompts[0])[3]
    decoder = make(m, 3, 24)
    answers = generate_batch(decoder, prompts, GREEDY, max_new_tokens=7, stop_tokens=[stop])
    assert answers.reasons == ["stop", "length", "full"]
    assert [len(answer) for answer in answers] == [4, 7, 4]
    assert decoder.lengths == [13, 19, 24]


@functools.cache
def continuation(window, ids):
    """What every engine must write after these ids."""
    return run(model(sliding_window=window), list(ids), 6)


@BATCHES
@pytest.mark.parametrize("window", [6, None])
def test_a_row_is_copied_without_a_forward_pass(make, window):
    """At unequal lengths, past the window, with ids that the cache has not read yet."""
    m = model(sliding_window=window)
    for length in (1, 27, 40, 41):
        decoder = make(m, 3)
        decoder.prefill([prompt(40), prompt(9, 3), prompt(31, 4)])
        sampled = decoder.step([GREEDY, GREEDY, None]).tolist()
        ids = [*prompt(40), sampled[0]]
        if window and length == 1:
            with pytest.raises(ValueError, match="cannot be copied up to token 1: once the window"):
                decoder.copy_row(0, 1, length)
            assert decoder.lengths == [41, 10, 31]
            continue
        cached = decoder._cache.lengths
        decoder.copy_row(0, 1, length)
        assert decoder.lengths == [41, length, 31]
        assert decoder._cache.lengths == [cached[0], min(length, cached[0]), cached[2]]
        # The source, the copy and another row continue, each by ids of its own.
        more = [[7], [11, 12], [8]]
        answers = generate_batch(decoder, more, GREEDY, max_new_tokens=6, stop_tokens=())
        texts = ([*ids, 7], [*ids[:length], 11, 12], [*prompt(31, 4), 8])
        assert answers == [continuation(window, tuple(text)) for text in texts]


@BATCHES
def test_the_logits_of_a_copy_are_those_of_its_ids(make):
    m = model(sliding_window=6)
    decoder = make(m, 3)
    decoder.prefill([prompt(20), prompt(4, 1), []])
    expected = m(torch.tensor([prompt(20)]))[0]
    for target, length in ((2, 20), (1, 20), (1, 18), (1, 20)):
        decoder.copy_row(0, target, length)
        got = decoder.logits
        assert torch.allclose(got[0], expected[19], atol=1e-4)
        assert torch.allclose(got[target], expected[length - 1], atol=1e-4)
    decoder.copy_row(0, 1, 0)
    assert decoder.lengths == [20, 0, 20]


@BATCHES
def test_a_copy_that_cannot_be_rolled_back_any_more_does_not_stop_the_other_rows(make):
    """Its last id is read again for its logits, which needs no slack."""
    m = model(sliding_window=6)
    decoder = make(m, 2)
    decoder.prefill([prompt(80), []])
    length = 80 - decoder.slack
    decoder.copy_row(0, 1, length)
    decoder.rewind([1, 0])
    assert decoder.lengths == [79, length]
    expected = m(torch.tensor([prompt(80)]))[0]
    assert torch.allclose(decoder.logits, expected[[78, length - 1]], atol=1e-4)


@BATCHES
def test_a_rewind_of_the_whole_slack_is_exact_and_one_more_is_refused(make):
    m = model(sliding_window=6)
    expected = m(torch.tensor([prompt(80)]))[0]
    decoder = make(m, 2)
    decoder.prefill([prompt(80), prompt(80)[:40]])
    length = 80 - decoder.slack
    decoder.rewind([decoder.slack, 0])
    assert decoder.lengths == [length, 40]
    with pytest.raises(ValueError, match="can be rolled back"):
        decoder.rewind([1, 0])
    assert torch.allclose(decoder.logits, expected[[length - 1, 39]], atol=1e-4)
    decoder.prefill([prompt(80)[length:], []])
    assert torch.allclose(decoder.logits, expected[[79, 39]], atol=1e-4)


def test_a_rewind_of_the_whole_slack_may_be_interrupted_and_continued_by_other_rows():
    """While the last kept token is read again, its row is one token beyond its slack."""
    m = model(sliding_window=6)
    expected = m(torch.tensor([prompt(80)]))[0]

    def interrupt(*_):
        raise KeyboardInterrupt

    for more in ([0, 1], [1, 0]):
        decoder = Decoder(m, 2)
        decoder.prefill([prompt(80), prompt(80)[:40]])
        decoder.rewind([decoder.slack, 0])
        handle = m.model.norm.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            decoder.logits  # noqa: B018
        handle.remove()
        decoder.rewind(more)
        last = [length - 1 for length in decoder.lengths]
        assert last == [63 - more[0], 39 - more[1]]
        assert torch.allclose(decoder.logits, expected[last], atol=1e-4)


@BATCHES
def test_ids_in_flight_are_rolled_back_before_a_row_is_scored(make):
    m = model(sliding_window=6)
    decoder = make(m, 2)
    decoder.prefill([prompt(30), prompt(9)])
    decoder.step(GREEDY)
    decoder.in_flight = [1, 1]  # as `generate` leaves them while it is suspended
    scores = decoder.score(0, [7, 8, 9])
    assert decoder.lengths == [33, 9]
    expected = m(torch.tensor([[*prompt(30), 7, 8, 9]]))[0, 30:]
    assert scores.shape == expected.shape
    assert torch.allclose(scores, expected, atol=1e-4)


@BATCHES
def test_rows_are_verified_together(make):
    """Of unequal counts and lengths, past the window, with ids that were not read yet."""
    m = model(sliding_window=6)
    decoder = make(m, 4)
    decoder.prefill([prompt(40), prompt(9, 3), [5], prompt(3, 4)])
    chosen = decoder.step([GREEDY, None, GREEDY, GREEDY]).tolist()
    texts = [[*prompt(40), chosen[0]], prompt(9, 3), [5, chosen[2]], [*prompt(3, 4), chosen[3]]]
    for more in ([[7, 8, 9], [], [1], prompt(6, 8)], [[], [3, 4], [], []], [[], [], [], []]):
        found = decoder.verify_rows(more)
        for b, ids in enumerate(more):
            texts[b] += ids
            expected = m(torch.tensor([texts[b]]))[0, len(texts[b]) - len(ids) :]
            assert found[b].shape == (len(ids), 128)
            assert torch.allclose(found[b], expected, atol=1e-4)
        assert decoder.lengths == list(map(len, texts))
    last = torch.stack([m(torch.tensor([text]))[0, -1] for text in texts])
    assert torch.allclose(decoder.logits, last, atol=1e-4)


@ENGINES
def test_impossible_copies_are_refused(make):
    decoder = make(model(sliding_window=6), 1)
    decoder.prefill([prompt(9)])
    for arguments in ((0, 0, 3), (0, 1, 3), (1, 0, 3)):
        with pytest.raises(ValueError, match="cannot (be copied|copy row)"):
            decoder.copy_row(*arguments)
    if make is not lookup:
        decoder = make(model(sliding_window=6), 2)
        decoder.prefill([prompt(9), []])
        for length in (-1, 10):
            with pytest.raises(ValueError, match=f"{length} tokens cannot be copied of a row"):
                decoder.copy_row(0, 1, length)


COUNTING = Sampling(
    temperature=0, frequency_penalty=0.9, presence_penalty=0.4, logit_bias={5: 3.0, 6: -9.0}
)


@ENGINES
def test_penalties_count_the_answer_and_biases_are_added_by_every_engine(make):
    m = model(sliding_window=6)
    ids = prompt(9)
    expected = list(generate_naive(m, ids, COUNTING, max_new_tokens=30, stop_tokens=()))
    assert expected != run(m, ids, 30)
    decoder = make(m)
    assert run(decoder, ids, 30, COUNTING) == expected
    # In the next turn the first answer is a part of the prompt.
    told = ids + expected + [7, 8]
    expected = list(generate_naive(m, told, COUNTING, max_new_tokens=9, stop_tokens=()))
    assert run(decoder, [7, 8], 9, COUNTING) == expected
    with pytest.raises(ValueError, match="logit_bias: token id 128 lies outside"):
        run(decoder, [7], 1, Sampling(logit_bias={128: 1.0}))


@BATCHES
def test_each_row_has_its_own_penalties(make):
    m = model(sliding_window=None)
    prompts = [prompt(9), prompt(5, 3), prompt(1, 7)]
    sampling = [COUNTING, GREEDY, Sampling(temperature=0, frequency_penalty=-1.0)]
    got = generate_batch(make(m, 3), prompts, sampling, max_new_tokens=12, stop_tokens=())
    assert got == [run(m, p, 12, s) for p, s in zip(prompts, sampling)]


def test_a_long_prompt_of_one_row_is_not_padded_to_all_rows(monkeypatch):
    m = model(sliding_window=None)
    passes = []
    forward = mistral.Mistral.forward

    def noted(self, tokens, *args, **options):
        passes.append(tuple(tokens.shape))
        return forward(self, tokens, *args, **options)

    monkeypatch.setattr(mistral.Mistral, "forward", noted)
    decoder = eager(m, 4)
    decoder.prefill([prompt(9), prompt(12, 1), [], prompt(3, 2)])
    decoder.step([GREEDY, GREEDY, None, GREEDY])
    expected = copy.deepcopy(decoder)
    decoder.prefill([[], [], prompt(40, 3), []])
    # Few tokens a row are read together; the long prompt alone, then the ids of the step.
    assert passes == [(4, 12), (1, 40), (4, 1)]
    for id in prompt(40, 3):
        expected.prefill([[], [], [id], []])
    assert passes[-1] == (1, 1)
    assert torch.allclose(decoder.logits, expected.logits, atol=1e-4)


def test_generate_says_why_it_ended():
    m = model()
    free = run(m, prompt(9))
    for options, reason in [
        (dict(stop_tokens=[free[2]]), "stop"),
        (dict(stop_tokens=()), "length"),
    ]:
        ids = generate(m, prompt(9), GREEDY, max_new_tokens=5, **options)
        assert ids.reason is None
        assert list(ids) == free[: 3 if reason == "stop" else 5]
        assert ids.reason == reason
    m = model(sliding_window=None)
    with pytest.raises(ValueError, match="12 tokens in a row, and the limit here is 11"):
        run(Decoder(m, 1, 11), prompt(9))


# Texts


def test_texts_of_a_batch_are_those_of_each_alone_and_say_why_they_ended():
    m, tokenizer = mistral.load("demo")
    texts = ["What is a sliding window?", "Hello", "The cache"]
    alone = []
    reasons = []
    for text in texts:
        pieces = mistral.generate_text(m, tokenizer, text, GREEDY, max_new_tokens=12, stop=["e"])
        alone.append("".join(pieces))
        reasons.append(pieces.reason)
    together = mistral.generate_batch_text(
        m, tokenizer, texts, GREEDY, max_new_tokens=12, stop=["e"]
    )
    assert together == alone
    assert together.reasons == reasons
    assert "stop_string" in reasons
    streamed = ["", "", ""]
    stream = mistral.stream_batch_text(m, tokenizer, texts, GREEDY, max_new_tokens=12, stop=["e"])
    for row, piece in stream:
        streamed[row] += piece
    assert streamed == alone
    assert stream.reasons == reasons


def test_a_text_in_a_full_decoder_ends_as_full():
    m, tokenizer = mistral.load("demo", sliding_window=None)
    pieces = mistral.generate_text(
        Decoder(m, 1, 12), tokenizer, list(range(10, 18)), GREEDY, max_new_tokens=50, stop_tokens=()
    )
    assert "".join(pieces)
    assert pieces.reason == "full"


def test_a_row_that_is_full_gives_the_text_held_back_with_its_last_id():
    m, tokenizer = mistral.load("demo", sliding_window=None)
    prompts = [list(range(10, 20)), [10, 11]]
    # The first row is full after 2 tokens, and what it ends with could begin the stop string.
    text = "".join(mistral.generate_text(m, tokenizer, prompts[0], GREEDY, max_new_tokens=2))
    events = list(
        mistral.stream_batch_text(
            Decoder(m, 2, 12),
            tokenizer,
            prompts,
            GREEDY,
            max_new_tokens=10,
            stop=[text[-1] + "\0"],
            stop_tokens=(),
        )
    )
    rows = [row for row, _ in events]
    assert "".join(piece for row, piece in events if row == 0) == text
    assert rows.count(1) > 2
    assert max(i for i, row in enumerate(rows) if row == 0) < 6


def test_the_reason_is_there_with_the_last_id():
    m = model()
    ids = generate(m, prompt(9), GREEDY, max_new_tokens=2, stop_tokens=())
    assert [(next(ids), ids.reason)[1], (next(ids), ids.reason)[1]] == [None, "length"]
    assert generate_batch(m, [[5]], GREEDY, max_new_tokens=0).reasons == ["length"]
    m = model(sliding_window=None)
    full = generate_batch(Decoder(m, 2, 9), [prompt(9), [5]], GREEDY, max_new_tokens=2)
    assert full.reasons == ["full", "length"]
    assert [len(row) for row in full] == [0, 2]


# Random numbers


SEEDED = Sampling(seed=7, temperature=1.3)


@ENGINES
def test_ids_that_were_forgotten_are_drawn_again(make):
    m = model()
    expected = run(make(m), prompt(9), 10, SEEDED)
    decoder = make(m)
    assert run(decoder, prompt(9), 7, SEEDED) == expected[:7]
    decoder.rewind(3)
    assert run(decoder, [], 6, SEEDED) == expected[4:]
    decoder.rewind(decoder.lengths)
    assert run(decoder, prompt(9), 10, SEEDED) == expected
    stopped = generate(decoder, [], SEEDED, max_new_tokens=9, stop_tokens=())
    next(stopped)
    stopped.close()  # rolls back steps in flight
    rest = run(decoder, [], 3, SEEDED)
    decoder.rewind(4)
    assert run(decoder, [], 4, SEEDED)[1:] == rest
    # Other ids in the place of drawn ones: the numbers before them stay used.
    decoder.rewind(2)
    decoder.prefill([[5, 6]])
    again = copy.deepcopy(decoder)
    assert run(decoder, [], 3, SEEDED) == run(again, [], 3, SEEDED)


@BATCHES
def test_a_row_that_was_rolled_back_draws_again_what_it_drew(make):
    m = model()
    samplings = [SEEDED, Sampling(seed=1), Sampling(seed=2, typical_p=0.9)]
    prompts = [prompt(9), prompt(5, 3), prompt(1, 7)]
    options = dict(max_new_tokens=6, stop_tokens=())
    decoder = make(m, 3)
    first = generate_batch(decoder, prompts, samplings, **options)
    decoder.rewind([2, 0, 6])
    again = generate_batch(decoder, [[], [], []], samplings, **options)
    assert again[0][:2] == first[0][4:]
    assert again[2] == first[2]
    alone = run(make(m), prompts[1], 12, samplings[1])
    assert first[1] + again[1] == alone


@ENGINES
def test_without_a_seed_nothing_is_drawn_again(make):
    decoder = make(model())
    texts = []
    for _ in range(3):
        texts.append(run(decoder, prompt(9), 12, Sampling(temperature=1.3)))
        decoder.rewind(decoder.lengths)
    assert len(set(map(tuple, texts))) == 3


@BATCHES
def test_rows_of_every_sampling_get_the_text_that_they_get_alone(make):
    m = model()
    samplings = [
        Sampling(seed=1, typical_p=0.8),
        Sampling(seed=1, top_p=0.9, repetition_penalty=1.3),
        Sampling(temperature=0, no_repeat_ngram_size=2),
        GREEDY,
        Sampling(seed=9, no_repeat_ngram_size=3, repetition_penalty=1.2),
    ]
    prompts = [prompt(n, n) for n in (3, 11, 1, 9, 6)]
    alone = [run(make(m), *row) for row in zip(prompts, [12] * 5, samplings)]
    decoder = make(m, 5)
    stop = [alone[1][3], alone[2][5]]
    expected = []
    for text in alone:
        ends = [i + 1 for i, id in enumerate(text) if id in stop]
        expected.append(text[: min(ends, default=12)])
    options = dict(max_new_tokens=12, stop_tokens=stop)
    assert generate_batch(decoder, prompts, samplings, **options) == expected
    decoder.rewind(decoder.lengths)
    assert generate_batch(decoder, prompts[::-1], samplings[::-1], **options) == expected[::-1]


# No choice


def broken_logits(m, change):
    m.lm_head.register_forward_hook(lambda module, inputs, output: change(output))
    return m


BROKEN = {
    "nan": lambda logits: logits.fill_(math.nan),
    "one nan": lambda logits: logits.index_fill_(-1, torch.tensor([5]), math.nan),
    "inf": lambda logits: logits.index_fill_(-1, torch.tensor([7]), math.inf),
    "all -inf": lambda logits: logits.fill_(-math.inf),
}


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=0), Sampling(seed=0, top_p=0.9)])
@pytest.mark.parametrize("name", BROKEN)
def test_logits_without_a_best_one_are_an_error_and_leave_the_decoder_as_it_was(name, sampling):
    m = broken_logits(model(), BROKEN[name])
    for decoder in (Decoder(m), LookupDecoder(Decoder(m), tokens=4)):
        with pytest.raises(ValueError, match="row 0: (the logits are NaN|constraint)"):
            run(decoder, prompt(9), 3, sampling)
        assert decoder.lengths == [9]
    with pytest.raises(ValueError, match="row 0: "):
        list(generate_naive(m, prompt(9), sampling, max_new_tokens=3))
    with pytest.raises(ValueError, match="row 0: "):
        generate_batch(m, [prompt(9), prompt(3)], sampling, max_new_tokens=3)


# Infinite weights make NaN: hidden states are above and below 0.
WEIGHTS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@ENGINES
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=0, typical_p=0.9)])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_broken_output_matrix_is_the_same_error_in_every_engine(make, weight, sampling):
    m = model()
    m.lm_head.weight[5:9] = WEIGHTS[weight]
    decoder = make(m)
    with pytest.raises(ValueError, match="row 0: the logits are NaN or infinite"):
        run(decoder, prompt(9), 3, sampling)
    assert decoder.lengths == [9]
    m.lm_head.weight.fill_(WEIGHTS[weight])
    with pytest.raises(ValueError, match="row 0: the logits are NaN or infinite"):
        run(decoder, [], 3, Sampling(seed=0))
    assert decoder.lengths == [9]


@ENGINES
def test_logits_of_minus_infinity_leave_no_choice_in_every_engine(make):
    m = model()
    m.model.norm.weight.fill_(0)
    m.model.norm.weight[0] = 1
    m.lm_head.weight.fill_(0)
    m.lm_head.weight[:, 0] = 1e38
    decoder = make(m)
    decoder.prefill([prompt(9)])
    sign = -1 if decoder.logits[0, 0] > 0 else 1
    m.lm_head.weight[:, 0] = sign * math.inf
    decoder = make(m)
    for sampling in (GREEDY, Sampling(seed=0)):
        with pytest.raises(ValueError, match="row 0: (the logits are|constraint and penalties)"):
            run(decoder, [] if decoder.lengths[0] else prompt(9), 3, sampling)
        assert decoder.lengths == [9]


@ENGINES
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_vocabulary_that_is_used_up_is_an_error(make, temperature):
    m = small.model(torch.float32, **SIZES | dict(vocab_size=32))
    ids = small.tokens(9, vocab_size=32).tolist()
    sampling = Sampling(temperature=temperature, seed=0, no_repeat_ngram_size=1)
    decoder = make(m)
    written = []
    with pytest.raises(ValueError, match="forbid every token"):
        for id in generate(decoder, ids, sampling, max_new_tokens=60, stop_tokens=()):
            written.append(id)
    assert len(set(written)) == len(written) == 32 - len(set(ids))
    assert decoder.lengths == [9 + len(written)]


@ENGINES
@pytest.mark.parametrize("only", [0, 8])
def test_a_constraint_to_an_id_that_a_penalty_bans_is_an_error(make, only):
    class Only(mistral.Constraint):
        def mask(self):
            return torch.arange(128) == only

    banned = Sampling(temperature=0, no_repeat_ngram_size=1)
    with pytest.raises(ValueError, match="forbid every token"):
        run(make(model()), [only, 5], 3, banned, constraint=Only())


# Ids and stop tokens


KINDS = {
    "list": list,
    "tuple": tuple,
    "numpy": np.array,
    "int32": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "tensor": torch.tensor,
    "uint8": lambda ids: np.array(ids, dtype=np.uint8),
    "int8 tensor": lambda ids: torch.tensor([ids], dtype=torch.int8),
    "uint8 tensor": lambda ids: torch.tensor(ids, dtype=torch.uint8),
    "[1, T]": lambda ids: torch.tensor([ids]),
    "numbers of numpy": lambda ids: list(np.array(ids)),
    "numbers of torch": lambda ids: list(torch.tensor(ids)),
}


@ENGINES
def test_ids_and_stop_tokens_of_every_integer_type_are_taken(make):
    m = model()
    expected = run(m, prompt(9))
    decoder = make(m)
    for kind, convert in KINDS.items():
        assert run(decoder, convert(prompt(9))) == expected, kind
        decoder.rewind(decoder.lengths)
        stop = convert([expected[2]])
        assert run(decoder, convert(prompt(9)), stop_tokens=stop) == expected[:3], kind
        decoder.rewind(decoder.lengths)


@pytest.mark.parametrize(
    "given", ["hello", b"ab", [1.0], [True], 5, None, [[1], [2]], [None], torch.rand(3), np.ones(2)]
)
def test_ids_of_other_types_are_refused(given):
    with pytest.raises(ValueError, match="the prompt (is text|must be whole numbers)"):
        token_ids(given)


def test_a_padded_batch_becomes_its_rows():
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10], [3, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]])
    assert unpadded(ids, mask) == [[5, 6], [7, 8, 9, 10], [3]]
    with pytest.raises(ValueError, match="between the tokens of row 0"):
        unpadded([[1, 2, 3]], [[1, 0, 1]])
    with pytest.raises(ValueError, match=r"\[B, T\] both"):
        unpadded([[1, 2, 3]], [[1, 0]])
    m = model()
    with pytest.raises(ValueError, match="mistral.unpadded"):
        m(ids, attention_mask=mask)
    right = m(ids[2:], attention_mask=mask[2:])
    assert torch.equal(right[:, 0], m(ids[2:])[:, 0])


@ENGINES
def test_a_set_or_one_number_of_any_type_stops(make):
    m = model()
    expected = run(m, prompt(9))
    id = expected[2]
    for stop in ({id}, frozenset([np.int32(id)]), id, np.uint8(id), torch.tensor(id), {id: 1}):
        assert run(make(m), prompt(9), stop_tokens=stop) == expected[:3]
    for stop in ([True], [np.bool_(True)], torch.tensor([True]), [1.0], "ab"):
        with pytest.raises(ValueError, match="stop_tokens (must be|is text)"):
            run(make(m), prompt(9), stop_tokens=stop)


@ENGINES
def test_the_count_of_a_rewind_is_a_whole_number_of_any_type(make):
    decoder = make(model())
    decoder.prefill([prompt(9)])
    for count in (1, [1], np.int64(1), torch.tensor(1), torch.tensor([1])):
        decoder.rewind(count)
    assert decoder.lengths == [4]


# Copies


@ENGINES
def test_a_copy_is_independent_and_shares_the_weights(make):
    m = model()
    expected = run(m, prompt(9))
    decoder = make(m)
    decoder.prefill([prompt(9)])
    branch = copy.deepcopy(decoder)
    assert run(branch, []) == expected
    assert run(decoder, []) == expected
    inner = getattr(branch, "_decoder", branch)
    assert inner.model is m
    sampling = Sampling(seed=3)
    assert run(copy.deepcopy(branch), [4], 6, sampling) == run(branch, [4], 6, sampling)


@pytest.mark.parametrize("make", [eager, lookup])
def test_a_pickled_decoder_continues(make):
    m = model()
    expected = run(m, prompt(9), 10, SEEDED)
    decoder = make(m)
    decoder.holder = lambda: "whoever uses it"  # cannot be pickled, and is not part of it
    run(decoder, prompt(9), 4, SEEDED)
    pickled = pickle.loads(pickle.dumps(decoder))
    assert pickled.holder is None
    assert run(copy.deepcopy(pickled), [], 6, SEEDED) == expected[4:]
    pickled.rewind(2)
    assert run(pickled, [], 8, SEEDED) == expected[2:]


@pytest.mark.parametrize("make", [compiled, kernels])
def test_engines_that_cannot_be_pickled_refuse(make):
    for decoder in (make(model()), LookupDecoder(make(model()), tokens=4)):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(decoder)


@ENGINES
def test_a_copy_in_mid_text_holds_what_was_yielded(make):
    m = model()
    for sampling in (GREEDY, SEEDED):
        expected = run(make(m), prompt(9), 12, sampling)
        decoder = make(m)
        decoder.holder = decoder
        ids = generate(decoder, prompt(9), sampling, max_new_tokens=12, stop_tokens=())
        written = [next(ids) for _ in range(4)]
        branch = copy.deepcopy(copy.deepcopy(decoder))
        assert branch.lengths == [13]
        assert branch.holder is None
        assert [*written, *ids] == expected
        assert written + run(branch, [], 8, sampling) == expected
        assert copy.deepcopy(decoder).lengths == [21]


class ForcesThree(mistral.Constraint):
    def __init__(self):
        self.left = [5, 6, 7]

    def forced(self):
        return self.left

    def accept(self, id):
        self.left = self.left[1:]


@ENGINES
def test_a_copy_among_forced_ids_holds_what_was_yielded(make):
    decoder = make(model())
    ids = generate(decoder, [5], GREEDY, max_new_tokens=9, constraint=ForcesThree())
    next(ids)
    assert copy.deepcopy(decoder).lengths == [2]


@ENGINES
def test_a_copy_after_a_rewind_past_the_window_continues(make):
    m = model(sliding_window=6)
    decoder = make(m)
    text = prompt(9) + run(decoder, prompt(9), 12, SEEDED)
    decoder.rewind(5)
    branch = copy.deepcopy(decoder)
    assert run(branch, [3, 4]) == run(decoder, [3, 4]) == run(m, text[:-5] + [3, 4])


@ENGINES
def test_a_dropped_decoder_is_freed_at_once(make):
    m = model()
    decoder = make(m)
    run(decoder, prompt(9))
    dropped = weakref.ref(decoder)
    gc.disable()
    try:
        del decoder
        assert dropped() is None
    finally:
        gc.enable()


# What is attached


def with_bias(m):
    m.model.layers[0].self_attn.q_proj = torch.nn.Linear(64, 64).requires_grad_(False)


def with_hook(m):
    m.model.layers[1].register_forward_hook(lambda module, inputs, output: output + 1)


def with_pre_hook(m):
    m.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def with_forward(m):
    layer = m.model.layers[0].mlp
    before = layer.forward
    layer.forward = lambda x: before(x) * 2


def with_lora(m):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(m, config)


ATTACHED = [with_bias, with_hook, with_pre_hook, with_forward, with_lora]


@pytest.mark.parametrize("attach", ATTACHED)
@pytest.mark.parametrize("make", [compiled, kernels, lookup])
def test_an_engine_honours_what_is_attached_or_refuses_it(make, attach, traced):
    m = model()
    attach(m)
    torch._dynamo.reset()
    expected = Decoder(m)
    expected.prefill([prompt(5)])
    expected.step(GREEDY)
    try:
        decoder = make(m)
    except ValueError as error:
        assert "cannot honour" in str(error)
        assert make is kernels or attach in (with_hook, with_pre_hook)
        return
    decoder.prefill([prompt(5)])
    decoder.step(GREEDY)
    assert torch.allclose(decoder.logits, expected.logits, atol=1e-4)


@pytest.mark.parametrize("make", [compiled, kernels])
def test_a_hook_that_is_attached_later_is_noticed_by_the_next_sequence(make):
    m = model()
    decoder = make(m)
    run(decoder, prompt(5))
    with_hook(m)
    with pytest.raises(ValueError, match="model.layers.1 has a forward hook"):
        decoder.prefill([prompt(5)])


@ENGINES
def test_a_model_that_is_converted_under_a_decoder_is_noticed(make):
    m = model()
    decoder = make(m)
    decoder.prefill([prompt(5)])
    decoder.step(GREEDY)
    m.bfloat16()
    for call in (
        lambda: decoder.prefill([prompt(5)]),
        lambda: decoder.logits,
        lambda: decoder.step(GREEDY),
        lambda: decoder.verify([3, 4]),
    ):
        with pytest.raises(ValueError, match="create a new decoder"):
            call()


@ENGINES
def test_other_weights_in_a_live_decoders_model_are_used_or_refused(make):
    other = small.model(torch.float32, seed=5, **SIZES)
    expected = run(other, prompt(9))
    for assign in (False, True):
        m = model()
        decoder = make(m)
        run(decoder, prompt(9))
        m.load_state_dict(other.state_dict(), assign=assign)
        decoder.rewind(decoder.lengths)
        if assign and make in (kernels, cpu):
            with pytest.raises(ValueError, match="replaced .*create a new decoder"):
                run(decoder, prompt(9))
        else:
            assert run(decoder, prompt(9)) == expected


@pytest.mark.parametrize("make", [eager, lookup])
def test_two_threads_in_one_decoder_are_noticed(make):
    m = model()
    decoder = make(m)
    said = []

    def meddle(module, inputs):
        def prefill():
            try:
                decoder.prefill([[5]])
            except ValueError as error:
                said.append(str(error))

        thread = threading.Thread(target=prefill)
        thread.start()
        thread.join()

    hook = m.lm_head.register_forward_pre_hook(meddle)
    decoder.prefill([prompt(9)])
    hook.remove()
    assert set(said) == {"another thread is using this decoder: give each thread its own"}
    assert run(decoder, []) == run(m, prompt(9))


# An ordinary module


@pytest.mark.parametrize("name", ["mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj"])
def test_a_forward_hook_keeps_what_its_module_computed(name):
    m = model()
    module = m.get_submodule(f"model.layers.0.{name}")
    kept = []
    module.register_forward_hook(lambda _, inputs, output: kept.append((inputs[0].clone(), output)))
    with torch.no_grad():
        m(torch.tensor([prompt(9)]))
    assert torch.equal(kept[0][1], F.linear(kept[0][0], module.weight))


@pytest.mark.parametrize("name", ["mlp.gate_proj", "mlp.up_proj", "self_attn.o_proj", "mlp", ""])
def test_full_backward_hooks_run(name):
    m = model().requires_grad_(True)
    calls = []
    module = m.get_submodule(f"model.layers.0.{name}".rstrip("."))
    module.register_full_backward_hook(lambda *arguments: calls.append(1))
    m(torch.tensor([prompt(9)])).logsumexp(-1).sum().backward()
    assert calls == [1]


def test_a_gate_of_another_module_trains():
    m = model().requires_grad_(True)
    mlp = m.model.layers[0].mlp
    mlp.gate_proj = torch.nn.Sequential(mlp.gate_proj, torch.nn.Tanh())
    m(torch.tensor([prompt(9)])).sum().backward()
    with torch.no_grad():
        changed = m(torch.tensor([prompt(9)]))
    assert torch.allclose(changed, m(torch.tensor([prompt(9)])), atol=1e-5)


@ENGINES
def test_the_model_trains_after_an_engine_was_made_for_it(make, traced):
    m = model().requires_grad_(True)
    run(make(m), prompt(9), 3)
    assert not any(parameter.is_inference() for parameter in m.parameters())
    m(torch.tensor([prompt(9)])).logsumexp(-1).sum().backward()
    torch.optim.SGD(m.parameters(), 0.1).step()


@ENGINES
def test_autocast_around_generation_changes_nothing(make):
    m = model()
    expected = run(make(m), prompt(9))
    with torch.autocast("cpu", torch.bfloat16):
        assert run(make(m), prompt(9)) == expected


@pytest.mark.parametrize("use_dora", [False, True])
def test_pefts_recipe_for_causal_models_trains_generates_and_merges(use_dora):
    peft = pytest.importorskip("peft")
    m = model().requires_grad_(True)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", use_dora=use_dora
    )
    wrapped = peft.get_peft_model(m, config)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, 0.05)
    tokens = torch.tensor([prompt(9)])
    losses = []
    for _ in range(5):
        logits = wrapped(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        loss = F.cross_entropy(logits[0, :-1], tokens[0, 1:])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with_adapter = run(wrapped, prompt(9))
    merged = wrapped.merge_and_unload()
    assert type(merged) is mistral.Mistral
    assert torch.allclose(merged(tokens), logits_of(wrapped, tokens), atol=1e-4)
    assert run(merged, prompt(9)) == with_adapter


def logits_of(wrapped, tokens):
    with torch.no_grad():
        return wrapped(tokens)


# Slips


def slips():
    m = model()
    decoder = Decoder(m)
    decoder.prefill([prompt(5)])
    wrapped = torch.nn.Sequential(m)
    return [
        (lambda: run("folder", [1]), "'folder' is a path"),
        (lambda: run((m, None), [1]), "not a tuple"),
        (lambda: run(None, [1]), "a model or an engine is needed"),
        (lambda: run({"a": 1}, [1]), "a model or an engine is needed, not {'a': 1}"),
        (lambda: run(m, [1], sampling=torch.zeros(9, 9)), "must be a mistral.Sampling, not tensor"),
        (lambda: run(wrapped, [1]), "Sequential is not a Mistral"),
        (lambda: Decoder("folder"), "'folder' is a path"),
        (lambda: Decoder(decoder), "a model is needed, not a Decoder"),
        (lambda: Decoder(m, "2"), "batch_size must be a whole number of 1 or more, not '2'"),
        (lambda: Decoder(m, 0), "batch_size must be a whole number of 1 or more, not 0"),
        (lambda: Decoder(m, 1, 2.5), "max_tokens must be a whole number of 1 or more"),
        (lambda: Decoder(m, slack=-1), "slack must be a whole number of 0 or more, not -1"),
        (lambda: Decoder(m, slack=None), "slack must be a whole number of 0 or more"),
        (lambda: run(m, [1], sampling={"temperature": 0}), "must be a mistral.Sampling"),
        (lambda: run(m, [1], sampling=None), "must be a mistral.Sampling"),
        (lambda: run(m, [1], 2.0), "max_new_tokens must be a whole number"),
        (lambda: run(m, [1], True), "max_new_tokens must be a whole number"),
        (lambda: generate_batch(m, "ab", GREEDY, max_new_tokens=1), "the prompts are text"),
        (lambda: Sampling(seed=True), "seed must be"),
        (lambda: Sampling(temperature="1"), "temperature must be a number"),
        (lambda: Sampling(top_k=True), "top_k must be"),
        (lambda: decoder.step(GREEDY, torch.ones(7, dtype=torch.bool)), r"bool \[128\]"),
        (lambda: decoder.step(GREEDY, torch.ones(128)), r"bool \[128\]"),
        (lambda: decoder.step(GREEDY, [True] * 128), r"bool \[128\]"),
        (lambda: decoder.step(None), "must be a mistral.Sampling, or a list"),
        (lambda: decoder.step([GREEDY, 3]), "must be a mistral.Sampling, or a list"),
        (lambda: decoder.rewind(1.0), "the count of a rewind must be whole numbers"),
        (lambda: decoder.rewind(None), "the count of a rewind must be whole numbers"),
        (lambda: decoder.rewind(True), "the count of a rewind must be whole numbers"),
        (lambda: decoder.prefill(None), "a list of ids for each row is needed"),
        (lambda: generate_batch(m, None, GREEDY, max_new_tokens=1), "prompts must be a list"),
        (lambda: generate_batch(m, [[5]], None, max_new_tokens=1), "must be a mistral.Sampling"),
        (lambda: run(m, [1], constraint=5), "a constraint has mask and accept"),
        (lambda: batch_of_one(m, [None]), "a constraint has mask and accept"),
        (lambda: batch_of_one(m, ForcesThree()), "constraints must be a list"),
        (lambda: unpadded(None, None), r"\[B, T\] both"),
        (lambda: m([[1, 2]]), "tokens must be an int64 tensor"),
        (lambda: m(torch.rand(1, 3)), "tokens must be an int64 tensor"),
        (lambda: m(torch.tensor([[1]]), labels=torch.tensor([[1]])), "labels is not supported"),
    ]


def batch_of_one(m, constraints):
    return generate_batch(m, [[5]], GREEDY, max_new_tokens=1, constraints=constraints)


@pytest.mark.parametrize("number", range(39))
def test_a_slip_is_one_line(number):
    call, message = slips()[number]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_wrappers_that_add_nothing_are_looked_through(traced):
    m = model()
    assert run(torch.compile(m, backend="eager"), prompt(5)) == run(m, prompt(5))
    assert run(torch.nn.DataParallel(m), prompt(5)) == run(m, prompt(5))


def test_changing_the_logits_that_a_decoder_shows_changes_nothing():
    m = model()
    decoder = Decoder(m)
    decoder.prefill([prompt(5)])
    with torch.inference_mode():
        decoder.logits.fill_(0)
    assert run(decoder, []) == run(m, prompt(5))


def test_ids_end_below_the_size_of_the_vocabulary():
    decoder = Decoder(model())
    decoder.prefill([[SIZES["vocab_size"] - 1]])
    with pytest.raises(ValueError, match="token id 128 lies outside"):
        decoder.prefill([[SIZES["vocab_size"]]])


def test_a_row_that_is_full_one_token_early_says_so():
    m = model(sliding_window=None)
    decoder = Decoder(m, 2, 12)
    answers = generate_batch(
        decoder, [prompt(6), prompt(5)], GREEDY, max_new_tokens=7, stop_tokens=()
    )
    assert [len(answer) for answer in answers] == [6, 7]
    assert answers.reasons == ["full", "length"]


def test_a_hook_on_all_modules_keeps_what_a_gate_computed():
    m = model()
    gate = m.model.layers[0].mlp.gate_proj
    kept = []

    def keep(module, inputs, output):
        if module is gate:
            kept.append((inputs[0].clone(), output))

    hook = torch.nn.modules.module.register_module_forward_hook(keep)
    try:
        with torch.no_grad():
            m(torch.tensor([prompt(9)]))
    finally:
        hook.remove()
    assert torch.equal(kept[0][1], F.linear(kept[0][0], gate.weight))


@BATCHES
def test_the_random_numbers_of_a_shared_sampling_continue_while_a_row_is_emptied(make):
    m = model(sliding_window=6)
    sampling = Sampling(seed=3, temperature=3.0)
    first, second = prompt(4), prompt(5, 3)

    def three_steps(decoder, active=None):
        return [decoder.step(sampling, None, active).tolist()[1] for _ in range(3)]

    emptied, idle, new = (make(m, 2) for _ in range(3))
    emptied.prefill([first, [5]])
    three_steps(emptied)
    emptied.rewind([0, 4])
    idle.prefill([first, []])
    three_steps(idle, [True, False])
    for decoder in (emptied, idle):
        decoder.prefill([[], second])
    new.prefill([first, second])
    after = three_steps(emptied)
    assert after == three_steps(idle) != three_steps(new)
    # When all rows are emptied, they start anew.
    emptied.rewind(emptied.lengths)
    emptied.prefill([first, second])
    new.rewind([3, 3])
    assert three_steps(emptied) == three_steps(new)


# A text that is left unfinished


@ENGINES
@pytest.mark.parametrize("use", ["prefill", "step", "rewind", "generate"])
def test_an_unfinished_text_leaves_a_decoder_alone_that_was_used_since(make, use):
    gc.freeze()  # the collection below need not look at what is there before
    m = model(sliding_window=6)
    decoder = make(m)
    unfinished = generate(decoder, prompt(9), GREEDY, max_new_tokens=20, stop_tokens=())
    ids = prompt(9) + [next(unfinished) for _ in range(4)]
    assert decoder.lengths == [len(ids)]  # not those of steps in flight
    if use == "prefill":
        decoder.prefill([[5, 6, 7]])
        ids += [5, 6, 7]
    elif use == "step":
        ids.append(decoder.step(GREEDY).item())
    elif use == "rewind":
        decoder.rewind(2)
        ids = ids[:-2]
    else:
        ids += [5, *run(decoder, [5], 3)]
    if use != "step":
        with pytest.raises(ValueError, match="used while this text was suspended"):
            next(unfinished)
    del unfinished
    gc.collect()
    assert decoder.lengths == [len(ids)]
    assert run(decoder, [8]) == run(make(m), [*ids, 8])


@ENGINES
def test_forced_ids_that_were_not_yielded_are_rolled_back_by_the_next_use(make):
    class Forced(mistral.Constraint):
        def forced(self):
            return [5, 6, 7, 8]

    m = model(sliding_window=None)
    decoder = make(m)
    text = generate(decoder, prompt(9), GREEDY, max_new_tokens=20, constraint=Forced())
    assert [next(text), next(text)] == [5, 6]
    assert decoder.lengths == [11]
    decoder.prefill([[20]])
    text.close()
    assert run(decoder, [8]) == run(make(m), [*prompt(9), 5, 6, 20, 8])


@BATCHES
def test_a_batch_that_is_left_unfinished_keeps_what_was_yielded(make):
    gc.freeze()
    m = model(sliding_window=6)
    prompts = [prompt(9), prompt(5, 3)]
    decoder = make(m, 2)
    loop = batch_loop(decoder, prompts, GREEDY, 20, (), None)
    steps = loop.steps()
    rows = [list(ids) for ids in zip(*(next(steps) for _ in range(3)))]
    decoder.prefill([[5], [6, 7]])
    del steps
    gc.collect()
    assert decoder.lengths == [13, 10]
    found = generate_batch(decoder, [[], []], GREEDY, max_new_tokens=4, stop_tokens=())
    histories = [p + row + more for p, row, more in zip(prompts, rows, [[5], [6, 7]])]
    assert found == [run(m, ids, 4) for ids in histories]
