"""What a folder, or a repository, holds that is not a checkpoint, told from the names of its files.

Only asked if there are no weights under a name that is read.
"""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from mistral.errors import CheckpointError, one_line
from mistral.files import read_json

ADAPTER = "adapter_config.json"
_IN_TRAINING = "the state of a training run, without the model's weights"

# (patterns of names, what is there and what to do); the first row that fits counts. {found} is the
# first file that fits.
_KINDS = [
    (
        "*.gguf.part*of*  *.gguf-split-*",
        "has {found}, a piece of a GGUF file: join all pieces in order (cat PIECES > model.gguf)",
    ),
    (
        "adapter_model.*",
        "has {found}, a LoRA adapter without its adapter_config.json: merge the adapter into its "
        "base model, and name the result",
    ),
    (
        "model-*-of-*.safetensors",
        "has the shard {found}, but no model.safetensors.index.json, which says where each tensor "
        "is: download that file too",
    ),
    (
        "pytorch_model-*-of-*.bin",
        "has the shard {found}, but no pytorch_model.bin.index.json, which says where each tensor "
        "is: download that file too",
    ),
    (
        "zero_to_fp32.py  global_step*  */zero_pp_rank_*",
        "has DeepSpeed's shards of a training run ({found}), not a checkpoint: run "
        "`python zero_to_fp32.py . pytorch_model.bin` in it",
    ),
    (
        "*.distcp  */*.distcp",
        "has FSDP's shards of a training run ({found}), not a checkpoint: run "
        "`accelerate merge-weights` on it",
    ),
    ("model_index.json", "is a diffusers pipeline ({found}), not a language model"),
    ("modules.json", "is a sentence-transformers model ({found}), which embeds and has no output"),
    ("*.onnx  */*.onnx", "has an ONNX model ({found}); download the safetensors or a GGUF file"),
    (
        "openvino_*.xml  openvino_*.bin",
        "has an OpenVINO model ({found}); download the safetensors or a GGUF file",
    ),
    (
        "mlc-chat-config.json  params_shard_*.bin",
        "has an MLC model ({found}); download the safetensors or a GGUF file",
    ),
    (
        "weights.npz  weights.*.npz  *.mlpackage  *.mlmodelc",
        "has a model for Apple's MLX or Core ML ({found}); download the safetensors or a GGUF file",
    ),
    (
        "tf_model*.h5  flax_model*.msgpack  *.nemo  *.engine  *.ckpt.index",
        "has the weights of another framework ({found}); download the safetensors or a GGUF file",
    ),
    (
        "ggml-*.bin  *ggml*.bin",
        "has {found}, ggml's old format: download a GGUF file, or convert it",
    ),
    ("*.llamafile", "has {found}, a program with a GGUF file in it: `unzip` it, name the .gguf"),
    ("*.zip  *.tar  *.tar.gz  *.tgz  *.7z", "has an archive, {found}: unpack it"),
    ("optimizer.*  scheduler.pt  rng_state*.pth  trainer_state.json", f"has {_IN_TRAINING}"),
    (
        "*.safetensors",
        "has {found}, which is not a name that is read: if it is the whole model in Hugging "
        "Face's names, rename it to model.safetensors",
    ),
    (
        "*.pth  *.pt  *.ckpt  pytorch_*.bin",
        "has {found}, which is not a name that is read: pytorch_model.bin and consolidated.00.pth "
        "are",
    ),
]


def other_kind(names: Iterable[str], fetch: Callable[[str], Path]) -> str | None:
    """What is there instead of a checkpoint and what to do, to be said after the folder's name.

    names  of the files, relative to the folder
    fetch  the local path of one of them

    None: nothing that is known.
    """
    names = sorted(names)
    if ADAPTER in names:
        return _adapter(fetch(ADAPTER))
    for patterns, sentence in _KINDS:
        for name in names:
            if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
                return sentence.format(found=one_line(name, 100))
    return None


def _adapter(path: Path) -> str:
    """peft's adapter_config.json names the kind of adapter, and its base model."""
    try:
        config = read_json(path)
    except CheckpointError:
        config = {}
    base = one_line(str(config.get("base_model_name_or_path") or "its base model"), 100)
    kind = one_line(str(config.get("peft_type") or "LORA"), 100).replace("LORA", "LoRA")
    return (
        f"is a {kind} adapter ({ADAPTER}), not a model: merge it into {base} (peft: "
        "AutoPeftModelForCausalLM.from_pretrained, merge_and_unload, save_pretrained), "
        "and name the result"
    )
