"""The numbers that define one checkpoint."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from mistral.errors import shown


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """`value` itself, a whole number from `least` to 2**31 - 1; ValueError with its name if not."""
    if type(value) is not int or not least <= value < 2**31:
        raise ValueError(
            f"{name} must be a whole number from {least} to {2**31 - 1}, not {shown(value)}"
        )
    return value


def positive_number(name: str, value: Any) -> float:
    """`value` as a float, from 1e-30 to 1e30; ValueError with its name if not.

    JSON writes some floats without a point. As an integer one above 2**63 would break arithmetic.
    """
    if type(value) not in (int, float) or not 1e-30 <= value <= 1e30:
        raise ValueError(f"{name} must be a positive number (1e-30 to 1e30), not {shown(value)}")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """How the rotary angles of a model are slowed for sequences longer than it was trained for.

    Hugging Face's names and defaults; rotary.py has the formulas. Linear scaling has a factor and
    nothing else. Raises ValueError for other values.
    """

    rope_type: Literal["linear", "yarn"]
    factor: float  # how many times longer the sequences are
    original_max_position_embeddings: int | None = None  # trained length; required by YaRN
    attention_factor: float | None = None  # of cosines and sines; None: follows from the factor
    beta_fast: float = 32.0  # pairs with more turns than this in the trained length stay as fast
    beta_slow: float = 1.0  # pairs with fewer turns than this are slowed by the whole factor
    mscale: float | None = None  # the two of them, if both are given, ...
    mscale_all_dim: float | None = None  # ... decide an attention_factor that is None
    truncate: bool = True  # round the ends of the ramp between the two to whole pairs

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "yarn"):
            raise ValueError(f"rope_type must be linear or yarn, not {shown(self.rope_type)}")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if self.rope_type == "linear" and field.name != "factor" and value != field.default:
                raise ValueError(f"{field.name} belongs to yarn, and rope_type is linear")
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be true or false, not {shown(value)}")
            if field.type is float or (field.type == float | None and value is not None):
                object.__setattr__(self, field.name, positive_number(field.name, value))
        if self.rope_type == "yarn":
            whole_number("original_max_position_embeddings", self.original_max_position_embeddings)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape and constants of one Mistral model, under Hugging Face's field names.

    No field of the paper's model has a default: what a checkpoint leaves out follows from a rule
    that its reader documents, or is an error. Raises ValueError for values that no Mistral has.
    Source: Mistral 7B, table 1, https://arxiv.org/abs/2310.06825
    """

    model_type = "mistral"  # Hugging Face's name of the architecture; PEFT asks for it

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
    rope_scaling: RotaryScaling | None = None  # of models made for longer sequences later

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int or (field.type == int | None and value is not None):
                whole_number(field.name, value)
            elif field.type is float:
                object.__setattr__(self, field.name, positive_number(field.name, value))
            elif field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be true or false, not {shown(value)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary pairs, not {self.head_dim}")
        if self.rope_scaling is not None and self.rope_theta <= 1.0:
            raise ValueError(f"rope_theta must be above 1 to be scaled, not {self.rope_theta}")
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
