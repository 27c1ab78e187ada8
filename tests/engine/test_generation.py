import copy
import itertools
import random

import pytest
import small
import torch

import mistral
from mistral import Decoder, Sampling, generate, generate_batch, generate_naive, generate_text
from mistral.chat import Conversation, tool
from mistral.checkpoints.hugging_face import save
from mistral.engine.base import IDLE, Constraint, Engine
from mistral.engine.constraints import AnyToken, FixedMask, KnownTokens
from mistral.engine.text import UntilStop

GREEDY = Sampling(temperature=0.0)
RICH = Sampling(
    temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, no_repeat_ngram_size=3, seed=5
)


def prompt(n, seed=0):
    return small.tokens(n, seed=seed).tolist()


def lengths_windows_and_samplings():
    """Quick: greedy and rich past the window from every length, the others from one length."""
    samplings = {"greedy": GREEDY, "rich": RICH, "plain": Sampling(seed=3)}
    for length, window, name in itertools.product([1, 3, 4, 5, 23], [4, None], samplings):
        quick = length == 5 or (window == 4 and name != "plain")
        marks = () if quick else pytest.mark.slow
        yield pytest.param(
            length, window, samplings[name], marks=marks, id=f"{length}-{window}-{name}"
        )


@pytest.mark.parametrize(("length", "window", "sampling"), list(lengths_windows_and_samplings()))
def test_the_cached_loop_equals_the_naive_one_far_beyond_the_window(length, window, sampling):
    model = small.model(sliding_window=window)
    arguments = dict(max_new_tokens=24, stop_tokens=())
    naive = list(generate_naive(model, prompt(length), sampling, **arguments))
    assert list(generate(model, prompt(length), sampling, **arguments)) == naive
    assert len(naive) == 24


def test_a_generated_text_scores_as_its_own_log_probabilities():
    # The re-scoring test of mistral-src: generate with the cache, then read everything in one pass.
    model = small.model()
    start = prompt(7)
    tokens = list(
        generate(model, start, Sampling(seed=1), max_new_tokens=40, stop_tokens=(), logprobs=True)
    )
    text = torch.tensor([start + [token.id for token in tokens]])
    log_p = model(text).float().log_softmax(-1)[0]
    for i, token in enumerate(tokens):
        assert token.logprob == pytest.approx(log_p[len(start) + i - 1, token.id].item(), abs=1e-5)


def test_a_prompt_is_read_in_chunks_of_the_window():
    model = small.model()
    chunks = []
    model.model.register_forward_pre_hook(lambda _, inputs: chunks.append(inputs[0].shape[1]))
    decoder = Decoder(model)
    decoder.prefill([prompt(11)])
    assert chunks == [4, 4, 3]
    assert torch.allclose(decoder.logits, model(torch.tensor([prompt(11)]))[:, -1], atol=1e-12)


def test_stop_tokens_end_the_text_and_are_its_last():
    model = small.model()
    free = list(generate(model, prompt(5), GREEDY, max_new_tokens=30, stop_tokens=()))
    stop = free[9]
    first = free.index(stop)
    assert (
        list(generate(model, prompt(5), GREEDY, max_new_tokens=30, stop_tokens=[stop]))
        == free[: first + 1]
    )
    assert (
        list(generate_naive(model, prompt(5), GREEDY, max_new_tokens=30, stop_tokens=[stop]))
        == free[: first + 1]
    )
    own = small.model(eos_token_id=(stop,))
    assert list(generate(own, prompt(5), GREEDY, max_new_tokens=30)) == free[: first + 1]


@pytest.mark.parametrize("window", [4, None])
def test_a_ragged_batch_gives_each_prompts_own_continuation(window):
    model = small.model(sliding_window=window)
    prompts = [prompt(n, seed=n) for n in (1, 13, 4, 6)]
    alone = [list(generate(model, p, GREEDY, max_new_tokens=25, stop_tokens=())) for p in prompts]
    assert generate_batch(model, prompts, GREEDY, max_new_tokens=25, stop_tokens=()) == alone
    stop = [alone[0][3], alone[1][8]]
    expected = [
        list(generate(model, p, GREEDY, max_new_tokens=25, stop_tokens=stop)) for p in prompts
    ]
    assert generate_batch(model, prompts, GREEDY, max_new_tokens=25, stop_tokens=stop) == expected
    assert len({len(row) for row in expected}) > 1


def test_batch_log_probabilities_belong_to_their_rows():
    model = small.model()
    prompts = [prompt(n, seed=n) for n in (2, 7)]
    alone = [
        list(generate(model, p, GREEDY, max_new_tokens=9, stop_tokens=(), logprobs=True))
        for p in prompts
    ]
    together = generate_batch(
        model, prompts, GREEDY, max_new_tokens=9, stop_tokens=(), logprobs=True
    )
    for row, expected in zip(together, alone):
        assert [token.id for token in row] == [token.id for token in expected]
        assert [token.logprob for token in row] == pytest.approx(
            [token.logprob for token in expected], abs=1e-6
        )


def test_a_seed_repeats_a_text_and_goes_on_inside_a_decoder():
    model = small.model()
    once, again = (
        list(generate(model, prompt(3), Sampling(seed=7), max_new_tokens=20)) for _ in range(2)
    )
    assert once == again
    assert once != list(generate(model, prompt(3), Sampling(seed=8), max_new_tokens=20))
    decoder = Decoder(model)
    first = list(generate(decoder, prompt(3), Sampling(seed=7), max_new_tokens=8))
    more = list(generate(decoder, [], Sampling(seed=7), max_new_tokens=12))
    assert first + more == once


def test_no_seed_means_pytorchs_generator():
    model = small.model()
    torch.manual_seed(7)
    texts = [list(generate(model, prompt(3), Sampling(), max_new_tokens=20)) for _ in range(2)]
    assert texts[0] == list(generate(model, prompt(3), Sampling(seed=7), max_new_tokens=20))
    assert texts[1] != texts[0]


@pytest.mark.parametrize("seed", small.seeds(3, 10))
def test_a_decoder_is_what_was_read_and_not_taken_back(seed):
    generator = random.Random(seed)
    model = small.model(seed=seed)
    decoder = Decoder(model, 3, slack=5)
    rows = [[], [], []]
    for _ in range(40):
        action = generator.choice(["read", "step", "rewind", "logits"])
        if action == "read" or not all(rows):
            news = [
                prompt(generator.choice([0, 1, 2, 7]), seed=generator.randrange(999)) for _ in rows
            ]
            decoder.prefill(news)
            rows = [row + new for row, new in zip(rows, news)]
        elif action == "step":
            sampling = Sampling(seed=seed, repetition_penalty=1.3, no_repeat_ngram_size=2)
            rows = [row + [id] for row, id in zip(rows, decoder.step(sampling).tolist())]
        elif action == "rewind":
            counts = [min(generator.choice([0, 1, 2]), len(row) - 1) for row in rows]
            try:
                decoder.rewind(counts)
            except ValueError as error:
                assert "can be rolled back" in str(error)
                counts = [0, 0, 0]
            rows = [row[: len(row) - n] for row, n in zip(rows, counts)]
        if all(rows) and generator.random() < 0.6:
            for b, row in enumerate(rows):
                assert torch.allclose(
                    decoder.logits[b], model(torch.tensor([row]))[0, -1], atol=1e-11
                )
                assert decoder._history[b, : len(row)].tolist() == row
                assert (decoder._history[b, len(row) :] == -1).all()


@pytest.mark.parametrize("slack", [-1, -2])
def test_a_negative_slack_is_refused(slack):
    with pytest.raises(ValueError, match=f"slack must be .* not {slack}"):
        Decoder(small.model(), slack=slack)


def test_everything_can_be_taken_back_and_begun_anew():
    model = small.model()
    decoder = Decoder(model, max_tokens=50)
    decoder.prefill([prompt(4)])
    decoder.rewind(4)
    with pytest.raises(ValueError, match="row 0 is empty"):
        decoder.step(GREEDY)
    decoder.prefill([prompt(3, seed=2)])
    assert torch.allclose(
        decoder.logits, model(torch.tensor([prompt(3, seed=2)]))[:, -1], atol=1e-12
    )


@pytest.fixture
def a_decoder():
    decoder = Decoder(small.model(), 2)
    decoder.prefill([prompt(5), prompt(2)])
    return decoder


def test_a_step_never_waits_for_the_device(a_decoder, no_host_reads):
    for _ in range(8):
        a_decoder.step(RICH, mask=torch.ones(101, dtype=torch.bool))
        a_decoder.step(GREEDY)


@pytest.mark.gpu
def test_a_step_on_a_gpu_never_waits():
    decoder = Decoder(small.model(torch.float32).cuda(), 2)
    decoder.prefill([prompt(5), prompt(2)])
    decoder.step(RICH)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            decoder.step(RICH)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_gpu_gives_the_greedy_text_of_the_cpu():
    model = small.model(torch.float32)
    expected = list(generate(model, prompt(9), GREEDY, max_new_tokens=60, stop_tokens=()))
    assert (
        list(generate(model.cuda(), prompt(9), GREEDY, max_new_tokens=60, stop_tokens=()))
        == expected
    )


def test_an_id_is_returned_before_the_forward_pass_over_it():
    model = small.model()
    forwards = []
    model.model.register_forward_hook(lambda *_: forwards.append(1))
    ids = generate(model, prompt(3), GREEDY, max_new_tokens=3, stop_tokens=())
    for expected in (1, 2, 3):
        next(ids)
        assert len(forwards) == expected
    assert list(ids) == []
    assert len(forwards) == 3


@pytest.mark.parametrize("layer", [0, 2])
def test_a_decoder_goes_on_after_ctrl_c(layer):
    model = small.model()
    decoder = Decoder(model)
    decoder.prefill([prompt(3)])

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[layer].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        decoder.prefill([[5, 6, 7]])
    handle.remove()
    assert torch.allclose(
        decoder.logits, model(torch.tensor([prompt(3) + [5, 6, 7]]))[:, -1], atol=1e-12
    )


class OnlyEven(Constraint):
    def __init__(self):
        self.accepted = []

    def mask(self):
        return torch.arange(101) % 2 == 0

    def accept(self, id):
        self.accepted.append(id)


def test_an_object_with_mask_and_accept_is_a_constraint():
    class Only:
        def __init__(self, id):
            self.allowed = torch.arange(101) == id
            self.seen = []
            self.mask = lambda: self.allowed
            self.accept = self.seen.append

    only = Only(8)
    options = dict(max_new_tokens=3, stop_tokens=())
    assert list(generate(small.model(), prompt(3), GREEDY, constraint=only, **options)) == [8] * 3
    assert only.seen == [8] * 3
    two = generate_batch(
        small.model(), [[5], [6]], GREEDY, constraints=[Only(9), OnlyEven()], **options
    )
    assert two[0] == [9] * 3


def test_a_constraint_is_asked_and_told():
    constraint = OnlyEven()
    ids = list(
        generate(
            small.model(), prompt(3), Sampling(seed=0), max_new_tokens=30, constraint=constraint
        )
    )
    assert all(id % 2 == 0 for id in ids)
    assert constraint.accepted == [id for id in ids if id != 2]
    constraints = [OnlyEven(), OnlyEven()]
    rows = generate_batch(
        small.model(),
        [prompt(3), prompt(5)],
        GREEDY,
        max_new_tokens=9,
        stop_tokens=(),
        constraints=constraints,
    )
    assert [constraint.accepted for constraint in constraints] == rows


def test_constraints_are_one_for_each_prompt():
    for count in (1, 4):
        with pytest.raises(ValueError, match=f"{count} constraints for 3 prompts"):
            generate_batch(
                small.model(),
                [prompt(2)] * 3,
                GREEDY,
                max_new_tokens=2,
                constraints=[OnlyEven() for _ in range(count)],
            )


def test_a_constraint_and_a_penalty_that_leave_nothing_are_an_error():
    constraint = OnlyEven()
    constraint.mask = lambda: torch.arange(101) == 8
    sampling = Sampling(no_repeat_ngram_size=1, temperature=0.0)
    ids = generate(small.model(), prompt(3), sampling, max_new_tokens=3, constraint=constraint)
    assert next(ids) == 8
    with pytest.raises(ValueError, match="row 0: constraint and penalties forbid every token"):
        next(ids)


def test_logits_that_are_no_numbers_are_an_error():
    model = small.model()
    model.model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="row 0: the logits are NaN"):
        list(generate(model, prompt(3), GREEDY, max_new_tokens=3))


def test_a_constraint_that_allows_nothing_is_an_error():
    constraint = OnlyEven()
    constraint.mask = lambda: torch.zeros(101, dtype=torch.bool)
    with pytest.raises(ValueError, match="row 0: constraint and penalties forbid every token"):
        list(generate(small.model(), prompt(3), GREEDY, max_new_tokens=3, constraint=constraint))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompt_ids=[]), "prompt is empty"),
        (dict(prompt_ids=[101]), "outside the vocabulary"),
        (dict(prompt_ids=[-1]), "outside the vocabulary"),
        (dict(max_new_tokens=-1), "max_new_tokens"),
        (dict(max_new_tokens=510), "3 tokens and 510 new ones make 513, .* made for 512"),
    ],
    ids=str,
)
def test_impossible_requests_are_refused(arguments, message):
    values = dict(prompt_ids=prompt(3), sampling=GREEDY, max_new_tokens=3) | arguments
    with pytest.raises(ValueError, match=message):
        list(generate(small.model(), **values))


def test_most_errors_come_at_the_call_and_not_at_the_first_token():
    with pytest.raises(ValueError, match="empty"):
        generate(small.model(), [], GREEDY, max_new_tokens=3)
    with pytest.raises(ValueError, match="empty"):
        generate_batch(small.model(), [[1], []], GREEDY, max_new_tokens=3)
    with pytest.raises(ValueError, match="no prompt"):
        generate_batch(small.model(), [], GREEDY, max_new_tokens=3)


def test_no_new_tokens_is_an_empty_text():
    assert list(generate(small.model(), prompt(3), GREEDY, max_new_tokens=0)) == []
    assert generate_batch(small.model(), [prompt(3)], GREEDY, max_new_tokens=0) == [[]]


def test_a_full_decoder_refuses_and_stays_as_it_was():
    model = small.model(sliding_window=None)
    decoder = Decoder(model, max_tokens=6)
    decoder.prefill([prompt(5)])
    before = decoder.logits.clone()
    with pytest.raises(ValueError, match="7 tokens in a row, and the limit here is 6"):
        decoder.prefill([[5, 6]])
    assert torch.equal(decoder.logits, before)
    decoder.step(GREEDY)
    with pytest.raises(ValueError, match="limit here is 6"):
        decoder.step(GREEDY)


def test_a_decoder_refuses_another_number_of_rows():
    decoder = Decoder(small.model(), 2)
    with pytest.raises(ValueError, match="1 rows for a decoder of 2"):
        decoder.prefill([[5]])
    with pytest.raises(ValueError, match="one count"):
        decoder.rewind([1])


@pytest.fixture(scope="module")
def with_true_tokenizer(tmp_path_factory):
    """A random model with Mistral's own vocabulary, padded as Hermes-2-Pro's is."""
    folder = tmp_path_factory.mktemp("true")
    model = small.model(torch.float32, vocab_size=32032, eos_token_id=(32000,), sliding_window=16)
    save(model, small.true_tokenizer(stop_ids=[32000]), folder)
    return mistral.load(folder, device="cpu")


def pieces_of(loaded, text="The quick brown fox", **arguments):
    values = (
        dict(sampling=Sampling(temperature=1.5, seed=4), max_new_tokens=60, stop_tokens=())
        | arguments
    )
    return list(generate_text(*loaded, text, **values))


def test_text_comes_in_pieces_that_are_the_decoded_ids(with_true_tokenizer):
    model, tokenizer = with_true_tokenizer
    pieces = pieces_of(with_true_tokenizer)
    # Both draw without the 30 rows that have no token, so the ids are the same.
    known = OnlyEven()
    known.mask = lambda: torch.arange(32032) < 32002
    ids = list(
        generate(
            model,
            tokenizer.encode("The quick brown fox"),
            Sampling(temperature=1.5, seed=4),
            max_new_tokens=60,
            stop_tokens=(),
            constraint=known,
        )
    )
    stream = tokenizer.stream()
    assert "".join(pieces) == "".join(stream.feed(id) for id in ids) + stream.finish()
    assert len(pieces) > 30


def test_rows_of_the_model_without_a_token_are_never_drawn(with_true_tokenizer):
    model, tokenizer = with_true_tokenizer
    seen = OnlyEven()
    seen.mask = lambda: None
    with torch.no_grad():
        saved = model.lm_head.weight.clone()
        model.lm_head.weight[32002:] *= 50  # the rows without a token would win almost always
    try:
        text = pieces_of(with_true_tokenizer, constraint=seen)
    finally:
        model.lm_head.weight.data.copy_(saved)
    assert text
    assert max(seen.accepted) < tokenizer.vocab_size


@pytest.fixture(scope="module")
def whole(with_true_tokenizer):
    return "".join(pieces_of(with_true_tokenizer))


FEW = (3, 9, 18, 30, 36)
CUTS = [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in range(3, 40, 3)]


@pytest.mark.parametrize("cut", CUTS)
def test_a_stop_string_ends_the_text_wherever_the_tokens_break(with_true_tokenizer, whole, cut):
    stop = whole[cut : cut + 5]
    expected = whole[: whole.index(stop)]
    for stops in ([stop], ["never seen, this", stop, stop + "x"]):
        assert "".join(pieces_of(with_true_tokenizer, stop=stops)) == expected
    # A beginning of it that continues differently is released.
    assert "".join(pieces_of(with_true_tokenizer, stop=[stop + "\u0000 no"])) == whole


def test_the_stop_string_that_is_complete_first_counts_however_the_text_is_cut():
    class Pieces:
        """A tokenizer whose ids are places in a list of pieces."""

        def __init__(self, pieces):
            self.pieces = pieces

        def stream(self, start):
            return self

        def feed(self, id):
            return self.pieces[id]

        def finish(self):
            return ""

    generator = random.Random(0)
    for _ in range(500):
        text = "".join(generator.choice("abcX") for _ in range(12))
        stop = [
            "".join(generator.choice("abcX") for _ in range(generator.randint(1, 4)))
            for _ in range(3)
        ]
        results = set()
        for _ in range(6):
            cuts = sorted(generator.sample(range(13), generator.randint(0, 8)))
            pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 12])]
            reader = UntilStop(Pieces(pieces), stop)
            found = [reader.feed(id) for id in range(len(pieces))]
            results.add("".join([*found, reader.finish()]))
        ends = [text.find(s) + len(s) for s in stop if s in text]
        expected = (
            text
            if not ends
            else min(
                text[:end].removesuffix(s)
                for end in [min(ends)]
                for s in stop
                if text[:end].endswith(s)
            )
        )
        assert results == {expected}


def test_a_stop_string_may_be_a_control_token(with_true_tokenizer):
    model, tokenizer = with_true_tokenizer
    always = OnlyEven()
    always.mask = lambda: torch.arange(32032) == 32001
    assert pieces_of(with_true_tokenizer, constraint=always, stop=["<|im_start|>"]) == []
    assert always.accepted == []


def test_text_goes_on_inside_a_word(with_true_tokenizer):
    model, tokenizer = with_true_tokenizer
    decoder = Decoder(model)
    decoder.prefill([tokenizer.encode("Hel")])
    list(
        generate_text(
            decoder, tokenizer, "lo", GREEDY, max_new_tokens=0, bos=False, prefix_space=False
        )
    )
    assert (
        tokenizer.decode(decoder._history[0][: sum(decoder._history[0] >= 0)].tolist()) == "Hello"
    )


def test_empty_stop_strings_are_refused(with_true_tokenizer):
    for stop in ([""], "text"):
        with pytest.raises(ValueError, match="stop takes"):
            pieces_of(with_true_tokenizer, stop=stop)


def test_control_tokens_in_a_prompt_are_text_unless_asked(with_true_tokenizer):
    model, tokenizer = with_true_tokenizer
    read = []
    handle = model.model.register_forward_pre_hook(
        lambda _, inputs: read.extend(inputs[0][0].tolist())
    )
    try:
        assert pieces_of(with_true_tokenizer, "<|im_start|>user\n", max_new_tokens=0) == []
        assert read == tokenizer.encode("<|im_start|>user\n")
        assert 32001 not in read
        read.clear()
        pieces_of(with_true_tokenizer, "<|im_start|>user\n", max_new_tokens=0, special=True)
        assert read == [1, 32001, 2188, 13]
    finally:
        handle.remove()


class Half(Constraint):
    """A constraint that leaves no choice for every second pair of ids, and says so."""

    def __init__(self, forced):
        self.accepted = []
        self.asked = 0
        self._forced = forced

    def mask(self):
        self.asked += 1

    def forced(self):
        return self._forced if len(self.accepted) % 4 == 2 else []

    def accept(self, id):
        self.accepted.append(id)


def test_ids_without_a_choice_are_appended_together_without_asking_the_model(monkeypatch):
    model = small.model(sliding_window=8)
    reads = []
    decoder = mistral.Decoder(model)
    read = decoder.prefill
    monkeypatch.setattr(decoder, "prefill", lambda rows: (reads.append(rows[0]), read(rows)))
    constraint = Half([7, 9])
    options = dict(max_new_tokens=11, stop_tokens=())
    ids = list(
        mistral.generate(
            decoder, [1, 5], mistral.Sampling(temperature=0), constraint=constraint, **options
        )
    )
    assert reads == [[1, 5], [7, 9], [7, 9], [7]]
    assert ids == constraint.accepted
    assert (len(ids), constraint.asked) == (11, 6)
    assert [ids[i : i + 2] for i in (2, 6)] == [[7, 9], [7, 9]]
    # The chosen ids are those of the model after the forced ones.
    for i in (0, 1, 4, 5, 8, 9):
        assert ids[i] == model(torch.tensor([[1, 5, *ids[:i]]]), last_only=True).argmax().item()


def test_ids_without_a_choice_count_against_the_limit():
    constraint = Half([7, 9, 11])
    ids = list(
        mistral.generate(
            small.model(),
            [1],
            mistral.Sampling(temperature=0),
            constraint=constraint,
            max_new_tokens=4,
            stop_tokens=(),
        )
    )
    assert ids[2:] == [7, 9]


def test_a_conversation_saves_no_more_tokens_than_it_writes():
    @tool
    def clock() -> str:
        """What time it is."""

    options = dict(tools=[clock], tool_choice="required", max_rounds=1, max_new_tokens=2)
    conversation = Conversation(*mistral.load("demo", device="cpu"), **options)
    # a call begins with more ids than two about which there is no choice
    list(conversation.say("What time is it?"))
    assert (conversation.tokens_written, conversation.tokens_saved) == (2, 2)


def test_a_text_takes_ids_without_a_choice_too(with_true_tokenizer):
    constraint = Half([7, 9])
    pieces_of(with_true_tokenizer, constraint=constraint, max_new_tokens=11)
    assert (len(constraint.accepted), constraint.asked) == (11, 6)
    assert [constraint.accepted[i : i + 2] for i in (2, 6)] == [[7, 9], [7, 9]]


def test_a_row_without_a_token_is_not_taken_even_if_a_constraint_leaves_only_it(
    with_true_tokenizer,
):
    constraint = Half([7, 32031])
    constraint.mask = lambda: torch.arange(32032) == (32031 if len(constraint.accepted) == 3 else 5)
    with pytest.raises(ValueError, match="forbid every token"):
        pieces_of(with_true_tokenizer, constraint=constraint)
    assert constraint.accepted == [5, 5, 7]


def test_a_batch_chooses_every_id():
    constraints = [Half([7]), Half([7])]
    options = dict(max_new_tokens=6, stop_tokens=(), constraints=constraints)
    generate_batch(small.model(), [[1], [1, 5]], GREEDY, **options)
    assert [constraint.asked for constraint in constraints] == [6, 6]


def test_text_may_be_given_as_ids():
    model, tokenizer = mistral.load(small.DATA / "small", device="cpu")
    options = dict(max_new_tokens=8)
    greedy = mistral.Sampling(temperature=0)
    of_text = list(mistral.generate_text(model, tokenizer, "Hello there", greedy, **options))
    assert (
        list(
            mistral.generate_text(
                model, tokenizer, tokenizer.encode("Hello there"), greedy, **options
            )
        )
        == of_text
    )


class Ahead(Decoder):
    """The reference engine, as one that lets `generate` start two steps before it looks at ids."""

    steps_in_flight = 2
    broken = None  # the ids of its fourth step

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.steps = 0

    @property
    def logits(self):
        return super().logits

    def step(self, sampling, mask=None, active=None):
        self.steps += 1
        ids = super().step(sampling, mask, active)
        return torch.full_like(ids, self.broken) if self.broken and self.steps == 4 else ids


@pytest.mark.parametrize("sampling", [GREEDY, RICH], ids=["greedy", "rich"])
def test_an_engine_that_runs_ahead_gives_the_same_text_and_holds_no_more(sampling):
    model = small.model()
    for n in (0, 1, 2, 3, 50):
        engines = Decoder(model), Ahead(model)
        texts = [
            list(generate(e, prompt(5), sampling, max_new_tokens=n, stop_tokens=()))
            for e in engines
        ]
        assert texts[0] == texts[1]
        assert engines[0].lengths == engines[1].lengths == [5 + n]
        assert torch.allclose(engines[0].logits, engines[1].logits, atol=1e-12)


def test_steps_past_a_stop_token_or_an_interrupt_are_rolled_back():
    model = small.model()
    text = list(generate(model, prompt(5), GREEDY, max_new_tokens=30, stop_tokens=()))
    engine = Ahead(model)
    stop = text[9]
    made = list(generate(engine, prompt(5), GREEDY, max_new_tokens=30, stop_tokens=[stop]))
    assert made == text[: len(made)]
    assert made[-1] == stop
    assert engine.lengths == [5 + len(made)]
    assert engine.steps == len(made) + 2
    broken_off = generate(engine, [3], GREEDY, max_new_tokens=30, stop_tokens=())
    next(broken_off)
    broken_off.close()
    assert engine.lengths == [5 + len(made) + 2]


def test_an_interrupt_while_steps_are_in_flight_rolls_them_back(monkeypatch):
    engine = Ahead(small.model())
    text = generate(engine, prompt(5), GREEDY, max_new_tokens=30, stop_tokens=())
    next(text)

    def interrupted(sampling, mask=None, active=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(text)
    assert engine.lengths == [6]


def test_an_engine_that_runs_ahead_fills_its_room_to_the_last_token():
    model = small.model(sliding_window=None)
    engine = Ahead(model, 1, 12)
    with pytest.raises(ValueError, match="the limit here is 12"):
        made = []
        for id in generate(engine, prompt(5), GREEDY, max_new_tokens=20, stop_tokens=()):
            made.append(id)
    assert len(made) == 7
    assert engine.lengths == [12]


def test_rows_that_run_ahead_end_one_by_one():
    model = small.model()
    prompts = [prompt(4), prompt(7, seed=1), prompt(1, seed=2)]
    options = dict(max_new_tokens=25, stop_tokens=list(range(3, 20)))
    engine = Ahead(model, 3)
    assert generate_batch(engine, prompts, GREEDY, **options) == generate_batch(
        model, prompts, GREEDY, **options
    )


def test_a_step_that_runs_ahead_and_finds_nothing_is_an_error_when_it_comes_to_it():
    for broken, message in ((-1, "the logits are NaN"), (-2, "forbid every token")):
        engine = Ahead(small.model())
        engine.broken = broken
        made = generate(engine, prompt(5), GREEDY, max_new_tokens=20, stop_tokens=())
        assert len([next(made) for _ in range(3)]) == 3
        with pytest.raises(ValueError, match=message):
            next(made)


def test_a_fixed_mask_lets_an_engine_run_ahead_and_a_grammar_does_not():
    model = small.model()
    counts = []
    for constraint in (None, OnlyEven()):
        engine = Ahead(model)
        next(generate(engine, prompt(5), GREEDY, max_new_tokens=20, constraint=constraint))
        counts.append(engine.steps)
    assert counts == [3, 1]


class Listener(FixedMask):
    """A fixed mask that lists what it is told."""

    def __init__(self, decoder):
        super().__init__(decoder, [True] * decoder.config.vocab_size)
        self.ids = []

    def accept(self, id):
        self.ids.append(id)


def test_constraints_are_told_the_same_ids_by_an_engine_that_runs_ahead():
    model = small.model()
    prompts = [prompt(4), prompt(7, seed=1)]
    told = []
    for engine in (Decoder(model, 2), Ahead(model, 2)):
        listeners = [Listener(engine) for _ in prompts]
        options = dict(max_new_tokens=25, stop_tokens=list(range(3, 20)), constraints=listeners)
        rows = generate_batch(engine, prompts, GREEDY, **options)
        told.append([listener.ids for listener in listeners])
        assert told[-1] == [row[:-1] if row[-1] in range(3, 20) else row for row in rows]
    assert told[0] == told[1]


# -- one sampling per row --

OWN = [
    Sampling(seed=5, temperature=0.8),
    Sampling(temperature=0.0),
    Sampling(seed=5, top_p=0.9, repetition_penalty=1.3),
    Sampling(seed=7, top_k=5, no_repeat_ngram_size=2),
]


def test_a_row_with_a_sampling_of_its_own_gets_the_text_that_it_gets_alone():
    model = small.model()
    prompts = [prompt(n, seed=n) for n in (3, 11, 1, 7)]
    options = dict(max_new_tokens=30, stop_tokens=range(90, 101))
    alone = [list(generate(model, p, s, **options)) for p, s in zip(prompts, OWN)]
    assert generate_batch(model, prompts, OWN, **options) == alone
    backwards = generate_batch(model, prompts[::-1], OWN[::-1], **options)
    assert backwards[::-1] == alone
    assert len({len(row) for row in alone}) > 1  # rows end at different steps


def test_after_a_batch_with_samplings_each_row_holds_its_prompt_and_its_text():
    decoder = Decoder(small.model(), 4)
    prompts = [prompt(n, seed=n) for n in (3, 11, 1, 7)]
    texts = generate_batch(decoder, prompts, OWN, max_new_tokens=30, stop_tokens=range(90, 101))
    assert decoder.lengths == [len(p) + len(text) for p, text in zip(prompts, texts)]


def test_an_idle_row_keeps_its_length_and_its_next_logits():
    model = small.model()
    decoder = Decoder(model, 3)
    rows = [prompt(n, seed=n) for n in (5, 2, 8)]
    decoder.prefill(rows)
    before = decoder.logits.clone()
    for _ in range(3):
        ids = decoder.step([GREEDY, None, GREEDY])
        assert ids[1] == IDLE
        rows[0].append(ids[0].item())
        rows[2].append(ids[2].item())
        for row, logits in zip(rows, decoder.logits):
            assert torch.allclose(logits, model(torch.tensor([row]))[0, -1], atol=1e-12)
    assert decoder.lengths == [8, 2, 11]
    assert torch.equal(decoder.logits[1], before[1])


def test_the_seed_of_one_row_does_not_disturb_the_others():
    decoders = [Decoder(small.model(), 2) for _ in range(2)]
    texts = []
    for decoder, seeds in zip(decoders, ((1, 1, 1, 1), (1, 8, 9, 9))):
        decoder.prefill([prompt(4), prompt(6, seed=1)])
        steps = [decoder.step([Sampling(seed=3), Sampling(seed=seed)]).tolist() for seed in seeds]
        texts.append([ids[0] for ids in steps])
    assert texts[0] == texts[1]


def test_an_emptied_row_draws_the_random_numbers_of_a_new_one():
    decoder = Decoder(small.model(), 2)
    samplings = [Sampling(seed=3), Sampling(seed=4)]
    decoder.prefill([prompt(4), prompt(6, seed=1)])
    first = [decoder.step(samplings)[1].item() for _ in range(5)]
    decoder.rewind([0, decoder.lengths[1]])
    decoder.prefill([[], prompt(6, seed=1)])
    assert [decoder.step(samplings)[1].item() for _ in range(5)] == first


def test_another_number_of_samplings_than_rows_is_an_error():
    decoder = Decoder(small.model(), 2)
    decoder.prefill([[5], [6]])
    with pytest.raises(ValueError, match="3 samplings for a decoder of 2 rows"):
        decoder.step([GREEDY] * 3)
    with pytest.raises(ValueError, match="1 samplings for 2 prompts"):
        generate_batch(decoder, [[5], [6]], [GREEDY], max_new_tokens=1)
    assert decoder.lengths == [1, 1]


def test_an_engine_that_does_not_guess_verifies_one_id_after_the_other():
    model = small.model()
    plain = Decoder(model)
    decoder = Decoder(model)
    for engine in (plain, decoder):
        engine.prefill([prompt(6)])
    ids = [5, 6, 7, 8]
    assert torch.allclose(Engine.verify(plain, ids), decoder.verify(ids), atol=1e-12)
    assert plain.lengths == decoder.lengths


@pytest.mark.parametrize("module", ["norm", "lm_head"])
def test_an_interrupt_after_the_layers_reads_no_token_twice(module):
    model = small.model()
    decoder = Decoder(model)
    decoder.prefill([prompt(9)])
    ids = prompt(9) + [decoder.step(GREEDY).item()]
    called = model.lm_head if module == "lm_head" else model.model.norm

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = called.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        decoder.logits  # noqa: B018
    handle.remove()
    for _ in range(3):
        assert torch.allclose(decoder.logits[0], model(torch.tensor([ids]))[0, -1], atol=1e-12)
        ids.append(decoder.step(GREEDY).item())


def test_an_empty_row_may_be_idle():
    model = small.model()
    decoder = Decoder(model, 2)
    decoder.prefill([[], prompt(5)])
    ids = decoder.step([None, GREEDY])
    assert ids[0] == IDLE
    assert decoder.lengths == [0, 6]
    expected = model(torch.tensor([prompt(5) + [ids[1].item()]]))[0, -1]
    assert torch.allclose(decoder.logits[1], expected, atol=1e-12)
    with pytest.raises(ValueError, match="row 0 is empty"):
        decoder.step([GREEDY, GREEDY])


def test_text_without_a_constraint_keeps_steps_in_flight_in_a_padded_vocabulary():
    decoder = Ahead(small.model())
    assert KnownTokens(decoder, 90, AnyToken()).is_static
    assert not KnownTokens(decoder, 90, OnlyEven()).is_static


def test_the_history_keeps_a_column_for_pads():
    """Its last column is written for rows that get no id: an id must not be there."""
    decoder = Decoder(small.model(sliding_window=None), 2, max_tokens=80)
    rows = [prompt(64), prompt(3)]
    decoder.prefill(rows)
    decoder.prefill([[], [5, 6]])
    assert decoder._history[0, :64].tolist() == rows[0]


def test_a_prompt_may_fill_all_positions_with_its_answer():
    model = small.model(max_position_embeddings=12, sliding_window=None)
    options = dict(stop_tokens=())
    assert len(list(generate(model, prompt(5), GREEDY, max_new_tokens=7, **options))) == 7
    with pytest.raises(ValueError, match="made for 12"):
        generate(model, prompt(5), GREEDY, max_new_tokens=8, **options)


def test_forced_ids_end_before_a_stop_token():
    class Forces(Constraint):
        ids = [7, 2, 9]

        def mask(self):
            return torch.arange(101) == 5

        def forced(self):
            ids, self.ids = self.ids, []
            return ids

    ids = generate(
        small.model(), [1], GREEDY, max_new_tokens=3, stop_tokens=[2], constraint=Forces()
    )
    assert list(ids) == [7, 5, 5]


def test_the_naive_loop_ends_at_a_stop_token():
    everything = range(101)
    ids = generate_naive(small.model(), [1], GREEDY, max_new_tokens=5, stop_tokens=everything)
    assert len(list(ids)) == 1


def test_a_text_that_ends_within_a_character_ends_with_its_mark():
    tokenizer = small.true_tokenizer()
    reader = UntilStop(tokenizer, [])
    half = tokenizer.encode("𓀀", bos=False)[1]
    assert (reader.feed(half), reader.finish()) == ("", "\ufffd")


def test_the_constraint_of_a_row_that_has_ended_is_not_asked():
    class Ends(Constraint):
        asked = 0

        def mask(self):
            self.asked += 1
            return torch.arange(101) == 2

        def accept(self, id):
            raise AssertionError("a stop token is not part of the text")

    ends = Ends()
    rows = generate_batch(
        small.model(),
        [[5], [6]],
        GREEDY,
        max_new_tokens=4,
        stop_tokens=[2],
        constraints=[ends, OnlyEven()],
    )
    assert rows[0] == [2] and len(rows[1]) > 1
    assert ends.asked == 1


def test_verify_leaves_out_the_logits_of_ids_that_were_not_read_yet():
    model = small.model()
    decoder = Decoder(model, slack=4)
    decoder.prefill([prompt(5)])
    id = decoder.step(GREEDY).item()  # the cache reads it together with the next ids
    whole = model(torch.tensor([[*prompt(5), id, 7, 8]]))[0]
    assert (decoder.verify([7, 8]) - whole[-2:]).abs().max() < 1e-12


def test_a_copy_belongs_to_nobody():
    decoder = Decoder(small.model())
    decoder.holder = object()
    assert copy.deepcopy(decoder).holder is None
