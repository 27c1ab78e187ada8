"""The model or engine that a caller passes: unwrapped, or refused in a line."""

from os import PathLike
from typing import Any

from torch import nn

from mistral.engine.base import Engine
from mistral.errors import shown
from mistral.model import Mistral
from mistral.tokenizer import Tokenizer

# Wrappers that compute what the model inside computes, and where they keep it
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "module",
}


def model_or_engine(given: Any) -> Mistral | Engine:
    """`given`, or the Mistral inside torch.compile's, DDP's or PEFT's wrapper.

    Adapters of PEFT stay active: they are in the model itself. Raises ValueError, with the remedy,
    for anything else.
    """
    if isinstance(given, (str, PathLike)):
        raise ValueError(f"{str(given)!r} is a path: model, tokenizer = mistral.load(...) opens it")
    if isinstance(given, tuple):
        raise ValueError("a model is needed, not a tuple: model, tokenizer = mistral.load(...)")
    if isinstance(given, Tokenizer):
        raise ValueError("a model is needed where the tokenizer is: exchange the two arguments")
    wrapped = given
    while isinstance(wrapped, nn.Module) and type(wrapped) is not Mistral:
        if (inner := _inside(wrapped)) is None:
            break
        wrapped = inner
    if isinstance(wrapped, nn.Module) and not isinstance(wrapped, Mistral):
        raise ValueError(
            f"{type(given).__name__} is not a Mistral, and what it adds would be left out: "
            "pass the Mistral inside it"
        )
    if not isinstance(wrapped, (Mistral, Engine)):
        raise ValueError(f"a model or an engine is needed, not {shown(given)}")
    return wrapped


def only_model(given: Any) -> Mistral:
    """`model_or_engine` for callers that need a model. Raises ValueError for an engine, too."""
    model = model_or_engine(given)
    if not isinstance(model, Mistral):
        raise ValueError(f"a model is needed, not a {type(given).__name__}")
    return model


def require_tokenizer(given: Any) -> None:
    """Raises ValueError for anything but a tokenizer of this package."""
    if not isinstance(given, Tokenizer):
        kind = type(given).__name__
        raise ValueError(f"the tokenizer that mistral.load returns is needed, not a {kind}")


def _inside(wrapper: nn.Module) -> nn.Module | None:
    """The module that a known wrapper contains; None for another module."""
    name = type(wrapper).__name__
    if name in _WRAPPERS:
        return getattr(wrapper, _WRAPPERS[name])
    if type(wrapper).__module__.split(".")[0] == "peft":
        # A tuner (LoraModel) has changed the model's layers. Without one, as in prompt tuning, the
        # wrapper itself changes the input.
        inner = wrapper._modules.get("base_model") or wrapper._modules.get("model")
        is_tuner = "base_model" not in wrapper._modules
        return inner if is_tuner or not isinstance(inner, Mistral) else None
    return None
