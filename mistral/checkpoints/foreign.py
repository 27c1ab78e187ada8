"""Weights that are not a plain Mistral's: what they are, by their types and names, and the remedy.

The config of a fine-tune is often wrong about its weights: the tensors decide, and the config is
asked only for the name of a method that they do not show.
"""

import re
from collections.abc import Iterable, Mapping

from mistral.checkpoints.reader import StoredTensor
from mistral.errors import CheckpointError, one_line

# The last parts of the names that a method of quantization adds. The first row that fits decides.
_METHODS = (
    ("GPTQ", ("qweight", "g_idx")),
    ("AWQ", ("qweight", "qzeros")),
    ("bitsandbytes, 4 bits", ("absmax", "quant_map")),
    ("bitsandbytes, 8 bits", ("SCB",)),
    ("HQQ", ("W_q",)),
    ("EETQ", ("weight_scales",)),
    ("MLX", ("scales", "biases")),
    ("compressed-tensors", ("weight_packed",)),
    ("torchao", ("weight_qdata",)),
    ("torchao", ("_weight_qdata",)),
    ("quanto", ("_data", "_scale")),
    ("EXL2", ("q_weight", "q_scale")),
    ("EXL3", ("trellis", "suh")),
    ("AQLM", ("codes", "codebooks")),
    ("QuIP#", ("Qidxs",)),
    ("fp8, in blocks", ("weight_scale_inv",)),
)

# What a name that no Mistral has says about the checkpoint, and the remedy
_OTHER_MODELS = (
    (
        r"\.lora_|lora_magnitude|\.base_layer\.",
        "this is a LoRA adapter that is not merged: call merge_and_unload() of PEFT, and save that",
    ),
    (
        r"block_sparse_moe|\.experts\.|_exps\.",
        "this is a mixture of experts, such as Mixtral; only dense models are read",
    ),
    (
        r"^(score|classifier|classification_head)\.",
        "this is a classifier; name the checkpoint that generates text",
    ),
    (
        r"(^|\.)v_head\.",
        "this has the value head of a reinforcement learner; save its inner model alone",
    ),
    (
        r"(^|\.)(language_model|text_model|vision_\w+|visual|multi_modal_projector)\.",
        "this is a multimodal model; save its language model alone",
    ),
    (r"\.(q_norm|k_norm)\.", "this is another architecture, such as Qwen3"),
    (r"\.(qkv_proj|Wqkv|gate_up_proj)\.", "this is another architecture, such as Phi-3"),
    (r"\.bias$", "biases belong to another architecture, such as Qwen2"),
    (r"^transformer\.", "this is another architecture, such as GPT-2"),
)

# What the names say if none of them begins as those of the layers should
_OTHER_LAYOUTS = (
    (r"^blk\.", "these are GGUF's names; name the GGUF file"),
    (
        r"^layers\.\d+\.(attention|feed_forward)\.|^tok_embeddings\.",
        "these are the names of Mistral's own layout; add its params.json and rename the file to "
        "consolidated.safetensors",
    ),
    (r"^model\.layers\.", "these are Hugging Face's names; add its config.json"),
    (
        r"^(layers\.\d+|embed_tokens)\.",
        "the names lack model., as in embedding models (e5-mistral), which have no output matrix "
        "and cannot generate text; name the checkpoint that it was made from",
    ),
    (r"", "name a checkpoint that transformers' or Mistral's own code has saved"),
)


def require_plain(tensors: Mapping[str, StoredTensor], method: str | None) -> None:
    """Raises CheckpointError if the tensors are quantized or are not floating-point values.

    method  of quantization, by the config
    """
    by_ending: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        by_ending.setdefault(name.rpartition(".")[2], tensor)
    for title, endings in _METHODS:
        if all(ending in by_ending for ending in endings):
            raise _quantized(by_ending[endings[0]], title)
    for tensor in tensors.values():
        if tensor.type_name.startswith("F8"):
            raise _quantized(tensor, "fp8")
        if tensor.dtype is None or not tensor.dtype.is_floating_point:
            if method is not None:
                raise _quantized(tensor, method)
            raise CheckpointError(
                f"{tensor.path}: {one_line(tensor.name, 100)} is stored as {tensor.type_name}; "
                "only float64, float32, float16 and bfloat16 are read: use the original "
                "checkpoint, or a GGUF of it"
            )


def _quantized(tensor: StoredTensor, method: str) -> CheckpointError:
    return CheckpointError(
        f"{tensor.path}: the weights are quantized with {one_line(method, 50)} "
        f"({one_line(tensor.name, 100)} is {tensor.type_name}), which is not read; use the "
        "original checkpoint, or a GGUF of it"
    )


def what_else(names: Iterable[str], layer_prefix: str) -> str | None:
    """What a checkpoint with these names of tensors is; None if they may be a Mistral's."""
    first = None
    has_layers = False
    for name in names:
        first = first or name
        has_layers = has_layers or name.startswith(layer_prefix)
        if found := _first_match(name, _OTHER_MODELS):
            return f"{one_line(name, 100)} is not part of a Mistral: {found}"
    if first is None:
        return "there are no tensors"
    if has_layers:
        return None
    return (
        f"no tensor's name begins with {layer_prefix}, the first is {one_line(first, 100)}: "
        f"{_first_match(first, _OTHER_LAYOUTS)}"
    )


def _first_match(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    return next((text for pattern, text in table if re.search(pattern, name)), None)
