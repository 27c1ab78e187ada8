"""Hugging Face's layout: config.json, safetensors, tokenizer.model.

The files are untrusted: everything is checked before a weight is read.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors.torch import save_file

from mistral.checkpoints.hugging_face_config import (
    config_notes,
    read_config,
    rotary_values,
    window_note,
)
from mistral.checkpoints.hugging_face_tokenizer import read_tokenizer, save_tokenizer
from mistral.checkpoints.hugging_face_weights import SAFETENSORS, stored_tensors
from mistral.checkpoints.labels import is_owner_and_name, name_on_the_hub
from mistral.checkpoints.names import OUTPUT, hugging_face_names
from mistral.checkpoints.reader import Reader, StoredTensor, blaming, dtype_name
from mistral.config import Config
from mistral.files import optional_json, read_json, whole_folder, write_json
from mistral.model import Mistral
from mistral.quantization.packed import Packed
from mistral.tokenizer import Tokenizer

_BUFFERS = (
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "position_ids",
)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")


class HuggingFaceReader(Reader):
    """A folder in this layout. config.json is read when it is opened."""

    layer_prefix = "model.layers."
    pairs_neighbours = False

    def __init__(self, folder: Path):
        self.path = folder
        self._config_path = folder / "config.json"
        self._raw_config = read_json(self._config_path)

    def config(self) -> Config:
        """config.json and generation_config.json, as transformers 4 or 5 wrote them.

        Some keys may be absent, with transformers' defaults: head_dim (hidden_size /
        num_attention_heads), num_key_value_heads, tie_word_embeddings (false) and rope_theta
        (10,000, with a note). An absent sliding_window is its default of 4096; one that is null
        means none. The stop tokens are those of generation_config.json if it names any.
        """
        stop = optional_json(self.path / "generation_config.json").get("eos_token_id")
        if stop is None:
            stop = self._raw_config.get("eos_token_id")
        with blaming(self._config_path):
            return read_config(self._raw_config, stop)

    def window_note(self, config: Config) -> str | None:
        note = window_note(self._raw_config)
        if note is None:
            return None
        note += ", as transformers does (sliding_window=... overrides)"
        return f"{self.label()}: config.json: {note}"

    def notes(self) -> list[str]:
        return [f"{self.label()}: config.json: {note}" for note in config_notes(self._raw_config)]

    def tokenizer(self, config: Config) -> Tokenizer:
        """tokenizer.model or tokenizer.json, see `hugging_face_tokenizer.read_tokenizer`."""
        return read_tokenizer(self.path, config)

    def model_name(self) -> str | None:
        """Its name on the hub, or _name_or_path of config.json if it has the form owner/name."""
        name = self._raw_config.get("_name_or_path")
        if not isinstance(name, str) or not is_owner_and_name(name):
            name = None
        return name_on_the_hub(self.path) or name

    def not_exported(self, written: Collection[str]) -> list[str]:
        """The defaults of sampling in generation_config.json."""
        defaults = optional_json(self.path / "generation_config.json")
        return [f"{key} of generation_config.json" for key in _SAMPLING if key in defaults]

    def tensors(self) -> Mapping[str, StoredTensor]:
        quantization = self._raw_config.get("quantization_config")
        return stored_tensors(self.path, quantization, self.ignores)

    def names(self, num_layers: int) -> dict[str, str]:
        return hugging_face_names(num_layers)

    def ignores(self, name: str) -> bool:
        """Buffers of old checkpoints: positions, and rotary tables that follow from rope_theta."""
        return name.endswith(_BUFFERS)


def save(model: Mistral, tokenizer: Tokenizer | None, folder: Path) -> None:
    """Write a checkpoint that `mistral.load`, transformers and llama.cpp's converter read.

    The files are in `folder` when all of them are written, see `whole_folder`. Without a tokenizer
    only config and weights are written. Raises ValueError for a packed model, OSError if a file
    cannot be written.
    """
    if any(isinstance(module, Packed) for module in model.modules()):
        raise ValueError(
            "the model is packed: "
            "load it without packed=True and quantize=... to save it in this layout"
        )
    config = model.config
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state[OUTPUT]
    stop: int | list[int] | None = list(config.eos_token_id) or None
    if len(config.eos_token_id) == 1:
        stop = config.eos_token_id[0]
    own_form = ("eos_token_id", "rope_theta", "rope_scaling")
    values = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "torch_dtype": dtype_name(model.dtype),
        **{name: value for name, value in vars(config).items() if name not in own_form},
        **rotary_values(config),
        "bos_token_id": None if tokenizer is None else tokenizer.bos_id,
        "eos_token_id": stop,
    }
    size = sum(tensor.nbytes for tensor in state.values())
    with whole_folder(folder, last="config.json", size=size) as unfinished:
        save_file(state, unfinished / SAFETENSORS, metadata={"format": "pt"})
        write_json(unfinished / "config.json", values)
        if tokenizer is not None:
            save_tokenizer(tokenizer, unfinished)
