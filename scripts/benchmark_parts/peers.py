"""The same weights in the shape that others want them in. Made when first asked for."""

import tempfile
from pathlib import Path

import torch

import mistral
from mistral.checkpoints.hugging_face_config import rotary_values
from mistral.quantization.packed import Packed


def transformers_model(model: mistral.Mistral, sliding_window: int | None) -> torch.nn.Module:
    """transformers' Mistral around our tensors: no second copy.

    The window is that of its attention and its cache.
    """
    import transformers
    from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim rms_norm_eps max_position_embeddings tie_word_embeddings"
    )
    config = transformers.MistralConfig(
        **{name: getattr(model.config, name) for name in names.split()},
        sliding_window=sliding_window,
        **rotary_values(model.config),
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        theirs = transformers.MistralForCausalLM(config)
    theirs.load_state_dict(model.state_dict(), assign=True)
    theirs.model.rotary_emb = MistralRotaryEmbedding(config).to(model.device)
    return theirs.eval().requires_grad_(False)


class GGUFFile:
    """The model as a GGUF file, in its own dtype or packed; the file goes away with this object."""

    def __init__(self, model: mistral.Mistral):
        # Here, so that the others can be measured where gguf and sentencepiece are not installed
        from dev.random_checkpoint import train_tokenizer

        from mistral.checkpoints.gguf_export import PLAIN, export

        self._folder = tempfile.TemporaryDirectory()
        self.path = str(Path(self._folder.name) / "random.gguf")
        packed = any(isinstance(module, Packed) for module in model.modules())
        kind = None if packed else PLAIN[model.dtype]
        export(model, mistral.Tokenizer(train_tokenizer(512)), Path(self.path), kind)
