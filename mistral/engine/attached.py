"""What people attach to a model: hooks, adapters, biases. Not every engine can honour it."""

from collections.abc import Iterator, Sequence

from torch import nn

from mistral.attention import Attention
from mistral.mlp import MLP
from mistral.model import Block, Mistral, Trunk
from mistral.quantization.packed import PackedEmbedding, PackedLinear, TiedOutput
from mistral.rms_norm import RMSNorm
from mistral.rotary import Rotary

_OWN = {
    *(Mistral, Trunk, Block, Attention, MLP, RMSNorm, Rotary),
    *(nn.ModuleList, nn.Linear, nn.Embedding, PackedLinear, PackedEmbedding, TiedOutput),
}


def refuse_hooks(model: Mistral, engine: str) -> None:
    """Raises ValueError, which names the module, if a forward hook is registered in the model."""
    _refuse(_hooks(model), engine)


def refuse_attachments(model: Mistral, engine: str) -> None:
    """Raises ValueError for hooks, and for modules that a Mistral of this package does not have."""
    _refuse(_hooks(model), engine)
    _refuse(_foreign_modules(model), engine)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether module(x) is x W^T and nothing else: a Linear to which nothing is attached."""
    is_own = type(module) is nn.Linear and "forward" not in vars(module)
    return is_own and module.bias is None and not (_has_hooks(module) or _all_have_hooks())


def addresses(model: Mistral) -> list[int]:
    """Where the parameters are, for `refuse_moved`."""
    return [parameter.data_ptr() for parameter in model.parameters()]


def refuse_moved(model: Mistral, before: Sequence[int]) -> None:
    """Raises ValueError if parameters are not where they were; `before` is from `addresses`.

    Changes in place are seen by every engine, but for norms: see `refuse_changed_norms`.
    """
    if addresses(model) != before:
        raise ValueError(
            "the model's weights were replaced after the decoder was created: create a new decoder"
        )


def norm_versions(model: Mistral) -> list[int]:
    """How often each norm's weight was changed in place, for `refuse_changed_norms`.

    PyTorch does not count changes of `.data`, and those of tensors made in inference mode.
    """
    weights = [module.weight for module in model.modules() if isinstance(module, RMSNorm)]
    return [0 if weight.is_inference() else weight._version for weight in weights]


def refuse_changed_norms(model: Mistral, before: Sequence[int]) -> None:
    """Raises ValueError if norms have changed since; for an engine that computes with copies.

    before  from `norm_versions`
    """
    if norm_versions(model) != before:
        raise ValueError(
            "the model's norms were changed after the decoder was created, which has scaled copies "
            "of them: create a new decoder"
        )


def _refuse(found: Iterator[str], engine: str) -> None:
    if attached := next(found, None):
        raise ValueError(
            f"{engine} cannot honour what is attached: {attached}. Remove it (merge an adapter), "
            "or use the eager engine, mistral.Decoder"
        )


def _hooks(model: Mistral) -> Iterator[str]:
    if _all_have_hooks():
        yield "every module has a global forward hook"
    for name, module in model.named_modules():
        if _has_hooks(module):
            yield f"{name or 'the model'} has a forward hook"


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _all_have_hooks() -> bool:
    all_modules = nn.modules.module
    return bool(all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks)


def _foreign_modules(model: Mistral) -> Iterator[str]:
    for name, module in model.named_modules():
        if type(module) not in _OWN:
            yield f"{name or 'the model'} is a {type(module).__name__}"
        elif "forward" in vars(module):
            yield f"{name or 'the model'} has a forward method of its own"
        elif isinstance(module, nn.Linear) and module.bias is not None:
            yield f"{name} has a bias"
