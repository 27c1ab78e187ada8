"""What a prompt does with its rows besides products and attention (prompt.py).

Arguments are sizes and addresses of float32; `first` and `last` say which rows. `table` is one of
`Activations`, with `rows` rows together.
"""

import numpy as np

from mistral_kernels.cpu.exponential import swiglu
from mistral_kernels.cpu.lanes import float_at, floats_at, long_at, store_floats
from mistral_kernels.cpu.rounding import round_row
from mistral_kernels.cpu.work import norm_row, rotate


def norm_rows(x, added, weight, D, eps, table, rows, first, last):
    """x += added; then RMSNorm of x to the activations of `table`, rounded."""
    for c in range(first, last):
        at = 4 * D * c
        for i in range(at, at + 4 * D, 32):
            store_floats(x + i, floats_at(x + i) + floats_at(added + i))
        norm_row(x + at, weight, D, float_at(eps), long_at(table) + at)
        round_row(table, D, rows, c, 0, D // 32)


def gate_rows(up, F, table, rows, first, last):
    """SwiGLU of the activations of `table` with `up`, rounded."""
    for c in range(first, last):
        gate = long_at(table) + 4 * F * c
        swiglu(gate, up + 4 * F * c, F, gate)
        round_row(table, F, rows, c, 0, F // 32)


def rotate_rows(qkv, stride, heads, H, cos, sin, first, last):
    """Rotate the first heads of each row in place."""
    for c in range(first, last):
        for h in range(heads):
            head = qkv + stride * c + 4 * H * h
            rotate(head, cos + 2 * H * c, sin + 2 * H * c, np.float32(1), H, head)
