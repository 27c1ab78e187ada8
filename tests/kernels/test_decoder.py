"""The fast engine against the reference engine: the same ids, the same lengths, the same errors.

On a CPU most of it runs on the kernels' plain twins, which compute what the kernels compute
(test_decode_kernels.py); a few steps run the kernels themselves in Triton's interpreter.
"""

import copy
from dataclasses import replace
from random import Random

import pytest
import small
import torch

import mistral
from mistral_kernels.decode.step import KERNELS, REFERENCES, DecodeStep
from mistral_kernels.decoder import Decoder
from mistral_kernels.weights import weights_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = mistral.Sampling(temperature=0)
SIZES = dict(
    hidden_size=96, intermediate_size=160, head_dim=16, num_hidden_layers=2, sliding_window=7
)
CLOSE = 2e-5  # float32, of logits up to about 10
PLAIN = DEVICE == "cpu"


def pair(batch_size=1, max_tokens=None, slack=16, plain=PLAIN, **changes):
    """A reference decoder and a fast one, of equal models."""
    model = small.model(torch.float32, **SIZES | changes).to(DEVICE)
    fast = Decoder(copy.deepcopy(model), batch_size, max_tokens, slack=slack, plain=plain)
    return mistral.Decoder(model, batch_size, max_tokens, slack=slack), fast


def assert_same_logits(reference, fast):
    difference = (reference.logits - fast.logits).abs().max()
    assert difference < CLOSE * reference.logits.abs().max()


def test_reads_steps_and_rewinds_in_any_order_give_what_the_reference_gives():
    random = Random(1)
    reference, fast = pair(batch_size=3)
    for i in range(150):
        kind = (
            random.choice(("read", "read one", "step", "step", "step", "rewind")) if i else "read"
        )
        if kind == "read":
            rows = [
                [random.randrange(101) for _ in range(random.randint(i == 0, 20))] for _ in range(3)
            ]
            calls = [decoder.prefill(rows) for decoder in (reference, fast)]
        elif kind == "read one":
            rows = [[random.randrange(101)] * random.randint(0, 1) for _ in range(3)]
            calls = [decoder.prefill(rows) for decoder in (reference, fast)]
        elif kind == "step":
            calls = [decoder.step(GREEDY).tolist() for decoder in (reference, fast)]
        else:
            n = [random.randint(0, 3) for _ in range(3)]
            calls = [error_of(decoder, n) for decoder in (reference, fast)]
        assert calls[0] == calls[1], (i, kind)
        assert reference.lengths == fast.lengths
        if random.random() < 0.4:
            assert_same_logits(reference, fast)
    assert max(fast.lengths) > 20 * 7  # the window rolled over many times


def error_of(decoder, n):
    try:
        return decoder.rewind(n)
    except ValueError as error:
        return str(error)


def test_generation_that_runs_ahead_of_the_host_ends_where_the_references_ends():
    reference, fast = pair()
    assert fast.steps_in_flight == 2
    rules = mistral.Sampling(temperature=0, repetition_penalty=1.2)
    for prompt in ([5, 6, 7], [8], [3, 4]):  # one behind the other
        options = dict(max_new_tokens=30, stop_tokens=range(0, 101, 9))
        texts = [
            list(mistral.generate(decoder, prompt, rules, **options))
            for decoder in (reference, fast)
        ]
        assert texts[0] == texts[1]
        assert reference.lengths == fast.lengths
    assert_same_logits(reference, fast)


def test_without_slack_no_step_is_in_flight_because_none_could_be_rolled_back():
    reference, fast = pair(slack=0)
    assert fast.steps_in_flight == 0
    assert pair(slack=1)[1].steps_in_flight == 1
    longer, _ = pair(slack=0)
    text = list(mistral.generate(longer, [5, 6, 7], GREEDY, max_new_tokens=20, stop_tokens=()))
    stop = next(i for i, id in enumerate(text) if i >= 6 and id not in text[:i])
    options = dict(max_new_tokens=20, stop_tokens=[text[stop]])  # past the window of 7
    for decoder in (reference, fast):
        assert list(mistral.generate(decoder, [5, 6, 7], GREEDY, **options)) == text[: stop + 1]
        assert decoder.lengths == [3 + stop + 1]


RULES = mistral.Sampling(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.1, seed=3)


@pytest.fixture
def a_decoder_under_way():
    """With all kernels compiled, and its graphs recorded on a GPU."""
    _, fast = pair(batch_size=2)
    fast.prefill([[5, 6, 7], [8]])
    for _ in range(3):
        fast.step(RULES)
    return fast


def test_a_step_never_waits_for_the_device(a_decoder_under_way, no_host_reads, monkeypatch):
    if PLAIN:  # the kernels' twins read numbers: here all around the kernels is looked at
        monkeypatch.setattr(a_decoder_under_way.works, "run", lambda name, work: None)
    allowed = torch.ones(101, dtype=torch.bool, device=DEVICE)
    other_rules = replace(RULES, temperature=0)
    for _ in range(8):  # past the window
        a_decoder_under_way.step(RULES)
        a_decoder_under_way.step(other_rules, allowed)


@pytest.mark.gpu
def test_a_step_on_a_gpu_never_waits(a_decoder_under_way):
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            a_decoder_under_way.step(RULES)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rules_that_the_sampling_kernel_lacks_are_left_to_the_reference():
    reference, fast = pair()
    for decoder in (reference, fast):
        decoder.prefill([[5, 6, 7]])
    for i in range(30):
        rules = (
            mistral.Sampling(temperature=0, no_repeat_ngram_size=2),
            mistral.Sampling(temperature=0, repetition_penalty=1.5),
        )[i % 3 == 0]
        assert reference.step(rules).tolist() == fast.step(rules).tolist()


def test_logits_that_are_not_numbers_are_an_error_although_nobody_looks_at_them():
    _, fast = pair()
    fast.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the logits are NaN"):
        next(mistral.generate(fast, [5, 6, 7], GREEDY, max_new_tokens=3))


@pytest.mark.parametrize(
    "changes",
    [
        dict(sliding_window=None),
        dict(num_key_value_heads=6),
        dict(rope_theta=1e6),
        dict(rope_scaling=small.YARN),
    ],
)
def test_other_shapes_and_no_window_give_the_references_text(changes):
    reference, fast = pair(max_tokens=60, **changes)
    options = dict(max_new_tokens=40, stop_tokens=())
    texts = [
        list(mistral.generate(decoder, [5, 6, 7], GREEDY, **options))
        for decoder in (reference, fast)
    ]
    assert texts[0] == texts[1]


def test_the_kernels_themselves_give_the_references_logits_past_the_window():
    if DEVICE == "cuda":
        pytest.skip("on a GPU every test here runs the kernels")
    model = small.model(torch.float32, **SIZES | dict(num_hidden_layers=1, sliding_window=3))
    cache = model.new_cache(2, slack=1)
    twin_cache = model.new_cache(2, slack=1)
    step = DecodeStep(model, cache, KERNELS)
    twin = DecodeStep(model, twin_cache, REFERENCES)
    tokens = small.tokens(2, 6)
    for t in range(6):
        for one in (step, twin):
            one.tokens.copy_(tokens[:, t])
            one.run(torch.full((2,), t))
        assert (step.logits - twin.logits).abs().max() < CLOSE * twin.logits.abs().max()
    assert (step.logits - model(tokens)[:, -1]).abs().max() < CLOSE * twin.logits.abs().max()


@pytest.mark.parametrize("scaling", [None, pytest.param(small.YARN, marks=pytest.mark.slow)])
def test_the_kernels_from_the_prompt_to_the_chosen_ids_give_the_references_text(scaling):
    """On a CPU in Triton's interpreter: short, but longer than the window."""
    sizes = dict(num_hidden_layers=1, sliding_window=3, rope_scaling=scaling)
    engines = pair(batch_size=2, plain=False, **sizes)
    rules = mistral.Sampling(temperature=0, repetition_penalty=1.3)
    for engine in engines:
        engine.prefill([[5, 6, 7, 8], [9]])
    for i in range(9):
        if i == 6:
            for engine in engines:
                engine.rewind([2, 0])
        reference, fast = (engine.step(rules).tolist() for engine in engines)
        assert reference == fast, i
    assert_same_logits(*engines)


def test_rows_that_keep_their_bits_share_a_step():
    """Past the window; prompts have a pass of their own."""
    _, fast = pair(4, 60)
    fast.rows_together = False
    prompts = [small.tokens(n, seed=n).tolist() for n in (20, 1, 6, 33)]
    steps = []
    run = fast._step.run
    fast._step.run = lambda positions: (steps.append(0), run(positions))

    def all_logits(rows):
        fast.rewind(fast.lengths)
        fast.prefill([ids if b in rows else [] for b, ids in enumerate(prompts)])
        logits = []
        for _ in range(12):
            logits.append(fast.logits[rows])
            steps.clear()
            fast.step([GREEDY if b in rows else None for b in range(4)])
        return torch.stack(logits, dim=1)

    together = all_logits([0, 1, 2, 3])
    assert fast.logits is not None
    assert len(steps) == 1
    for rows in ([0], [1], [2], [3], [1, 3]):
        assert torch.equal(all_logits(rows), together[rows])


def test_a_row_of_a_step_of_the_kernels_has_the_same_bits_in_any_company():
    """On a CPU in Triton's interpreter: beside a row at another position, and an idle one."""
    changes = dict(num_hidden_layers=1, sliding_window=2, hidden_size=64, intermediate_size=64)
    model = small.model(torch.float32, **SIZES | changes).to(DEVICE)
    tokens = small.tokens(2, 4).to(DEVICE)
    results = []
    for others in ([0, -1, 1, 2], [-1, -1, -1, -1]):
        step = DecodeStep(model, model.new_cache(2, slack=1), KERNELS)
        for t, other in enumerate(others):
            step.tokens.copy_(tokens[:, t])
            step.run(torch.tensor([t, other], device=DEVICE))
            results.append(step.logits[0].clone())
    assert torch.equal(torch.stack(results[:4]), torch.stack(results[4:]))


def test_regrouped_weights_are_the_models_own_and_regrouped_once():
    model = small.model(torch.float32, **SIZES)
    logits = model(small.tokens(1, 9))
    weights = weights_of(model)
    attention = model.model.layers[1].self_attn
    assert weights.layers[1].qkv.data_ptr() == attention.q_proj.weight.data_ptr()
    stored = attention.v_proj.weight.untyped_storage()
    assert stored.data_ptr() == attention.q_proj.weight.untyped_storage().data_ptr()
    assert stored.nbytes() == weights.layers[1].qkv.nbytes
    assert weights_of(model).layers[1].qkv.data_ptr() == weights.layers[1].qkv.data_ptr()
    assert torch.equal(model(small.tokens(1, 9)), logits)
    assert torch.equal(weights.layers[0].gate_up[:160], model.model.layers[0].mlp.gate_proj.weight)


def test_norms_that_were_scaled_for_float16_are_not_changed_unnoticed():
    model = small.model(torch.float16, **SIZES).to(DEVICE)
    decoder = Decoder(model, plain=True)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)  # a view of the kernels' own
    decoder.prefill([[5]])
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.mul_(2)
    with pytest.raises(ValueError, match="norms were changed .*: create a new decoder"):
        decoder.prefill([[5]])
    Decoder(model, plain=True).prefill([[5]])


def test_what_the_kernels_cannot_do_is_named():
    model = small.model(torch.float32, **SIZES | dict(intermediate_size=50)).to(DEVICE)
    with pytest.raises(ValueError, match="a multiple of 32"):
        decoder = Decoder(model)
        decoder.prefill([[1]])
        decoder.step(GREEDY)
        decoder.logits  # noqa: B018
    with pytest.raises(ValueError, match="a CUDA graph needs the kernels and a GPU"):
        Decoder(small.model(torch.float32, **SIZES), plain=True, graph=True)


@pytest.mark.parametrize("steps", [60, pytest.param(1100, marks=pytest.mark.slow)])
def test_greedy_text_of_the_demo_is_the_references_past_its_window(steps):
    model, tokenizer = mistral.load("demo", device=DEVICE, dtype=torch.float32)
    reference = mistral.Decoder(model)
    fast = Decoder(copy.deepcopy(model), plain=PLAIN)
    prompt = tokenizer.encode("Hello. " * 330)
    assert len(prompt) > 900
    banned = torch.ones(model.config.vocab_size, dtype=torch.bool)
    banned[list(model.config.eos_token_id)] = False
    for decoder in (reference, fast):
        decoder.prefill([prompt])
    for i in range(steps):
        ids = [decoder.step(GREEDY, banned.to(DEVICE)).tolist() for decoder in (reference, fast)]
        assert ids[0] == ids[1], i
    assert fast.lengths[0] > model.config.sliding_window + steps - 100


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
def test_a_graph_gives_the_bits_of_single_launches(pdl):
    if pdl and not (9, 0) <= torch.cuda.get_device_capability() < (12, 0):
        pytest.skip("these kernels launch dependently on compute capability 9.0 to 11.x")
    model = small.model(torch.bfloat16, **SIZES).cuda()
    texts = []
    for graph in (True, False):
        decoder = Decoder(model, 2, graph=graph, pdl=pdl and graph)
        decoder.prefill([[4, 5, 6], [7]])
        steps = [decoder.step(mistral.Sampling(seed=3)) for _ in range(40)]
        texts.append((torch.stack(steps), decoder.logits))
    assert all(torch.equal(*both) for both in zip(*texts))


@pytest.mark.gpu
def test_a_copy_of_a_decoder_with_graphs_is_independent_and_records_its_own():
    sampling = mistral.Sampling(seed=3)
    decoder = Decoder(small.model(torch.bfloat16, **SIZES).cuda())
    decoder.prefill([[4, 5, 6]])
    for _ in range(6):
        decoder.step(sampling)
    branch = copy.deepcopy(decoder)
    assert branch._graphs == {}
    texts = [[d.step(sampling).item() for _ in range(12)] for d in (branch, decoder)]
    assert texts[0] == texts[1]
    assert torch.equal(branch.logits, decoder.logits)
    assert branch._graphs
    branch.rewind(5)
    assert decoder.lengths == [21]


def test_bfloat16_chooses_float32s_id_unless_two_are_nearly_as_good():
    exact = mistral.load("demo", device=DEVICE, dtype=torch.float32)[0]
    fast = Decoder(mistral.load("demo", device=DEVICE, dtype=torch.bfloat16)[0], plain=PLAIN)
    tokens = small.tokens(1, 80, vocab_size=1000)[0].tolist()
    wanted = exact(torch.tensor([tokens], device=DEVICE))[0, 39:].log_softmax(-1)  # [41, V]
    fast.prefill([tokens[:40]])
    made = [fast.logits[0]]
    for id in tokens[40:]:
        fast.prefill([[id]])
        made.append(fast.logits[0])
    chosen = torch.stack(made).argmax(-1)
    lost = wanted.amax(-1) - wanted.gather(1, chosen[:, None])[:, 0]
    assert lost.max() < 0.3
    assert (lost == 0).float().mean() > 0.9


def test_bfloat16_is_at_least_as_close_to_float32_as_the_references_own():
    exact = mistral.load("demo", device=DEVICE, dtype=torch.float32)[0]
    coarse = mistral.load("demo", device=DEVICE, dtype=torch.bfloat16)[0]
    tokens = small.tokens(1, 600, vocab_size=1000)[0].tolist()
    wanted = exact(torch.tensor([tokens], device=DEVICE))[0, 500:].float()
    errors = []
    for decoder in (mistral.Decoder(copy.deepcopy(coarse)), Decoder(coarse, plain=PLAIN)):
        decoder.prefill([tokens[:500]])
        made = []
        for id in tokens[500:]:
            decoder.prefill([[id]])
            made.append(decoder.logits[0].float())
        errors.append((torch.stack(made) - wanted).abs().mean().item())
    assert errors[1] <= 1.05 * errors[0]


def test_a_row_with_a_sampling_of_its_own_gets_the_text_that_it_gets_alone():
    model = small.model(
        torch.float32, sliding_window=20, hidden_size=64, intermediate_size=128, head_dim=16
    )
    samplings = [
        mistral.Sampling(seed=5, temperature=0.8),
        mistral.Sampling(temperature=0.0),
        mistral.Sampling(seed=5, top_p=0.9, repetition_penalty=1.3),
    ]
    prompts = [small.tokens(n, seed=n).tolist() for n in (3, 11, 1)]
    options = dict(max_new_tokens=30, stop_tokens=range(90, 101))
    fast = Decoder(copy.deepcopy(model), 3, plain=True)
    together = mistral.generate_batch(fast, prompts, samplings, **options)
    for prompt, sampling, text in zip(prompts, samplings, together):
        alone = Decoder(copy.deepcopy(model), plain=True)
        assert list(mistral.generate(alone, prompt, sampling, **options)) == text
    assert len({len(text) for text in together}) > 1
    assert fast.lengths == [len(p) + len(text) for p, text in zip(prompts, together)]
    # A second sequence in emptied rows, in another order, with steps of single rows in between.
    fast.rewind(fast.lengths)
    fast.prefill(prompts[::-1])
    fast.step([samplings[2], None, None])
    more = mistral.generate_batch(
        fast, [[], [], []], samplings[::-1], **options | dict(max_new_tokens=5)
    )
    lengths = [len(p) + len(text) for p, text in zip(prompts[::-1], more)]
    assert fast.lengths == [lengths[0] + 1, *lengths[1:]]


def test_a_row_that_is_full_may_be_idle():
    reference, fast = pair(batch_size=2, max_tokens=14, sliding_window=None)
    for engine in (reference, fast):
        engine.prefill([small.tokens(13).tolist(), [4, 5]])
        engine.step([GREEDY, GREEDY])
        for _ in range(4):
            engine.step([None, GREEDY])
    assert fast.lengths == reference.lengths == [14, 7]
    assert_same_logits(reference, fast)
    assert torch.equal(fast._history[:, :14], reference._history[:, :14])
    # Nothing of the full row was overwritten while it was idle, nor of the other one.
    for engine in (reference, fast):
        engine.rewind([2, 0])
        engine.step([GREEDY, None])
        engine.step([GREEDY, None])
    assert_same_logits(reference, fast)
    assert (fast._history[1, fast.lengths[1] :] == -1).all()


def test_a_penalty_knows_the_ids_that_were_verified():
    penalty = mistral.Sampling(temperature=0, repetition_penalty=1.5)
    reference, fast = pair()
    for engine in (reference, fast):
        engine.prefill([[5, 6]])
        engine.step(penalty)
        engine.verify([20, 21, 22])
    assert [reference.step(penalty).item() for _ in range(8)] == [
        fast.step(penalty).item() for _ in range(8)
    ]
    assert fast._sampler._seen[0, [5, 6, 20, 21, 22]].all()
