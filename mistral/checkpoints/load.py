"""The one door from files to a model."""

from os import PathLike
from pathlib import Path
from typing import Literal

import torch

from mistral.checkpoints import gguf, hugging_face
from mistral.errors import CheckpointError
from mistral.model import Mistral
from mistral.tokenizer import Tokenizer


def load(
    source: str | PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    packed: bool = False,
    sliding_window: int | None | Literal["auto"] = "auto",
) -> tuple[Mistral, Tokenizer]:
    """Load a checkpoint: (model, tokenizer).

    source          a folder in Hugging Face's layout (config.json, model.safetensors or shards with an index,
                    tokenizer.model), or a GGUF file (the first of a split set)
    device          None: CUDA where there is one, else the CPU
    dtype           None: float32 on the CPU, elsewhere the dtype of the checkpoint (bfloat16 for quantised ones)
    packed          keep the blocks of a quantised GGUF as they are and unpack them as they are used: the memory of
                    the file, at the price of speed. False: unpack into `dtype` once.
    sliding_window  "auto": what the checkpoint says; for a GGUF, which does not, a rule (`gguf.window_of`). A number
                    or None (attend to everything) overrides it.

    Weights go straight to the device, tensor by tensor, after every name and shape was checked; a terminal sees a
    progress bar. Raises CheckpointError for files that are missing, damaged or contradict each other, ValueError for
    arguments that make no sense, NotEnoughMemory before anything is taken.
    """
    path = Path(source).expanduser()
    chosen = choose_device(device)
    if path.is_file():
        return gguf.load(path, chosen, dtype, packed, sliding_window)
    if not path.is_dir():
        raise CheckpointError(
            f"{source} does not exist; name a folder with config.json, weights and tokenizer, or a GGUF"
        )
    if packed:
        raise ValueError(f"packed=True is for quantised GGUF files; {source} is a folder")
    return hugging_face.load(path, chosen, dtype, sliding_window)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device that was named, or CUDA where there is one, else the CPU. ValueError for one that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is not one that PyTorch knows; try 'cuda' or 'cpu'") from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {device!r} is not supported; try 'cuda' or 'cpu'")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: PyTorch {torch.__version__} finds no CUDA GPU; try 'cpu'")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r}: there are {torch.cuda.device_count()} CUDA GPUs, counted from 0")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device {device!r}: PyTorch {torch.__version__} finds no Apple GPU; try 'cpu'")
    return chosen
