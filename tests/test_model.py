import pytest
import small
import torch
import torch.nn.functional as F

import mistral


def test_parameters_have_hugging_faces_names():
    names = set(small.model().state_dict())
    assert names == {name for name, _ in small.model().named_parameters()}  # no frequencies
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= names
    assert {name for name in names if ".layers.2." in name} == {
        f"model.layers.2.{part}.weight"
        for part in (
            *("input_layernorm", "post_attention_layernorm"),
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        )
    }


def test_later_tokens_never_change_earlier_logits():
    model = small.model()
    tokens = small.tokens(3, 11)
    changed = tokens.clone()
    changed[:, 6:] = small.tokens(3, 5, seed=9)
    assert torch.equal(model(tokens)[:, :6], model(changed)[:, :6])
    assert not torch.equal(model(tokens)[:, 6:], model(changed)[:, 6:])


def test_the_window_reaches_w_minus_1_tokens_back_in_every_layer():
    # 3 layers with window 4: position p depends on p - 9 .. p.
    model = small.model()
    tokens = small.tokens(1, 20)
    changed = tokens.clone()
    changed[0, 5] = (tokens[0, 5] + 1) % 101
    differs = (model(tokens) != model(changed)).any(dim=-1)[0]
    assert differs.nonzero()[:, 0].tolist() == list(range(5, 5 + 3 * (4 - 1) + 1))


@pytest.mark.parametrize("with_cache", [False, True])
def test_last_only_gives_each_rows_last_real_position(with_cache):
    model = small.model()
    tokens = small.tokens(3, 11)
    cache = model.new_cache(3) if with_cache else None
    last = model(tokens, cache, lengths=[11, 4, 1], last_only=True)
    whole = model(tokens)
    assert last.shape == (3, 101)
    assert torch.allclose(last, whole[[0, 1, 2], [10, 3, 0]], atol=1e-12)
    assert torch.allclose(model(tokens, last_only=True), whole[:, -1], atol=1e-12)


def test_a_cached_prompt_gives_the_bits_of_an_uncached_one():
    for dtype in (torch.float32, torch.bfloat16):
        model = small.model(dtype)
        tokens = small.tokens(3, 11)
        assert torch.equal(model(tokens, model.new_cache(3)), model(tokens))
        assert torch.equal(model(tokens[:, :3], model.new_cache(3)), model(tokens[:, :3]))


def test_logits_and_cache_have_the_models_dtype():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        model = small.model(dtype)
        assert model(small.tokens(1, 5)).dtype == dtype
        assert model.new_cache(1).keys.dtype == dtype


def test_a_changed_dtype_keeps_the_rotary_angles():
    # Where the frequencies are a buffer of the module, .to(bfloat16) rounds them: an error of 0.15
    # in the logits.
    tokens = small.tokens(1, 50)
    there_and_back = small.model(torch.float32).to(torch.bfloat16)(tokens)
    made_so = small.model(torch.bfloat16)(tokens)
    assert torch.equal(there_and_back, made_so)


def test_a_tied_model_has_one_matrix():
    model = small.model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("shape", [(5,), (1, 0), (1, 1, 5)])
def test_tokens_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="tokens must be"):
        small.model()(torch.zeros(shape, dtype=torch.int64))


def test_arguments_without_a_meaning_are_refused():
    model = small.model()
    tokens = small.tokens(2, 3)
    with pytest.raises(ValueError, match="lengths says"):
        model(tokens, lengths=[3, 1])
    with pytest.raises(ValueError, match="the cache has 3 rows"):
        model(tokens, model.new_cache(3))


@pytest.mark.parametrize("lengths", [[4], [12, 1, 1], [-5, 1, 1]])
def test_impossible_lengths_are_refused_without_a_cache_too(lengths):
    with pytest.raises(ValueError, match="lengths"):
        small.model()(small.tokens(3, 11), lengths=lengths, last_only=True)


def test_a_cache_that_cannot_fit_is_refused_with_what_would():
    with pytest.raises(
        mistral.NotEnoughMemory, match=r"needs .* are free; \d+ positions, or \d+ rows, would fit"
    ):
        mistral.Decoder(small.model(sliding_window=None), 4, max_tokens=2**31)


def test_gradients_reach_every_parameter_and_match_finite_differences():
    model = small.model().requires_grad_(True)
    tokens = small.tokens(2, 9)
    F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name

    weight = model.model.layers[1].self_attn.k_proj.weight
    eps = 1e-6
    losses = []
    for step in (eps, -eps):
        with torch.no_grad():
            weight[3, 5] += step
            losses.append(
                F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            )
            weight[3, 5] -= step
    assert weight.grad[3, 5].item() == pytest.approx(
        (losses[0] - losses[1]).item() / (2 * eps), rel=1e-5
    )


def test_the_model_learns():
    model = small.model(torch.float32, sliding_window=8).requires_grad_(True)
    text = torch.arange(24).remainder(7)[None] + 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(text)[:, :-1].flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


def test_a_forward_traces_into_one_graph():
    model = small.model(torch.float32)
    tokens = small.tokens(2, 11)
    explained = torch._dynamo.explain(model)(tokens)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_tokens_may_be_int32():
    model = small.model()
    tokens = small.tokens(2, 5)
    assert torch.equal(model(tokens.int()), model(tokens))
