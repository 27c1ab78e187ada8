"""Which engine to run a model with, and why.

    eager     mistral.Decoder                     plain PyTorch, everywhere
    compile   mistral.engine.compiled.CompiledDecoder    the same, its step compiled; takes seconds
              to begin
    kernels   mistral_kernels.Decoder             the fastest; needs Triton and an NVIDIA GPU

All have the same methods and give the same numbers up to rounding. `auto` is kernels, then compile,
then eager on a GPU, and eager without one, where nothing needs to be compiled first.
"""

import gc
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch

from mistral import Decoder, Mistral, NotEnoughMemory
from mistral.engine.decoder import Engine
from mistral.quantization.packed import Packed

ENGINES = ("auto", "eager", "compile", "kernels")
MOST_ROWS = 16
OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)
DRIVER = Path("/proc/driver/nvidia/version")  # where Linux says that an NVIDIA driver is loaded


def open_engine(
    name: str,
    model: Mistral,
    batch_size: int = 1,
    max_tokens: int | None = None,
    *,
    slack: int = 16,
    say: Callable[[str], object] = lambda line: None,
) -> tuple[Engine, str]:
    """A decoder for `model`, and one line about it: "engine: kernels (CUDA sm_90, Triton 3.6)".

    name   auto, eager, compile or kernels
    say    takes a line when something begins that may take minutes
    The other arguments are those of `mistral.Decoder`.

    `auto` takes the first engine that works, and its line says why it is not a faster one. Any
    other name is that engine or a ValueError that says what is in its way. NotEnoughMemory where
    the cache does not fit.
    """
    if name not in ENGINES:
        raise ValueError(f"there is no engine {name!r}; there are {', '.join(ENGINES)}")
    sizes = dict(batch_size=batch_size, max_tokens=max_tokens, slack=slack)
    if name == "eager":
        return Decoder(model, **sizes), "engine: eager"
    if name == "compile":
        return _open_compiled(model, sizes), f"engine: compile ({_place(model)})"
    if model.device.type == "cuda" and kernels_problem(model, batch_size) is None:
        say(
            "trying the kernels; those that this machine has not compiled yet take some minutes "
            "once"
        )
    if name == "kernels":
        decoder = _open_kernels(model, sizes)
        return decoder, f"engine: kernels ({_kernels_place(model)}){_slow_part(decoder)}"
    if model.device.type != "cuda":
        return Decoder(model, **sizes), f"engine: eager: {_no_gpu(model)}"
    problems, in_planes = [], _in_planes(model)
    for name, open_it, place in (
        ("kernels", _open_kernels, _kernels_place),
        ("compile", _open_compiled, _place),
    ):
        try:
            decoder = open_it(model, sizes)
            return decoder, "; ".join(
                [f"engine: {name} ({place(model)}){_slow_part(decoder)}", *problems]
            )
        except (ValueError, NotEnoughMemory) as error:
            problems.append(f"not {name}: {error}")
        _put_back(
            model, in_planes
        )  # here, where no traceback holds on to the memory of what failed
    return Decoder(model, **sizes), "; ".join(["engine: eager", *problems])


def kernels_problem(model: Mistral, batch_size: int = 1) -> str | None:
    """What is in the way of the kernels, with the remedy; None where they should run."""
    if model.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return (
            f"the kernels know no {str(model.dtype).removeprefix('torch.')}: load the "
            f"checkpoint in bfloat16"
        )
    if batch_size > MOST_ROWS:
        return (
            f"the kernels take at most {MOST_ROWS} rows at once, not {batch_size}: use smaller "
            f"batches"
        )
    return _shape_problem(model) or _triton_problem() or _gpu_problem(model)


def _shape_problem(model: Mistral) -> str | None:
    config = model.config
    widths = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads * head_dim": config.num_attention_heads * config.head_dim,
    }
    for name, width in widths.items():
        if width % 32:
            return f"the kernels need {name} to be a multiple of 32, not {width}"
    if config.head_dim not in (16, 32, 64, 128, 256):
        return f"the kernels need a head_dim of 16, 32, 64, 128 or 256, not {config.head_dim}"
    if (shared := config.num_attention_heads // config.num_key_value_heads) > 16:
        return f"the kernels take at most 16 query heads to a key/value head, not {shared}"
    return None


def _triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (Linux)"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        wanted = ".".join(map(str, OLDEST_TRITON))
        return (
            f"Triton {triton.__version__} is too old, {wanted} is needed: install a newer PyTorch"
        )
    return None


def _gpu_problem(model: Mistral) -> str | None:
    if model.device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None  # slowly, on a CPU
        return f"the kernels need an NVIDIA GPU: {_no_gpu(model)}"
    if torch.version.cuda is None:
        return "the kernels need an NVIDIA GPU, and this is an AMD one"
    capability = torch.cuda.get_device_capability(model.device)
    if capability < OLDEST_GPU:
        return "the kernels need compute capability {}.{} or later, not {}.{}".format(
            *OLDEST_GPU, *capability
        )
    return None


def _no_gpu(model: Mistral) -> str:
    """Why a model is on no GPU."""
    if torch.cuda.is_available():
        return f"the model is on {model.device}"
    if not DRIVER.exists():
        return "no GPU"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA: install one with it"
    return f"PyTorch sees no GPU: its CUDA {torch.version.cuda} may need a newer NVIDIA driver"


def _open_compiled(model: Mistral, sizes: dict) -> Engine:
    from mistral.engine.compiled import CompiledDecoder

    try:
        return CompiledDecoder(model, **sizes)
    except (ValueError, NotEnoughMemory):
        raise
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(f"the compiled step does not fit: {_one_line(error)}") from error
    except (
        Exception
    ) as error:  # what the compiled code or its CUDA graph meet when they run for the first time
        reason = f"{type(error).__name__}: {_one_line(error)}"
        raise ValueError(
            f"the compiled step does not run here: {reason}; use another engine"
        ) from error


def _open_kernels(model: Mistral, sizes: dict) -> Engine:
    if problem := kernels_problem(model, sizes["batch_size"]):
        raise ValueError(problem)
    try:
        from mistral_kernels.decoder import Decoder as KernelsDecoder
        from mistral_kernels.trial import expected_logits, try_out

        if model.device.type != "cuda":  # in the interpreter a trial takes minutes
            return KernelsDecoder(model, **sizes)
        expected = expected_logits(model)
        decoder = KernelsDecoder(model, **sizes)
        try_out(decoder, expected)
        return decoder
    except NotEnoughMemory:
        raise
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(f"the kernels' buffers do not fit: {_one_line(error)}") from error
    except Exception as error:  # whatever Triton's compiler, its assembler or the driver say
        reason = f"{type(error).__name__}: {_one_line(error)}"
        remedy = (
            "update the NVIDIA driver and Triton (3.6 needs a C compiler, gcc), or use "
            "another engine"
        )
        raise ValueError(f"the kernels do not run here: {reason}; {remedy}") from error


def _in_planes(model: Mistral) -> set[Packed]:
    """The packed layers that kernels have taken over."""
    return {
        module
        for module in model.modules()
        if isinstance(module, Packed) and module.keeper is not None
    }


def _put_back(model: Mistral, before: set[Packed]) -> None:
    """Undo what kernels that do not run have done: other engines would make the blocks of their
    planes at every use.

    before  layers that were in planes already, for another decoder that works with them
    """
    gc.collect()
    for module in _in_planes(model) - before:
        module.take_back()


def _slow_part(decoder: Engine) -> str:
    """What of a packed model is not multiplied as it is."""
    kinds = getattr(decoder, "unpacked_kinds", None)
    return f", {', '.join(kinds)} unpacked at every step: slow" if kinds else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _place(model: Mistral) -> str:
    if model.device.type == "cuda" and torch.version.cuda:
        return "CUDA sm_{}{}".format(*torch.cuda.get_device_capability(model.device))
    return (
        f"{model.device.type}, {torch.get_num_threads()} threads"
        if model.device.type == "cpu"
        else "GPU"
    )


def _kernels_place(model: Mistral) -> str:
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    interpreter = "" if model.device.type == "cuda" else ", its interpreter"
    return f"{_place(model)}, Triton {version}{interpreter}"
