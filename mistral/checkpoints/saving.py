"""Write a model: in Hugging Face's layout, or as a GGUF file."""

from os import PathLike

from mistral.checkpoints import hugging_face
from mistral.engine.given import only_model
from mistral.files import expanded
from mistral.model import Mistral
from mistral.tokenizer import Tokenizer


def save(model: Mistral, tokenizer: Tokenizer | None, folder: str | PathLike[str]) -> None:
    """Write a folder that `mistral.load`, transformers and llama.cpp's converter read.

    A new folder appears with all of its files. In one that exists, files of the same names are
    replaced after all are written, on Linux all in one step. A process that is killed leaves the
    earlier files or the new ones. On other systems, and in a folder with folders in it, it may also
    leave one without config.json, which no reader accepts.

    Without a tokenizer only config and weights are written. Raises ValueError for a packed model,
    OSError, with nothing changed, if a file cannot be written.
    """
    hugging_face.save(only_model(model), tokenizer, expanded(folder))


def export_gguf(
    model: Mistral,
    tokenizer: Tokenizer,
    path: str | PathLike[str],
    type: str | None = "Q8_0",
    name: str | None = None,
) -> None:
    """Write a GGUF file for `mistral.load` and llama.cpp, whole or not at all. Needs gguf.

    type  of all matrices: F32, F16, BF16, Q8_0 or Q4_0. None, for a packed model: as they are
    name  of the model, for those who list the file

    Raises ValueError for another type and for what the format cannot express, CheckpointError for
    values that the type cannot hold, OSError if the file cannot be written. A checkpoint that is
    not loaded yet takes less memory with scripts/export_gguf.py.
    """
    from mistral.checkpoints.gguf_export import export  # gguf is needed for nothing else

    export(only_model(model), tokenizer, expanded(path), type, name)
