"""The rolling cache: whatever the chunks, the logits are those of one pass over the whole text."""

import copy
import random

import pytest
import small
import torch

from mistral.cache import RollingCache, chunk_mask

LONG = 60  # tokens a row; 15 windows


def read_chunks(model, cache, tokens, chunks, at=None):
    """Read rows of `tokens` in ragged chunks; yields (row, position, logits) for every real
    token.
    """
    at = at if at is not None else [0] * tokens.shape[0]
    for counts in chunks:
        T = max(max(counts), 1)
        piece = torch.zeros(len(counts), T, dtype=torch.int64)
        for b, n in enumerate(counts):
            piece[b, :n] = tokens[b, at[b] : at[b] + n]
        logits = model(piece, cache, lengths=counts)
        for b, n in enumerate(counts):
            for t in range(n):
                yield b, at[b] + t, logits[b, t]
            at[b] += n


def random_chunks(generator, rows, length):
    """Ragged chunks, empty rows and chunks longer than window and ring among them, until every row
    has `length`.
    """
    left = [length] * rows
    while max(left):
        counts = [min(n, generator.choice([0, 0, 1, 1, 1, 2, 3, 5, 9, 17])) for n in left]
        left = [n - c for n, c in zip(left, counts)]
        yield counts


@pytest.mark.parametrize("slack", [0, 1, 3, 40])
@pytest.mark.parametrize("window", [1, 4, None])
@pytest.mark.parametrize("seed", small.seeds(2, 6))
def test_any_chunking_equals_the_whole_pass(seed, window, slack):
    model = small.model(sliding_window=window, seed=seed)
    tokens = small.tokens(3, LONG, seed=seed)
    whole = model(tokens)
    cache = model.new_cache(3, max_tokens=LONG if window is None else None, slack=slack)
    seen = 0
    for b, p, logits in read_chunks(
        model, cache, tokens, random_chunks(random.Random(seed), 3, LONG)
    ):
        assert (logits - whole[b, p]).abs().max() < 1e-12
        seen += 1
    assert seen == 3 * LONG


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 11, 60])
def test_even_chunks_without_lengths_equal_the_whole_pass(chunk):
    model = small.model()
    tokens = small.tokens(3, LONG)
    whole = model(tokens)
    cache = model.new_cache(3)
    parts = [model(piece, cache) for piece in tokens.split(chunk, dim=1)]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-12
    assert cache.lengths == [LONG] * 3


@pytest.mark.parametrize("seed", small.seeds(6, 20))
def test_rewinding_within_the_slack_leaves_no_trace(seed):
    generator = random.Random(seed)
    slack = generator.choice([1, 2, 5])
    model = small.model(seed=seed)
    tokens = small.tokens(2, LONG, seed=seed)
    whole = model(tokens)
    cache = model.new_cache(2, slack=slack)
    at = [0, 0]
    for _ in range(60):
        left = min(LONG - n for n in at)
        if left < 1:
            break
        # Other tokens are read and rolled back first: nothing of them may stay.
        wrong = min(generator.randint(0, slack), left)
        if wrong:
            model(small.tokens(2, wrong, seed=generator.randrange(10**6)), cache)
            cache.rewind(wrong)
        count = [generator.randint(0, min(left, 6)) for _ in at]
        for b, p, logits in read_chunks(model, cache, tokens, [count], at):
            assert (logits - whole[b, p]).abs().max() < 1e-12


def test_rows_rewind_by_their_own_counts():
    model = small.model()
    tokens = small.tokens(3, 30)
    whole = model(tokens)
    cache = model.new_cache(3, slack=6)
    model(tokens[:, :20], cache)
    cache.rewind([0, 2, 6])
    assert cache.lengths == [20, 18, 14]
    for b, p, logits in read_chunks(
        model, cache, tokens, [[10, 3, 1], [0, 5, 12]], at=[20, 18, 14]
    ):
        assert (logits - whole[b, p]).abs().max() < 1e-12


def test_rewinds_add_up_against_the_slack():
    model = small.model()
    cache = None
    cache = model.new_cache(1, slack=3)
    model(small.tokens(1, 20), cache)
    cache.rewind(2)
    with pytest.raises(ValueError, match="the slack is 3"):
        cache.rewind(2)
    assert cache.lengths == [18]
    cache.rewind(1)
    model(small.tokens(1, 3), cache)
    cache.rewind(3)
    model(small.tokens(1, 1), cache)  # does not bring back what the rewound tokens evicted
    with pytest.raises(ValueError, match="the slack is 3"):
        cache.rewind(2)


def test_before_the_first_eviction_everything_can_be_taken_back():
    model = small.model()
    tokens = small.tokens(1, 8)
    cache = model.new_cache(1)
    model(tokens[:, :4], cache)
    cache.rewind(4)
    assert (model(tokens, cache) - model(tokens)).abs().max() < 1e-12
    cache = model.new_cache(1)
    model(tokens[:, :4], cache)
    cache.rewind(2)
    assert (model(tokens[:, 2:], cache) - model(tokens)[:, 2:]).abs().max() < 1e-12
    cache = model.new_cache(1)
    model(tokens, cache)
    with pytest.raises(ValueError, match="cannot forget 9 tokens of a row that holds 8"):
        cache.rewind(9)


def slots(cache):
    return cache.slot_positions[0].tolist()


def test_the_example_in_the_docstring():
    model = small.model(sliding_window=3)
    tokens = small.tokens(1, 8)
    cache = model.new_cache(1)
    model(tokens[:, :5], cache)
    assert slots(cache) == [3, 4, 2]
    model(tokens[:, 5:6], cache)
    assert slots(cache) == [3, 4, 5]
    plan = cache.plan(2)
    assert plan.mask.int().tolist() == [[[[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]]]
    model(tokens[:, 6:8], cache)
    assert slots(cache) == [6, 7, 5]

    cache = model.new_cache(1, slack=2)
    model(tokens, cache)
    assert slots(cache) == [5, 6, 7, 3, 4]
    cache.rewind(2)
    assert slots(cache) == [5, -1, -1, 3, 4]
    plan = cache.plan(1)
    assert plan.mask[0, 0, 0].tolist() == [True, True, False, False, True]  # 6 is written first
    for text in ("[3 4 2]", "[3 4 5]", "[6 7 5]", "[5 6 7 3 4]", "[5 . . 3 4]"):
        assert text in RollingCache.__doc__


def test_memory_is_that_of_the_window():
    model = small.model()
    assert model.new_cache(2, slack=3).num_slots == 7
    assert model.new_cache(2, max_tokens=3).num_slots == 3
    assert small.model(sliding_window=None).new_cache(2, max_tokens=50, slack=9).num_slots == 50


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6, 7])
def test_room_below_the_window_is_a_limit_and_exact_up_to_it(max_tokens):
    model = small.model()
    tokens = small.tokens(2, 30)
    whole = model(tokens)
    cache = model.new_cache(2, max_tokens=max_tokens, slack=2)
    limit = 30 if max_tokens >= 6 else max_tokens  # from window + slack on, the ring rolls
    parts = [model(piece, cache) for piece in tokens[:, :limit].split(2, dim=1)]
    assert (torch.cat(parts, dim=1) - whole[:, :limit]).abs().max() < 1e-12
    if limit < 30:
        with pytest.raises(ValueError, match="do not fit"):
            model(tokens[:, :1], cache)


def break_off(model, *arguments, layer):
    """A forward that ends with Ctrl-C before a layer."""

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[layer].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(*arguments)
    handle.remove()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_forward_that_was_broken_off_counts_as_taken_back(layer):
    model = small.model()
    tokens = small.tokens(2, 30)
    whole = model(tokens)
    for length in (2, 4, 11):
        cache = model.new_cache(2, slack=3)
        model(tokens[:, :length], cache)
        break_off(model, small.tokens(2, 3, seed=9), cache, layer=layer)
        assert cache.lengths == [length] * 2
        assert (model(tokens[:, length:], cache) - whole[:, length:]).abs().max() < 1e-12


def test_a_long_forward_that_was_broken_off_in_a_full_ring_is_noticed():
    model = small.model()
    tokens = small.tokens(2, 30)
    cache = model.new_cache(2, slack=3)
    model(tokens[:, :11], cache)
    break_off(model, tokens[:, 11:20], cache, layer=1)
    with pytest.raises(ValueError, match="interrupted .* start a new cache"):
        model(tokens[:, 11:12], cache)


def test_a_cache_keeps_no_graph():
    model = small.model().requires_grad_(True)
    tokens = small.tokens(2, 9)
    cache = model.new_cache(2)
    for piece in tokens.split(3, dim=1):
        assert model(piece, cache).requires_grad
    assert not cache.keys.requires_grad
    assert not cache.values.requires_grad


def test_a_cache_that_is_too_small_refuses_before_it_changes():
    model = small.model(sliding_window=None)
    tokens = small.tokens(2, 9)
    cache = model.new_cache(2, max_tokens=8)
    model(tokens[:, :6], cache, lengths=[6, 2])
    with pytest.raises(ValueError, match="9 tokens do not fit into a cache made for max_tokens=8"):
        model(tokens[:, :3], cache)
    assert cache.lengths == [6, 2]
    model(tokens[:, :6], cache, lengths=[2, 6])


@pytest.mark.parametrize("arguments", [(0,), (1, 0), (1, None, -1)])
def test_impossible_sizes_are_refused(arguments):
    with pytest.raises(ValueError, match="impossible cache"):
        small.model().new_cache(*arguments)


def test_without_a_window_max_tokens_is_required():
    with pytest.raises(ValueError, match="needs max_tokens"):
        small.model(sliding_window=None).new_cache(1)


@pytest.mark.parametrize("lengths", [[1], [1, 4], [-1, 2]])
def test_impossible_lengths_are_refused(lengths):
    model = small.model()
    with pytest.raises(ValueError, match="lengths"):
        model(small.tokens(2, 3), model.new_cache(2), lengths=lengths)


def test_pads_never_reach_a_real_token():
    model = small.model()
    tokens = small.tokens(2, 20)
    outcomes = []
    for pad in (0, 7):
        cache = model.new_cache(2)
        padded = tokens.clone()
        padded[1, 2:] = pad
        outcomes.append(model(padded, cache, lengths=[20, 2])[1, :2])
        padded = torch.full((2, 5), pad)
        padded[1] = tokens[1, 2:7]
        outcomes.append(model(padded, cache, lengths=[0, 5])[1])
    assert torch.equal(outcomes[0], outcomes[2])
    assert torch.equal(outcomes[1], outcomes[3])


def test_a_row_that_holds_nothing_does_not_poison_its_neighbours():
    model = small.model()
    tokens = small.tokens(2, 9)
    cache = model.new_cache(2)
    model(tokens[:, :3], cache, lengths=[3, 0])
    model(tokens[:, 3:5], cache, lengths=[2, 0])
    logits = model(torch.stack((tokens[0, 5:], tokens[1, :4])), cache)
    assert (logits[0] - model(tokens)[0, 5:]).abs().max() < 1e-12
    assert (logits[1] - model(tokens[:, :4])[1]).abs().max() < 1e-12


@pytest.fixture
def a_model_and_what_it_reads():
    model = small.model()
    tokens = small.tokens(2, 30)
    return model, tokens, model.new_cache(2, slack=2)


def test_a_forward_never_waits_for_the_device(a_model_and_what_it_reads, no_host_reads):
    model, tokens, cache = a_model_and_what_it_reads
    for piece in tokens.split([9, 1, 1, 5, 1, 2, 11], dim=1):
        model(piece, cache)
    model(tokens[:, :3], cache, lengths=[3, 1], last_only=True)
    for read in (
        lambda t: t[0, 0].item(),
        lambda t: t.tolist(),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: bool(t[0, 0]),
    ):
        with pytest.raises(AssertionError):
            read(cache.slot_positions)


@pytest.mark.parametrize("window", [4, None])
@pytest.mark.parametrize("seed", small.seeds(1, 5))
def test_a_row_is_copied_bit_for_bit_or_refused(seed, window):
    generator = random.Random(seed)
    model = small.model(sliding_window=window, seed=seed)
    tokens = small.tokens(3, LONG, seed=seed)
    copied = 0
    for held in (1, 3, 4, 6, 7, 8, 20, 35):
        cache = model.new_cache(3, max_tokens=LONG if window is None else None, slack=3)
        for _ in read_chunks(model, cache, tokens, [[held, generator.choice([0, 2, 11]), 5]]):
            pass
        for length in range(held + 1):
            before = cache.keys.clone(), cache.lengths, cache.peaks
            if held > 7 and 0 < length < held - 3 and window:
                with pytest.raises(ValueError, match="cannot be copied to row 1"):
                    cache.copy_row(0, 1, length)
                assert torch.equal(cache.keys, before[0])
                assert (cache.lengths, cache.peaks) == before[1:]
                continue
            cache.copy_row(0, 1, length)
            copied += 1
            assert cache.lengths == [held, length, 5]
            sources = cache.slot_positions[:2].tolist()
            kept = [s for s, p in enumerate(sources[1]) if p >= 0]
            assert sources[1] == [p if p < length else -1 for p in sources[0]]
            assert torch.equal(cache.keys[:, 0, :, kept], cache.keys[:, 1, :, kept])
            assert torch.equal(cache.values[:, 0, :, kept], cache.values[:, 1, :, kept])
            # Both continue, by different ids.
            own = copy.deepcopy(cache)
            text = tokens.clone()
            text[1, :length] = tokens[0, :length]
            whole = model(text)
            steps = [[1, 1, 0], [3, 2, 1], [6, 9, 0]]
            for b, p, logits in read_chunks(model, own, text, steps, [held, length, 5]):
                assert (logits - whole[b, p]).abs().max() < 1e-12 or b == 2
    assert copied > 30


@pytest.mark.parametrize("seed", range(4))
def test_a_row_view_reads_as_a_cache_of_its_own_and_writes_into_the_whole(seed):
    generator = random.Random(seed)
    model = small.model(torch.float32, seed=seed)
    tokens = small.tokens(3, LONG, seed=seed)
    shared = model.new_cache(3, slack=2)
    alone = [model.new_cache(1, slack=2) for _ in range(3)]
    at = [0, 0, 0]
    for _ in range(40):
        b = generator.randrange(3)
        n = min(generator.choice([1, 1, 2, 5, 9]), LONG - at[b])
        if n == 0:
            continue
        chunk = tokens[b : b + 1, at[b] : at[b] + n]
        assert torch.equal(model(chunk, shared.row(b)), model(chunk, alone[b]))
        at[b] += n
        if generator.random() < 0.3:
            back = min(generator.randint(0, 2), at[b])
            shared.row(b).rewind(back)
            alone[b].rewind(back)
            at[b] -= back
        assert shared.lengths == at
    for b, cache in enumerate(alone):
        assert torch.equal(shared.keys[:, b], cache.keys[:, 0])
        assert torch.equal(shared.values[:, b], cache.values[:, 0])
        assert torch.equal(shared.slot_positions[b], cache.slot_positions[0])


def test_the_whole_continues_where_its_row_views_stopped():
    model = small.model()
    tokens = small.tokens(3, 30)
    whole = model(tokens)
    cache = model.new_cache(3)
    for b, n in ((1, 7), (0, 3), (2, 12)):
        model(tokens[b : b + 1, :n], cache.row(b))
    assert cache.lengths == [3, 7, 12]
    for b, p, logits in read_chunks(model, cache, tokens, [[1, 1, 1], [5, 0, 2]], [3, 7, 12]):
        assert (logits - whole[b, p]).abs().max() < 1e-12


def test_lengths_may_be_a_tensor():
    model = small.model()
    tokens = small.tokens(2, 9)
    cache = model.new_cache(2)
    model(tokens, cache, lengths=torch.tensor([9, 4]))
    assert cache.lengths == [9, 4]


@pytest.mark.gpu
def test_a_forward_on_a_gpu_never_waits():
    model = small.model(torch.float32).cuda()
    tokens = small.tokens(2, 30).cuda()
    cache = model.new_cache(2, slack=2)
    model(tokens, model.new_cache(2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for piece in tokens.split([9, 1, 1, 5, 1, 2, 11], dim=1):
            model(piece, cache)
        model(tokens[:, :3], cache, lengths=[3, 1], last_only=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_all_of_a_row_can_be_forgotten_even_when_the_window_has_rolled():
    model = small.model()
    tokens = small.tokens(2, 30)
    cache = model.new_cache(2)
    model(tokens, cache)
    with pytest.raises(ValueError, match="gone"):
        cache.rewind(3)
    cache.rewind(cache.lengths)
    assert torch.equal(model(tokens[:, 5:], cache), model(tokens[:, 5:], model.new_cache(2)))
    cache.rewind([0, 25])
    again = model(tokens[:, :9], cache, lengths=[0, 9])[1]
    assert torch.allclose(
        again, model(tokens[:, :9], model.new_cache(2), lengths=[0, 9])[1], rtol=0, atol=1e-12
    )


def test_a_chunk_as_long_as_the_window_has_a_mask_as_in_transformers():
    """No key lies outside the window yet, and the choice of kernel shows in the last bits."""
    for T, is_masked in ((3, False), (4, True), (5, True)):
        mask = chunk_mask(torch.arange(T)[None], window=4)
        assert (mask is not None) == is_masked
    assert torch.equal(chunk_mask(torch.arange(4)[None], 4)[0, 0], torch.ones(4, 4).tril() > 0)


def test_lengths_far_beyond_the_window_of_a_7b_are_exact_on_the_device():
    cache = small.model(sliding_window=4).new_cache(2, slack=1)
    growth = cache.grow([4097, 2**33])
    cache.begin(growth)
    cache.commit(growth)
    plan = cache.plan(2)
    assert plan.positions.tolist() == [[4097, 4098], [2**33, 2**33 + 1]]
    assert plan.slots.tolist() == [[4097 % 5, 4098 % 5], [2**33 % 5, (2**33 + 1) % 5]]
    held = cache.slot_positions
    assert held[0, 4096 % 5] == 4096
    assert held[1, (2**33 - 1) % 5] == 2**33 - 1


def test_a_row_that_is_filled_to_its_last_slot_keeps_its_first_token():
    model = small.model(sliding_window=None)
    tokens = small.tokens(2, 10)
    expected = model(tokens)
    # 1. All at once, and the last token again.
    cache = model.new_cache(2, max_tokens=10)
    model(tokens, cache)
    assert cache.slot_positions.tolist() == [list(range(10))] * 2
    cache.rewind(1)
    assert (model(tokens[:, 9:], cache) - expected[:, 9:]).abs().max() < 1e-10
    # 2. With pads, for which the full row has no slot.
    cache = model.new_cache(2, max_tokens=10)
    model(tokens[:, :8], cache, [8, 2])
    chunk = torch.stack((tokens[0, 5:], tokens[1, 2:7]))
    chunk[0, :2] = tokens[0, 8:]
    logits = model(chunk, cache, [2, 5])
    assert (logits[0, :2] - expected[0, 8:]).abs().max() < 1e-10
    assert (logits[1] - expected[1, 2:7]).abs().max() < 1e-10


@pytest.mark.parametrize("slack", [0, 1, 3])
def test_rows_of_one_length_that_are_rewound_equal_the_whole_pass(slack):
    """As a decoder reads: token by token, where no mask is made unless something must be hidden."""
    model = small.model()
    tokens = small.tokens(2, 24)
    whole = model(tokens)
    for seed in range(3):
        generator = random.Random(seed)
        cache = model.new_cache(2, slack=slack)
        at = 0
        while at < 24:
            T = min(generator.choice([1, 1, 1, 2, 3]), 24 - at)
            logits = model(tokens[:, at : at + T], cache)
            assert (logits - whole[:, at : at + T]).abs().max() < 1e-12
            at += T
            wrong = generator.randint(0, slack)
            for i in range(wrong):
                model(small.tokens(2, 1, seed=i), cache)
            cache.rewind(wrong)


def test_one_token_each_of_rows_of_unequal_lengths():
    model = small.model()
    tokens = small.tokens(2, 3)
    whole = model(tokens)
    cache = model.new_cache(2)
    model(tokens[:, :2], cache, [2, 1])
    logits = model(torch.stack((tokens[0, 2:], tokens[1, 1:2])), cache)
    assert (logits[0, 0] - whole[0, 2]).abs().max() < 1e-12
    assert (logits[1, 0] - whole[1, 1]).abs().max() < 1e-12
