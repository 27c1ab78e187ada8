"""Memory in large pages, for what every step reads from end to end.

A processor keeps the places of some thousand pages at hand and looks up the others in memory. In
pages of 4 kB all weights are thousands of pages more than that; in pages of 2 MB they fit. Linux
gives such pages to memory for which it is asked to, before the memory is first used; the call is
`madvise` (man 2 madvise, MADV_HUGEPAGE). Other systems have no such call, and the memory is theirs.
"""

import ctypes
import sys
from contextlib import suppress

import torch
from torch import Tensor

_LARGE = 1 << 21  # bytes of a large page
_ALIGNED = 64  # where a piece begins: at a cache line
_HUGEPAGE = 14  # MADV_HUGEPAGE


class Pages:
    """Memory for `size` bytes, of which pieces are taken one after another."""

    def __init__(self, size: int, pieces: int):
        whole = torch.empty(size + _ALIGNED * pieces + _LARGE, dtype=torch.uint8)
        ask_for_large(whole)
        self._left = whole[-whole.data_ptr() % _LARGE :]

    def take(self, *shape: int) -> Tensor:
        """The next piece: uint8 of this shape, not yet written."""
        size = torch.Size(shape).numel()
        piece = self._left[:size]
        self._left = self._left[size + -size % _ALIGNED :]
        return piece.view(shape)


def ask_for_large(memory: Tensor) -> None:
    """Ask the system to hold a tensor's memory in large pages, as far as whole ones lie in it."""
    if sys.platform != "linux":
        return
    begin = memory.data_ptr() + -memory.data_ptr() % _LARGE
    size = memory.data_ptr() + memory.nbytes - begin
    if size < _LARGE:
        return
    # A kernel without large pages says no: then the pages are small.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _HUGEPAGE)
