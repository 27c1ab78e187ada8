"""The sampling kernel against the rules in mistral/sampling.py: the same tokens can be drawn, and
as often.

On a CPU the kernel runs in Triton's interpreter.
"""

import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from mistral import Sampling
from mistral.engine.base import IDLE, NO_NUMBERS, NOTHING_LEFT
from mistral.sampling import next_ids, processed_scores
from mistral_kernels.portable import row_width
from mistral_kernels.sample.kernel import kth_highest, launch
from mistral_kernels.sample.sampler import Sampler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V = 70  # not a multiple of 32, and its groups are not a power of two


def random_logits(B=1, ties=False, scale=3.0):
    logits = torch.randn(B, V) * scale
    return ((logits * 2).round() / 2 if ties else logits).to(DEVICE)


def nothing(B):
    return torch.full((B, 1), -1, device=DEVICE)


def run(sampler, logits, ids):
    """Choose from logits [B, V]; the columns that rows have beyond V hold NaN."""
    sampler.run(F.pad(logits, (0, -logits.shape[1] % 4), value=math.nan), ids)


def draw(logits, sampling, mask=None, steps=1, plain=False):
    """int64 [steps, B]: what comes at the same logits, step after step."""
    B, V = logits.shape
    sampler = Sampler(B, V, DEVICE, plain)
    ids = torch.full((B,), -7, device=DEVICE)
    drawn = []
    sampler.prepare(sampling, mask, nothing(B))
    for _ in range(steps):
        run(sampler, logits, ids)
        drawn.append(ids.clone())
    assert sampler.counts.tolist() == [steps] * B
    return torch.stack(drawn)


def probabilities(logits, sampling, mask=None):
    """[B, V] of the reference; 0 for ids that cannot be drawn."""
    B = logits.shape[0]
    return processed_scores(
        logits, sampling, nothing(B), torch.zeros(B, device=DEVICE), mask
    ).softmax(-1)


CASES = [
    dict(),
    dict(temperature=0.3),
    dict(top_k=1),
    dict(top_k=7),
    dict(top_k=V - 1),
    dict(top_k=10**6),
    dict(top_p=0.0),
    dict(top_p=0.3),
    dict(top_p=0.9),
    dict(min_p=0.1),
    dict(min_p=1.0),
    dict(temperature=0.7, top_k=30, top_p=0.8, min_p=0.02),
    dict(temperature=2.0, top_k=12, top_p=0.5),
]


@pytest.mark.parametrize("ties", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("values", CASES, ids=str)
def test_only_what_the_reference_keeps_is_drawn(values, ties):
    logits = random_logits(ties=ties)
    sampling = Sampling(seed=5, **values)
    lowest = logits[probabilities(logits, sampling) > 0].min()
    # By their scores: which of equals stay at the border of top-p is up to the reference's sort.
    assert (logits[0, draw(logits, sampling, steps=12)] >= lowest).all()


FREQUENCIES = [
    dict(temperature=1.5, top_k=40, top_p=0.5, min_p=0.3),
    dict(temperature=1.3),
    dict(top_k=9, temperature=2.0),
    dict(top_p=0.6),
]


# Draws in the interpreter take 10 ms each: one case of the kernel is enough by default.
@pytest.mark.parametrize(
    "values, plain",
    [(FREQUENCIES[0], False)]
    + [pytest.param(values, False, marks=pytest.mark.slow) for values in FREQUENCIES[1:]]
    + [(values, True) for values in FREQUENCIES],
    ids=str,
)
def test_frequencies_are_the_probabilities_of_the_reference(values, plain):
    logits = random_logits(scale=0.7)
    sampling = Sampling(seed=1, **values)
    # The short form in the interpreter draws less.
    n = 150 if values == FREQUENCIES[0] and not plain and DEVICE == "cpu" else 300
    expected = probabilities(logits, sampling)[0].cpu() * n
    counts = draw(logits, sampling, steps=n, plain=plain).flatten().bincount(minlength=V).cpu()
    assert counts[expected == 0].sum() == 0
    # Rare ids count together: each alone has too few draws for the approximation.
    rare = (expected > 0) & (expected < 5)
    cells = [(counts[i].item(), expected[i].item()) for i in torch.nonzero(expected >= 5).flatten()]
    cells += [(counts[rare].sum().item(), expected[rare].sum().item())] * bool(rare.any())
    chi_square = sum((c - e) ** 2 / e for c, e in cells)
    freedom = len(cells) - 1
    assert freedom >= 5
    # Five standard deviations of chi-square; the seed is fixed.
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_at_the_border_of_top_p_the_higher_ids_of_as_many_equals_as_in_the_reference_stay():
    logits = torch.full((1, 40), -30.0, device=DEVICE)
    logits[0, [2, 3, 33, 39]] = 1.0
    for top_p, kept in (
        (0.0, {39}),
        (0.2, {39}),
        (0.25, {39}),  # exactly reached by the first
        (0.45, {33, 39}),
        (0.5, {33, 39}),
        (0.55, {3, 33, 39}),
        (0.95, {2, 3, 33, 39}),
    ):
        sampling = Sampling(top_p=top_p, seed=3)
        assert (probabilities(logits, sampling) > 0).sum() == len(kept)
        drawn = draw(logits, sampling, steps=12 * len(kept))
        assert set(drawn.flatten().tolist()) == kept


@pytest.mark.parametrize("plain", [False, True])
def test_what_ties_with_the_kth_stays(plain):
    logits = torch.full((1, 40), -4.0, device=DEVICE)
    logits[0, [5, 7]] = 0.0
    logits[0, 9] = -0.0
    assert set(
        draw(logits, Sampling(top_k=2, seed=0), steps=40, plain=plain).flatten().tolist()
    ) == {5, 7, 9}


@triton.jit
def border_kernel(scores, out, k, SIZE: tl.constexpr):
    z = tl.load(scores + tl.arange(0, SIZE))
    border = kth_highest(z, tl.max(z), k)
    tl.store(out + tl.arange(0, SIZE), z >= border)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_bisection_finds_the_k_highest_of_any_size(scale):
    scores = torch.randn(64, device=DEVICE) * scale
    scores[3:20] = scores[21]
    scores[40] = 0.0
    scores[41] = -0.0
    scores[50:] = -math.inf
    for k in (1, 2, 17, 30, 49, 50, 51, 64):
        kept = torch.zeros(64, dtype=torch.bool, device=DEVICE)
        border_kernel[(1,)](scores, kept, k, 64)
        assert torch.equal(kept, scores >= scores.topk(k).values[-1]), k


@pytest.mark.parametrize("plain", [False, True])
def test_greedy_is_the_first_of_the_best(plain):
    logits = random_logits(3, ties=True)
    logits[1, [4, 44]] = 99.0
    assert (
        draw(logits, Sampling(temperature=0, top_k=1, typical_p=0.5), plain=plain)[0].tolist()
        == logits.argmax(-1).tolist()
    )


@pytest.mark.parametrize("plain", [False, True])
def test_ids_that_occurred_are_penalised_and_the_chosen_one_joins_them(plain):
    B = 3
    logits = random_logits(3)
    history = torch.full((B, 12), -1, device=DEVICE)
    history[0, :4] = torch.arange(4, device=DEVICE)
    history[2, :2] = logits[2].topk(2).indices
    lengths = torch.tensor([4, 0, 2], device=DEVICE)
    mask = torch.rand(B, V, device=DEVICE) < 0.6
    sampling = Sampling(temperature=0, repetition_penalty=2.5)
    sampler = Sampler(B, V, DEVICE, plain)
    ids = torch.zeros(B, dtype=torch.int64, device=DEVICE)
    given = history.clone()
    for _ in range(6):
        expected = next_ids(logits, sampling, history, lengths, mask, None)
        # The history is read once: afterwards the kernel adds the ids that it chooses.
        sampler.prepare(sampling, mask, given)
        run(sampler, logits, ids)
        assert ids.tolist() == expected.tolist()
        history.scatter_(1, lengths[:, None], ids[:, None])
        lengths += 1
    sampler.forget()
    sampler.prepare(sampling, None, given)
    run(sampler, logits, ids)
    assert (
        ids.tolist()
        == next_ids(logits, sampling, given, torch.tensor([4, 0, 2]), None, None).tolist()
    )


@pytest.mark.parametrize("V", [70, 72])
@pytest.mark.parametrize("plain", [False, True])
def test_a_seed_repeats_rows_differ_and_random_numbers_go_on(plain, V):
    logits = torch.zeros(2, V, device=DEVICE)
    ids = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    sampler = Sampler(2, V, DEVICE, plain)
    texts = []
    for seed in (2**64 - 1, 7, 2**64 - 1, 2**64 - 1):
        text = []
        for _ in range(8):
            sampler.prepare(Sampling(seed=seed), None, nothing(2))
            run(sampler, logits, ids)
            text.append(ids.tolist())
        texts.append(text)
    first, other, again, further = texts
    assert first == again != other
    assert further not in (first, other)
    assert [row[0] for row in first] != [row[1] for row in first]
    sampler.counts -= 8
    run(sampler, logits, ids)
    assert ids.tolist() == further[0]


def test_without_a_seed_the_global_generator_starts_the_random_numbers():
    logits = torch.zeros(1, V, device=DEVICE)
    texts = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        texts.append(draw(logits, Sampling(), steps=8).tolist())
    assert texts[0] == texts[1] != texts[2]


def texts_of(rows, logits, steps=6, plain=False, changes=None):
    """The ids of each step, [steps][B], and the sampler; each row has a Sampling of its own.

    changes  step -> the rows of that step
    """
    B, V = logits.shape
    sampler = Sampler(B, V, DEVICE, plain)
    ids = torch.full((B,), -7, device=DEVICE)
    texts = []
    for step in range(steps):
        sampler.prepare((changes or {}).get(step, rows), None, nothing(B))
        run(sampler, logits, ids)
        texts.append(ids.tolist())
    return texts, sampler


@pytest.mark.parametrize("plain", [False, True])
def test_a_row_with_its_own_sampling_depends_on_no_other_row(plain):
    logits = random_logits(4, scale=0.5)
    rows = [
        Sampling(seed=3, top_p=0.9),
        Sampling(temperature=0, repetition_penalty=1.5),
        Sampling(seed=3, top_p=0.9),
        Sampling(seed=2**64 - 1, top_k=20, min_p=0.01, temperature=1.7),
    ]
    logits[2] = logits[0]
    together, _ = texts_of(rows, logits, plain=plain)
    for b, row in enumerate(rows):
        mine = [ids[b] for ids in together]
        my_logits = logits[b : b + 1].contiguous()
        alone, _ = texts_of([row], my_logits, plain=plain)
        assert mine == [ids[0] for ids in alone]
        # For one row a Sampling for all means the same.
        assert mine == draw(my_logits, row, steps=6, plain=plain)[:, 0].tolist()
    assert [ids[0] for ids in together] == [ids[2] for ids in together]  # one seed, one text
    assert len({tuple(ids[b] for ids in together) for b in range(4)}) == 3


@pytest.mark.parametrize("plain", [False, True])
def test_rows_obey_their_own_rules(plain):
    logits = random_logits(3)
    logits[2] = 0.0
    rows = [Sampling(temperature=0), Sampling(top_p=0.3, seed=4), Sampling(seed=4)]
    texts, _ = texts_of(rows, logits, steps=12, plain=plain)
    best = logits[0].argmax().item()
    assert [ids[0] for ids in texts] == [best] * 12
    kept = set(torch.nonzero(probabilities(logits, rows[1])[1] > 0).flatten().tolist())
    assert {ids[1] for ids in texts} <= kept
    assert len({ids[2] for ids in texts}) > 6


@pytest.mark.parametrize("plain", [False, True])
def test_an_idle_row_keeps_everything(plain):
    logits = random_logits(3)
    logits[1] = math.nan  # an idle row's logits are not read
    a = Sampling(seed=1, repetition_penalty=1.3)
    c = Sampling(seed=2)
    sampler = Sampler(3, V, DEVICE, plain)
    ids = torch.tensor([-7, -8, -9], device=DEVICE)
    sampler.prepare([a, None, c], None, nothing(3))
    run(sampler, logits, ids)
    first = ids.tolist()
    assert first[1] == -8
    assert sampler.counts.tolist() == [1, 0, 1]
    assert sampler.answers.tolist() == [first[0], IDLE, first[2]]
    assert sampler._seen.sum(1).tolist() == [1, 0, 1]
    seen = sampler._seen[2].clone()
    sampler.prepare([a, None, None], None, nothing(3))
    run(sampler, logits, ids)
    assert ids.tolist()[1:] == [-8, first[2]]
    assert sampler.counts.tolist() == [2, 0, 1]
    assert sampler.answers.tolist() == [ids[0], IDLE, IDLE]
    assert torch.equal(sampler._seen[2], seen)
    # Active again, a row continues its random numbers.
    sampler.prepare([None, None, c], None, nothing(3))
    run(sampler, logits, ids)
    alone, _ = texts_of([c], logits[2:].contiguous(), steps=2, plain=plain)
    assert [first[2], ids[2].item()] == [text[0] for text in alone]


@pytest.mark.parametrize("plain", [False, True])
def test_one_rows_new_seed_starts_that_row_alone_anew(plain):
    logits = torch.zeros(2, V, device=DEVICE)
    a, b, other = (Sampling(seed=seed) for seed in (1, 2, 3))
    warmer = Sampling(seed=1, temperature=1.5)  # other settings, same seed
    plan = {3: [a, other], 4: [warmer, other], 5: [warmer, None]}
    texts, sampler = texts_of([a, b], logits, plain=plain, changes=plan)
    undisturbed, _ = texts_of([a, b], logits, plain=plain)
    assert [ids[0] for ids in texts] == [ids[0] for ids in undisturbed]
    fresh, _ = texts_of([other], logits[:1], steps=2, plain=plain)
    assert [ids[1] for ids in texts[3:5]] == [ids[0] for ids in fresh]
    assert sampler.counts.tolist() == [6, 2]


@pytest.mark.parametrize("plain", [False, True])
def test_random_numbers_of_ids_that_are_gone_are_drawn_again(plain):
    logits = torch.zeros(2, V, device=DEVICE)
    ids = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    a, b = (Sampling(seed=seed) for seed in (1, 2))
    expected, _ = texts_of([a, b], logits, plain=plain)
    sampler = Sampler(2, V, DEVICE, plain)
    lengths = [5, 9]

    def step(rows=(a, b), confirmed=True):
        sampler.prepare(rows, None, nothing(2), lengths=lengths)
        run(sampler, logits, ids)
        if confirmed:
            sampler.confirm()
            lengths[:] = [n + (row is not None) for n, row in zip(lengths, rows)]
        return ids.tolist()

    assert [step() for _ in range(4)] == expected[:4]
    lengths[:] = [6, 12]  # three ids of the first row are gone, and one of the second
    sampler.settle(lengths)
    assert step() == [expected[1][0], expected[3][1]]
    step(confirmed=False)  # interrupted
    sampler.settle(lengths)
    assert step() == [expected[2][0], expected[4][1]]
    lengths[1] = 0
    sampler.settle(lengths)
    assert step() == [expected[3][0], expected[0][1]]
    # Without a seed an emptied row starts with a number of its own.
    lengths[:] = [0, 0]
    texts = []
    for _ in range(2):
        sampler.settle([0, 0])
        lengths[:] = [1, 1]
        texts.append([step((Sampling(), Sampling())) for _ in range(4)])
    assert texts[0] != texts[1]


def test_without_seeds_each_row_draws_its_own_from_the_global_generator():
    logits = torch.zeros(2, V, device=DEVICE)
    texts = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        texts.append(texts_of([Sampling(), Sampling()], logits)[0])
    assert texts[0] == texts[1] != texts[2]
    assert [ids[0] for ids in texts[0]] != [ids[1] for ids in texts[0]]
    torch.manual_seed(3)
    shared = draw(logits, Sampling(), steps=6).tolist()
    assert [ids[0] for ids in shared] == [ids[0] for ids in texts[0]]


def test_a_sampling_for_each_row_is_asked_for():
    with pytest.raises(ValueError, match="1 samplings for 2 rows"):
        Sampler(2, V, DEVICE).prepare([Sampling()], None, nothing(2))
    with pytest.raises(ValueError, match="has no typical_p, no_repeat_ngram_size, logit_bias"):
        Sampler(2, V, DEVICE).prepare([None, Sampling(typical_p=0.5)], None, nothing(2))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1e-5, 0.7])
def test_what_is_no_number_is_not_chosen_and_the_id_lies_inside(temperature, plain):
    sampling = Sampling(temperature=temperature, top_k=4, top_p=0.5, repetition_penalty=1.1, seed=0)
    logits = random_logits(4)
    logits[0] = math.nan
    logits[1] = -math.inf
    logits[2, :-1] = math.nan
    logits[3, 5] = math.inf
    assert draw(logits, sampling, plain=plain)[0].tolist() == [0, 0, V - 1, 5]
    nowhere = torch.zeros(V, dtype=torch.bool, device=DEVICE)
    assert draw(random_logits(2), sampling, nowhere, plain=plain)[0].tolist() == [0, 0]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_each_row_says_what_was_wrong_with_its_choice(temperature, plain):
    logits = random_logits(4)
    mask = torch.ones(4, V, dtype=torch.bool, device=DEVICE)
    logits[1, 3] = math.nan
    mask[1, 3] = False  # a NaN is reported even if its id is forbidden
    logits[2] = -math.inf
    mask[3] = False
    sampler = Sampler(4, V, DEVICE, plain)
    ids = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    for given, expected in (
        (None, [0, NO_NUMBERS, NOTHING_LEFT, 0]),
        (mask, [0, NO_NUMBERS, NOTHING_LEFT, NOTHING_LEFT]),
    ):
        sampler.prepare(Sampling(temperature=temperature, seed=0), given, nothing(4))
        run(sampler, logits, ids)
        answers = [id if wrong == 0 else wrong for id, wrong in zip(ids.tolist(), expected)]
        assert sampler.answers.tolist() == answers


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_is_obeyed_until_it_is_gone(temperature, plain):
    logits = random_logits(2)
    sampling = Sampling(temperature=temperature, top_p=0.9, seed=1)
    sampler = Sampler(2, V, DEVICE, plain)
    ids = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    mask = torch.zeros(2, V, dtype=torch.bool)
    mask[0, 69] = mask[1, 31] = True
    for given, expected in ((mask, [69, 31]), (mask[1], [31, 31])):
        sampler.prepare(sampling, given, nothing(2))
        run(sampler, logits, ids)
        assert ids.tolist() == expected
    logits[:, 12] = 60.0
    sampler.prepare(sampling, None, nothing(2))
    run(sampler, logits, ids)
    assert ids.tolist() == [12, 12]


@pytest.mark.parametrize(
    "size", [63, *(pytest.param(size, marks=pytest.mark.slow) for size in (61, 62, 64, 70))]
)
def test_a_row_takes_nothing_from_what_lies_beside_it(size):
    logits = torch.full((3, size), math.nan, device=DEVICE)
    mask = torch.zeros(3, size, dtype=torch.bool, device=DEVICE)
    # The neighbours of the row are forbidden and penalised, too.
    history = torch.arange(size, device=DEVICE).repeat(3, 1)
    for b in range(3):
        logits.fill_(math.nan)
        mask.zero_()
        mask[b] = True
        history[b] = -1
        for best, values in (
            (0, dict(temperature=0)),
            (size - 1, dict(temperature=0)),
            (0, {}),
            (size - 1, {}),
        ):
            logits[b] = torch.linspace(-20, -10, size)
            logits[b, best] = 20.0
            for given, penalty in ((None, 1.0), (mask, 1.0), (None, 2.0), (mask, 2.0)):
                sampler = Sampler(3, size, DEVICE)
                ids = torch.zeros(3, dtype=torch.int64, device=DEVICE)
                sampler.prepare(
                    Sampling(repetition_penalty=penalty, seed=0, **values), given, history
                )
                run(sampler, logits, ids)
                assert ids[b].item() == sampler.answers[b].item() == best
        history[b] = torch.arange(size)


@pytest.mark.parametrize("size", [61, 62, 63, 64])
def test_each_row_writes_its_own_scores_and_no_others(size):
    logits = torch.randn(3, size, device=DEVICE)
    mask = torch.rand(3, size, device=DEVICE) < 0.5
    sampler = Sampler(3, size, DEVICE)
    ids = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    width = sampler._scores.shape[1]
    memory = torch.full((3 * width + 16,), 7.0, device=DEVICE)
    sampler._scores = memory[: 3 * width].view(3, width)
    sampler.prepare(Sampling(temperature=0), mask, nothing(3))
    run(sampler, logits, ids)
    expected = logits.masked_fill(~mask, -math.inf)
    wanted = torch.full_like(memory, 7.0)
    for b in range(3):
        wanted[b * width : (b + 1) * width] = -math.inf
        wanted[b * width : b * width + size] = expected[b]
    assert torch.equal(memory, wanted)
    assert torch.equal(ids, expected.argmax(-1))


def test_what_the_kernel_does_not_have_is_left_to_the_reference():
    supported = [
        Sampling(),
        Sampling(temperature=0, typical_p=0.5),
        Sampling(top_k=5, top_p=0.5, min_p=0.1),
    ]
    assert all(map(Sampler.supports, supported))
    for sampling in (
        Sampling(typical_p=0.5),
        Sampling(no_repeat_ngram_size=3),
        Sampling(temperature=0, no_repeat_ngram_size=1),
    ):
        assert not Sampler.supports(sampling)
        with pytest.raises(ValueError, match="has no typical_p, no_repeat_ngram_size, logit_bias"):
            Sampler(1, V, DEVICE).prepare(sampling, None, nothing(1))
    with pytest.raises(
        ValueError, match="logits in torch.float16: the sampling kernel takes float32"
    ):
        Sampler(1, V, DEVICE).run(
            random_logits().half(), torch.zeros(1, dtype=torch.int64, device=DEVICE)
        )


def test_preparing_and_running_reads_nothing_from_the_device(no_host_reads):
    sampler = Sampler(2, V, DEVICE)
    ids = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    sampler.prepare(
        Sampling(repetition_penalty=1.2, seed=3), torch.ones(V, dtype=torch.bool), nothing(2)
    )
    sampler.prepare([Sampling(seed=4), None], torch.ones(V, dtype=torch.bool), nothing(2))
    sampler.prepare([Sampling(seed=4), Sampling(seed=5, repetition_penalty=2.0)], None, nothing(2))
    if DEVICE == "cuda":  # the interpreter itself reads
        run(sampler, random_logits(2), ids)


@pytest.mark.gpu
def test_one_graph_serves_all_settings():
    B = 5
    V = 32_002
    logits = torch.randn(B, V, device=DEVICE) * 3
    ids = torch.zeros(B, dtype=torch.int64, device=DEVICE)
    sampler = Sampler(B, V, DEVICE)
    sampler.prepare(Sampling(), None, nothing(B))
    run(sampler, logits, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(sampler, logits, ids)
    mask = torch.rand(B, V, device=DEVICE) < 0.5
    for number, values in enumerate([dict(temperature=0), *CASES]):
        sampling = Sampling(seed=100 + number, repetition_penalty=1.5, **values)
        sampler.forget()
        sampler.prepare(sampling, mask, nothing(B))
        kept = probabilities(logits, sampling, mask) > 0
        for _ in range(20):
            graph.replay()
            assert kept.gather(1, ids[:, None]).all() or sampling.temperature == 0
            sampler.forget()
            sampler.prepare(sampling, mask, nothing(B))
        if sampling.temperature == 0:
            assert torch.equal(ids, logits.masked_fill(~mask, -math.inf).argmax(-1))


@pytest.mark.parametrize("plain", [False, True])
def test_at_min_p_of_1_the_best_and_its_equals_stay(plain):
    logits = torch.full((1, 40), 1.9, device=DEVICE)
    logits[0, [5, 7]] = 2.0
    drawn = draw(logits, Sampling(min_p=1.0, seed=0), steps=20, plain=plain)
    assert set(drawn.flatten().tolist()) == {5, 7}


def test_a_vocabulary_that_is_too_large_is_refused():
    assert launch(1, 2**17, 0).constants["GROUPS"] == 2**12
    for V in (2**17 + 1, 2**17 + 4):
        with pytest.raises(ValueError, match="takes up to 131072"):
            launch(1, V, 0)


def test_seeds_above_2_to_the_63_are_seeds_of_their_own():
    logits = torch.zeros(1, 40, device=DEVICE)
    texts = [draw(logits, Sampling(seed=seed), steps=8).tolist() for seed in (5, 2**63 + 5)]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("plain", [False, True])
def test_a_top_k_of_any_size_is_taken(plain):
    logits = random_logits()
    texts = [
        draw(logits, Sampling(seed=1, top_k=k), steps=4, plain=plain).tolist() for k in (0, 2**70)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("seed", [1, None])
def test_rows_that_share_a_sampling_draw_again_together(seed):
    sampler = Sampler(2, 40, DEVICE, plain=True)
    ids = torch.zeros(2, dtype=torch.int64, device=DEVICE)

    def step(lengths, counts=None):
        sampler.settle(lengths)
        sampler.prepare(Sampling(seed=seed), None, nothing(2), counts, lengths)
        before = sampler.counts.tolist()
        run(sampler, torch.zeros(2, 40, device=DEVICE), ids)
        sampler.confirm()
        return before

    def counts_of(*seeded_and_not):  # without a seed, none are drawn again
        return [seeded_and_not[seed is None]] * 2

    assert step([5, 9]) == counts_of(0, 0)
    assert step([5, 10]) == counts_of(1, 1)  # the second row holds the id of the first draw
    assert step([6, 11], [1, 0]) == counts_of(2, 2)
    assert step([6, 12]) == counts_of(2, 3)  # no row holds an id of the third
    assert step([7, 13], [1, 0]) == counts_of(3, 4)
    assert step([8, 13]) == counts_of(4, 5)  # an idle row draws its share
    assert step([7, 12]) == counts_of(3, 6)
    assert step([1, 0]) == counts_of(0, 7)
    assert step([0, 0]) == counts_of(0, 0)


def test_rows_begin_at_multiples_of_16_bytes():
    for size in range(1, 200):
        assert row_width(size) % 4 == 0
        assert size <= row_width(size) < size + 4
    with pytest.raises(ValueError, match="logits of 70 columns: rows for 70 tokens have 72"):
        Sampler(1, V, DEVICE).run(random_logits(), torch.zeros(1, dtype=torch.int64, device=DEVICE))
