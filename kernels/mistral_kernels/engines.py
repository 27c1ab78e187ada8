"""The choice of an engine for a model, with the reason.

    eager     mistral.Decoder                            plain PyTorch, on every device
    compile   mistral.engine.compiled.CompiledDecoder    a compiled step; takes seconds to start
    kernels   mistral_kernels.Decoder                    the fastest; needs Triton and an NVIDIA GPU
    cpu       mistral_kernels.cpu.Decoder                the fastest on a CPU; needs numba

All are an `Engine` (mistral/engine/base.py), with the same logits up to rounding. `auto` tries
kernels, compile and eager in this order on a GPU, and cpu and eager on a CPU. On a GPU that has
dependent launch it tries the kernels with it first, and before that in a process of its own
(apart.py); `kernels` never uses it.
"""

import gc
from collections.abc import Callable
from functools import partial

import torch

from mistral import Decoder, Mistral, NotEnoughMemory
from mistral.engine.base import Engine
from mistral.quantization.packed import Packed
from mistral_kernels.apart import problem_apart
from mistral_kernels.requirements import (
    cpu_problem,
    has_dependent_launch,
    kernels_problem,
    machine_problem,
    no_gpu,
)

ENGINES = ("auto", "eager", "compile", "kernels", "cpu")
_MOST_ROWS_EARLY = 16  # with dependent launch: MAX_BATCH there
_EARLY = ", dependent launch, which another process has tried first"


def open_engine(
    name: str,
    model: Mistral,
    batch_size: int = 1,
    max_tokens: int | None = None,
    *,
    slack: int = 16,
    say: Callable[[str], object] = lambda line: None,
    progress: Callable[[int, int, str], object] = lambda done, total, name: None,
) -> tuple[Engine, str]:
    """A decoder for `model`, and one line about it: "engine: kernels (CUDA sm_90, Triton 3.6)".

    name      auto, eager, compile, kernels or cpu
    say       receives a line before work that may take minutes
    progress  called while kernels for a CPU are compiled, with the number of those that are done,
              the number of all, and the name of the last one
    The other arguments are those of `mistral.Decoder`.

    `auto` takes the first engine that works, and its line says why it is not a faster one. Any
    other name is that engine, or a ValueError that says why it cannot run. Raises NotEnoughMemory
    if the cache does not fit.
    """
    _check_name(name)
    sizes = dict(batch_size=batch_size, max_tokens=max_tokens, slack=slack)
    if name == "eager":
        return Decoder(model, **sizes), "engine: eager"
    if name == "compile":
        decoder, place = _open_compiled(model, sizes)
        return decoder, f"engine: compile ({place})"
    progress = _announced(say, progress)
    if name == "cpu":
        decoder = _open_cpu(model, sizes, say, progress)
        return decoder, f"engine: cpu ({_threads()}){_cpu_notes(model)}"
    if model.device.type == "cuda" and kernels_problem(model, batch_size) is None:
        say("trying the kernels; the first time on a machine, compiling them takes some minutes")
    if name == "kernels":
        decoder, place = _open_kernels(model, sizes)
        return decoder, f"engine: kernels ({place}){_slow_part(decoder)}"
    if model.device.type != "cuda":
        return _open_without_gpu(model, sizes, say, progress)
    return _open_fastest(model, sizes)


def check_engine(
    name: str, device: torch.device, *, packed: bool = False, batch_size: int = 1
) -> None:
    """ValueError for an engine that cannot run on `device`, whatever the model's sizes are.

    It needs no model: call it before weights are loaded, which may take minutes.

    packed  whether the model will have packed weights
    """
    _check_name(name)
    if name == "compile" and packed:
        from mistral.engine.compiled import NO_PACKED

        raise ValueError(NO_PACKED)
    if name == "kernels" and (problem := machine_problem(device, batch_size)):
        raise ValueError(problem)
    if name == "cpu" and (problem := cpu_problem(device)):
        raise ValueError(problem)


def _check_name(name: str) -> None:
    if name not in ENGINES:
        raise ValueError(f"there is no engine {name!r}; there are {', '.join(ENGINES)}")


def _open_fastest(model: Mistral, sizes: dict) -> tuple[Engine, str]:
    """The first engine that works on a GPU, and its line with the problems of faster ones."""
    problems: list[str] = []
    regrouped = _regrouped(model)
    quick_kernels = partial(_open_quick_kernels, problems=problems)
    for name, open_it in (("kernels", quick_kernels), ("compile", _open_compiled)):
        try:
            decoder, place = open_it(model, sizes)
            line = f"engine: {name} ({place}){_slow_part(decoder)}"
            return decoder, "; ".join([line, *problems])
        except (ValueError, NotEnoughMemory) as error:
            problems.append(f"not {name}: {error}")
        # After the `except` block: its traceback keeps the memory of the failed engine alive.
        _check_gpu(model.device, problems)
        _put_back(model, regrouped)
    return Decoder(model, **sizes), "; ".join(["engine: eager", *problems])


def _open_quick_kernels(model: Mistral, sizes: dict, problems: list[str]) -> tuple[Engine, str]:
    """The kernels with dependent launch if they can have it and pass both trials, else without.

    problems  receives why they are without
    """
    batch_size = sizes["batch_size"]
    problem = kernels_problem(model, batch_size)
    if problem or batch_size > _MOST_ROWS_EARLY or not has_dependent_launch(model.device):
        return _open_kernels(model, sizes)
    if problem := problem_apart(model, batch_size):
        problems.append(f"not kernels with dependent launch: {problem}")
        return _open_kernels(model, sizes)
    regrouped = _regrouped(model)
    try:
        return _open_kernels(model, sizes, pdl=True)
    except ValueError as error:  # plain launches need the same memory, but may compute right
        problems.append(f"not kernels with dependent launch: {error}")
    _check_gpu(model.device, problems)
    _put_back(model, regrouped)  # see `_open_fastest`
    return _open_kernels(model, sizes)


def _check_gpu(device: torch.device, problems: list[str]) -> None:
    """ValueError if the GPU takes no more work from this process, whatever engine it is for."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise ValueError(
            f"the GPU takes no more work from this process ({_one_line(error)}) after this: "
            f"{'; '.join(problems)}; start again with another engine, and please report it"
        ) from error


def _open_without_gpu(
    model: Mistral,
    sizes: dict,
    say: Callable[[str], object],
    progress: Callable[[int, int, str], object],
) -> tuple[Engine, str]:
    """The CPU's engine, or eager, and its line with the problem of the CPU's."""
    reason = no_gpu(model.device)
    regrouped = _regrouped(model)
    try:
        decoder = _open_cpu(model, sizes, say, progress)
        return decoder, f"engine: cpu ({_threads()}): {reason}{_cpu_notes(model)}"
    except ValueError as error:
        problem = str(error)
    _put_back(model, regrouped)
    return Decoder(model, **sizes), f"engine: eager: {reason}; not cpu: {problem}"


def _open_compiled(model: Mistral, sizes: dict) -> tuple[Engine, str]:
    """The engine, and where it runs."""
    from mistral.engine.compiled import CompiledDecoder

    try:
        return CompiledDecoder(model, **sizes), _place(model)
    except (ValueError, NotEnoughMemory):
        raise
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(f"the compiled step does not fit: {_one_line(error)}") from error
    except Exception as error:  # the first run of the compiled code or of its CUDA graph failed
        reason = f"{type(error).__name__}: {_one_line(error)}"
        raise ValueError(
            f"the compiled step does not run here: {reason}; use another engine"
        ) from error


def _announced(
    say: Callable[[str], object], progress: Callable[[int, int, str], object]
) -> Callable[[int, int, str], object]:
    """`progress`, and a line before it."""

    def report(done: int, total: int, name: str) -> None:
        if done == 0:
            say(f"compiling {total} kernels for this CPU; the next start finds them")
        progress(done, total, name)

    return report


def _open_cpu(
    model: Mistral,
    sizes: dict,
    say: Callable[[str], object],
    progress: Callable[[int, int, str], object],
) -> Engine:
    if problem := cpu_problem(model.device):
        raise ValueError(problem)
    try:
        from mistral_kernels.cpu import Decoder as CpuDecoder
        from mistral_kernels.cpu.weights import problem as weights_problem
        from mistral_kernels.cpu.weights import widening_note

        if not weights_problem(model) and (note := widening_note(model)):
            say(note)
        return CpuDecoder(model, **sizes, progress=progress)
    except (ValueError, NotEnoughMemory):
        raise
    except Exception as error:  # from numba: it may not fit NumPy or Python, or fail to compile
        reason = f"{type(error).__name__}: {_one_line(error)}"
        raise ValueError(
            f"the CPU kernels do not run here: {reason}; update numba, or use another engine"
        ) from error


def _cpu_notes(model: Mistral) -> str:
    """The end of the CPU engine's line: what takes more time or memory than it should."""
    from mistral_kernels.cpu.compiled import cache_problem
    from mistral_kernels.cpu.weights import widened_note

    problem = cache_problem()
    recompiled = f"; compiled at every start: {problem}" if problem else ""
    widened = widened_note(model)
    return recompiled + (f"; {widened}" if widened else "")


def _open_kernels(model: Mistral, sizes: dict, pdl: bool = False) -> tuple[Engine, str]:
    """The engine, where it runs, and how far its logits are from the model's own.

    pdl  with dependent launch, which the GPU must have
    """
    if problem := kernels_problem(model, sizes["batch_size"]):
        raise ValueError(problem)
    try:
        from mistral_kernels.decoder import Decoder as KernelsDecoder
        from mistral_kernels.trial import WrongLogits, expected_logits, try_out
    except Exception as error:  # Triton does not fit this Python or this system
        raise ValueError(_does_not_run(error)) from error
    try:
        if model.device.type != "cuda":  # a trial in the interpreter would take minutes
            return KernelsDecoder(model, **sizes), _kernels_place(model)
        expected = expected_logits(model)  # before the decoder regroups the model's weights
        decoder = KernelsDecoder(model, **sizes, pdl=pdl)
        distance = try_out(decoder, expected)
        place = _kernels_place(model) + (_EARLY if pdl else "")
        return decoder, f"{place}, logits {distance:.1%} from eager's"
    except NotEnoughMemory:
        raise
    except WrongLogits as error:
        raise ValueError(
            f"the kernels compute something else here: {error}; use another engine, and please "
            "report it"
        ) from error
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(f"the kernels' buffers do not fit: {_one_line(error)}") from error
    except Exception as error:  # from Triton's compiler, its assembler or the driver
        raise ValueError(_does_not_run(error)) from error


def _does_not_run(error: Exception) -> str:
    return (
        f"the kernels do not run here: {type(error).__name__}: {_one_line(error)}; update the "
        "NVIDIA driver and Triton (3.6 needs a C compiler, gcc), or use another engine"
    )


def _regrouped(model: Mistral) -> set[Packed]:
    """The packed layers whose blocks an engine holds in another order."""
    packed = {module for module in model.modules() if isinstance(module, Packed)}
    return {module for module in packed if module.keeper is not None}


def _put_back(model: Mistral, before: set[Packed]) -> None:
    """Give layers their blocks back after an engine failed.

    Other engines would restore the blocks at every use.

    before  layers that were regrouped already, for another decoder that works with them
    """
    gc.collect()
    for module in _regrouped(model) - before:
        module.take_back()


def _slow_part(decoder: Engine) -> str:
    """The end of an engine's line: which quantization types are unpacked at every step."""
    if not decoder.unpacked_kinds:
        return ""
    return f", {', '.join(decoder.unpacked_kinds)} unpacked at every step: slow"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'' if count == 1 else 's'}"


def _place(model: Mistral) -> str:
    """The device that an engine runs on."""
    if model.device.type == "cpu":
        return f"cpu, {_threads()}"
    if model.device.type == "cuda" and torch.version.cuda:
        return "CUDA sm_{}{}".format(*torch.cuda.get_device_capability(model.device))
    return "GPU"


def _kernels_place(model: Mistral) -> str:
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    interpreter = "" if model.device.type == "cuda" else ", its interpreter"
    return f"{_place(model)}, Triton {version}{interpreter}"
