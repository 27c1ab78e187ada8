"""The models that are measured, of random weights, and the least that a step of them must cost."""

from dataclasses import dataclass

import torch

import mistral
from benchmark_parts import formats

# Far more positions than any case measures.
_COMMON = dict(
    rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=2**17, tie_word_embeddings=False
)

SIZES = {
    "7b": dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        sliding_window=4096,
    ),
    # 175 million parameters, cut like the 7B: 4 query heads a key/value head, an MLP of 3.5 times
    # the width
    "small": dict(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        sliding_window=4096,
    ),
    # to try the script: 1 million
    "tiny": dict(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=64,
    ),
}

USUAL = 0.02  # the standard deviation of most weights


@dataclass(frozen=True)
class Case:
    """One measurement: prefill `batch` rows of `context` tokens, then generate `tokens` more.

    chunk  how many tokens a forward pass takes after the prompt: above 1 they are given ones, as in
           speculation, and there are logits after each of them
    """

    batch: int
    context: int
    tokens: int
    chunk: int = 1

    def __str__(self) -> str:
        chunk = f", chunks of {self.chunk}" if self.chunk > 1 else ""
        return f"batch {self.batch}, context {self.context:,}{chunk}"


def config(size: str, layers: int | None = None) -> mistral.Config:
    """The numbers of a size by its name; layers: another number of them."""
    numbers = SIZES[size] | ({} if layers is None else {"num_hidden_layers": layers})
    return mistral.Config(**numbers, **_COMMON, eos_token_id=(2,))


def spread(name: str, layers: int) -> float:
    """The standard deviation of a matrix of random weights, by its name.

    What all layers add to the residual stream together is about as large as the embedding, as in a
    trained model. If every layer drowns what was there before, 32 of them amplify the rounding of
    bfloat16 to a tenth of the logits, and a comparison of two engines says little.
    """
    if "embed_tokens" in name:
        return 1.0
    return USUAL * (2 * layers) ** -0.5 if "o_proj" in name or "down_proj" in name else USUAL


def make_model(
    size: str,
    device: torch.device,
    dtype: torch.dtype,
    format: str = "plain",
    layers: int | None = None,
) -> mistral.Mistral:
    """Random weights of the size's shapes, created on the device: nothing is read or copied.

    The values are spread as those of a trained model are: see `spread`.

    format  "plain" or one of `formats.FORMATS`. ValueError if rows are not whole blocks of it.
    layers  None: as many as the size has
    """
    with torch.device("meta"):
        model = mistral.Mistral(config(size, layers)).to(dtype)
    if format != "plain":
        formats.replace_matrices(model, format)
    model = model.to_empty(device=device)
    torch.manual_seed(0)
    layers = model.config.num_hidden_layers
    if format != "plain":
        formats.fill(model, lambda name: spread(name, layers) / USUAL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=spread(name, layers))
    return model.requires_grad_(False)


def weight_bytes(model: mistral.Mistral) -> int:
    """Bytes of weights that a decode step reads: all but the embedding."""
    plain = sum(
        p.nbytes
        for name, p in model.named_parameters()
        if not name.startswith("model.embed_tokens.")
    )
    return plain + formats.packed_bytes(model, embedding=False)


def decode_roof(model: mistral.Mistral, case: Case, bandwidth: float) -> float:
    """Tokens/s if a step took no longer than reading its weights, keys and values."""
    held = case.context + case.tokens // 2
    slots = min(held, model.config.sliding_window or held)
    step = weight_bytes(model) + case.batch * model.config.cache_bytes(slots, model.dtype.itemsize)
    return case.batch * case.chunk * bandwidth / step


def prefill_roof(model: mistral.Mistral, case: Case, bandwidth: float, rate: float) -> float:
    """Tokens/s if prefill took no longer than its arithmetic, or than reading the weights once."""
    config = model.config
    T = case.context
    window = min(T, config.sliding_window or T)
    pairs = window * (window + 1) // 2 + (T - window) * window  # of a query and a key that it sees
    matrices = config.num_parameters - 2 * config.vocab_size * config.hidden_size
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    head = 2 * config.vocab_size * config.hidden_size  # of the last token alone
    arithmetic = case.batch * (2 * matrices * T + attention + head) / rate
    return case.batch * T / max(arithmetic, weight_bytes(model) / bandwidth)
