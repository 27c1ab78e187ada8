"""Each decode kernel against its plain twin: unequal sizes, odd batches, poisoned outputs,
untouched neighbours.

On a CPU the kernels run in Triton's interpreter, in float32 and float16; `pytest -m gpu` runs the
same in bfloat16 too.
"""

import copy
import math

import pytest
import small
import torch

from mistral.attention import attend_explicit
from mistral.rotary import rotate
from mistral_kernels.decode.attention import (
    Partials,
    attend,
    attend_reference,
    launch,
    num_splits,
)
from mistral_kernels.decode.embed import embed, embed_reference
from mistral_kernels.decode.gate_up import gate_up, gate_up_reference
from mistral_kernels.decode.head import head, head_reference
from mistral_kernels.decode.matvec import scaled_norm
from mistral_kernels.decode.projection import project, project_reference
from mistral_kernels.decode.qkv import qkv, qkv_reference
from mistral_kernels.decode.step import REFERENCES, DecodeStep, Operations
from mistral_kernels.portable import activation, arch_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# The interpreter launches nothing early, but runs the kernel that would be.
HAS_PDL = DEVICE == "cpu" or (9, 0) <= torch.cuda.get_device_capability() < (12, 0)
EPS = 0.5  # large beside the squares: another number in its place shows
D = 96
F = 160
N = 6
K = 2
H = 16
V = 45  # no two sizes equal; V is not a multiple of a tile
CLOSE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def normal(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def poisoned(*shape, dtype=torch.float32):
    """NaN everywhere, with one extra row: `check` sees whether a kernel writes into it."""
    return torch.full((shape[0] + 1, *shape[1:]), math.nan, dtype=dtype, device=DEVICE)[:-1]


def check(launcher, twin, arguments, outputs, close=None):
    """Run both on the same data; the outputs (by position) must be close, all other tensors as they
    were.

    close  how close; None: as their dtype lets us expect
    """
    guards = {i: whole(arguments[i]) for i in outputs}
    theirs = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    inputs = {
        i: a.clone()
        for i, a in enumerate(arguments)
        if isinstance(a, torch.Tensor) and i not in outputs
    }
    launcher(*arguments)
    twin(*theirs)
    for i in outputs:
        assert_close(arguments[i], theirs[i], close)
        beyond = guards[i][arguments[i].shape[0] :]
        assert beyond.isnan().all(), f"argument {i} was written beyond its end"
    for i, before in inputs.items():
        assert torch.equal(arguments[i], before), f"argument {i} is an input and was changed"


def whole(tensor):
    """The buffer that a `poisoned` tensor is the beginning of."""
    return tensor if tensor._base is None else tensor._base


def assert_close(ours, twin, close=None):
    assert ours.isfinite().all()
    error = (ours.double() - twin.double()).abs().max() / twin.double().abs().max().clamp(min=1.0)
    assert error < (close or CLOSE[ours.dtype if ours.is_floating_point() else torch.float32])


def input_of(B, dtype):
    """x and sums as a producer leaves them: x = residual * norm, un-normalised."""
    residual = normal(B, D, scale=3.0)
    x = (residual * (torch.rand(D, device=DEVICE) + 0.5)).to(dtype)
    return x, residual.square().unflatten(-1, (-1, 16)).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "columns"), [(3, F), (1, 64), (13, 32), (8, 256)])
def test_projection_adds_to_the_residual_and_prepares_the_next_input(B, columns, dtype):
    weight = normal(D, columns, dtype=dtype, scale=columns**-0.5)
    norm = normal(D, dtype=dtype)
    residual = torch.cat((normal(B, D), torch.full((1, D), math.nan, device=DEVICE)))[:B]
    outputs = (residual, poisoned(B, D, dtype=dtype), poisoned(B, D // 16))
    check(
        project,
        project_reference,
        [normal(B, columns, dtype=dtype), weight, norm, *outputs],
        (3, 4, 5),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [3, 9])
def test_gate_up_is_swiglu_of_the_normalised_input(B, dtype):
    x, sums = input_of(B, dtype)
    weight = normal(2 * F, D, dtype=dtype, scale=D**-0.5)
    check(
        gate_up, gate_up_reference, [x, sums, weight, poisoned(B, F, dtype=dtype), EPS, 0.5], (3,)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [3, 16])
def test_head_scores_a_vocabulary_that_is_no_multiple_of_a_tile(B, dtype):
    x, sums = input_of(B, dtype)
    weight = normal(V, D, dtype=dtype, scale=D**-0.5)
    check(head, head_reference, [x, sums, weight, poisoned(B, V), EPS, 2.0], (3,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_begins_a_step(dtype):
    B = 3
    S = 5
    tokens = torch.tensor([44, 0, 7], device=DEVICE)
    positions = torch.tensor([4097, -1, 3], device=DEVICE)
    table = normal(V, D, dtype=dtype)
    norm = normal(D, dtype=dtype)
    frequencies = torch.rand(H // 2, device=DEVICE)
    residual = poisoned(B, D)
    x = poisoned(B, D, dtype=dtype)
    sums = poisoned(B, D // 16)
    cos = poisoned(B, H // 2)
    sin = poisoned(B, H // 2)
    slots = torch.full((B,), 99, device=DEVICE)
    arguments = [tokens, positions, table, norm, frequencies, residual, x, sums, cos, sin]
    check(
        lambda *a: embed(*a, slots, S, 1.25),
        lambda *a: embed_reference(*a, slots.clone(), S, 1.25),
        arguments,
        (5, 6, 7, 8, 9),
    )
    assert slots.tolist() == [4097 % S, S, 3]  # the row that takes no part writes into the bin


@pytest.mark.parametrize("scaling", [None, small.YARN])
def test_embed_turns_by_the_angles_of_the_model(scaling):
    model = small.model(torch.float32, hidden_size=D, head_dim=H, rope_scaling=scaling)
    positions = torch.tensor([0, 1, 511, 32767], device=DEVICE)
    cos = poisoned(4, H // 2)
    sin = poisoned(4, H // 2)
    scratch = [poisoned(4, D), poisoned(4, D), poisoned(4, D // 16)]
    rotary = model.model.rotary
    frequencies = rotary.frequencies.to(DEVICE)
    table = model.model.embed_tokens.weight.to(DEVICE)
    norm = model.model.norm.weight.to(DEVICE)
    written = (*scratch, cos, sin, positions.clone())
    read = (positions % 7, positions, table, norm, frequencies)
    embed(*read, *written, 8, rotary.attention_factor)
    for ours, theirs in zip((cos, sin), rotary(positions.cpu()[:, None], torch.float32)):
        assert torch.allclose(ours.cpu(), theirs[:, 0, 0, : H // 2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_qkv_writes_one_slot_of_each_row_and_leaves_the_others(dtype):
    B = 3
    S = 7
    x, sums = input_of(B, dtype)
    weight = normal((N + 2 * K) * H, D, dtype=dtype, scale=D**-0.5)
    angles = normal(B, H // 2) * 9
    slots = torch.tensor([3, S, 0], device=DEVICE)
    keys = normal(B, K, S + 1, H, dtype=dtype)
    values = normal(B, K, S + 1, H, dtype=dtype)
    before = (keys.clone(), values.clone())
    q = poisoned(B, N, H, dtype=dtype)
    arguments = [x, sums, weight, angles.cos(), angles.sin(), slots, q]
    check(
        lambda *a: qkv(*a, keys, values, EPS),
        lambda *a: qkv_reference(*a, *before, EPS),
        arguments,
        (6,),
    )
    for ours, twin in zip((keys, values), before):
        assert_close(ours, twin)
        others = torch.ones(B, S + 1, dtype=torch.bool, device=DEVICE)
        others[torch.arange(B), slots] = False
        assert torch.equal(ours.transpose(1, 2)[others], twin.transpose(1, 2)[others])


def test_qkv_turns_pairs_as_the_model_does():
    B = 2
    S = 4
    x, sums = input_of(B, torch.float32)
    weight = normal((N + 2 * K) * H, D, scale=D**-0.5)
    angles = normal(B, H // 2)
    keys = normal(B, K, S + 1, H)
    values = normal(B, K, S + 1, H)
    q = poisoned(B, N, H)
    qkv(
        x,
        sums,
        weight,
        angles.cos(),
        angles.sin(),
        torch.tensor([1, 2], device=DEVICE),
        q,
        keys,
        values,
        EPS,
    )
    straight = x @ weight.T * torch.rsqrt(sums.sum(-1, keepdim=True) / D + EPS)
    straight = straight.view(B, N + 2 * K, 1, H)
    angles = torch.cat((angles, angles), dim=-1)[:, None, None]
    turned = rotate(straight, angles.cos(), angles.sin())[:, :, 0]
    assert_close(q, turned[:, :N])
    assert_close(torch.stack((keys[0, :, 1], keys[1, :, 2])), turned[:, N : N + K])
    assert_close(torch.stack((values[0, :, 1], values[1, :, 2])), straight[:, N + K :, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("positions", "window"),
    [
        ([0, 1, 63], None),  # the first tokens; a block of keys, exactly
        ([69, 64, -1], None),  # a full ring; a block and one; a row that takes no part
        ([700, 69, 70], 64),  # wrapped, with slack; not wrapped; just wrapped
        ([139, 5, 104], 3),  # a window at both ends of the ring
    ],
)
def test_attention_sees_the_window_and_nothing_else(positions, window, dtype):
    B = 3
    S = 70
    keys = normal(B, K, S + 1, H, dtype=dtype)
    values = normal(B, K, S + 1, H, dtype=dtype)
    dead = torch.ones(B, S + 1, dtype=torch.bool)
    for b, position in enumerate(positions):
        for p in range(max(0, position + 1 - min(window or S, S)), position + 1):
            dead[b, p % S] = False
    q = normal(B, N, H, dtype=dtype)
    positions = torch.tensor(positions, device=DEVICE)
    clean = (keys.clone(), values.clone())
    for cache in (keys, values):
        cache.transpose(1, 2)[dead.to(DEVICE)] = math.nan  # read any of these, and the sum is NaN
    twin = poisoned(B, N * H, dtype=dtype)
    attend_reference(q, *clean, positions, twin, None, S, window)
    # In one part there are two blocks, the second of which is short.
    for pdl, splits in ((False, 2), (True, 2), (True, 1)) if HAS_PDL else ((False, 2),):
        y = poisoned(B, N * H, dtype=dtype)
        partials = parts(B, splits)
        attend(q, keys, values, positions, y, partials, S, window, pdl=pdl)
        assert_close(y, twin)
        assert whole(y)[B:].isnan().all()
        assert not y[positions < 0].any()
        assert not partials.counters.any()


def parts(B, splits):
    """Room for few parts, whatever the batch: the interpreter takes a while for each."""
    partials = Partials(B, N, K, H, DEVICE, splits=splits)
    for tensor in (partials.outputs, partials.stats):
        tensor.fill_(math.nan)
    return partials


def test_attention_again_has_the_same_bits():
    B = 1
    S = 70
    keys = normal(B, K, S + 1, H)
    values = normal(B, K, S + 1, H)
    q = normal(B, N, H)
    partials = Partials(B, N, K, H, DEVICE)
    results = [poisoned(B, N * H), poisoned(B, N * H)]
    for y in results:
        attend(q, keys, values, torch.tensor([500], device=DEVICE), y, partials, S, None)
    assert partials.splits == 16
    assert torch.equal(*results)
    # Without a window a ring that has wrapped is seen once, and all of it.
    twin = poisoned(B, N * H)
    positions = torch.tensor([500], device=DEVICE)
    attend_reference(q, keys, values, positions, twin, None, S, None)
    assert_close(results[0], twin)


def test_attention_agrees_with_the_rolling_cache_of_the_model():
    B = 2
    S = 9
    W = 6
    config = small.config(
        num_hidden_layers=1,
        num_attention_heads=N,
        num_key_value_heads=K,
        head_dim=H,
        sliding_window=W,
    )
    model = small.mistral.Mistral(config)
    cache = model.new_cache(B, slack=S - W)
    partials = parts(B, 2)
    for step in range(26):
        q = torch.randn(B, N, 1, H)
        k = torch.randn(B, K, 1, H)
        v = torch.randn(B, K, 1, H)
        plan = cache.plan(1, [1, step % 3 > 0])  # a row that falls behind
        cache.begin(plan)
        seen = cache.layer(0, plan).update(k, v)
        mask = (
            plan.mask
            if plan.mask is not None
            else torch.ones(B, 1, 1, seen[0].shape[2], dtype=torch.bool)
        )
        if step in (3, 18, 25) and step % 3 > 0:
            y = poisoned(B, N * H)
            layer = (cache.keys[0].to(DEVICE), cache.values[0].to(DEVICE))
            attend(
                q[:, :, 0].to(DEVICE), *layer, plan.positions[:, 0].to(DEVICE), y, partials, S, W
            )
            assert_close(y.cpu(), attend_explicit(q, *seen, mask).transpose(1, 2).reshape(B, -1))
        cache.commit(plan)
        if step == 20:
            cache.rewind(2)


def test_keys_are_cut_into_as_many_parts_as_the_gpu_has_room_for():
    assert [num_splits(B, 8) for B in (1, 2, 3, 4, 8, 9, 16)] == [16, 16, 8, 8, 4, 2, 2]
    assert num_splits(3, 11) == 8  # exactly two for each multiprocessor


@pytest.mark.parametrize("launchers", ["kernels", "twins"])
def test_a_step_is_the_models_forward(launchers):
    model = small.model(
        torch.float32, hidden_size=64, head_dim=16, intermediate_size=96, num_hidden_layers=2
    )
    cache = model.new_cache(3, slack=2)
    steps = 2 if launchers == "kernels" else 30
    prompt = small.tokens(3, 11)
    new = small.tokens(3, steps, seed=1)
    model(prompt, cache, [11, 2, 5])  # past the window of 4; within it; just past
    expected_cache = model.new_cache(3, slack=2)
    model(prompt, expected_cache, [11, 2, 5])
    step = make_step(model, cache, *STEPS[launchers])
    for t in range(steps):
        expected = model(new[:, t : t + 1], expected_cache, last_only=True)
        logits = step(new[:, t], torch.tensor([11 + t, 2 + t, 5 + t]))
        assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


def test_a_step_with_heads_of_128_is_the_models_forward():
    """The head size of a 7B: a head takes 8 CTAs of `qkv`, and 64 pairs have an angle."""
    sizes = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=128, num_hidden_layers=1)
    model = small.model(torch.float32, hidden_size=32, intermediate_size=32, **sizes)
    cache = model.new_cache(2, slack=2)
    tokens = small.tokens(2, 7)
    model(tokens[:, :5], cache)
    step = make_step(model, cache, *STEPS["kernels"])
    for t in (5, 6):
        logits = step(tokens[:, t], torch.tensor([t, t]))
        expected = model(tokens[:, : t + 1], last_only=True)
        assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


def test_only_the_kernels_after_the_first_are_launched_early():
    """The twins do not know `pdl`: it is passed only if it is on, and refused together with them."""
    sizes = dict(hidden_size=D, intermediate_size=F, num_attention_heads=N, head_dim=H)
    model = small.model(torch.float32, num_hidden_layers=1, **sizes)
    early = {}

    def recorder(name):
        def operation(*arguments, **options):
            early[name] = options
            getattr(REFERENCES, name)(*arguments)

        return operation

    operations = Operations(*map(recorder, Operations._fields))
    for pdl, expected in ((False, {}), (True, {"pdl": True})):
        step = DecodeStep(model, model.new_cache(1, slack=1), operations, pdl)
        step.run(torch.zeros(1, dtype=torch.int64))
        assert early.pop("embed") == {}
        assert early == dict.fromkeys(("qkv", "attend", "project", "gate_up", "head"), expected)
    with pytest.raises(ValueError, match="plain twins launch none"):
        DecodeStep(model, model.new_cache(1, slack=1), REFERENCES, pdl=True)


STEPS = {
    "kernels": (embed, qkv, attend, project, gate_up, head),
    "twins": (
        embed_reference,
        qkv_reference,
        attend_reference,
        project_reference,
        gate_up_reference,
        head_reference,
    ),
}


def make_step(model, cache, embed, qkv, attend, project, gate_up, head):
    """The step of an engine, in as few lines as it can be written."""
    model = copy.deepcopy(model).to(DEVICE)
    keys = cache.keys.to(DEVICE)
    values = cache.values.to(DEVICE)
    c = model.config
    layers = model.model.layers
    B = cache.batch_size
    dtype = model.dtype
    D = c.hidden_size
    N = c.num_attention_heads
    H = c.head_dim
    norms = [
        scaled_norm(n.weight)
        for layer in layers
        for n in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    norms.append(scaled_norm(model.model.norm.weight))
    attention = [layer.self_attn for layer in layers]
    fused = [torch.cat((a.q_proj.weight, a.k_proj.weight, a.v_proj.weight)) for a in attention]
    both = [torch.cat((layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)) for layer in layers]
    x = poisoned(B, D, dtype=dtype)
    sums = poisoned(B, D // 16)
    residual = poisoned(B, D)
    cos = poisoned(B, H // 2)
    sin = poisoned(B, H // 2)
    slots = torch.zeros(B, dtype=torch.int64, device=DEVICE)
    q = poisoned(B, N, H, dtype=dtype)
    y = poisoned(B, N * H, dtype=dtype)
    h = poisoned(B, c.intermediate_size, dtype=dtype)
    logits = poisoned(B, c.vocab_size)
    partials = Partials(B, N, c.num_key_value_heads, H, DEVICE, splits=1)
    eps = c.rms_norm_eps

    def step(tokens, positions):
        tokens = tokens.to(DEVICE).contiguous()
        positions = positions.to(DEVICE)
        start = (model.model.embed_tokens.weight, norms[0][0], model.model.rotary.frequencies)
        embed(tokens, positions, *start, residual, x, sums, cos, sin, slots, cache.num_slots)
        for i, layer in enumerate(layers):
            qkv(x, sums, fused[i], cos, sin, slots, q, keys[i], values[i], eps, norms[2 * i][1])
            attend(q, keys[i], values[i], positions, y, partials, cache.num_slots, c.sliding_window)
            project(y, attention[i].o_proj.weight, norms[2 * i + 1][0], residual, x, sums)
            gate_up(x, sums, both[i], h, eps, norms[2 * i + 1][1])
            project(h, layer.mlp.down_proj.weight, norms[2 * i + 2][0], residual, x, sums)
        head(x, sums, model.lm_head.weight, logits, eps, norms[-1][1])
        return logits.cpu()

    return step


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("B", [1, 3, 16])
def test_kernels_of_a_7b_on_a_gpu(B, pdl):
    if pdl and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    D = 4096
    F = 14336
    N = 32
    K = 8
    H = 128
    V = 32002
    S = 4112
    dtype = torch.bfloat16
    x = normal(B, D, dtype=dtype)
    sums = torch.rand(B, D // 16, device=DEVICE) * 32
    weight = normal(2 * F, D, dtype=dtype, scale=D**-0.5)
    h = poisoned(B, F, dtype=dtype)
    check(bound(gate_up, pdl), gate_up_reference, [x, sums, weight, h, EPS, 1.0], (3,))
    outputs = (normal(B, D), poisoned(B, D, dtype=dtype), poisoned(B, D // 16))
    weight = normal(D, F, dtype=dtype, scale=F**-0.5)
    norm = normal(D, dtype=dtype)
    check(
        bound(project, pdl),
        project_reference,
        [normal(B, F, dtype=dtype), weight, norm, *outputs],
        (3, 4, 5),
    )
    weight = normal(V, D, dtype=dtype, scale=D**-0.5)
    check(bound(head, pdl), head_reference, [x, sums, weight, poisoned(B, V), EPS, 1.0], (3,))
    cache = [normal(B, K, S + 1, H, dtype=dtype) for _ in range(2)]
    positions = torch.arange(B, device=DEVICE) * 700
    q = normal(B, N, H, dtype=dtype)
    y = poisoned(B, N * H, dtype=dtype)
    arguments = [q, *cache, positions, y, Partials(B, N, K, H, DEVICE), S, 4096]
    check(bound(attend, pdl), attend_reference, arguments, (4,))


def bound(launcher, pdl):
    """A launcher whose kernel may start before the previous one has ended."""
    return lambda *arguments: launcher(*arguments, pdl=pdl)


def test_half_precision_stops_at_its_largest_number_and_keeps_nan():
    x = torch.ones(1, 32, device=DEVICE).half()
    sums = torch.full((1, 2), 16.0, device=DEVICE)
    weight = torch.full((64, 32), 20.0, device=DEVICE).half()  # g = u = 640, h = 409,600
    h = poisoned(1, 32, dtype=torch.float16)
    gate_up(x, sums, weight, h, EPS)
    assert (h == 65504).all()
    weight[32] = math.nan
    gate_up(x, sums, weight, h, EPS)
    assert h[0].isnan().nonzero().flatten().tolist() == [0]


def test_tiny_norm_weights_keep_their_digits_in_half_precision():
    weight = torch.tensor([3e-5, -1.7e-4, 1e-6]).half()
    scaled, gain = scaled_norm(weight)
    assert torch.equal(scaled.double() / gain, weight.double())
    assert 1 <= scaled.abs().max() < 2
    for dtype in (torch.bfloat16, torch.float32):
        same, gain = scaled_norm(weight.to(dtype))
        assert same.dtype == dtype
        assert gain == 1
    assert scaled_norm(torch.zeros(3).half())[1] == 1


def test_what_the_kernels_cannot_do_is_named():
    def projection(B=1, D=32, columns=32, dtype=torch.float32):
        x = torch.zeros(B, D, device=DEVICE, dtype=dtype)
        y = torch.zeros(B, columns, device=DEVICE, dtype=dtype)
        weight = x.new_zeros(D, columns)
        project(y, weight, x[0], x.float(), x, torch.zeros(B, max(D // 16, 1), device=DEVICE))

    with pytest.raises(
        ValueError, match="hidden_size is 40; the decode kernels need a multiple of 32"
    ):
        projection(D=40)
    with pytest.raises(ValueError, match="projection's input is 48"):
        projection(columns=48)
    with pytest.raises(ValueError, match="batch of 17 rows: a pass over the weights takes 1 to 16"):
        projection(B=17)
    with pytest.raises(
        ValueError, match="float64: the decode kernels take bfloat16, float16 and float32"
    ):
        projection(dtype=torch.float64)
    x, sums = input_of(1, torch.float32)
    with pytest.raises(ValueError, match="intermediate_size is 40"):
        gate_up(x, sums, normal(80, D), normal(1, 40), EPS)
    cache = normal(1, K, 8, 48)
    with pytest.raises(
        ValueError, match="head_dim is 48; the decode kernels need 16, 32, 64, 128 or 256"
    ):
        attend(
            normal(1, N, 48),
            cache,
            cache,
            torch.tensor([1]),
            normal(1, N * 48),
            Partials(1, N, K, 48, "cpu"),
            7,
            4,
        )


def test_tensors_with_gaps_are_refused():
    x, sums = input_of(1, torch.float32)
    with pytest.raises(ValueError, match=r"weight \[45, 96\] must be contiguous"):
        head(x, sums, normal(D, V).T, normal(1, V), EPS)


def test_without_a_gpu_the_message_says_what_is_needed(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="need a CUDA GPU, not cpu"):
        head(torch.zeros(1, 32), torch.zeros(1, 2), torch.zeros(16, 32), torch.zeros(1, 16), EPS)


def test_more_than_16_query_heads_of_a_key_value_head_are_refused():
    assert launch(1, 32, 2, 16, torch.float32, 0).constants["G"] == 16
    with pytest.raises(ValueError, match="17 query heads share a key/value head"):
        launch(1, 34, 2, 16, torch.float32, 0)


def test_large_heads_are_not_loaded_ahead():
    """64 keys and values would take more registers than there are."""
    for H, dtype, wanted in ((128, torch.float16, True), (256, torch.float16, False)):
        assert launch(1, 32, 8, H, dtype, 90, ahead=True).constants["AHEAD"] is wanted
    assert not launch(1, 32, 8, 128, torch.float32, 90, ahead=True).constants["AHEAD"]
    assert not launch(1, 32, 8, 128, torch.float16, 90).constants["AHEAD"]


def test_twins_stop_at_the_largest_half_of_either_sign():
    x = torch.tensor([-1e6, -7.0, 1e6])
    assert activation(x, torch.float16).tolist() == [-65504.0, -7.0, 65504.0]
    assert torch.equal(activation(x, torch.float32), x)


def test_a_gpu_of_compute_capability_12_is_like_an_older_one():
    capabilities = (80, 86, 89, 90, 100, 110, 120, 121)
    assert [arch_for(one) for one in capabilities] == [80, 80, 80, 90, 90, 90, 80, 80]
