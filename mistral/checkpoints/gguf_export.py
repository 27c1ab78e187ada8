"""Write a checkpoint or a model as a GGUF file that llama.cpp reads, one tensor at a time.

gguf-py writes and quantizes.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor, nn
from tqdm import tqdm

from mistral.checkpoints.assemble import check_tied_output, match_tensors
from mistral.checkpoints.gguf_tensor import PLAIN_DTYPES
from mistral.checkpoints.gguf_vocabulary import add_vocabulary
from mistral.checkpoints.names import (
    EMBEDDING,
    OUTPUT,
    gguf_names,
    interleaved_rows,
    rotary_heads,
    tensor_shapes,
)
from mistral.checkpoints.reader import Reader, StoredTensor, blaming
from mistral.checkpoints.room import packed_blocks
from mistral.config import Config, RotaryScaling
from mistral.files import whole_file
from mistral.model import Mistral
from mistral.printable import on_one_line
from mistral.quantization.packed import Packed
from mistral.rotary import attention_factor
from mistral.tokenizer import Tokenizer

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
PLAIN = {dtype: kind for kind, dtype in PLAIN_DTYPES.items()}
# Quantized types store a float16 for each block: its largest value by 127 or 8.
_LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0, "Q4_0": 8 * 65504.0}
_AT_ONCE = 1 << 22  # weights that are float32 at a time: 16 MB
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A tensor to write. Nothing is read before `read`."""

    shape: tuple[int, ...]
    kind: str  # ggml's name of the type that it has
    packed: bool = False
    heads: int | None = None  # of Q and K in Hugging Face's order of rows; None: they stay
    read: Callable[[], Tensor]  # values, or blocks if packed: uint8 [rows, bytes of a row]


def export(
    model: Mistral, tokenizer: Tokenizer, path: Path, kind: str | None, name: str | None = None
) -> None:
    """Write a model as the file `path`. Arguments and errors are those of `write_gguf`."""
    sources = {}
    for tensor, shape in _shapes(model.config).items():
        module = model.get_submodule(tensor.removesuffix(".weight"))
        heads = rotary_heads(tensor, model.config)
        sources[tensor] = _of_module(module, shape, heads)
    write_gguf(path, model.config, tokenizer, sources, kind, name)


def export_checkpoint(
    reader: Reader,
    config: Config,
    tokenizer: Tokenizer,
    path: Path,
    kind: str,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an opened checkpoint as the file `path`, without loading it.

    Values are read in the checkpoint's own dtype, one tensor at a time: that, and the same tensor
    in the file's type, is all that memory holds. Warns about quantized values, which are rounded a
    second time, and about facts in the files that a GGUF file of ours does not hold.

    config     of the model to write, with the stop tokens of `tokenizer`
    tokenizer  of `reader`
    dtype      round all values to it before; None: read them as they are

    Other arguments are those of `write_gguf`. Raises CheckpointError for files that are damaged or
    contradictory, and what `write_gguf` raises.
    """
    stored = match_tensors(reader, config)
    tied_output = stored.pop(OUTPUT, None) if config.tie_word_embeddings else None
    if tied_output is not None:
        own = stored[EMBEDDING].dtype or torch.float32
        check_tied_output(reader.path, tied_output, stored[EMBEDDING], own)
    if blocks := packed_blocks(stored):
        types = ", ".join(sorted({block.name for block in blocks.values()}))
        warnings.warn(
            on_one_line(
                f"{reader.label()} is quantized ({types}): its values are rounded again, to {kind}"
            ),
            stacklevel=2,
        )
    sources = {}
    for tensor in _shapes(config):
        # Files that pair neighbours have GGUF's order of rows.
        heads = None if reader.pairs_neighbours else rotary_heads(tensor, config)
        sources[tensor] = _of_file(stored[tensor], dtype, heads)
    name = reader.model_name() or reader.label()
    written = write_gguf(path, config, tokenizer, sources, kind, name)
    if lost := reader.not_exported(written):
        message = f"not carried over to {path.name}: {', '.join(lost)}"
        warnings.warn(on_one_line(message), stacklevel=2)


def write_gguf(
    path: Path,
    config: Config,
    tokenizer: Tokenizer,
    tensors: Mapping[str, Source],
    kind: str | None,
    name: str | None = None,
) -> list[str]:
    """Write `path`, whole or not at all; returns the keys of its metadata.

    tensors  by Hugging Face's names
    kind     the type of all matrices, one of KINDS; vectors are F32. None is for packed matrices:
             their blocks are written as they are, and other matrices in their own type.
    name     the model's, stored as general.name

    Raises ValueError for another type, for packed matrices with a type, for rows that are not whole
    blocks of 32 (Q8_0 and Q4_0), and for what the format cannot express: some vocabularies, and
    YaRN's truncate=False. CheckpointError for values that the type cannot hold. OSError if the
    file cannot be written; a full disk is noticed before.
    """
    # 1. Check the arguments.
    kinds = _checked_kinds(tensors, kind)
    scaling = config.rope_scaling
    if scaling is not None and not scaling.truncate:
        raise ValueError("GGUF has no key for truncate, which is False in the rotary scaling")
    shapes = {
        tensor: gguf.quant_shape_to_byte_shape(source.shape, kinds[tensor])
        for tensor, source in tensors.items()
    }
    size = sum(int(np.prod(shape)) for shape in shapes.values())

    # 2. Write the header, then the tensors.
    names = gguf_names(config.num_hidden_layers)
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="writing", leave=False, disable=None)
    with (
        whole_file(path, size) as file,
        closing(gguf.GGUFWriter(file, "llama")) as writer,
        bar,
    ):
        if name is not None:
            writer.add_name(name)
        _add_config(writer, config, kind)
        add_vocabulary(writer, tokenizer, config.vocab_size)
        keys = list(writer.kv_data[0])
        for tensor, shape in shapes.items():
            writer.add_tensor_info(
                names[tensor], shape, np.dtype(np.uint8), int(np.prod(shape)), kinds[tensor]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, source in tensors.items():
            with blaming(tensor):
                data = _bytes(source, shapes[tensor], kinds[tensor])
            writer.write_tensor_data(data)
            bar.update(data.nbytes)
            del data  # before the next tensor is read
    return keys


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors to write: the output matrix of a tied model is the embedding."""
    shapes = tensor_shapes(config)
    if config.tie_word_embeddings:
        del shapes[OUTPUT]
    return shapes


def _of_module(module: nn.Module, shape: tuple[int, ...], heads: int | None) -> Source:
    if isinstance(module, Packed):
        blocks = module.all_blocks
        return Source(shape=shape, kind=module.kind.name, packed=True, heads=heads, read=blocks)
    kind = PLAIN.get(module.weight.dtype, "F32")
    return Source(shape=shape, kind=kind, heads=heads, read=module.weight.detach)


def _of_file(tensor: StoredTensor, dtype: torch.dtype | None, heads: int | None) -> Source:
    values = dtype or tensor.dtype or torch.float32
    return Source(
        shape=tensor.shape,
        kind=PLAIN.get(values, "F32"),
        heads=heads,
        read=lambda: tensor.read(_CPU, values),
    )


def _checked_kinds(
    tensors: Mapping[str, Source], kind: str | None
) -> dict[str, GGMLQuantizationType]:
    """The type that each tensor is written as. Raises what `write_gguf` documents about types."""
    packed = [tensor for tensor, source in tensors.items() if source.packed]
    if packed and kind in KINDS:
        raise ValueError(
            f"{packed[0]} is packed; "
            f"load the checkpoint without packed=True and quantize=... to export it as {kind}"
        )
    if kind not in KINDS and not (kind is None and packed):
        raise ValueError(f"the type must be one of {', '.join(KINDS)}, not {kind!r}")
    kinds = {}
    for tensor, source in tensors.items():
        is_vector = len(source.shape) == 1
        kinds[tensor] = GGMLQuantizationType["F32" if is_vector else kind or source.kind]
        if source.shape[-1] % gguf.GGML_QUANT_SIZES[kinds[tensor]][0]:
            raise ValueError(
                f"{kind} stores blocks of 32 weights, and {tensor} has rows of {source.shape[-1]}"
            )
    return kinds


def _bytes(source: Source, shape: tuple[int, ...], kind: GGMLQuantizationType) -> np.ndarray:
    """A tensor as in the file: uint8 in the shape `shape`.

    Raises ValueError for values that the type cannot hold.
    """
    rows = source.read()
    order = None if source.heads is None else interleaved_rows(len(rows), source.heads)
    if order is not None:
        order = order.to(rows.device)
    if source.packed:
        return (rows if order is None else rows[order]).cpu().numpy()
    if rows.dim() == 1:
        return rows.float().cpu().numpy().view(np.uint8)
    data = np.empty(shape, np.uint8)
    at_once = max(1, _AT_ONCE // rows.shape[1])
    for start in range(0, len(rows), at_once):
        places = slice(start, start + at_once)
        part = rows[places] if order is None else rows[order[places]]
        part = part.float().cpu().numpy()
        if kind.name in _LARGEST:
            largest = max(float(part.max()), -float(part.min()))  # NaN if there is one
            if not largest <= _LARGEST[kind.name]:
                raise ValueError(
                    f"{kind.name} cannot hold its largest value, {largest:,g}: take BF16"
                )
        part = np.ascontiguousarray(gguf.quantize(part, kind))
        data[places] = part.view(np.uint8).reshape(len(part), -1)
    return data


def _add_config(writer: gguf.GGUFWriter, config: Config, kind: str | None) -> None:
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
    if config.rope_scaling is not None:
        _add_rope_scaling(writer, config.rope_scaling)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    # llama.cpp does not read it for this architecture; `mistral.load` does. 0: none.
    writer.add_sliding_window(config.sliding_window or 0)
    kinds = {None: "GUESSED", "F32": "ALL_F32"}
    writer.add_file_type(gguf.LlamaFileType[kinds.get(kind, f"MOSTLY_{kind}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_rope_scaling(writer: gguf.GGUFWriter, scaling: RotaryScaling) -> None:
    """The keys that llama.cpp reads, and those in which its converter stores the rest of YaRN."""
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.rope_type))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.rope_type == "linear":
        return
    writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
    betas = (scaling.beta_fast, scaling.beta_slow)
    if betas != (32.0, 1.0):
        warnings.warn(
            "llama.cpp computes other logits from this file: for this architecture it takes 32 and "
            f"1 as YaRN's beta_fast and beta_slow, not {betas[0]} and {betas[1]}",
            stacklevel=5,
        )
    writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
    ours = attention_factor(scaling)
    stored_factor = float(np.float32(scaling.factor))
    default = attention_factor(
        replace(scaling, factor=stored_factor, attention_factor=None, mscale=None)
    )
    if np.float32(ours) != np.float32(default):
        writer.add_rope_scaling_attn_factors(ours / default)  # llama.cpp multiplies its default
        writer.add_rope_scaling_yarn_attn_factor(ours)
