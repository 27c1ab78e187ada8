"""What the machine is: versions, bandwidths, the rate of matrix products, the cost of a launch."""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # common.py, benchmark_parts/

import common
import torch
import triton
import triton.language as tl
from benchmark_parts import machine

from mistral_kernels.portable import Launch, arch_of, release_consumer, wait_for_producer

_LAUNCHES = 1000
_COPIED = 4 << 30  # bytes


@triton.jit
def nothing_kernel(x, ARCH: tl.constexpr):
    """Waits for the kernel before it, and lets the next one begin."""
    wait_for_producer(ARCH)
    release_consumer(ARCH)


def main() -> None:
    common.parser(__doc__, "python scripts/dev/gpu_stages/facts.py").parse_args()
    device = torch.device("cuda", 0)
    facts = machine.facts(device, torch.bfloat16)
    properties = torch.cuda.get_device_properties(device)
    facts |= {
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "gcc": first_line("gcc", "--version"),
    }
    common.show_json(facts | machine.gpu_state(device))
    common.show_json({"read_bytes_per_s": round(machine.read_bandwidth(device))})
    common.show_json({"copy_bytes_per_s": round(copy_bandwidth(device))})
    common.show_json({"matrix_flop_per_s": round(machine.matrix_rate(device, torch.bfloat16))})
    for pdl in (False, True):
        gap = seconds_a_launch(device, pdl)
        common.show_json({"launch_gap_us": round(1e6 * gap, 3), "dependent": pdl})
    common.show_json(machine.gpu_state(device))


def first_line(*command: str) -> str:
    """What a program says first; why not, if it does not."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"not known: {error}"
    return (run.stdout.splitlines() or ["not known: no output"])[0]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s of a copy on the device, read and written ones together."""
    source = torch.zeros(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return (
        2 * _COPIED / min(machine.seconds(device, lambda: target.copy_(source)) for _ in range(5))
    )


def seconds_a_launch(device: torch.device, pdl: bool) -> float:
    """What a kernel that does nothing takes in a CUDA graph of many."""
    x = torch.zeros(16, device=device)
    launch = Launch((1,), dict(ARCH=arch_of(x)), dict(num_warps=4))

    def work() -> None:
        for number in range(_LAUNCHES):
            launch.run(nothing_kernel, x, pdl=pdl and number > 0)

    work()  # compiles it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return min(machine.seconds(device, graph.replay) for _ in range(10)) / _LAUNCHES


if __name__ == "__main__":
    common.run(main)
