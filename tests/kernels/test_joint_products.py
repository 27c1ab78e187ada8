"""One product for Q, K and V of a chunk, and one for gate and up, of the model's own parameters.

The kernels between the products are their plain twins here: test_prefill_kernel.py has them.
"""

import copy

import pytest
import small
import torch
from test_packed_decoder import PLAIN, packed_model
from torch import nn

from mistral_kernels.decode.step import DecodeStep
from mistral_kernels.packed.dequantize import unpack_reference
from mistral_kernels.packed.joint_linear import joint_linear_reference
from mistral_kernels.packed.short_linear import scale_rows_reference, short_linear_reference
from mistral_kernels.prefill import chunk, pointwise
from mistral_kernels.prefill.attention import attend_chunk_reference
from mistral_kernels.prefill.short_attention import attend_short_reference
from mistral_kernels.weights import already_stacked, weights_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D = 32
F = 48
QKV = (64 + 32 + 32, D)
APART = [(64, D), (32, D), (32, D)]
REST = [(D, 64), (2 * F, D), (D, F)]
SIZES = dict(
    hidden_size=D, intermediate_size=F, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_hidden_layers=2, sliding_window=5,
)  # fmt: skip
HEAD = (small.SIZES["vocab_size"], D)


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """The shapes of the matrices that were multiplied since they were asked for last."""
    shapes = []
    linear = nn.functional.linear

    def counted(x, weight, bias=None):
        shapes.append(tuple(weight.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    twins = {name: getattr(pointwise, f"{name}_reference") for name in
             ("rotate_chunk", "store_chunk", "swiglu")}  # fmt: skip
    twins |= dict(attend_chunk=attend_chunk_reference, attend_short=attend_short_reference)
    twins |= dict(scale_rows=scale_rows_reference, short_linear=short_linear_reference)
    twins |= dict(joint_linear=joint_linear_reference)
    for name, twin in twins.items():
        monkeypatch.setattr(chunk, name, twin)

    def since_last():
        new = list(shapes)
        shapes.clear()
        return new

    return since_last


def stacked_model(**changes):
    """A model whose parameters are views of the kernels' matrices."""
    model = small.model(torch.float32, **SIZES | changes).to(DEVICE)
    weights_of(model)
    return model


def read(model, T=9, workspace=None):
    """Three rows, far beyond the window of 5: the logits at all positions of two chunks."""
    cache = model.new_cache(3, slack=1)
    rows = small.tokens(3, T + 2, vocab_size=model.config.vocab_size).to(DEVICE)
    return torch.cat(
        [
            chunk.read_chunk(model, rows[:, :T], cache, None, workspace, last_only=False),
            chunk.read_chunk(model, rows[:, T:], cache, None, workspace, last_only=False),
        ],
        dim=1,
    )


def assert_as_the_model(model, T=9):
    rows = small.tokens(3, T + 2, vocab_size=model.config.vocab_size).to(DEVICE)
    expected = model(rows)
    ours = read(model, T)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_layer_of_a_decoders_model_has_four_products(products):
    model = stacked_model()
    assert_as_the_model(model)
    products()
    read(model)
    assert products() == 2 * (2 * [QKV, *REST] + [HEAD])


def test_a_model_that_no_decoder_has_seen_has_seven(products):
    model = small.model(torch.float32, **SIZES).to(DEVICE)
    read(model)
    assert products()[:7] == [*APART, (D, 64), (F, D), (F, D), (D, F)]
    assert_as_the_model(model)


class Adapter(nn.Module):
    """What PEFT puts in the place of a layer, in short."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.low = nn.Linear(D, 2, bias=False)
        self.high = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.high(self.low(x))


def adapter(model, attention):
    attention.q_proj = Adapter(attention.q_proj).to(DEVICE).requires_grad_(False)


def hook(model, attention):
    attention.k_proj.register_forward_hook(lambda module, inputs, out: out * 2)


def bias(model, attention):
    attention.v_proj.bias = nn.Parameter(torch.ones(32, device=DEVICE))


def parametrization(model, attention):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(attention.v_proj, "weight", Twice())


def forward_method(model, attention):
    linear = attention.v_proj
    linear.forward = lambda x: nn.functional.linear(x, linear.weight) + 1


@pytest.mark.parametrize("attach", [adapter, hook, bias, parametrization, forward_method])
def test_a_layer_to_which_something_is_attached_computes_for_itself(attach, products):
    model = stacked_model()
    before = read(model)
    attach(model, model.model.layers[0].self_attn)
    assert_as_the_model(model)
    assert (read(model) - before).abs().max() > 1e-2
    products()
    read(model)
    made = products()
    assert made.count(QKV) == 2  # of the other layer, in two chunks
    assert made.count((2 * F, D)) == 4


def test_a_hook_on_all_modules_is_called_for_each(products):
    model = stacked_model()
    called = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append(module)
    )
    try:
        read(model)
    finally:
        handle.remove()
    assert model.model.layers[1].self_attn.k_proj in called
    assert QKV not in products()


def test_what_changes_in_place_is_seen(products):
    model = stacked_model()
    other = small.model(torch.float32, seed=7, **SIZES).to(DEVICE)
    model.load_state_dict(other.state_dict())
    assert (read(model) - read(other)).abs().max() < 1e-4
    products()
    assert_as_the_model(model)
    assert QKV in products()


def test_a_step_of_training_is_seen():
    model = stacked_model().requires_grad_(True)
    before = read(model)
    model(small.tokens(1, 6).to(DEVICE)).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad.sign()
    assert_as_the_model(model)
    assert (read(model) - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: model.to(torch.float64).to(torch.float32),
        lambda model: (
            model.load_state_dict(copy.deepcopy(model).state_dict(), assign=True) and model
        ),
    ],
    ids=["copied", "moved", "assigned"],
)
def test_weights_that_were_replaced_are_multiplied_one_by_one(change, products):
    model = stacked_model()
    model = change(model)
    attention = model.model.layers[0].self_attn
    assert already_stacked([attention.q_proj, attention.k_proj, attention.v_proj]) is None
    assert_as_the_model(model)
    products()
    read(model)
    assert products()[:3] == APART


def test_one_weight_that_was_replaced_is_enough(products):
    model = stacked_model()
    attention = model.model.layers[1].self_attn
    attention.k_proj.weight = nn.Parameter(torch.randn(32, D, device=DEVICE))
    assert_as_the_model(model)
    products()
    read(model)
    assert products().count(QKV) == 2


def test_a_saved_model_has_every_weight_once(tmp_path):
    model = stacked_model()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "model.pt").stat().st_size < 4 * numbers + 20_000
    loaded = torch.load(tmp_path / "model.pt")
    assert all(torch.equal(loaded[name], own) for name, own in model.state_dict().items())


def test_neighbours_in_memory_are_one_only_if_they_are_views_of_one():
    one, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    memory = torch.zeros(8)
    one.weight.data, other.weight.data = memory[:4].view(2, 2), memory[4:].view(2, 2)
    assert already_stacked([one, other]).shape == (4, 2)
    assert already_stacked([other, one]) is None
    apart = memory.numpy()[4:]  # the same place, and PyTorch does not know it
    other.weight.data = torch.from_numpy(apart).view(2, 2)
    assert already_stacked([one, other]) is None


@pytest.mark.parametrize(
    ("F", "T", "kinds", "shapes"),
    [
        # The memory holds the largest matrix of a layer: one of the MLP, or Q alone.
        (64, 65, {}, [(64, 32), (32, 32), (64, 32), (64, 32), (32, 64)]),
        (32, 65, {}, [(32, 32), (16, 32), (16, 32), (32, 32), (32, 32), (32, 32), (32, 32)]),
        (64, 9, {}, []),  # multiplied as they are
        # Without kernels they are unpacked for a step as well, all that it multiplies at once.
        (64, 9, dict(q_proj="Q5_0", k_proj="Q5_0", v_proj="Q5_0"), [(64, 32)]),
    ],
)
def test_packed_matrices_share_a_product_if_their_memory_holds_them(F, T, kinds, shapes, products):
    sizes = dict(
        hidden_size=32, intermediate_size=F, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=16, eos_token_id=(0,),
    )  # fmt: skip
    model = packed_model(dict(other="Q4_0") | kinds, **sizes)
    rows = small.tokens(1, T, vocab_size=16).to(DEVICE)
    expected = copy.deepcopy(model)(rows)
    workspace = DecodeStep(model, model.new_cache(1, slack=1)).workspace
    if PLAIN:
        workspace._unpack = unpack_reference
    products()
    cache = model.new_cache(1, slack=1)
    ours = chunk.read_chunk(model, rows, cache, None, workspace, last_only=False)
    head = [(16, 32)] if T > 64 else []
    assert products() == shapes * model.config.num_hidden_layers + head
    assert (ours - expected).abs().max() < 1e-3 * expected.abs().max()
