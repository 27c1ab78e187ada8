"""Mistral's own layout: params.json, consolidated.safetensors or .00.pth, tokenizer.model.

Source: mistral-inference, `args.py` and `transformer.py`,
https://github.com/mistralai/mistral-inference
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral.checkpoints.foreign import require_plain
from mistral.checkpoints.names import consolidated_names
from mistral.checkpoints.pickle_files import pickled_tensors
from mistral.checkpoints.reader import Reader, StoredTensor, blaming
from mistral.checkpoints.safetensors_files import tensors_in
from mistral.config import Config, whole_number
from mistral.errors import CheckpointError, one_line, shown
from mistral.files import read_file, read_json
from mistral.pieces.sentence_pieces import LARGEST_MODEL
from mistral.tokenizer import Tokenizer
from mistral.unreadable import is_there

_SAFETENSORS = "consolidated.safetensors"
_PICKLE = "consolidated.00.pth"
TOKENIZERS = [f"tokenizer.model{version}" for version in ("", ".v3", ".v2", ".v1")]
# Every Mistral-7B was made for this many positions; params.json does not say.
_POSITIONS = 32768
_OTHER_MODELS = "moe mamba yarn rope_scaling quantization lora vision_encoder".split()


class ConsolidatedReader(Reader):
    """A folder in this layout. The tensors' headers are read when it is opened."""

    layer_prefix = "layers."
    pairs_neighbours = True

    def __init__(self, folder: Path):
        self.path = folder
        found = _read_tensors(folder)
        self._tensors = {name: t for name, t in found.items() if not self.ignores(name)}
        require_plain(self._tensors, method=None)

    def config(self) -> Config:
        """params.json as a Config.

        Published copies are wrong about hidden_dim and silent about vocab_size, so those two come
        from the tensors. If rope_theta is missing, it is 10,000 with a sliding window and 1,000,000
        without: the rule of mistral-inference until May 2024. (Today's would take 1,000,000 for
        v0.1, whose params.json does not name it.)
        """
        path = self.path / "params.json"
        params = read_json(path)
        with blaming(path):
            return _config(params, self._tensors)

    def tokenizer(self, config: Config) -> Tokenizer:
        """tokenizer.model, or .model.v1 to .model.v3 as newer checkpoints name it."""
        for path in (self.path / name for name in TOKENIZERS):
            if is_there(path):
                with blaming(path):
                    model_proto = read_file(path, LARGEST_MODEL)
                    return Tokenizer(model_proto, stop_ids=config.eos_token_id or None)
        raise CheckpointError(f"{self.path} has no tokenizer.model")

    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._tensors

    def names(self, num_layers: int) -> dict[str, str]:
        return consolidated_names(num_layers)

    def ignores(self, name: str) -> bool:
        """The rotary frequencies, which follow from rope_theta."""
        return name.startswith("rope.")


def _read_tensors(folder: Path) -> Mapping[str, StoredTensor]:
    if is_there(folder / _SAFETENSORS):
        return tensors_in(folder / _SAFETENSORS)
    path = folder / _PICKLE
    if not is_there(path):
        raise CheckpointError(f"{folder} has params.json, but neither {_SAFETENSORS} nor {_PICKLE}")
    return pickled_tensors(path)


def _config(params: dict[str, Any], tensors: Mapping[str, StoredTensor]) -> Config:
    """params.json as a Config without stop tokens. ValueError if it is bad."""
    gate = tensors.get("layers.0.feed_forward.w1.weight")
    embedding = tensors.get("tok_embeddings.weight")
    if gate is None or embedding is None or len(gate.shape) != 2 or len(embedding.shape) != 2:
        raise ValueError(
            "the weights in the same folder have no layers.0.feed_forward.w1.weight or "
            f"tok_embeddings.weight (the first is {one_line(next(iter(tensors), 'none'), 100)})"
        )
    for key in _OTHER_MODELS:
        if params.get(key) is not None:
            raise ValueError(f"{key} is not supported in this layout; no Mistral-7B has it")
    dim = whole_number("dim", params.get("dim"))
    heads = whole_number("n_heads", params.get("n_heads"))
    window = _window(params)
    theta = params.get("rope_theta")
    if theta is None:
        theta = 1e6 if window is None else 1e4
    return Config(
        vocab_size=embedding.shape[0],
        hidden_size=dim,
        intermediate_size=gate.shape[0],
        num_hidden_layers=whole_number("n_layers", params.get("n_layers")),
        num_attention_heads=heads,
        num_key_value_heads=whole_number("n_kv_heads", params.get("n_kv_heads")),
        head_dim=whole_number("head_dim", params.get("head_dim", dim // heads)),
        rms_norm_eps=params.get("norm_eps"),
        rope_theta=theta,
        sliding_window=window,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=params.get("tied_embeddings", False),
        eos_token_id=(),  # the tokenizer's
    )


def _window(params: dict[str, Any]) -> int | None:
    """One number for all layers; newer files may spell it as a list with one entry a layer."""
    window = params.get("sliding_window", params.get("_sliding_window"))
    if isinstance(window, list):
        if len({str(entry) for entry in window}) != 1:
            raise ValueError(
                f"sliding_window {shown(window)} differs between the layers, which no Mistral-7B "
                "has"
            )
        window = window[0]
    return window
