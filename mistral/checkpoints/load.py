"""The one door from files to a model."""

from os import PathLike
from pathlib import Path
from typing import Literal

import torch

from mistral.checkpoints import consolidated, gguf, hub, hugging_face
from mistral.errors import CheckpointError
from mistral.model import Mistral
from mistral.tokenizer import Tokenizer

DEMO = Path(__file__).parents[1] / "demo/demo.gguf"


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
                    "owner/repo:Q4_K_M" for one of several GGUFs,
                    or "demo", a small Mistral that comes with this package ("./demo" is a folder of
                    that name)
    device          None: CUDA where there is one, else the CPU
    dtype           None: float32 on the CPU, elsewhere the dtype of the checkpoint (bfloat16 for
                    quantised ones)
    packed          keep the blocks of a quantised GGUF as they are: the memory of the file. The
                    reference unpacks them at each use, at the price of speed. False: unpack into
                    `dtype` once.
    sliding_window  "auto": what the checkpoint says; for a GGUF, which does not, a rule
                    (`gguf_config.window_of`).
                    A number or None (attend to everything) overrides it.
    quantize        round the matrices to 8 or 4 bits a weight while loading, as llama.cpp would
                    (see `assemble.quantized_kinds` for which): the model is packed then, like a
                    packed GGUF
    revision        branch, tag or commit of a name on the hub; None: its main branch

    Weights go straight to the device, tensor by tensor, after every name and shape was checked; a
    terminal sees a progress bar. Raises CheckpointError for files that are missing, damaged or
    contradict each other, ValueError for arguments that make no sense, NotEnoughMemory before
    anything is taken.
    """
    chosen = choose_device(device)
    path = local_path(source, revision)
    if path.is_file():
        return gguf.load(path, chosen, dtype, packed, sliding_window, quantize)
    if packed and quantize is None:
        raise ValueError(
            f"packed=True is for quantised GGUF files, and {source} is none; quantize makes such a "
            f"model"
        )
    if (path / "config.json").exists():
        return hugging_face.load(path, chosen, dtype, sliding_window, quantize)
    if (path / "params.json").exists():
        return consolidated.load(path, chosen, dtype, sliding_window, quantize)
    raise CheckpointError(
        f"{path} has no config.json (Hugging Face's layout) and no params.json (Mistral's own)"
    )


def local_path(source: str | PathLike[str], revision: str | None = None) -> Path:
    """The file or folder that `source` names, downloaded if it is a name on the hub.

    CheckpointError if it is none.
    """
    path = DEMO if source == "demo" else Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for names on the hub, and {source} is a local path"
            )
        return path
    if isinstance(source, str) and hub.is_name(source):
        return hub.download(source, revision)
    raise CheckpointError(
        f"{source} does not exist; name a folder with a checkpoint, a GGUF file, owner/repo on the "
        f"hub, or demo"
    )


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device that was named, or CUDA where there is one, else the CPU.

    ValueError for one that is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"device {device!r} is not one that PyTorch knows; try 'cuda' or 'cpu'"
        ) from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {device!r} is not supported; try 'cuda' or 'cpu'")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {device!r}: PyTorch {torch.__version__} finds no CUDA GPU; try 'cpu'"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r}: there are {torch.cuda.device_count()} CUDA GPUs, counted from 0"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            f"device {device!r}: PyTorch {torch.__version__} finds no Apple GPU; try 'cpu'"
        )
    return chosen
