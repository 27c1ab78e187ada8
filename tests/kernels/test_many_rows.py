"""Steps of 17 to 64 rows: the twins of the operations for fewer, and the reference's logits.

On a CPU the kernels run in Triton's interpreter, on very small models.
"""

import copy

import pytest
import small
import torch
import torch.nn.functional as F
from test_decode_kernels import CLOSE, DEVICE, EPS, H, K, N, check, input_of, normal, poisoned
from test_decode_kernels import D as HIDDEN
from test_decode_kernels import F as INNER
from test_decode_kernels import V as VOCABULARY
from test_packed_decoder import assert_close, packed_model
from test_packed_kernels import random_planes

import mistral
from mistral_kernels.decode import many_rows
from mistral_kernels.decode.gate_up import gate_up_reference
from mistral_kernels.decode.head import head_reference
from mistral_kernels.decode.projection import project_reference
from mistral_kernels.decode.qkv import qkv_reference
from mistral_kernels.decode.step import DecodeStep
from mistral_kernels.decoder import Decoder
from mistral_kernels.packed.planes import FAST_KINDS

GREEDY = mistral.Sampling(temperature=0)
TINY = dict(
    vocab_size=16, eos_token_id=(0,), hidden_size=32, intermediate_size=32, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, num_hidden_layers=1,
)  # fmt: skip
# Q5_0 is unpacked at every step.
MIX = dict(v_proj="Q8_0", o_proj="Q5_0", down_proj="Q8_0", other="Q4_0")
# Products of 16-bit matrices are rounded twice: to the matrix's dtype, and in the result.
CLOSE_16 = {dtype: 2 * close for dtype, close in CLOSE.items()}


def forms(gemm, tiles, packed):
    """How a product is computed, for how many rows, in which dtype."""
    each = [("gemm", gemm, dtype) for dtype in (torch.float32, torch.float16)]
    each += [("tiles", tiles, torch.float32), ("Q4_0", packed, torch.float16)]
    on_gpu = [("gemm", gemm, torch.bfloat16), ("tiles", tiles, torch.bfloat16)]
    on_gpu += [(kind, rows, torch.float16) for kind in FAST_KINDS for rows in (17, 33, 64)]
    each += [pytest.param(*one, marks=pytest.mark.gpu) for one in on_gpu]
    return pytest.mark.parametrize(("how", "B", "dtype"), each)


def weight_of(how, rows, columns, dtype):
    if how in FAST_KINDS:
        return random_planes(how, rows, columns)
    return normal(rows, columns, dtype=dtype, scale=columns**-0.5)


def operation(name, how):
    """An operation, as its twin is called."""
    function = getattr(many_rows, name)
    return lambda *arguments: function(*arguments, keep_bits=how == "tiles")


@forms(gemm=17, tiles=17, packed=17)
def test_queries_are_rotated_and_keys_and_values_stored(how, B, dtype):
    x, sums = input_of(B, dtype)
    if how in FAST_KINDS:
        weight = tuple(weight_of(how, n * H, HIDDEN, dtype) for n in (N, K, K))
    else:
        weight = weight_of(how, (N + 2 * K) * H, HIDDEN, dtype)
    angles = normal(B, H // 2)
    slots = torch.arange(B, device=DEVICE) % 4
    slots[5] = 7  # an idle row
    rings = [normal(B, K, 8, H, dtype=dtype) for _ in range(2)]
    outputs = [poisoned(B, N, H, dtype=dtype), *rings]
    expected = [output.clone() for output in outputs]
    arguments = (angles.cos(), angles.sin(), slots)
    operation("qkv", how)(x, sums, weight, *arguments, *outputs, EPS, 2.0)
    qkv_reference(x, sums, weight, *arguments, *expected, EPS, 2.0)
    for ours, theirs in zip(outputs, expected):
        error = (ours.double() - theirs.double()).abs().max()
        assert error < CLOSE_16[dtype] * theirs.double().abs().max()


@forms(gemm=24, tiles=33, packed=17)
def test_projection_adds_to_the_residual_and_prepares_the_next_input(how, B, dtype):
    residual = torch.cat((normal(B, HIDDEN), torch.full((1, HIDDEN), torch.nan, device=DEVICE)))
    outputs = (residual[:B], poisoned(B, HIDDEN, dtype=dtype), poisoned(B, HIDDEN // 16))
    arguments = [normal(B, INNER, dtype=dtype), weight_of(how, HIDDEN, INNER, dtype)]
    arguments += [normal(HIDDEN, dtype=dtype), *outputs]
    check(operation("project", how), project_reference, arguments, (3, 4, 5), CLOSE_16[dtype])


@forms(gemm=33, tiles=17, packed=24)
def test_gate_up_is_swiglu_of_the_normalised_input(how, B, dtype):
    x, sums = input_of(B, dtype)
    if how in FAST_KINDS:
        weight = tuple(weight_of(how, INNER, HIDDEN, dtype) for _ in range(2))
    else:
        weight = weight_of(how, 2 * INNER, HIDDEN, dtype)
    arguments = [x, sums, weight, poisoned(B, INNER, dtype=dtype), EPS, 0.5]
    check(operation("gate_up", how), gate_up_reference, arguments, (3,), CLOSE_16[dtype])


@forms(gemm=17, tiles=64, packed=33)
def test_head_writes_the_logits_and_not_the_padding_of_their_rows(how, B, dtype):
    x, sums = input_of(B, dtype)
    weight = weight_of(how, VOCABULARY, HIDDEN, dtype)
    wide = torch.full((B, VOCABULARY + 3), torch.nan, device=DEVICE)
    wide[:, VOCABULARY:] = 7.0
    arguments = [x, sums, weight, wide, EPS, 2.0]
    check(operation("head", how), head_reference, arguments, (3,), CLOSE_16[dtype])
    assert (wide[:, VOCABULARY:] == 7.0).all()


def test_in_float16_large_inputs_do_not_make_products_infinite():
    """The sums of x would be: cuBLAS rounds them before they are divided by the norm."""
    x, sums = input_of(17, torch.float16)
    logits = poisoned(17, VOCABULARY)
    weight = normal(VOCABULARY, HIDDEN, dtype=torch.float16, scale=9.0)
    many_rows.head(x * 1000, sums * 1000**2, weight, logits, EPS)
    expected = torch.empty_like(logits)
    head_reference(x * 1000, sums * 1000**2, weight, expected, EPS)
    assert (logits - expected).abs().max() < 4e-3 * expected.abs().max()


def small_model(how, window=1):
    if how == "plain":
        return small.model(torch.float32, **TINY, sliding_window=window).to(DEVICE)
    return packed_model(MIX, **TINY, sliding_window=window)


LONG = [(B, how, 4) for B in (17, 24, 33, 64) for how in ("plain", "packed")]


@pytest.mark.parametrize(
    ("B", "how", "steps"),
    [
        (17, "plain", 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG),
    ],
)
def test_steps_give_the_references_logits_past_the_window_with_idle_rows(B, how, steps):
    model = small_model(how, window=steps // 2)
    engines = mistral.Decoder(copy.deepcopy(model), B), Decoder(model, B)
    for t in range(steps):
        ids = [[(7 * b + t) % 16] if t == 0 or (b + t) % 4 else [] for b in range(B)]
        for engine in engines:
            engine.prefill(ids)
    reference, fast = engines
    assert set(fast.lengths) == {steps - 1, steps}
    assert_close(fast.logits, reference.logits)


def test_all_doors_are_open_to_17_rows():
    """Chunks, samples, rewinds, copies, several rows' guesses and idle rows, in any order."""
    B = 17
    model = small_model("plain", window=2)
    engines = mistral.Decoder(copy.deepcopy(model), B, slack=4), Decoder(model, B, slack=4)
    some = [GREEDY if b % 3 else None for b in range(B)]
    for work in (
        lambda d: d.prefill([[1 + b % 9] * (1 + b % 3) for b in range(B)]),
        lambda d: d.step(GREEDY).tolist(),
        lambda d: d.step(some).tolist(),
        lambda d: d.rewind([b % 2 for b in range(B)]),
        lambda d: d.copy_row(4, 16, 2),
        lambda d: [len(one) for one in d.verify_rows([[3, 4]] + [[]] * 15 + [[5]])],
        lambda d: d.step(GREEDY).tolist(),
    ):
        assert work(engines[0]) == work(engines[1])
        assert engines[0].lengths == engines[1].lengths
    assert_close(engines[1].logits, engines[0].logits)


def test_a_row_of_a_step_has_the_same_bits_in_any_company(monkeypatch):
    """If they are asked for: no matrix is left to PyTorch, whose sums may be in any order."""
    monkeypatch.setattr(F, "linear", lambda *_: pytest.fail("a product by PyTorch"))
    model = small_model("plain")
    logits = []
    for others in (0, -1):
        step = DecodeStep(model, model.new_cache(17, slack=1))
        step.keep_bits = True
        step.tokens.copy_(small.tokens(17, 1, vocab_size=16)[:, 0])
        positions = torch.full((17,), others, device=DEVICE)
        positions[[0, 16]] = 0  # of the first pass, and of the last
        step.run(positions)
        logits.append(step.logits[[0, 16]])
    assert torch.equal(*logits)


@pytest.mark.parametrize("how", ["tiles", "Q4_0"])
def test_a_row_of_a_product_has_the_same_bits_in_any_company(how):
    dtype = torch.float32 if how == "tiles" else torch.float16
    weight = weight_of(how, 16, HIDDEN, dtype)
    x, sums = input_of(17, dtype)
    logits = []
    for others in (1.0, 3.0):
        x[1:16] *= others
        logits.append(poisoned(17, 16))
        many_rows.head(x, sums, weight, logits[-1], EPS, keep_bits=True)
    assert torch.equal(logits[0][[0, 16]], logits[1][[0, 16]])
    assert not torch.equal(logits[0][1], logits[1][1])


def test_bits_are_kept_if_they_are_asked_for():
    """The tiles are slower than a GEMM, so only then; each way has a CUDA graph of its own."""
    fast = Decoder(small_model("plain"), 17)
    names = []
    fast.works.run = lambda name, work: names.append((name, fast._step.keep_bits))
    for fast.rows_together in (True, False):
        fast.prefill([[3]] * 17)
    assert names == [("forward", False), ("forward, same bits", True)]


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["plain", "packed"])
def test_a_graph_gives_the_bits_of_single_launches(how):
    model = small_model(how, window=7).to(torch.bfloat16)
    texts = []
    for graph in (True, False):
        decoder = Decoder(model, 24, graph=graph)
        decoder.prefill([[b % 16] for b in range(24)])
        steps = [decoder.step(mistral.Sampling(seed=3)) for _ in range(20)]
        texts.append((torch.stack(steps), decoder.logits))
    assert all(torch.equal(*both) for both in zip(*texts))


def test_too_many_rows_are_named():
    model = small_model("plain")
    with pytest.raises(ValueError, match="batch of 65 rows: the decode kernels take 1 to 64"):
        Decoder(model, 65)
    with pytest.raises(ValueError, match="dependent launch is for 1 to 16 rows, not 17"):
        Decoder(model, 17, pdl=True)
