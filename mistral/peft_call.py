"""How PEFT's wrapper calls a causal model: `model(input_ids=..., attention_mask=..., labels=None)`.

`get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", ...))` returns such a wrapper.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# transformers' switches of what is returned; logits are all that there is
_SWITCHES = {"output_attentions", "output_hidden_states", "return_dict", "use_cache"}


def tokens_of(arguments: Mapping[str, Any], tokens: Tensor | None) -> Tensor:
    """The tokens in transformers' keyword arguments: int64 [B, T].

    Raises TypeError for a name that is not transformers', ValueError for one that has an effect
    there and none here, and for a mask with pads on the left.
    """
    for name, value in arguments.items():
        if name in ("input_ids", "attention_mask") or value is None:
            continue
        if name in _SWITCHES and not value:
            continue
        if name not in _SWITCHES and name not in ("labels", "inputs_embeds"):
            raise TypeError(f"Mistral.forward() got an unexpected keyword argument {name!r}")
        raise ValueError(f"{name} is not supported: the model takes tokens and returns logits")
    given = arguments.get("input_ids", tokens)
    mask = arguments.get("attention_mask")
    if mask is not None:
        _require_right_pads(mask)
    return given


def _require_right_pads(mask: Tensor) -> None:
    """ValueError for an attention mask that is not ones and then zeros in each row.

    A token never attends to pads on its right, so such a mask changes no token's logits.
    """
    rises = torch.as_tensor(mask).diff(dim=-1) > 0
    if rises.any():
        raise ValueError(
            "attention_mask has pads on the left: mistral.unpadded(input_ids, attention_mask) "
            "returns the rows for generate_batch; with a cache, pad on the right and pass lengths"
        )
