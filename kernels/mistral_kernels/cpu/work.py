"""The work of a layer, in the pieces that the threads of a step claim (step.py).

Each function does a part of what `Block` (mistral/model.py) does, for all columns; `first` and
`last` say which rows of a matrix, in tiles of 8 or groups of 32; `table` is the address of a
layer's matrices.
"""

import numpy as np

from mistral_kernels.cpu.attention import merge
from mistral_kernels.cpu.compiler import part
from mistral_kernels.cpu.exponential import swiglu
from mistral_kernels.cpu.lanes import (
    float_at,
    floats_at,
    floats_of,
    long_at,
    multiply_add,
    store_float,
    store_floats,
    total,
)
from mistral_kernels.cpu.layout import GATE, MATRIX_BYTES, MAX_COLUMNS, UP
from mistral_kernels.cpu.rounding import round_row, rows_together
from mistral_kernels.cpu.shared import call_attend, call_product, call_store, matrix_at


@part
def multiply(matrix, first, last, groups, columns, activations, out, stride):
    """A part of a product (products.py)."""
    call_product(
        matrix.product, matrix.weights, first, last, groups, columns, activations, out, stride
    )


@part
def _round_all(activations, width, columns):
    """The float32 of an `activations` to its int16."""
    for c in range(columns):
        round_row(activations, width, rows_together(columns), c, 0, width // 32)


@part
def norm_row(x, weight, D, eps, out):
    """RMSNorm of one row; x, weight and out are addresses of float32 [D]."""
    squares = floats_of(np.float32(0))
    for i in range(0, 4 * D, 32):
        squares = multiply_add(floats_at(x + i), floats_at(x + i), squares)
    mean = total(squares) / np.float32(D)
    scale = floats_of(np.float32(1) / np.sqrt(mean + eps))
    for i in range(0, 4 * D, 32):
        store_floats(out + i, floats_at(x + i) * scale * floats_at(weight + i))


@part
def norm(sizes, addresses, weight, columns):
    """RMSNorm of x, rounded; weight is the address of float32 [D]."""
    D = sizes.D
    eps = float_at(sizes.eps)
    for c in range(columns):
        at = 4 * D * c
        norm_row(addresses.x + at, weight, D, eps, addresses.normed + at)
    _round_all(addresses.normed_activations, D, columns)


@part
def angles(sizes, addresses, columns):
    """The cosines and sines of the columns' positions, as in mistral/rotary.py."""
    factor = float_at(addresses.attention_factor)
    for c in range(columns):
        position = np.float32(long_at(addresses.orders + 8 * (4 + MAX_COLUMNS + c)))
        for i in range(sizes.H // 2):
            angle = position * float_at(addresses.frequencies + 4 * i)
            at = 2 * sizes.H * c + 4 * i
            store_float(addresses.cos + at, np.cos(angle) * factor)
            store_float(addresses.sin + at, np.sin(angle) * factor)


@part
def rotate(head, cos, sin, scale, H, out):
    """out = the head [H] rotated: element i with element i + H/2, as in mistral/rotary.py."""
    half = 2 * H  # bytes
    factor = floats_of(scale)
    for i in range(0, half, 32):
        a = floats_at(head + i) * factor
        b = floats_at(head + half + i) * factor
        c = floats_at(cos + i)
        s = floats_at(sin + i)
        store_floats(out + i, a * c - b * s)
        store_floats(out + half + i, b * c + a * s)


@part
def merge_shares(sizes, addresses, columns, shares):
    """Put the shares of every head together, and round."""
    G = sizes.N // sizes.K
    size = 4 * (sizes.H + 8)
    for i in range(columns * sizes.N):
        parts = addresses.parts + size * (i // G * shares * G + i % G)
        merge(parts, shares, G * size, sizes.H, addresses.attended + 4 * sizes.H * i)
    _round_all(addresses.attended_activations, sizes.N * sizes.H, columns)


@part
def rows_of_three(sizes, addresses, table, first, last, columns):
    """Tiles `first` to `last` of Q, K and V, counted as if they were one matrix."""
    stride = 4 * (sizes.N + 2 * sizes.K) * sizes.H
    at = 0
    for i in range(3):
        matrix = matrix_at(table + MATRIX_BYTES * i)
        a = max(first - at, 0)
        b = min(last - at, matrix.tiles)
        if a < b:
            out = addresses.qkv + 32 * at
            activations = addresses.normed_activations
            multiply(matrix, a, b, sizes.D // 32, columns, activations, out, stride)
        at += matrix.tiles


@part
def add_rows(sizes, addresses, matrix, first, last, width, columns, activations):
    """x += matrix @ activations, for tiles `first` to `last`."""
    stride = 4 * sizes.D
    out = addresses.added
    multiply(matrix, first, last, width // 32, columns, activations, out, stride)
    for c in range(columns):
        for i in range(stride * c + 32 * first, stride * c + 32 * last, 32):
            store_floats(addresses.x + i, floats_at(addresses.x + i) + floats_at(out + i))


@part
def gate_and_up(sizes, addresses, table, first, last, columns):
    """SwiGLU of groups `first` to `last` of 32 rows, rounded."""
    F = sizes.F
    a = addresses.normed_activations
    gate = matrix_at(table + GATE * MATRIX_BYTES)
    up = matrix_at(table + UP * MATRIX_BYTES)
    multiply(gate, 4 * first, 4 * last, sizes.D // 32, columns, a, addresses.gated, 4 * F)
    multiply(up, 4 * first, 4 * last, sizes.D // 32, columns, a, addresses.up, 4 * F)
    for c in range(columns):
        at = 4 * F * c + 128 * first
        swiglu(addresses.gated + at, addresses.up + at, 32 * (last - first), addresses.gated + at)
        round_row(addresses.gated_activations, F, rows_together(columns), c, first, last)


@part
def rotate_and_store(sizes, addresses, layer, columns):
    """Rotate queries and keys, and write the new keys and values into their slots."""
    N, K, H, S = sizes.N, sizes.K, sizes.H, sizes.S
    scale = np.float32(1) / np.sqrt(np.float32(H))
    for c in range(columns):
        row = long_at(addresses.orders + 8 * (4 + c))
        position = long_at(addresses.orders + 8 * (4 + MAX_COLUMNS + c))
        cos = addresses.cos + 2 * H * c
        sin = addresses.sin + 2 * H * c
        qkv = addresses.qkv + 4 * (N + 2 * K) * H * c
        for h in range(N):
            to = addresses.queries + 4 * H * (N * c + h)
            rotate(qkv + 4 * H * h, cos, sin, scale, H, to)
        for h in range(K):
            key = qkv + 4 * H * (N + h)
            value = qkv + 4 * H * (N + K + h)
            rotate(key, cos, sin, np.float32(1), H, key)
            head = (layer * sizes.batch + row) * K + h
            slot = sizes.cell * H * (head * (S + 1) + position % S)
            call_store(addresses.store, key, H, addresses.keys + slot)
            call_store(addresses.store, value, H, addresses.values + slot)


@part
def attend_share(sizes, addresses, layer, item, shares):
    """An item of the attention: column, key/value head and share of the positions."""
    N, K, H, S = sizes.N, sizes.K, sizes.H, sizes.S
    G = N // K
    share = item % shares
    h = item // shares % K
    c = item // shares // K
    row = long_at(addresses.orders + 8 * (4 + c))
    position = long_at(addresses.orders + 8 * (4 + MAX_COLUMNS + c))
    begin = max(0, position - sizes.window + 1)
    count = position + 1 - begin
    first = begin + count * share // shares
    last = begin + count * (share + 1) // shares
    cached = sizes.cell * H * (((layer * sizes.batch + row) * K + h) * (S + 1))
    call_attend(
        addresses.attend,
        addresses.queries + 4 * H * (N * c + G * h),
        G,
        H,
        addresses.keys + cached,
        addresses.values + cached,
        S,
        first,
        last,
        addresses.parts + 4 * (H + 8) * G * item,
    )
