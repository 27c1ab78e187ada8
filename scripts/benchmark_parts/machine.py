"""What the machine is, and the two rates that bound everything else, measured."""

import importlib.util
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from mistral_kernels.cpu.pages import ask_for_large

# nvidia-smi's names, and ours
_STATE = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "watts",
    "temperature.gpu": "celsius",
}


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, run: Callable[[], object]) -> float:
    """How long `run` takes, until the device has done it."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s of the quickest way to read 1 GB of random numbers and do nothing else.

    Sums by PyTorch, and on a GPU a kernel that only reads (reading.py). A GPU has done one in a
    quarter of a millisecond, and starting it and waiting for it would count: it does 20. On a CPU
    the numbers are in large pages, as the weights of its engine are.
    """
    numbers = torch.empty(250_000_000, device=device)
    if device.type == "cpu":
        ask_for_large(numbers)
    numbers.uniform_()
    times = 20 if device.type == "cuda" else 1
    sums = [numbers.sum, numbers.view(25_000, -1).sum, lambda: numbers.view(25_000, -1).sum(-1)]
    quickest = min(
        seconds(device, lambda run=run: [run() for _ in range(times)])
        for _ in range(4)
        for run in sums
    )
    return max(times * 1e9 / quickest, _kernel_bandwidth(device) if times > 1 else 0.0)


def _kernel_bandwidth(device: torch.device) -> float:
    """Bytes/s of the kernel that only reads; 0, with a warning, if it does not run."""
    try:
        from benchmark_parts import reading

        numbers, sums = reading.new_memory(1_000_000_000, device)
        reading.read(numbers, sums)  # compiles it
        took = min(
            seconds(device, lambda: [reading.read(numbers, sums) for _ in range(20)])
            for _ in range(3)
        )
    except Exception as error:  # of Triton, its compiler or the driver
        warnings.warn(
            f"the reading kernel does not run: {error}; the roof is that of sums", stacklevel=2
        )
        return 0.0
    return 20 * numbers.nbytes / took


def gpu_state(device: torch.device) -> dict[str, float]:
    """Clocks in MHz, power in watts and temperature of a GPU now; {} without nvidia-smi."""
    if device.type != "cuda":
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_STATE)}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
        values = run.stdout.splitlines()[device.index or 0].split(",")
        return {name: float(value) for name, value in zip(_STATE.values(), values)}
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return {}


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations/s of the quickest of some products of two square matrices."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(device, lambda: a @ b) for _ in range(20))


def keep_busy(cores: int) -> None:
    """Start processes that each keep a core busy until this process ends, however it ends."""
    program = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    for _ in range(cores):
        subprocess.Popen([sys.executable, "-c", program])


def facts(device: torch.device, dtype: torch.dtype) -> dict[str, str | int]:
    """The machine and the versions of everything that is measured."""
    known: dict[str, str | int] = {}
    if device.type == "cuda":
        known["machine"] = torch.cuda.get_device_name(device)
        known["cuda"] = torch.version.cuda or torch.version.hip
    else:
        known["machine"] = _processor_name()
        known["threads"] = torch.get_num_threads()
    known["python"] = sys.version.split()[0]
    known["torch"] = torch.__version__
    for package in ("triton", "transformers", "xllamacpp"):
        if importlib.util.find_spec(package):
            known[package] = version(package)
    return known | {"dtype": str(dtype).removeprefix("torch.")}


def version(package: str) -> str:
    """The version of an installed package, or a word that it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor_name() -> str:
    """As Linux calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(": ", 1)[1] for line in lines if line.startswith("model name")),
        platform.processor(),
    )
