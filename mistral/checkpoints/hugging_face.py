"""Hugging Face's layout: config.json, safetensors, tokenizer.model.

The files are untrusted: everything is checked before a weight is read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mistral.checkpoints.names import OUTPUT, hugging_face_names
from mistral.checkpoints.reader import Reader, StoredTensor, blaming, dtype_name
from mistral.checkpoints.safetensors_files import WEIGHTS, stored_tensors
from mistral.config import Config, whole_number
from mistral.errors import CheckpointError
from mistral.files import read_json, whole_file, write_json
from mistral.model import Mistral
from mistral.quantization.packed import Packed
from mistral.tokenizer import Tokenizer


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

        Two keys may be absent, as in transformers: head_dim (then hidden_size /
        num_attention_heads) and tie_word_embeddings (then false). An absent sliding_window is
        transformers' default of 4096; one that is null means none. The stop tokens are those of
        generation_config.json if it names any.
        """
        stop = _optional_json(self.path / "generation_config.json").get("eos_token_id")
        if stop is None:
            stop = self._raw_config.get("eos_token_id")
        with blaming(self._config_path):
            return _config(self._raw_config, stop)

    def window_note(self, config: Config) -> str | None:
        if "sliding_window" in self._raw_config:
            return None
        return (
            f"{self._config_path} has no sliding_window; taking 4096, transformers' default "
            "(sliding_window=None: attend to all)"
        )

    def tokenizer(self, stop_ids: tuple[int, ...]) -> Tokenizer:
        """tokenizer.model with the added tokens of added_tokens.json and tokenizer_config.json."""
        path = self.path / "tokenizer.model"
        if not path.is_file():
            has_json = (self.path / "tokenizer.json").exists()
            other = " (tokenizer.json alone is not read)" if has_json else ""
            raise CheckpointError(
                f"{self.path} has no tokenizer.model{other}; "
                "copy it from the checkpoint's base model"
            )
        added = _added_tokens(self.path)
        with blaming(path):
            return Tokenizer(path.read_bytes(), added, stop_ids or None)

    def tensors(self) -> Mapping[str, StoredTensor]:
        return stored_tensors(self.path)

    def names(self, num_layers: int) -> dict[str, str]:
        return hugging_face_names(num_layers)

    def ignores(self, name: str) -> bool:
        """The rotary frequencies of old checkpoints, which follow from rope_theta."""
        return name.endswith("rotary_emb.inv_freq")


def save(model: Mistral, tokenizer: Tokenizer | None, folder: Path) -> None:
    """Write a checkpoint that `mistral.load`, transformers and llama.cpp's converter read.

    Creates `folder`. Without a tokenizer only config and weights are written. Raises ValueError for
    a packed model.
    """
    if any(isinstance(module, Packed) for module in model.modules()):
        raise ValueError(
            "the model is packed; load it without packed and quantize to save it in this layout"
        )
    config = model.config
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state[OUTPUT]
    folder.mkdir(parents=True, exist_ok=True)
    stop: int | list[int] | None = list(config.eos_token_id) or None
    if len(config.eos_token_id) == 1:
        stop = config.eos_token_id[0]
    values = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "torch_dtype": dtype_name(model.dtype),
        **{name: value for name, value in vars(config).items() if name != "eos_token_id"},
        "bos_token_id": None if tokenizer is None else tokenizer.bos_id,
        "eos_token_id": stop,
    }
    write_json(folder / "config.json", values)
    if tokenizer is not None:
        _save_tokenizer(tokenizer, folder)
    with whole_file(folder / WEIGHTS) as file:
        save_file(state, file, metadata={"format": "pt"})
        # safetensors creates a file that only its owner can read.
        file.chmod((folder / "config.json").stat().st_mode)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    flags["special"] = True
    values = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "added_tokens_decoder": {
            str(id): {"content": text, **flags} for id, text in tokenizer.added.items()
        },
    }
    write_json(folder / "tokenizer_config.json", values)
    (folder / "tokenizer.model").write_bytes(tokenizer.model_proto)


def _config(raw: dict[str, Any], stop: Any) -> Config:
    """A config.json as a Config. ValueError if it is bad.

    stop  the stop tokens in the form of JSON: an id, a list of ids, or None
    """
    if raw.get("model_type") != "mistral":
        raise ValueError(f"model_type is {raw.get('model_type')!r}, and 'mistral' is read here")
    if raw.get("hidden_act") not in (None, "silu"):
        raise ValueError(f"hidden_act is {raw['hidden_act']!r}; Mistral's MLP uses silu")
    if raw.get("quantization_config"):
        raise ValueError(
            "the weights are quantised (quantization_config); use the original checkpoint"
        )
    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    numbers = {name: whole_number(name, _required(raw, name)) for name in sizes}
    head_dim = raw.get("head_dim")
    if head_dim is None:
        head_dim = numbers["hidden_size"] // numbers["num_attention_heads"]
    if stop is None:
        stop = []
    return Config(
        **numbers,
        head_dim=head_dim,
        rms_norm_eps=_required(raw, "rms_norm_eps"),
        rope_theta=_rope_theta(raw),
        sliding_window=raw.get("sliding_window", 4096),
        max_position_embeddings=_required(raw, "max_position_embeddings"),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        eos_token_id=tuple(stop) if isinstance(stop, list) else (stop,),
    )


def _required(raw: dict[str, Any], name: str) -> Any:
    if raw.get(name) is None:
        raise ValueError(f"{name} is missing, and a number of the architecture is not guessed")
    return raw[name]


def _rope_theta(raw: dict[str, Any]) -> float:
    """The rotary base. transformers 5 writes rope_theta and the scaling inside rope_parameters."""
    inner = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    if not isinstance(inner, dict) or not isinstance(scaling, dict):
        raise ValueError("rope_parameters and rope_scaling must be objects or null")
    kinds = [
        part[key]
        for part in (inner, scaling)
        for key in ("rope_type", "type")
        if part.get(key) is not None
    ]
    if any(kind != "default" for kind in kinds) or (scaling and not kinds):
        raise ValueError(
            f"rotary scaling {inner or scaling} is not supported; no Mistral-7B uses any"
        )
    return _required({"rope_theta": inner.get("rope_theta", raw.get("rope_theta"))}, "rope_theta")


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _added_tokens(folder: Path) -> dict[int, str]:
    """The tokens that added_tokens.json and tokenizer_config.json add: id -> text."""
    listed = [(id, text) for text, id in _optional_json(folder / "added_tokens.json").items()]
    described = _optional_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    if not isinstance(described, dict):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is not an object"
        )
    for id, token in described.items():
        is_number = id.isdecimal() and len(id) < 10
        text = token.get("content") if isinstance(token, dict) else None
        listed.append((int(id) if is_number else id, text))
    added: dict[int, str] = {}
    for id, text in listed:
        if not isinstance(id, int) or not isinstance(text, str):
            raise CheckpointError(
                f"{folder}: added token {text!r} with the id {id!r} is not a text with a number"
            )
        if added.setdefault(id, text) != text:
            raise CheckpointError(
                f"{folder}: two added tokens, {added[id]!r} and {text!r}, have the id {id}"
            )
    return added
