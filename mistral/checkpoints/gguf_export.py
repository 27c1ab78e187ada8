"""Write a model as a GGUF file that llama.cpp reads, through gguf-py's writer and quantizers."""

from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from torch import nn

from mistral.checkpoints.gguf_tensor import PLAIN_DTYPES
from mistral.checkpoints.names import (
    OUTPUT,
    gguf_names,
    interleaved_rows,
    rotary_heads,
    tensor_shapes,
)
from mistral.files import whole_file
from mistral.model import Mistral
from mistral.quantization.packed import Packed
from mistral.tokenizer import Tokenizer

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
PLAIN = {dtype: kind for kind, dtype in PLAIN_DTYPES.items()}


def export(model: Mistral, tokenizer: Tokenizer, path: Path, kind: str | None) -> None:
    """Write `path`, whole or not at all.

    kind  the type of all matrices, one of KINDS; vectors are F32. None is for packed models: blocks
          are written as they are, and matrices that are not packed in their dtype.

    Raises ValueError for another type, for a packed model with a type, for rows that are not whole
    blocks of 32 (Q8_0 and Q4_0), and for more than the two stop tokens that the format has keys
    for.
    """
    # 1. Check the arguments.
    shapes = tensor_shapes(model.config)
    if model.config.tie_word_embeddings:
        del shapes[OUTPUT]
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in shapes}
    packed = [name for name, module in modules.items() if isinstance(module, Packed)]
    if packed and kind in KINDS:
        raise ValueError(
            f"{packed[0]} is packed; "
            f"load the checkpoint without packed and quantize to export it as {kind}"
        )
    if kind not in KINDS and not (kind is None and packed):
        raise ValueError(f"the type must be one of {', '.join(KINDS)}, not {kind!r}")
    if len(tokenizer.stop_ids) > 2:
        raise ValueError(
            f"GGUF has keys for two stop tokens, and this checkpoint has {len(tokenizer.stop_ids)}"
        )
    kinds = {n: GGMLQuantizationType[_kind(module, kind)] for n, module in modules.items()}
    for name, shape in shapes.items():
        if shape[-1] % gguf.GGML_QUANT_SIZES[kinds[name]][0]:
            raise ValueError(
                f"{kind} stores blocks of 32 weights, and {name} has rows of {shape[-1]}"
            )

    # 2. Write the header, then the tensors.
    names = gguf_names(model.config.num_hidden_layers)
    with whole_file(path) as file, closing(gguf.GGUFWriter(file, "llama")) as writer:
        _add_config(writer, model, kind)
        _add_vocabulary(writer, tokenizer, model.config.vocab_size)
        for name, shape in shapes.items():
            stored = gguf.quant_shape_to_byte_shape(shape, kinds[name])
            writer.add_tensor_info(
                names[name], stored, np.dtype(np.uint8), int(np.prod(stored)), kinds[name]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # One at a time: in addition to the model, memory holds one tensor.
        for name, module in modules.items():
            writer.write_tensor_data(_bytes(module, kinds[name], rotary_heads(name, model.config)))


def _kind(module: nn.Module, kind: str | None) -> str:
    if isinstance(module, Packed):
        return module.kind.name
    if module.weight.dim() == 1:
        return "F32"
    return kind or PLAIN.get(module.weight.dtype, "F32")


def _bytes(module: nn.Module, kind: GGMLQuantizationType, heads: int | None) -> np.ndarray:
    """A module's matrix or vector as in the file, uint8: Q and K have another order of rows there.

    heads  of the rows of Q and K; None: another matrix
    """
    rows = module.all_blocks() if isinstance(module, Packed) else module.weight.detach()
    if heads is not None:
        rows = rows[interleaved_rows(len(rows), heads).to(rows.device)]
    if isinstance(module, Packed):
        return rows.cpu().numpy()
    return np.ascontiguousarray(gguf.quantize(rows.float().cpu().numpy(), kind)).view(np.uint8)


def _add_config(writer: gguf.GGUFWriter, model: Mistral, kind: str | None) -> None:
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    # llama.cpp does not read it for this architecture; `mistral.load` does. 0: none.
    writer.add_sliding_window(config.sliding_window or 0)
    kinds = {None: "GUESSED", "F32": "ALL_F32"}
    writer.add_file_type(gguf.LlamaFileType[kinds.get(kind, f"MOSTLY_{kind}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> None:
    entries = tokenizer.vocabulary()
    # Every row of the embedding gets an entry, as llama.cpp requires.
    for id in range(len(entries), vocab_size):
        entries.append((f"[PAD{id}]", -1000.0, gguf.TokenType.UNUSED))
    texts, scores, kinds = zip(*entries)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_unk_token_id(kinds.index(gguf.TokenType.UNKNOWN))
    writer.add_add_space_prefix(tokenizer.adds_space)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    for add, id in zip((writer.add_eos_token_id, writer.add_eot_token_id), tokenizer.stop_ids):
        add(id)
