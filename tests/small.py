"""Small models with unequal sizes for the tests, and where the test data is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mistral
from mistral.checkpoints import load
from mistral.checkpoints.hugging_face import HuggingFaceReader

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parent.parent
SCRIPTS = {
    path.stem: path.relative_to(ROOT).as_posix()
    for folder in ("scripts", "scripts/dev", "scripts/demo")
    for path in (ROOT / folder).glob("*.py")
}


def __getattr__(name: str) -> Path:
    """TRUE_TOKENIZERS, a folder of mistral-common: without that package its users are skipped."""
    if name != "TRUE_TOKENIZERS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    mistral_common = pytest.importorskip("mistral_common")
    return Path(mistral_common.__file__).parent / "data"


# No two sizes are equal, and the head size is not hidden_size / heads: a swapped axis cannot hide.
SIZES = dict(
    vocab_size=101,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    rms_norm_eps=2**-10,  # a constant of 1e-5 in its place shows
    rope_theta=1e4,
    sliding_window=4,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    eos_token_id=(2,),
)
# For the rotary pairs of heads of 10: one fast, some on the ramp, one slow.
YARN = mistral.RotaryScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=256)


def config(**changes) -> mistral.Config:
    return mistral.Config(**{**SIZES, **changes})


def model(dtype=torch.float64, seed=0, **changes) -> mistral.Mistral:
    """A random model whose logits are spread well apart."""
    torch.manual_seed(seed)
    made = mistral.Mistral(config(**changes))
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return made.to(dtype).requires_grad_(False)


def seeds(quick: int, count: int) -> list:
    """The numbers below `count`, those from `quick` on marked as the long form of a test."""
    long = (pytest.param(seed, marks=pytest.mark.slow) for seed in range(quick, count))
    return [*range(quick), *long]


def tokens(*shape: int, seed=0, vocab_size=SIZES["vocab_size"]) -> torch.Tensor:
    return torch.randint(3, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def true_tokenizer(**kwargs) -> mistral.Tokenizer:
    """Mistral's own 32,000-piece tokenizer, with Hermes-2-Pro's two tokens."""
    proto = (__getattr__("TRUE_TOKENIZERS") / "tokenizer.model.v1").read_bytes()
    return mistral.Tokenizer(
        proto, **{"added": {32000: "<|im_end|>", 32001: "<|im_start|>"}, **kwargs}
    )


def save_hf(
    folder: Path, dtype=torch.float32, seed=0, family="Mistral", scaling=None, **changes
) -> Path:
    """A random checkpoint written by transformers itself.

    family   "Mistral" or "Llama", whose config has no window
    scaling  the rotary scaling, as transformers spells it
    """
    transformers = pytest.importorskip("transformers")

    sizes = {**SIZES, "initializer_range": 0.3, **changes}
    sizes["eos_token_id"] = list(sizes["eos_token_id"])
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    sizes["rope_parameters"] |= scaling or {}
    if family == "Llama":
        del sizes["sliding_window"]
        sizes["hidden_size"] = 42  # LlamaConfig wants a multiple of the heads
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**sizes)
    made = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in made.named_parameters():
        if "norm" in name:  # all of them are ones at first: one in the place of another would hide
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    made.to(dtype).save_pretrained(folder)
    return folder


def load_model(folder: Path, dtype=None, sliding_window="auto", quantize=None) -> mistral.Mistral:
    """The model of a folder in Hugging Face's layout, on the CPU, without its tokenizer."""
    reader = HuggingFaceReader(folder)
    config = reader.config()
    if sliding_window != "auto":
        config = replace(config, sliding_window=sliding_window)
    return load.load_model(reader, config, torch.device("cpu"), dtype, quantize=quantize)


def load_pair(folder: Path, dtype: torch.dtype, attention="sdpa"):
    """(ours, transformers') of one checkpoint."""
    transformers = pytest.importorskip("transformers")

    ours = load_model(folder, dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention
    )
    return ours.requires_grad_(False), theirs.eval().requires_grad_(False)
