"""config.json in Hugging Face's layout as a Config, by the rules of transformers 5."""

from dataclasses import fields
from typing import Any

from mistral.config import Config, RotaryScaling, whole_number
from mistral.errors import one_line, shown

_MODEL_TYPES = ("mistral", "llama")
_KEY_VALUE_HEADS = 8  # of a config of type mistral without num_key_value_heads
_WINDOW = 4096  # of a config of type mistral without sliding_window
_THETA = 10000.0  # of a config without rope_theta
# The keys of a rotary scaling that transformers uses, by its type.
_USED = {
    "default": {"rope_type"},
    "linear": {"rope_type", "factor"},
    "yarn": {field.name for field in fields(RotaryScaling)},
}
# Others that change nothing in the computation.
_HARMLESS = {"finetuned", "partial_rotary_factor"}
_ZERO_IS_ABSENT = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def read_config(raw: dict[str, Any], stop: Any) -> Config:
    """A config.json, of transformers 4 or 5, as a Config. ValueError if it is bad.

    stop  the stop tokens in the form of JSON: an id, a list of ids, or None

    model_type llama is the same computation. It has no window, and as many key/value heads as query
    heads unless it names another number.
    """
    _refuse_variants(raw)
    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    numbers = {name: whole_number(name, _required(raw, name)) for name in sizes}
    heads = numbers["num_attention_heads"]
    head_dim = raw.get("head_dim")
    if head_dim is None:
        head_dim = numbers["hidden_size"] // heads
    default_heads = heads if _is_llama(raw) else _KEY_VALUE_HEADS
    key_value_heads = raw.get("num_key_value_heads", default_heads)
    if stop is None:
        stop = []
    return Config(
        **numbers,
        num_key_value_heads=heads if key_value_heads is None else key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=_required(raw, "rms_norm_eps"),
        rope_theta=_rope_theta(raw),
        sliding_window=None if _is_llama(raw) else raw.get("sliding_window", _WINDOW),
        max_position_embeddings=_required(raw, "max_position_embeddings"),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        eos_token_id=tuple(stop) if isinstance(stop, list) else (stop,),
        rope_scaling=_rope_scaling(raw),
    )


def window_note(raw: dict[str, Any]) -> str | None:
    """What a config.json leaves to transformers about the window, or None."""
    if not _is_llama(raw):
        return None if "sliding_window" in raw else f"no sliding_window; taking {_WINDOW:,}"
    if raw.get("sliding_window") is None:
        return None
    return f"a llama has no window, so sliding_window {shown(raw['sliding_window'])} is not applied"


def config_notes(raw: dict[str, Any]) -> list[str]:
    """Notes about an accepted config.json: absent keys that get a default, keys without effect."""
    notes = []
    if not _named_thetas(raw):
        notes.append(f"no rope_theta; taking {_THETA:,.0f}, transformers' default")
    rotary = _rotary(raw)
    used = _USED[rotary.get("rope_type") or "default"] | _HARMLESS
    unused = sorted(name for name in rotary if name not in used and rotary[name] is not None)
    if unused:
        notes.append(f"the rotary scaling does not use {one_line(', '.join(unused))}; not applied")
    return notes


def rotary_values(config: Config) -> dict[str, Any]:
    """rope_theta and rope_scaling for a config.json, as every transformers reads them."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta}
    given = {name: getattr(scaling, name) for name in sorted(_USED[scaling.rope_type])}
    given = {name: value for name, value in given.items() if value is not None}
    return {"rope_theta": config.rope_theta, "rope_scaling": given}


def _is_llama(raw: dict[str, Any]) -> bool:
    return raw.get("model_type") == "llama"


def _refuse_variants(raw: dict[str, Any]) -> None:
    """ValueError for models with another computation."""
    if raw.get("model_type") not in _MODEL_TYPES:
        raise ValueError(
            f"model_type is {shown(raw.get('model_type'))}, and {' and '.join(_MODEL_TYPES)} are "
            "read; this is another model"
        )
    if raw.get("hidden_act") not in (None, "silu"):
        raise ValueError(f"hidden_act is {shown(raw['hidden_act'])}; Mistral's MLP uses silu")
    for name in ("attention_bias", "mlp_bias"):
        if raw.get(name) not in (None, False):
            raise ValueError(f"{name} is {shown(raw[name])}; Mistral's matrices have no bias")


def _required(raw: dict[str, Any], name: str) -> Any:
    if raw.get(name) is None:
        raise ValueError(f"{name} is missing, and a number of the architecture is not guessed")
    return raw[name]


def _rope_theta(raw: dict[str, Any]) -> Any:
    """The rotary base: at the top in transformers 4, within rope_parameters in transformers 5."""
    thetas = _named_thetas(raw) or [_THETA]
    for theta in thetas[1:]:
        if theta != thetas[0]:
            raise ValueError(
                f"rope_theta is {shown(thetas[0])} in one place and {shown(theta)} in another"
            )
    return thetas[0]


def _named_thetas(raw: dict[str, Any]) -> list[Any]:
    places = (raw, *_rotary_parts(raw))
    return [place["rope_theta"] for place in places if place.get("rope_theta") is not None]


def _rope_scaling(raw: dict[str, Any]) -> RotaryScaling | None:
    """The rotary scaling as transformers reads it; None for a model without one."""
    values = _rotary(raw)
    rope_type = values.get("rope_type")
    if rope_type is None and values.keys() - {"rope_type"} - _HARMLESS:
        names = one_line(", ".join(sorted(values)))
        raise ValueError(f"the rotary scaling has no rope_type, only {names}")
    if rope_type in (None, "default"):
        return None
    if rope_type not in ("linear", "yarn"):
        raise ValueError(f"rotary scaling {shown(rope_type)} is not supported; linear and yarn are")
    used = _USED[rope_type]
    given = {name: value for name, value in values.items() if name in used and value is not None}
    if rope_type == "yarn":
        _add_yarn_defaults(given, values, raw)
    if "factor" not in given:
        raise ValueError(f"the rotary scaling {rope_type} has no factor")
    return RotaryScaling(**given)


def _add_yarn_defaults(given: dict[str, Any], values: dict[str, Any], raw: dict[str, Any]) -> None:
    """Complete `given` as transformers does for keys of `values` that are absent, null or 0."""
    length = "original_max_position_embeddings"
    positions = raw.get("max_position_embeddings")
    named = [part[length] for part in (raw, given) if part.get(length) is not None]
    if len(named) == 2 and named[0] != named[1]:
        raise ValueError(
            f"{length} is {shown(named[0])} in one place and {shown(named[1])} in another"
        )
    given[length] = whole_number(length, named[0] if named else positions)
    if "factor" in values:  # null is the ratio; an absent key is an error
        given.setdefault(
            "factor", whole_number("max_position_embeddings", positions) / given[length]
        )
    for name in _ZERO_IS_ABSENT:
        if type(given.get(name)) in (int, float) and given[name] == 0:
            del given[name]
    if values.get("truncate", True) is None:
        given["truncate"] = False  # transformers asks whether the value is true


def _rotary(raw: dict[str, Any]) -> dict[str, Any]:
    """The keys of the rotary scaling without rope_theta, and with `type` as rope_type.

    ValueError if rope_parameters and rope_scaling are both given and do not say the same.
    """
    found: dict[str, Any] = {}
    for part in _rotary_parts(raw):
        values = {name: value for name, value in part.items() if name not in ("type", "rope_theta")}
        old_name = part.get("type")
        if values.get("rope_type") is None:
            values["rope_type"] = old_name
        elif old_name not in (None, values["rope_type"]):
            raise ValueError(
                f"rope_type is {shown(values['rope_type'])}, and type is {shown(old_name)}"
            )
        if all(value is None for value in values.values()):
            continue
        for name in sorted(found.keys() | values.keys()) if found else ():
            if found.get(name) != values.get(name):
                raise ValueError(
                    f"rope_parameters and rope_scaling differ in {one_line(name, 80)}; keep one"
                )
        found = values
    partial = found.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ValueError("rotary embedding of a part of the head is not supported")
    return found


def _rotary_parts(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """rope_parameters (transformers 5) and rope_scaling (4), those that are there."""
    parts = [raw.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError("rope_parameters and rope_scaling must be objects or null")
    return parts
