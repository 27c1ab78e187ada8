"""What the engines need of a model and of the machine: each function says why one cannot run."""

import importlib.util
import os
from pathlib import Path

import torch

from mistral import Mistral
from mistral_kernels.widths import width_problem

_MOST_ROWS = 64  # MAX_ROWS of the decode kernels, whose file imports Triton
_OLDEST_TRITON = (3, 6)
_OLDEST_GPU = (8, 0)
_DEPENDENT_LAUNCH = ((9, 0), (12, 0))  # from this compute capability, up to but not this one
_DRIVER = Path("/proc/driver/nvidia/version")  # exists on Linux if an NVIDIA driver is loaded


def kernels_problem(model: Mistral, batch_size: int = 1) -> str | None:
    """Why the kernels cannot run the model, with the remedy; None if they should run."""
    if model.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        dtype = str(model.dtype).removeprefix("torch.")
        return f"the kernels know no {dtype}: load the checkpoint in bfloat16"
    return _shape_problem(model) or machine_problem(model.device, batch_size)


def machine_problem(device: torch.device, batch_size: int) -> str | None:
    """Why the kernels cannot run any model: too many rows, Triton, the GPU; None if they can."""
    if batch_size > _MOST_ROWS:
        return (
            f"the kernels take at most {_MOST_ROWS} rows at once, not {batch_size}: use fewer rows"
        )
    return _triton_problem() or _gpu_problem(device)


def _shape_problem(model: Mistral) -> str | None:
    config = model.config
    if reason := width_problem(config, "the kernels"):
        return reason
    if config.head_dim not in (16, 32, 64, 128, 256):
        return f"the kernels need a head_dim of 16, 32, 64, 128 or 256, not {config.head_dim}"
    shared = config.num_attention_heads // config.num_key_value_heads
    if shared > 16:
        return f"the kernels take at most 16 query heads to a key/value head, not {shared}"
    return None


def _triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (Linux)"
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < _OLDEST_TRITON:
        wanted = ".".join(map(str, _OLDEST_TRITON))
        return (
            f"Triton {triton.__version__} is too old, {wanted} is needed: install a newer PyTorch"
        )
    return None


def _gpu_problem(device: torch.device) -> str | None:
    if device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None  # Triton's interpreter runs them on a CPU, slowly
        return f"the kernels need an NVIDIA GPU: {no_gpu(device)}"
    if torch.version.cuda is None:
        return "the kernels need an NVIDIA GPU, and this is an AMD one"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_GPU:
        return "the kernels need compute capability {}.{} or later, not {}.{}".format(
            *_OLDEST_GPU, *capability
        )
    return None


def no_gpu(device: torch.device) -> str:
    """Why the model on `device` is not on a GPU."""
    if torch.cuda.is_available():
        return f"the model is on {device}"
    if not _DRIVER.exists():
        return "no GPU"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA: install one with it"
    return f"PyTorch sees no GPU: its CUDA {torch.version.cuda} may need a newer NVIDIA driver"


def cpu_problem(device: torch.device) -> str | None:
    """Why the CPU engine cannot run on this machine; None if it should."""
    if device.type != "cpu":
        return f"the CPU engine needs the model on the CPU, and it is on {device}: --device cpu"
    if importlib.util.find_spec("numba") is None:
        return "the CPU engine needs numba: pip install numba"
    return None


def has_dependent_launch(device: torch.device) -> bool:
    """Whether kernels may begin on this GPU before the previous kernel of a stream has ended."""
    oldest, first_without = _DEPENDENT_LAUNCH
    return oldest <= torch.cuda.get_device_capability(device) < first_without
