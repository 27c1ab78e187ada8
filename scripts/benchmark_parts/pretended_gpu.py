"""A GPU that is not there: tensors without values on "cuda", and a Triton driver that runs nothing.

After `install` a script takes every path that it takes on a GPU, the CUDA graphs included, without
one and without memory: PyTorch's fake tensors have shapes, dtypes and devices alone. What the host
reads back is zero, or True. Triton specializes each kernel for its arguments as it would for a GPU,
and either compiles it or only notes it.

It is for rehearsals and for compiling ahead. No figure that such a process prints means anything,
and `install` cannot be undone: give it a process of its own.
"""

import json
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

NAME = "no GPU: a rehearsal"


@dataclass(frozen=True)
class Variant:
    """A kernel, specialized for its arguments, as `JITFunction.preload` takes it."""

    function: Any  # of Triton: the kernel
    key: str
    data: str  # JSON
    early: bool  # dependent launch


@dataclass
class Recording:
    """What a process has asked of the GPU that is not there.

    compiled  the kernels that Triton's cache on disk did not have
    faults    what must not happen while a CUDA graph is recorded: a compilation, a copy between
              the host and the device, a read back
    """

    variants: dict[tuple[str, str], Variant] = field(default_factory=dict)  # by name and key
    launches: list[tuple[str, bool]] = field(default_factory=list)  # name; launched early (PDL)
    compiled: list[str] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)  # how many launches each CUDA graph has
    faults: list[str] = field(default_factory=list)
    capturing: bool = False

    def fault(self, what: str) -> None:
        """Note what must not happen, if a graph is being recorded."""
        if self.capturing:
            self.faults.append(what)


def install(capability: int = 90, compiles: bool = True) -> Recording:
    """Pretend in this process, from now on, that there is a GPU of this compute capability.

    compiles  whether kernels are compiled, by Triton's own compiler; else they are only noted

    Raises ValueError if Triton's interpreter has replaced its compiler.
    """
    if knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET=1 replaces Triton's compiler: unset it")
    recording = Recording()
    _replace_triton(recording, capability, compiles)
    _replace_cuda(recording, capability)
    _replace_reads(recording)
    FakeTensorMode(allow_non_fake_inputs=True).__enter__()
    return recording


class _Driver:
    """What Triton asks of a driver."""

    def __init__(self, recording: Recording, capability: int):
        self._target = GPUTarget("cuda", capability, 32)
        shared = 232_448 if capability in range(90, 120) else 101_376
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": shared},
            # module, function, registers, spilled bytes, threads of a CTA
            load_binary=lambda name, kernel, shared, device: (1, 1, 32, 0, 1024),
        )

        def launcher(source: Any, metadata: Any) -> Callable[..., None]:
            early = bool(metadata.launch_pdl)
            return lambda *_: recording.launches.append((metadata.name, early))

        self.launcher_cls = launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def _replace_triton(recording: Recording, capability: int, compiles: bool) -> None:
    driver.set_active(_Driver(recording, capability))

    def before_compiling(*, key: str, fn: Any, compile: dict, **_: Any) -> bool:
        """True: Triton shall compile and launch nothing."""
        variant = fn.name, str(key)
        if variant not in recording.variants:
            data = compile["specialization_data"]
            early = bool(json.loads(data)["options"]["launch_pdl"])
            recording.variants[variant] = Variant(fn.jit_function, str(key), data, early)
            recording.fault(f"{fn.name} is compiled")
        if not compiles:
            recording.launches.append((fn.name, recording.variants[variant].early))
        return not compiles

    def after_compiling(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            recording.compiled.append(src.name)

    knobs.runtime.jit_cache_hook = before_compiling
    knobs.compilation.listener = after_compiling


class _Watch(TorchDispatchMode):
    """Notes copies between the host and the device, which cannot be part of a CUDA graph."""

    def __init__(self, recording: Recording):
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence = (), kwargs: dict | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        devices = {t.device.type for t in (*args, made) if isinstance(t, Tensor) and t.dim()}
        if len(devices) > 1:
            name = function.__name__.split(".")[0]
            self._recording.fault(f"{name} copies between the host and the device")
        return made


class _Graph:
    """In the place of torch.cuda.CUDAGraph."""

    def replay(self) -> None:
        """Nothing runs."""

    def reset(self) -> None:
        """There is nothing to free."""


def _replace_cuda(recording: Recording, capability: int) -> None:
    """`torch.cuda` of a machine with one GPU."""

    class Graph(_Nothing):
        """In the place of the context `torch.cuda.graph`."""

        def __enter__(self) -> None:
            recording.capturing = True
            self.before = len(recording.launches)
            self.watch = _Watch(recording)
            self.watch.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.watch.__exit__(*error)
            recording.capturing = False
            recording.graphs.append(len(recording.launches) - self.before)

    facts = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": NAME,
        "get_device_capability": divmod(capability, 10),
        "get_device_properties": types.SimpleNamespace(
            name=NAME, multi_processor_count=132, total_memory=140 << 30, major=capability // 10,
            minor=capability % 10, L2_cache_size=50 << 20,
        ),
        "mem_get_info": (140 << 30, 140 << 30),
        "graph_pool_handle": (0, 0),
        "current_stream": _Nothing(),
    }  # fmt: skip
    for name, value in facts.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        setattr(torch.cuda, name, lambda *_: 0)
    torch.cuda.max_memory_reserved = lambda *_: 0
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_stream"):
        setattr(torch.cuda, name, lambda *_, name=name: recording.fault(f"{name} is called"))
    for name in ("Event", "Stream", "device", "device_of", "stream"):
        setattr(torch.cuda, name, _Nothing)
    torch.cuda.is_current_stream_capturing = lambda: recording.capturing
    torch.cuda.CUDAGraph = _Graph
    torch.cuda.graph = Graph
    torch.version.cuda = torch.version.cuda or "13.0"
    profile = torch.profiler.profile  # a build for CPUs knows no events of a GPU
    torch.profiler.profile = lambda activities, **options: profile(activities=None, **options)


class _Nothing:
    """An event, a stream or a context of the GPU that is not there."""

    device_index = 0

    def __init__(self, *_: Any, **__: Any):
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        """Nothing runs that it could follow."""

    def synchronize(self) -> None:
        """Nothing runs that it could wait for."""

    def wait_stream(self, *_: Any) -> None:
        """Nothing runs that it could wait for."""

    def query(self) -> bool:
        """All is done."""
        return True

    def elapsed_time(self, end: Any) -> float:
        """A millisecond: nothing divides by zero."""
        return 1.0


def _replace_reads(recording: Recording) -> None:
    """What needs values, or a device that PyTorch was not built for."""

    def value(tensor: Tensor) -> bool | int | float:
        recording.fault("a value is read back")
        if tensor.dtype == torch.bool:
            return True
        return 0.0 if tensor.dtype.is_floating_point else 0

    def values(tensor: Tensor) -> Any:
        nested = value(tensor)
        for size in reversed(tensor.shape):
            nested = [nested] * size
        return nested

    def copy(tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """`Tensor.copy_`: PyTorch's own asks for CUDA itself, as its indexing does."""
        if tensor.device.type != source.device.type:
            recording.fault("copy_ copies between the host and the device")
        source.expand(tensor.shape)  # RuntimeError if the shapes do not fit
        return tensor

    def contiguous(tensor: Tensor) -> Tensor:
        """`Tensor.contiguous`, likewise."""
        if tensor.is_contiguous():
            return tensor
        return torch.ops.aten.clone(tensor, memory_format=torch.contiguous_format)

    FakeTensor.to = _to
    FakeTensor.copy_ = copy
    FakeTensor.contiguous = contiguous
    FakeTensor.item = value
    FakeTensor.tolist = values
    FakeTensor.__bool__ = lambda tensor: bool(recording.fault("a value is read back") or True)
    FakeTensor.__int__ = FakeTensor.__index__ = lambda tensor: int(value(tensor))
    FakeTensor.__float__ = lambda tensor: float(value(tensor))
    # Of the place inside its storage, which says how a pointer is aligned.
    FakeTensor.data_ptr = lambda tensor: tensor.storage_offset() * tensor.itemsize
    FakeTensor.__getitem__ = _item
    FakeTensor.__setitem__ = _set_item
    torch.equal = lambda one, other: bool(recording.fault("equal is read back") or True)
    torch.tensor = _tensor
    nn.Module._apply = _convert


_real_to = Tensor.to


def _to(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """`Tensor.to`: without a number PyTorch's own asks CUDA which GPU is meant."""

    def numbered(argument: Any) -> Any:
        is_device = isinstance(argument, (str, torch.device))
        return torch.device("cuda", 0) if is_device and str(argument) == "cuda" else argument

    options = {name: numbered(value) for name, value in options.items()}
    return _real_to(tensor, *map(numbered, arguments), **options)


_real_tensor = torch.tensor


def _tensor(data: Any, device: Any = None, **options: Any) -> Tensor:
    """`torch.tensor`, by way of the host: PyTorch's own allocates on the device."""
    made = _real_tensor(data, **options)
    made.constant = None  # its values, which PyTorch would compute with
    return made.to(device or "cpu")


def _convert(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """`Module._apply`: PyTorch's own fails for a fake tensor that has a weak reference."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    made = function(parameter)
                owner._parameters[name] = nn.Parameter(made, parameter.requires_grad)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = function(buffer)
    return module


def _item(tensor: Tensor, index: Any) -> Tensor:
    """`tensor[index]`: PyTorch's own asks for CUDA itself, which a build for CPUs lacks."""
    view, indices = _view(tensor, index)
    return torch.ops.aten.index(view, indices) if indices else view


def _set_item(tensor: Tensor, index: Any, value: Any) -> None:
    view, indices = _view(tensor, index)
    if indices:
        value = torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device)
        torch.ops.aten.index_put_(view, indices, value)
    elif isinstance(value, Tensor):
        view.copy_(value)
    else:
        view.fill_(value)


def _view(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The view that numbers, slices and None make; then the indices that are tensors."""
    index = index if isinstance(index, tuple) else (index,)
    given = [i for i in index if i is not None and i is not Ellipsis]
    if not any(i is Ellipsis for i in index):
        index = (*index, Ellipsis)
    indices: list[Tensor | None] = []
    dim = 0
    for i in index:
        if i is Ellipsis:
            skipped = tensor.dim() - dim - (len(given) - _taken(index))
            indices += [None] * skipped
            dim += skipped
        elif i is None:
            tensor = tensor.unsqueeze(dim)
            indices.append(None)
            dim += 1
        elif isinstance(i, slice):
            tensor = torch.ops.aten.slice(tensor, dim, i.start, i.stop, i.step or 1)
            indices.append(None)
            dim += 1
        elif isinstance(i, (Tensor, list)):
            indices.append(torch.as_tensor(i, device=tensor.device))
            dim += 1
        else:
            tensor = tensor.select(dim, i.__index__())
    return tensor, indices if any(i is not None for i in indices) else []


def _taken(index: tuple) -> int:
    """How many dimensions the entries before the Ellipsis take."""
    before = index[: next(n for n, i in enumerate(index) if i is Ellipsis)]
    return sum(i is not None for i in before)
