"""A kernel that reads memory and does nothing else: the bandwidth that a decode kernel could have.

PyTorch's sums may read more slowly than the decode kernels do, and a share of such a roof flatters.
This one loads as they do: 16 bytes a lane, `evict_first`, six loads of a lane in flight (read from
the SASS for sm_90).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # numbers that a CTA loads at once: 4 a lane of 16 warps
_ROUNDS = 8  # loads in flight of each lane
PART = _BLOCK * _ROUNDS  # numbers of a CTA


@triton.jit
def read_kernel(numbers, sums, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """One CTA: the sum of BLOCK * ROUNDS int32, so that no load can be left out."""
    start = numbers + tl.program_id(0).to(tl.int64) * (BLOCK * ROUNDS)
    parts = ()
    for i in tl.static_range(ROUNDS):
        at = start + i * BLOCK + tl.arange(0, BLOCK)
        parts = parts + (tl.load(at, eviction_policy="evict_first"),)
    total = parts[0]
    for i in tl.static_range(1, ROUNDS):
        total = total ^ parts[i]
    tl.store(sums + tl.program_id(0), tl.xor_sum(total, 0))


def read(numbers: Tensor, sums: Tensor) -> None:
    """Read int32 numbers [n * PART]; sums int32 [n] are written, the exclusive or of each part."""
    read_kernel[(len(sums),)](numbers, sums, BLOCK=_BLOCK, ROUNDS=_ROUNDS, num_warps=16)


def new_memory(num_bytes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """About so many bytes of numbers, and room for the sums, for `read`."""
    parts = num_bytes // 4 // PART
    numbers = torch.randint(-(2**31), 2**31 - 1, (parts * PART,), dtype=torch.int32, device=device)
    return numbers, numbers.new_zeros(parts)
