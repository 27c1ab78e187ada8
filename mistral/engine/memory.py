"""Free memory, checked before an allocation."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from mistral.cache import RollingCache, cache_slots
from mistral.errors import NotEnoughMemory
from mistral.files import format_bytes
from mistral.model import Mistral

try:
    import resource
except ImportError:  # Windows
    resource = None


def _available_memory(device: torch.device) -> int | None:
    """Bytes that are free on `device`; None if unknown."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    if device.type == "cpu":
        found = (_system_memory(), _container_memory(), _address_space())
        return min((free for free in found if free is not None), default=None)
    return None


def _address_space() -> int | None:
    """Bytes left below the limit of this process (`ulimit -v`); None without a limit."""
    if resource is None:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # not Linux: what the process has already is unknown
        return limit
    return max(limit - pages * resource.getpagesize(), 0)


def _system_memory() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux: the total memory, if the system reports it
        names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
        known = hasattr(os, "sysconf") and all(name in os.sysconf_names for name in names)
        return os.sysconf(names[0]) * os.sysconf(names[1]) if known else None


def _container_memory() -> int | None:
    """Bytes left below the limit of a container (cgroup 2); None without a limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (
            (group / name).read_text().strip() for name in ("memory.max", "memory.current")
        )
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Cached files count as used, and are freed when memory is short.
        return None if limit == "max" else int(limit) - int(used) + int(fields["file"])
    except (OSError, KeyError, ValueError):
        return None


def has_room(needed: int, device: torch.device) -> bool:
    """Whether `needed` bytes are free on `device`; True if that is unknown."""
    free = _available_memory(device)
    return free is None or needed <= free


def how_often_fits(needed: int, device: torch.device) -> int | None:
    """How often `needed` bytes are free on `device`; None if that is unknown."""
    free = _available_memory(device)
    return None if free is None else free // needed


def require_memory(
    needed: int, device: torch.device, what: str, fits: Callable[[int], str]
) -> None:
    """Raises NotEnoughMemory if `needed` bytes are not free on `device`.

    Checked up front because the system kills a process that takes too much memory on a CPU: the
    allocator never gets to raise an error. `fits(free_bytes)` says what would fit instead.
    """
    free = _available_memory(device)
    if free is not None and needed > free:
        raise NotEnoughMemory(
            f"{what} needs {format_bytes(needed)} on {device}, and {format_bytes(free)} are free; "
            f"{fits(free)}"
        )


def checked_cache(
    model: Mistral, batch_size: int, max_tokens: int | None, slack: int
) -> RollingCache:
    """`model.new_cache`, or NotEnoughMemory, with what would fit, if the cache does not."""
    config = model.config
    if batch_size >= 1 and (config.sliding_window or max_tokens):
        slots = cache_slots(config.sliding_window, max_tokens, slack)
        row_bytes = config.cache_bytes(slots, model.dtype.itemsize)
        rows = f"{batch_size} row{'s' * (batch_size > 1)}"

        def fits(free: int) -> str:
            positions = free // (row_bytes // slots * batch_size)
            return f"{positions} positions, or {free // row_bytes} rows, would fit"

        what = f"a key/value cache of {slots} positions for {rows}"
        require_memory(batch_size * row_bytes, model.device, what, fits)
    return model.new_cache(batch_size, max_tokens, slack)
