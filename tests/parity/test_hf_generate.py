"""Token for token what `transformers.generate` writes at the same seed."""

import pytest
import small
import torch

import mistral


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = small.save_hf(tmp_path_factory.mktemp("hf"), initializer_range=0.15, sliding_window=8)
    return small.load_pair(folder, torch.float32)


def theirs(model, prompts, seed, **arguments):
    """Left-padded, as transformers wants it; returns the new ids of each row up to its stop
    token.
    """
    longest = max(map(len, prompts))
    pads = [longest - len(p) for p in prompts]
    ids = torch.tensor([[0] * n + p for n, p in zip(pads, prompts)])
    mask = torch.tensor([[0] * n + [1] * len(p) for n, p in zip(pads, prompts)])
    torch.manual_seed(seed)
    output = model.generate(
        ids, attention_mask=mask, pad_token_id=0, max_new_tokens=50, **arguments
    )
    rows = [row[longest:].tolist() for row in output]
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows]


SETTINGS = [
    dict(),
    dict(temperature=0.7),
    dict(top_k=20),
    dict(top_p=0.8),
    dict(min_p=0.05),
    dict(typical_p=0.7),
    dict(repetition_penalty=1.4),
    dict(no_repeat_ngram_size=2),
    dict(temperature=1.3, top_k=50, top_p=0.95, min_p=0.01, typical_p=0.95, repetition_penalty=1.1),
]


@pytest.mark.parametrize("seed", small.seeds(1, 3))
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sampling_one_prompt(pair, settings, seed):
    ours, reference = pair
    prompt = small.tokens(5 + 7 * seed, seed=seed).tolist()
    expected = theirs(reference, [prompt], seed, do_sample=True, **{"top_k": 0} | settings)
    sampling = mistral.Sampling(seed=seed, **settings)
    assert list(mistral.generate(ours, prompt, sampling, max_new_tokens=50)) == expected[0]


@pytest.mark.parametrize(
    "settings", [dict(), dict(repetition_penalty=1.4), dict(no_repeat_ngram_size=2)], ids=str
)
def test_greedy_ragged_batch(pair, settings):
    ours, reference = pair
    prompts = [small.tokens(n, seed=n).tolist() for n in (3, 17, 8)]
    expected = theirs(reference, prompts, 0, do_sample=False, **settings)
    sampling = mistral.Sampling(temperature=0.0, **settings)
    assert mistral.generate_batch(ours, prompts, sampling, max_new_tokens=50) == expected


def test_sampling_a_ragged_batch_from_one_generator(pair):
    ours, reference = pair
    prompts = [small.tokens(n, seed=n).tolist() for n in (3, 17, 8)]
    for seed in range(3):
        expected = theirs(reference, prompts, seed, do_sample=True, top_k=0, top_p=0.9)
        sampling = mistral.Sampling(seed=seed, top_p=0.9)
        assert mistral.generate_batch(ours, prompts, sampling, max_new_tokens=50) == expected
