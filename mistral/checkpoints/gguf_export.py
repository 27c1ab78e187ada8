"""Write a model as a GGUF file that llama.cpp reads, through gguf-py's writer and quantisers."""

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from mistral.checkpoints.names import gguf_names, interleaved_rows, rotary_heads
from mistral.model import Mistral
from mistral.tokenizer import Tokenizer

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")


def export(model: Mistral, tokenizer: Tokenizer, path: Path, kind: str) -> None:
    """Write `path`, whole or not at all. `kind` (one of KINDS) is the type of all matrices; vectors are F32.

    ValueError for another kind, for a packed model, for rows that are not whole blocks of 32 (Q8_0 and Q4_0), and for
    more than the two stop tokens that the format has keys for.
    """
    if kind not in KINDS:
        raise ValueError(f"the type must be one of {', '.join(KINDS)}, not {kind!r}")
    if len(tokenizer.stop_ids) > 2:
        raise ValueError(f"GGUF has keys for two stop tokens, and this checkpoint has {len(tokenizer.stop_ids)}")
    names = gguf_names(model.config.num_hidden_layers)
    tied = model.config.tie_word_embeddings
    state = {n: t for n, t in model.state_dict().items() if not (tied and n.startswith("lm_head."))}
    if packed := sorted(state.keys() - names.keys()):
        raise ValueError(f"{packed[0]} is packed; load the checkpoint with packed=False to export it")
    kinds = {n: GGMLQuantizationType[kind if t.dim() == 2 else "F32"] for n, t in state.items()}
    for name, tensor in state.items():
        if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kinds[name]][0]:
            raise ValueError(f"{kind} stores blocks of 32 weights, and {name} has rows of {tensor.shape[-1]}")

    unfinished = path.with_name(path.name + ".unfinished")
    writer = gguf.GGUFWriter(unfinished, "llama")
    _add_config(writer, model, kind)
    _add_vocabulary(writer, tokenizer, model.config.vocab_size)
    for name, tensor in state.items():
        shape = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), kinds[name])
        writer.add_tensor_info(names[name], shape, np.dtype(np.uint8), int(np.prod(shape)), kinds[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in state.items():  # one at a time: beside the model, memory holds one tensor
            heads = rotary_heads(name, model.config)
            rows = tensor if heads is None else tensor[interleaved_rows(len(tensor), heads).to(tensor.device)]
            data = gguf.quantize(rows.detach().float().cpu().numpy(), kinds[name])
            writer.write_tensor_data(np.ascontiguousarray(data).view(np.uint8))
        writer.close()
        unfinished.replace(path)
    finally:
        writer.close()
        unfinished.unlink(missing_ok=True)


def _add_config(writer: gguf.GGUFWriter, model: Mistral, kind: str) -> None:
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
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Every row of the embedding gets an entry, as llama.cpp wants it."""
    entries = tokenizer.vocabulary()
    entries += [(f"[PAD{id}]", -1000.0, gguf.TokenType.UNUSED) for id in range(len(entries), vocab_size)]
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
