"""How far logits move by rounding, and how far by a mistake: where a test's tolerance has to lie.

A random model of three layers with sizes that all differ, the same on every machine; the largest
change of a logit.
"""

import copy

import style
import torch
from torch import Tensor

import mistral
from mistral import attention
from mistral.checkpoints.names import interleaved_rows, rotary_heads

SIZES = dict(
    vocab_size=101,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=4,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    eos_token_id=(2,),
)


def model(**changes) -> mistral.Mistral:
    """The model in float64; a change of the config leaves its weights as they are."""
    generator = torch.Generator().manual_seed(0)
    made = mistral.Mistral(mistral.Config(**{**SIZES, **changes})).double().requires_grad_(False)
    for name, weight in made.named_parameters():
        weight.copy_(
            torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.3
            + ("norm" in name)
        )
    return made


def in_the_files_order() -> mistral.Mistral:
    """With the rows of Q and K as files have them that pair neighbours."""
    made = model()
    for name, weight in made.named_parameters():
        if heads := rotary_heads(name, made.config) if "proj" in name else None:
            weight.copy_(weight[interleaved_rows(len(weight), heads)])
    return made


def with_mixed_groups() -> mistral.Mistral:
    """Query head n reads key/value head n mod K instead of n // G."""
    made, H, N, K = (
        model(),
        SIZES["head_dim"],
        SIZES["num_attention_heads"],
        SIZES["num_key_value_heads"],
    )
    heads = sorted(range(N), key=lambda n: (n % K, n))
    rows = torch.tensor(heads)[:, None] * H + torch.arange(H)
    for layer in made.model.layers:
        q, o = layer.self_attn.q_proj.weight, layer.self_attn.o_proj.weight
        q.copy_(q[rows.flatten()])
        o.copy_(o[:, rows.flatten()])
    return made


def in_chunks(model: mistral.Mistral, tokens: Tensor) -> Tensor:
    """The logits of a text that is read through the rolling cache, three tokens at a time."""
    cache = model.new_cache(1)
    return torch.cat([model(piece, cache) for piece in tokens.split(3, dim=1)], dim=1)


def spelled_out(model: mistral.Mistral, tokens: Tensor) -> Tensor:
    """The logits with attention as the formula has it, without PyTorch's fused kernels."""
    fused, attention.attend = attention.attend, attention.attend_explicit
    try:
        return model(tokens)
    finally:
        attention.attend = fused


@torch.inference_mode()
def data() -> dict:
    """The largest change of any logit: by rounding, and by mistakes."""
    right, tokens = (
        model(),
        torch.randint(3, 101, (1, 24), generator=torch.Generator().manual_seed(0)),
    )
    single, rounded = copy.deepcopy(right).float(), copy.deepcopy(right).bfloat16().double()
    expected = right(tokens)

    def change(logits: Tensor, expected: Tensor = expected) -> float:
        return (logits.double() - expected.double()).abs().max().item()

    return {
        "rounding": {
            "read in chunks, float64": change(in_chunks(right, tokens)),
            "read in chunks, float32": change(in_chunks(single, tokens), single(tokens)),
            "the other attention, float32": change(spelled_out(single, tokens), single(tokens)),
            "weights rounded to bfloat16": change(rounded(tokens)),
        },
        "mistakes": {
            "one key too many in the window": change(model(sliding_window=5)(tokens)),
            "rotary base of v0.2": change(model(rope_theta=1e6)(tokens)),
            "Q and K in the file's order": change(in_the_files_order()(tokens)),
            "heads grouped the other way": change(with_mixed_groups()(tokens)),
        },
    }


def draw(folder=style.FOLDER) -> None:
    numbers = data()
    figure, ax = style.start(3.0)
    names, row = [], 0
    for color, (kind, errors) in zip((style.BLUE, style.ORANGE), numbers.items()):
        for name, size in errors.items():
            ax.barh(
                -row,
                size,
                color=color,
                alpha=0.8,
                label=kind if name == next(iter(errors)) else None,
            )
            names.append(name)
            row += 1
    ax.set(
        xscale="log",
        xlim=(1e-16, 1e2),
        yticks=range(0, -row, -1),
        xlabel="largest change of a logit",
    )
    ax.set_yticklabels(names)
    ax.axvline(2e-5, color=style.INK, linestyle=":", linewidth=1)
    figure.legend(loc="outside upper center", ncols=2)
    style.save(figure, "sizes_of_errors", numbers, folder)
