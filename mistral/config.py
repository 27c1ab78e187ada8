"""The numbers that define one checkpoint."""

from dataclasses import dataclass, fields
from typing import Any


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """`value` itself, a whole number from `least` to 2**31 - 1; ValueError with its name if not."""
    if type(value) is not int or not least <= value < 2**31:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return value


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape and constants of one Mistral model, under Hugging Face's field names.

    No field has a default: what a checkpoint leaves out follows from a rule that its reader
    documents, or is an error. Raises ValueError for values that no Mistral can have.
    Source: Mistral 7B, table 1, https://arxiv.org/abs/2310.06825
    """

    vocab_size: int  # V: rows of the embedding; may exceed the tokens that the tokenizer knows
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # blocks
    num_attention_heads: int  # N
    num_key_value_heads: int  # K; each serves G = N/K query heads
    head_dim: int  # H; not D/N in every checkpoint
    rms_norm_eps: float
    rope_theta: float  # 1e4 in v0.1 and Hermes-2-Pro, 1e6 in v0.2 and v0.3
    sliding_window: int | None  # W: keys that a query sees, its own included; None: all before it
    max_position_embeddings: int  # tokens of the longest sequence it was trained for
    tie_word_embeddings: bool  # True: the output matrix is the embedding
    eos_token_id: tuple[int, ...]  # generation stops at any of these

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int or (field.type == int | None and value is not None):
                whole_number(field.name, value)
            elif field.type is float and not (type(value) in (int, float) and 0 < value < 1e30):
                raise ValueError(f"{field.name} must be a positive number, not {value!r}")
            elif field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be true or false, not {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary pairs, not {self.head_dim}")
        for token in self.eos_token_id:
            if whole_number("eos_token_id", token, least=0) >= self.vocab_size:
                raise ValueError(
                    f"eos_token_id {token} lies outside the vocabulary of {self.vocab_size}"
                )

    @property
    def num_parameters(self) -> int:
        """Weights of the model; a tied output matrix counts once."""
        D = self.hidden_size
        heads = self.num_attention_heads + self.num_key_value_heads
        attention = 2 * heads * self.head_dim * D  # Q and O, K and V
        mlp = 3 * D * self.intermediate_size
        norms = 2 * D
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * D
        return self.num_hidden_layers * (attention + mlp + norms) + embeddings + D

    def cache_bytes(self, num_slots: int, itemsize: int) -> int:
        """Bytes of the keys and values of `num_slots` positions of one row."""
        elements = 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim
        return elements * num_slots * itemsize
