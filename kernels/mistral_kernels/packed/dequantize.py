"""Unpacked matrices, one after another in the same memory.

They serve prompts, and quantization types without kernels.

A prompt of hundreds of tokens is bound by arithmetic, at which cuBLAS is best, and cuBLAS needs
plain matrices. So each is unpacked just before its use, into memory that the next one reuses.
(Chunks of up to 64 rows are bound by memory, and multiply the planes directly:
packed/short_linear.py.)

One CTA unpacks 8 rows of a group of planes, 1,024 columns, and a thread 8 neighbouring weights at a
time: it loads the 16 bytes that hold them (4-bit weights share them with three other threads, which
find them in the cache) and stores 16 bytes of weights (32 in fp32). The weights are ggml's to the
bit, rounded once to the dtype that is stored.

Bytes: those of the planes, and 2 per weight written (7B, Q4_K_M: 4.0 + 14.0 GB, 4.2 ms at 4.3 TB/s;
not measured).

Versions (times not measured; instructions per weight read from the SASS for sm_90, of 17 to 19 that
there is time for while the bytes move)
  torch, whole tensors               dozens of kernels per matrix, with int32 and fp32 in between
  conversion by bits, q | 2^23       12.1 Q4_0, 14.8 Q4_K, 19.1 Q5_K, 17.9 Q6_K, 12.2 Q8_0
  this one                           10.2 Q4_0, 12.6 Q4_K, 17.1 Q5_K, 16.3 Q6_K, 12.2 Q8_0; one of
                                     them a conversion, which takes eight times as long: 1.9 ms of
                                     the 4.2, in parallel to the rest
  a product that unpacks its tiles   would save the 14 GB written and read again, most of the time
                                     of a prompt of less than about 500 tokens; exists for up to 64
                                     rows (packed/short_linear.py)
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mistral.quantization.dequantize import dequantize
from mistral.quantization.ggml_types import GgmlType
from mistral.quantization.packed import weights_at_once
from mistral_kernels.packed.planes import GROUP, ROWS, Planes, restore, restore_rows
from mistral_kernels.packed.row import high_mask, high_place, scale_and_low, zero_point
from mistral_kernels.packed.tile import body_bytes, high_pieces, low_pieces, row_block_bytes
from mistral_kernels.portable import TRITON_DTYPES, Launch, arch_of, require


class Blocks(NamedTuple):
    """A packed matrix that the kernels cannot multiply, because of its type or its scales."""

    data: Tensor  # uint8 [rows, bytes of a row]
    kind: GgmlType

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        rows, row_bytes = self.data.shape
        return rows, row_bytes // self.kind.block_bytes * self.kind.block_weights


Matrix = Tensor | Planes | Blocks


def unpack_reference(planes: Planes, out: Tensor, rows: Tensor | None = None) -> None:
    """`unpack` in plain PyTorch."""
    blocks = restore(planes) if rows is None else restore_rows(planes, rows)
    out.copy_(dequantize(blocks, planes.kind))


@triton.jit(do_not_specialize=["T"])
def unpack_kernel(
    weight, ids, out, T, COLUMNS: tl.constexpr, KIND: tl.constexpr, CHOSEN: tl.constexpr
):
    """One CTA: 8 rows of `out`, one group of columns; a line is 8 neighbouring weights."""
    # 1. Which weights a line has: row, quarter, piece u, and place n in its words.
    BLOCK: tl.constexpr = row_block_bytes(KIND, COLUMNS)
    BODY: tl.constexpr = body_bytes(KIND, COLUMNS)
    GROUP_BYTES: tl.constexpr = 512 * (1 + low_pieces(KIND) + high_pieces(KIND))
    PIECES: tl.constexpr = low_pieces(KIND)
    BITS: tl.constexpr = PIECES // 2
    group = tl.program_id(1)
    line = tl.arange(0, 1024)  # (row of 8, quarter, piece, value of a word)
    i = tl.program_id(0) * 8 + line // 128
    row = tl.minimum(i, T - 1)
    if CHOSEN:
        row = tl.load(ids + row).to(tl.int32)
    quarter = line // 32 % 4
    u = line % 32 // (16 // BITS)
    n = line % (16 // BITS)

    # 2. Their bits. The offset counts words of 16 bits, in multiples of 8, so that the compiler
    # knows that 16 bytes can be loaded at once.
    place = row // 8 * (BLOCK // 2) + group * (GROUP_BYTES // 2) + row % 8 * 32 + quarter * 8
    words = weight.to(tl.pointer_type(tl.int16)) + place
    word = tl.arange(0, 8)[None, :]
    value = tl.load((words + 256 * (u + 1))[:, None] + word).to(tl.int32)  # piece 0 is the head
    value = value >> (BITS * n)[:, None] & (1 << BITS) - 1
    if high_pieces(KIND) > 0:
        piece, shift = high_place(u, n, KIND)
        high = tl.load((words + 256 * piece)[:, None] + word).to(tl.int32)
        value |= (high >> shift[:, None] & high_mask(KIND)) << 4

    # 3. The weights, stored once.
    tail = row // 8 * BLOCK + BODY + group * 64 + row % 8 * 8 + quarter * 2
    scale, low = scale_and_low(weight, 2 * place, tail, u, n, KIND)
    unpacked = scale[:, None] * (value - zero_point(KIND)).to(tl.float32)
    if KIND == "Q4_K" or KIND == "Q5_K":
        unpacked -= low[:, None]
    column = group * 1024 + line % 128 * 8
    here = (i < T) & (column < COLUMNS)
    to = (out + (i * COLUMNS + column))[:, None] + word
    tl.store(to, unpacked.to(out.dtype.element_ty), mask=here[:, None])


def launch(rows: int, columns: int, kind: str, chosen: bool = False) -> Launch:
    """Shape of the launch."""
    constants = dict(COLUMNS=columns, KIND=kind, CHOSEN=chosen)
    return Launch((-(-rows // ROWS), -(-columns // GROUP)), constants, dict(num_warps=4))


def unpack(planes: Planes, out: Tensor, rows: Tensor | None = None) -> None:
    """Unpack a matrix, or some of its rows.

    out   [n, columns] in bfloat16, float16 or float32, written
    rows  int64 [n]: which; None: all

    Raises ValueError for another dtype, and for a matrix of 2^31 bytes or weights.
    """
    arch_of(out)  # raises if no kernel can run on this device
    require(
        out.dtype in TRITON_DTYPES,
        f"weights in {out.dtype}: the kernels take bfloat16, float16 and float32",
    )
    large = max(out.numel(), planes.data.nbytes)
    require(
        large < 2**31,
        f"a matrix of {planes.rows} rows takes {large:,} bytes or weights; the kernels count to "
        "2^31",
    )
    shape = launch(len(out), planes.columns, planes.kind.name, rows is not None)
    shape.run(unpack_kernel, planes.data, planes.data if rows is None else rows, out, len(out))


class Workspace:
    """Memory for one unpacked matrix at a time, in `dtype`.

    size    how many weights it holds
    unpack  `unpack`, or its plain twin
    """

    def __init__(
        self,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        unpack: Callable[..., None] = unpack,
    ):
        self._memory = torch.empty(size, dtype=dtype, device=device)
        self._unpack = unpack

    def holds(self, matrices: Sequence[Matrix]) -> bool:
        """Whether `fill` has room for them."""
        return sum(math.prod(matrix.shape) for matrix in matrices) <= len(self._memory)

    def fill(self, matrices: Sequence[Matrix]) -> Tensor:
        """Matrices of equal width, stacked: [rows, columns]. Valid until the next call."""
        rows = [matrix.shape[0] for matrix in matrices]
        columns = matrices[0].shape[1]
        whole = self._memory[: sum(rows) * columns].view(-1, columns)
        for matrix, out in zip(matrices, whole.split(rows)):
            self._write(matrix, out)
        return whole

    def linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        """x W^T: [..., in] -> [..., out]; in pieces if the matrix is larger than the memory."""
        rows, columns = matrix.shape
        room = len(self._memory) // columns
        at_once = rows if rows <= room else room // ROWS * ROWS
        results = []
        for start in range(0, rows, at_once):
            weight = self._memory[: min(at_once, rows - start) * columns].view(-1, columns)
            self._write(matrix, weight, start)
            results.append(F.linear(x, weight))
        return results[0] if len(results) == 1 else torch.cat(results, dim=-1)

    def rows(self, matrix: Planes, which: Tensor) -> Tensor:
        """Some rows, int64 [...] -> [..., columns], in new memory."""
        out = self._memory.new_empty(which.numel(), matrix.columns)
        self._unpack(matrix, out, which.flatten())
        return out.view(*which.shape, -1)

    def _write(self, matrix: Matrix, out: Tensor, start: int = 0) -> None:
        """Unpack rows from `start`, a multiple of 8, until `out` is full."""
        end = start + len(out)
        if isinstance(matrix, Planes):
            part = matrix.data[start // ROWS : -(-end // ROWS)]
            self._unpack(Planes(matrix.kind, len(out), matrix.columns, part), out)
        elif isinstance(matrix, Blocks):
            at_once = max(1, weights_at_once(out.device) // out.shape[1])
            for some, to in zip(matrix.data[start:end].split(at_once), out.split(at_once)):
                to.copy_(dequantize(some, matrix.kind))
        else:
            out.copy_(matrix[start:end])
