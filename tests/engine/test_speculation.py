"""Prompt lookup: the text is what it would be without, from fewer forwards."""

import itertools
import random
import re
import runpy
import sys

import pytest
import small
import torch

import mistral
import mistral.chat
from mistral import Decoder, Sampling, generate, generate_batch
from mistral.engine.base import NOTHING_LEFT, Constraint, Engine
from mistral.engine.compiled import CompiledDecoder
from mistral.engine.constraints import CountsForced
from mistral.engine.speculation import LookupDecoder, _find_guess
from mistral.sampling import processed_scores
from mistral_kernels.decoder import Decoder as KernelsDecoder

GREEDY = Sampling(temperature=0.0)
RICH = Sampling(
    temperature=0.9,
    top_k=5,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.1,
    no_repeat_ngram_size=4,
    seed=5,
)
RULES = pytest.mark.parametrize(
    "sampling", [GREEDY, RICH, Sampling(typical_p=0.9, seed=3)], ids=["greedy", "rich", "typical"]
)


def tiny(seed=0, **changes):
    """A random model of seven tokens: a guess is right as often as not."""
    sizes = {"vocab_size": 7, "eos_token_id": (0,), "num_hidden_layers": 2, **changes}
    return small.model(seed=seed, **sizes)


def prompt(n, seed=0):
    return small.tokens(n, seed=seed, vocab_size=7).tolist()


def guess(text, tokens=8, max_ngram=3, min_ngram=1):
    return _find_guess(text, tokens, max_ngram, min_ngram)


def test_a_guess_is_what_followed_the_longest_ending_where_it_occurred_last():
    assert guess("abcX--bcY--cZ--abc", tokens=1) == "X"
    assert guess("abcX--bcY--cZ--abc", tokens=1, max_ngram=2) == "Y"
    assert guess("abcX--bcY--cZ--abc", tokens=1, max_ngram=1) == "Z"
    assert guess("abcX abcY abc", tokens=4) == "Y ab"
    assert guess("abc Xbc") == " Xbc Xbc"[:8]
    assert guess("abc Xbc", min_ngram=3) == ""
    assert guess("abcd") == guess("a") == ""
    assert guess("abcX abc", tokens=0) == ""


def test_a_guess_that_reaches_the_end_of_the_text_repeats_itself():
    assert guess("hahaha") == "hahahaha"
    assert guess("no!!!") == "!!!!!!!!"
    assert guess("one two one two one", tokens=12) == " two one two"


@RULES
@pytest.mark.parametrize("window", [4, None])
@pytest.mark.parametrize("length", [1, 90])
def test_the_text_is_that_of_plain_generation(length, window, sampling):
    model = tiny(sliding_window=window)
    options = dict(max_new_tokens=30, stop_tokens=())
    plain = list(generate(model, prompt(length), sampling, **options))
    for tokens in (1, 8):
        lookup = LookupDecoder(Decoder(model, 1, length + 30), tokens)
        assert list(generate(lookup, prompt(length), sampling, **options)) == plain
        assert lookup.forwards < lookup.plain_forwards == 30


@pytest.mark.parametrize("forces", [False, True])
def test_right_guesses_save_forwards_and_both_counts_are_true(forces):
    model = tiny(seed=3, sliding_window=None)
    forwards = []
    model.model.register_forward_hook(lambda *_: forwards.append(1))
    arguments = dict(max_new_tokens=60, stop_tokens=())
    plain = list(generate(model, prompt(5), GREEDY, constraint=Alternating(forces), **arguments))
    made_plainly = len(forwards)
    forwards.clear()
    lookup = LookupDecoder(Decoder(model, 1, 200))
    assert (
        list(generate(lookup, prompt(5), GREEDY, constraint=Alternating(forces), **arguments))
        == plain
    )
    assert (lookup.forwards, lookup.plain_forwards) == (len(forwards), made_plainly)
    assert lookup.tokens_a_forward == made_plainly / len(forwards) > 1.2


def test_log_probabilities_are_those_of_plain_generation():
    model = tiny()
    arguments = dict(max_new_tokens=40, stop_tokens=(), logprobs=True)
    plain = list(generate(model, prompt(9), RICH, **arguments))
    lookup = list(generate(LookupDecoder(Decoder(model)), prompt(9), RICH, **arguments))
    assert [token.id for token in lookup] == [token.id for token in plain]
    assert [token.logprob for token in lookup] == pytest.approx(
        [token.logprob for token in plain], abs=1e-9
    )


class Chain(Engine):
    """An engine whose next token depends on the last one alone, by a table: quick, and its
    distribution is known.
    """

    def __init__(self, table):
        self.table = table
        self.ids = []
        self.batch_size = 1
        self.slack = 8
        self.config = small.config(vocab_size=len(table))

    limit = 1000
    lengths = property(lambda self: [len(self.ids)])
    logits = property(lambda self: self.table[self.ids[-1:]])

    def prefill(self, rows):
        self.ids += rows[0]

    def verify(self, ids):
        self.ids += ids
        return self.table[ids]

    def rewind(self, n):
        (count,) = n
        del self.ids[len(self.ids) - count :]

    def step(self, sampling, mask=None):
        raise NotImplementedError  # lookup samples by itself


RANDOM = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.4)


def exact_probability(table, start, continuation):
    """Of a continuation under RANDOM, by its definition."""
    product = 1.0
    text = list(start)
    for id in continuation:
        history = torch.tensor([text])
        scores = processed_scores(table[text[-1:]], RANDOM, history, torch.tensor([len(text)]))
        product *= scores.softmax(-1)[0, id].item()
        text.append(id)
    return product


def test_sampled_texts_have_the_distribution_of_plain_sampling():
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    start = [0, 1, 2, 0, 1, 2, 0]
    runs = 2000
    lookup = LookupDecoder(Chain(table), 3)
    counts = dict.fromkeys(itertools.product(range(4), repeat=3), 0)
    for _ in range(runs):
        lookup.rewind(lookup.lengths)
        lookup.prefill([start])
        counts[tuple(lookup.step(RANDOM).item() for _ in range(3))] += 1
    expected = {text: runs * exact_probability(table, start, text) for text in counts}
    possible = [text for text in counts if expected[text]]
    assert 10 < len(possible) < 64
    assert sum(counts[text] for text in possible) == runs
    chi_squared = sum((counts[text] - expected[text]) ** 2 / expected[text] for text in possible)
    freedom = len(possible) - 1
    assert chi_squared < freedom + 4 * (2 * freedom) ** 0.5
    assert 1.2 < lookup.tokens_a_forward < 2.5  # guesses were right, and guesses were wrong


@pytest.mark.parametrize("seed", range(5))
def test_a_decoder_is_what_was_read_and_not_taken_back(seed):
    generator = random.Random(seed)
    model = tiny(seed)
    text = []
    lookup = LookupDecoder(Decoder(model, slack=11), 5)
    assert lookup.slack == 6
    for _ in range(40):
        action = generator.choice(["read", "step", "step", "step", "rewind"])
        if action == "read" or not text:
            new = prompt(generator.choice([0, 1, 2, 7, 80]), seed=generator.randrange(999))
            lookup.prefill([new])
            text += new
        elif action == "step":
            text += lookup.step(RICH).tolist()
        else:
            n = min(generator.choice([0, 1, 2, 6]), len(text) - 1)
            try:
                lookup.rewind(n)
                text = text[: len(text) - n]
            except ValueError as error:
                assert "can be rolled back" in str(error)
        assert lookup.lengths == [len(text)]
        if text and generator.random() < 0.5:
            assert torch.allclose(lookup.logits, model(torch.tensor([text]))[:, -1], atol=1e-11)


def test_as_much_as_slack_says_can_be_taken_back_beyond_the_window():
    model = tiny()
    for seed in range(8):
        lookup = LookupDecoder(Decoder(model, slack=11), 5)
        text = prompt(30, seed)
        lookup.prefill([text])
        text += [lookup.step(Sampling(seed=seed)).item() for _ in range(seed)]
        lookup.logits  # noqa: B018  (reads a guess)
        lookup.rewind(lookup.slack)
        assert torch.allclose(lookup.logits, model(torch.tensor([text[:-6]]))[:, -1], atol=1e-11)


def test_a_score_that_is_interrupted_has_appended_its_ids():
    model = tiny()
    lookup = LookupDecoder(Decoder(model, 2))
    lookup.prefill([prompt(20), [5]])
    passes = itertools.count()

    def interrupt(*_):
        if next(passes) == 2:  # more than the slack was read
            raise KeyboardInterrupt

    handle = model.model.norm.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        lookup.score(0, prompt(40, 1))
    handle.remove()
    assert lookup.lengths == [60, 1]
    expected = model(torch.tensor([prompt(20) + prompt(40, 1)]))[0, -1]
    assert torch.allclose(lookup.logits[0], expected, atol=1e-11)


def test_ids_that_are_scored_follow_a_rewind_as_those_of_a_prefill():
    """The random numbers of the ids that were rolled back are drawn again."""
    texts = []
    for make in (Decoder, lambda model: LookupDecoder(Decoder(model))):
        decoder = make(tiny())
        sampling = Sampling(seed=5)
        decoder.prefill([prompt(9)])
        for _ in range(3):
            decoder.step(sampling)
        decoder.rewind(2)
        decoder.score(0, [1, 2])
        texts.append([decoder.step(sampling).item() for _ in range(6)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("layer", [0, 1])
def test_it_goes_on_after_ctrl_c(layer):
    model = tiny()
    lookup = LookupDecoder(Decoder(model))
    lookup.prefill([prompt(20)])
    id = lookup.step(GREEDY).item()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[layer].register_forward_pre_hook(interrupt)
    for broken_off in (lambda: lookup.logits, lambda: lookup.prefill([[5, 6]])):
        with pytest.raises(KeyboardInterrupt):
            broken_off()
    handle.remove()
    assert torch.allclose(
        lookup.logits, model(torch.tensor([prompt(20) + [id, 5, 6]]))[:, -1], atol=1e-12
    )


class Alternating(Constraint):
    """A constraint to an even id, then an odd one, ...; after each pair, 3 and 4 are the only
    choice.
    """

    def __init__(self, forces=True):
        self.accepted = []
        self._forces = forces

    def mask(self):
        return torch.arange(7) % 2 == len(self.accepted) % 2

    def forced(self):
        return [4, 3] if self._forces and len(self.accepted) % 4 == 2 else []

    def accept(self, id):
        self.accepted.append(id)


@RULES
@pytest.mark.parametrize("forces", [False, True])
def test_under_a_constraint_the_text_is_that_of_plain_generation_too(forces, sampling):
    model = tiny()
    arguments = dict(max_new_tokens=41, stop_tokens=())
    if forces and sampling.no_repeat_ngram_size:
        pytest.skip("what is forced repeats itself")
    plain = list(generate(model, prompt(30), sampling, constraint=Alternating(forces), **arguments))
    constraint = Alternating(forces)
    lookup = LookupDecoder(Decoder(model))
    assert list(generate(lookup, prompt(30), sampling, constraint=constraint, **arguments)) == plain
    assert constraint.accepted == plain


def test_ids_without_a_choice_are_read_in_one_forward_with_a_guess_or_none_if_they_were_guessed():
    model = tiny(sliding_window=None)
    read = []
    model.model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0][0].tolist()))
    lookup = LookupDecoder(Decoder(model, 1, 200), 4)
    lookup.prefill([[1, 2, 3, 4, 5, 6, 1]])
    assert read.pop() == [1, 2, 3, 4, 5, 6, 1] + [2, 3, 4, 5]
    lookup.prefill([[2, 3]])
    assert read == []
    lookup.prefill([[6, 1]])
    # 4 and 5 are rolled back
    assert read == [[6, 1] + [2, 3, 6, 1]]
    assert torch.allclose(
        lookup.logits, model(torch.tensor([[1, 2, 3, 4, 5, 6, 1, 2, 3, 6, 1]]))[:, -1], atol=1e-12
    )


def test_forced_ids_count_as_saved_only_if_they_are_reached():
    for limit, saved in ((3, 1), (4, 2), (5, 2), (7, 3), (40, 20)):
        constraint = CountsForced(Alternating())
        ids = list(
            generate(
                tiny(), [1], GREEDY, max_new_tokens=limit, stop_tokens=(), constraint=constraint
            )
        )
        assert (len(ids), constraint.taken) == (limit, saved)


@pytest.mark.parametrize("window", [4, None])
def test_scores_are_the_logits_after_each_id(window):
    model = tiny(sliding_window=window)
    decoder = Decoder(model, 1, 100)
    text = prompt(9)
    decoder.prefill([text])
    decoder.step(GREEDY)
    decoder.rewind(1)
    for n, back in ((1, 0), (3, 2), (7, 7), (2, 1), (20, 3)):
        new = prompt(n, seed=n)
        text += new
        scored = decoder.verify(new)
        assert torch.allclose(scored, model(torch.tensor([text]))[0, -n:], atol=1e-11)
        assert torch.equal(decoder.logits[0], scored[-1])
        decoder.rewind(back)
        text = text[: len(text) - back]
        assert torch.allclose(decoder.logits, model(torch.tensor([text]))[:, -1], atol=1e-11)


@pytest.mark.parametrize(
    "engine",
    [
        CompiledDecoder,
        lambda model, **sizes: KernelsDecoder(model, plain=not torch.cuda.is_available(), **sizes),
    ],
    ids=["compiled", "kernels"],
)
def test_the_other_engines_can_be_sped_up_too(engine, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # which takes seconds
    sizes = dict(
        hidden_size=96, intermediate_size=160, head_dim=16, num_hidden_layers=2, sliding_window=7
    )
    model = tiny(**sizes).to(torch.float32)
    if torch.cuda.is_available():
        model = model.cuda()
    plain = list(generate(model, prompt(12), GREEDY, max_new_tokens=30, stop_tokens=()))
    lookup = LookupDecoder(engine(model, slack=16))
    assert list(generate(lookup, prompt(12), GREEDY, max_new_tokens=30, stop_tokens=())) == plain
    assert lookup.tokens_a_forward > 1
    lookup.rewind(3)
    assert list(generate(lookup, [], GREEDY, max_new_tokens=3, stop_tokens=())) == plain[-3:]


def test_a_full_decoder_is_filled_to_its_last_token_and_then_refuses():
    model = tiny(sliding_window=None)
    plain = list(generate(model, prompt(5), GREEDY, max_new_tokens=25, stop_tokens=()))
    lookup = LookupDecoder(Decoder(model, max_tokens=30))
    assert list(generate(lookup, prompt(5), GREEDY, max_new_tokens=25, stop_tokens=())) == plain
    for more in (lambda: lookup.step(GREEDY), lambda: lookup.prefill([[5]])):
        with pytest.raises(ValueError, match="31 tokens in a row, and the limit here is 30"):
            more()
    assert lookup.lengths == [30]
    assert torch.allclose(
        lookup.logits, model(torch.tensor([prompt(5) + plain]))[:, -1], atol=1e-12
    )


def test_wrong_calls_are_refused_and_leave_it_as_it_was():
    lookup = LookupDecoder(Decoder(tiny()))
    with pytest.raises(ValueError, match="row 0 is empty"):
        lookup.logits  # noqa: B018
    lookup.prefill([[]])
    lookup.prefill([prompt(5)])
    before = lookup.logits
    for rows, message in (
        ([[5], [6]], "2 rows"),
        ([[5, 7]], "token id 7 lies outside"),
        ([[-1]], "token id -1"),
    ):
        with pytest.raises(ValueError, match=message):
            lookup.prefill(rows)
    for n, message in ((-1, "0 or more"), (6, "cannot forget 6"), ([1, 1], "each of 1 rows")):
        with pytest.raises(ValueError, match=message):
            lookup.rewind(n)
    assert lookup.lengths == [5]
    assert torch.equal(lookup.logits, before)


def test_what_cannot_look_up_says_so():
    model = tiny()
    read = Decoder(model)
    read.prefill([[1, 2]])
    for decoder, numbers, message in (
        (read, {}, "holds 2 tokens already"),
        (Decoder(model, slack=7), {}, "slack=8 or more, not 7"),
        (Decoder(model), {"tokens": 0}, "are impossible"),
        (Decoder(model), {"max_ngram": 0}, "are impossible"),
        (Decoder(model), {"min_ngram": 4}, "are impossible"),
    ):
        with pytest.raises(ValueError, match=message):
            LookupDecoder(decoder, **numbers)
    with pytest.raises(ValueError, match="2 rows for a decoder of 1"):
        generate_batch(LookupDecoder(Decoder(model)), [[1], [2]], GREEDY, max_new_tokens=1)
    with pytest.raises(ValueError, match="verify takes ids"):
        Decoder(model).verify([])


@pytest.mark.parametrize("script", ["generate", "chat", "json_mode"])
def test_scripts_take_it_and_report_it(script, monkeypatch, capsys):
    arguments = ["--prompt", "Hello!"] if script != "chat" else []
    arguments += [
        "--engine",
        "eager",
        "--device",
        "cpu",
        "--max-new-tokens",
        "3",
        "--temperature",
        "0",
    ]
    outputs = []
    for more in ([], ["--lookup", "4"]):
        monkeypatch.setattr(sys, "argv", [f"scripts/{script}.py", *arguments, *more])
        monkeypatch.setattr("builtins.input", iter_input(["Hello!"]))
        with pytest.raises(SystemExit):
            runpy.run_path(str(small.ROOT / small.SCRIPTS[script]), run_name="__main__")
        outputs.append(capsys.readouterr())
    assert outputs[0].out == outputs[1].out
    assert "tokens a forward pass" not in outputs[0].err
    assert re.search(r"lookup: \d\.\d tokens a forward pass", outputs[1].err)


def iter_input(lines):
    """`input` that gives these lines and then ends."""
    left = iter(lines)

    def read(*_):
        for line in left:
            return line
        raise EOFError

    return read


def test_a_conversation_says_the_same_with_fewer_forwards():
    model, tokenizer = mistral.load("demo", device="cpu")
    said = []
    for make in (lambda decoder: decoder, LookupDecoder):
        decoder = make(Decoder(model, slack=32))
        conversation = mistral.chat.Conversation(decoder, tokenizer, max_new_tokens=30)
        said.append(
            [[str(event) for event in conversation.say(text)] for text in ("Hello!", "Hello!")]
        )
        assert decoder.lengths == [conversation.tokens_held]
    assert said[0] == said[1]
    assert decoder.forwards < decoder.plain_forwards


def test_a_forced_id_counts_once():
    inner = Alternating()
    inner.accepted = [4, 3]  # after a pair two ids are forced
    constraint = CountsForced(inner)
    assert constraint.forced() == [4, 3]
    for id in (4, 3, 6, 1):
        constraint.accept(id)
    assert constraint.taken == 2


def test_of_a_guess_that_was_partly_right_nothing_stays_but_that_part():
    model = tiny(sliding_window=None)
    decoder = Decoder(model, 1, 200)
    lookup = LookupDecoder(decoder, 4)
    lookup.prefill([[1, 2, 3, 4, 5, 6, 1]])
    assert decoder.lengths == [11]  # 2 3 4 5 are guessed
    lookup.prefill([[2, 6, 4, 5, 3, 3]])
    text = [1, 2, 3, 4, 5, 6, 1, 2, 6, 4, 5, 3, 3]
    assert torch.allclose(lookup.logits, model(torch.tensor([text]))[:, -1], atol=1e-12)


def test_a_rewind_counts_as_a_plain_forward_pass():
    model = tiny(sliding_window=None)
    forwards = []
    model.model.register_forward_hook(lambda *_: forwards.append(1))
    counts = []
    for engine in (Decoder(model, 1, 50), LookupDecoder(Decoder(model, 1, 50))):
        forwards.clear()
        engine.prefill([[1, 2, 3, 4, 5]])
        engine.rewind(2)
        engine.logits  # noqa: B018  (reads the last id again)
        counts.append(len(forwards))
    assert engine.plain_forwards == counts[0] == 2


def test_slack_is_what_the_guesses_leave():
    assert LookupDecoder(Decoder(tiny(), slack=16), tokens=5).slack == 11


@pytest.mark.parametrize(("length", "guesses"), [(64, True), (65, False)])
def test_a_long_prompt_is_read_without_a_guess(length, guesses, monkeypatch):
    decoder = Decoder(tiny())
    verified = []
    verify = decoder.verify_rows
    monkeypatch.setattr(decoder, "verify_rows", lambda ids: verified.append(ids) or verify(ids))
    LookupDecoder(decoder).prefill([[1, 2, 3, 4] * 16 + [1] * (length - 64)])
    assert bool(verified) == guesses


def test_an_id_that_is_no_choice_leaves_the_row_as_it_was():
    lookup = LookupDecoder(Decoder(tiny()))
    lookup.prefill([prompt(5)])
    before = lookup.logits
    nothing = torch.zeros(7, dtype=torch.bool)
    assert lookup.step(GREEDY, nothing).item() == NOTHING_LEFT
    lookup.rewind(1)
    assert lookup.lengths == [5]
    assert torch.allclose(lookup.logits, before, atol=1e-12)
