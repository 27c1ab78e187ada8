"""What memory there is, asked before it is taken."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from mistral.errors import NotEnoughMemory


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on `device`; None where that cannot be told."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    if device.type == "cpu":
        known = [free for free in (_system_memory(), _container_memory()) if free is not None]
        return min(known, default=None)
    return None


def _system_memory() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux: all there is, if the system tells
        names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
        known = hasattr(os, "sysconf") and all(name in os.sysconf_names for name in names)
        return os.sysconf(names[0]) * os.sysconf(names[1]) if known else None


def _container_memory() -> int | None:
    """What a container's limit (cgroup 2) leaves; None without one."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (
            (group / name).read_text().strip() for name in ("memory.max", "memory.current")
        )
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Cached files count as used, and are given back when memory is short.
        return None if limit == "max" else int(limit) - int(used) + int(fields["file"])
    except (OSError, KeyError, ValueError):
        return None


def require_memory(
    needed: int, device: torch.device, what: str, fits: Callable[[int], str]
) -> None:
    """Raise NotEnoughMemory where `needed` bytes are not free on `device`.

    The system kills a process that takes too much on a CPU, so nothing waits for the allocator's
    own error. `fits(free_bytes)` says what would fit instead.
    """
    free = available_memory(device)
    if free is not None and needed > free:
        raise NotEnoughMemory(
            f"{what} needs {format_bytes(needed)} on {device}, and {format_bytes(free)} are free; "
            f"{fits(free)}"
        )


def format_bytes(count: float) -> str:
    """4367704064 -> '4.37 GB'; decimal units, as disks and download pages count."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.2f} {unit}"
