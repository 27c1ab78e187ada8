"""The matrices of a step of 17 to 64 rows: the same operations as for fewer, in several launches.

    qkv        products of norm(x); then queries and keys are rotated, keys and values stored
    project    product of y; then the residual, the next x and its sums
    gate_up    products of norm(x); then silu(gate) * up
    head       product of norm(x)

The tile of decode/matvec.py multiplies 16 rows in one pass over the weights, and the rest of an
operation is done by the CTA that has the product. For more rows the product is stored, and a kernel
of its own does the rest:

* packed weights by `short_linear`, 16 rows in a pass (packed/short_linear.py): float32. Q, K and V
  are one product, and so are gate and up (packed/joint_linear.py)
* plain weights by one GEMM of cuBLAS, which reads them once for all rows, and rounds its results to
  their dtype. Which kernel cuBLAS takes depends on the number of rows, and nobody promises that all
  rows of a product are summed in the same order. So with `keep_bits` they go by `short_linear`,
  too: slower, with the same bits for a row in any place and any company.

Bytes: those of the weights once for each pass, or once in all by cuBLAS; products are written and
read (7B, 64 rows: 0.4 GB in 16 bits, 0.7 in 32).

Versions (times not measured; launches are those of a layer with its attention)
  torch           about 40 launches
  this one        11; all of a step in one CUDA graph
  the tile with M = 32 or 64 columns   a CTA would load 2 or 4 times as many bytes of x as of
                                       weights; cuBLAS shares them among 128 rows of the matrix
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mistral_kernels.decode.matvec import TILE, require_multiple
from mistral_kernels.packed.joint_linear import is_joint, joint_linear
from mistral_kernels.packed.planes import Planes
from mistral_kernels.packed.short_linear import short_linear
from mistral_kernels.portable import Launch, arch_of, to_activation

_BLOCK = 1024  # elements of one CTA of the pointwise kernels
_PARTS = 16  # sums of one CTA of `add_kernel`


@triton.jit
def normalise_kernel(x, sums, to, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """One CTA: BLOCK elements of one row, divided by its root mean square."""
    b = tl.program_id(0)
    part = tl.arange(0, triton.next_power_of_2(D // 16))
    squares = tl.load(sums + b * (D // 16) + part, mask=part < D // 16, other=0.0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + b * D + d, mask=d < D, other=0.0).to(tl.float32)
    v = v * tl.rsqrt(tl.sum(squares, 0) / D + eps)
    tl.store(to + b * D + d, to_activation(v, to.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["ring_size"])
def rotate_store_kernel(
    q_product, k_product, v_product, cos, sin, slots, q, keys, values, gain, ring_size,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """One CTA: one head of one row. Heads are numbered queries first, then keys, then values.

    JOINED  all three products are one tensor, [B, (N + 2K) H]
    """
    # 1. The head, as two halves of rotated pairs.
    b = tl.program_id(0)
    head = tl.program_id(1)
    HALF: tl.constexpr = H // 2
    i = tl.arange(0, triton.next_power_of_2(HALF))
    here = i < HALF
    if JOINED:
        product = q_product + (b * (N + 2 * K) + head) * H
    elif head < N:
        product = q_product + (b * N + head) * H
    elif head < N + K:
        product = k_product + (b * K + head - N) * H
    else:
        product = v_product + (b * K + head - N - K) * H
    first = tl.load(product + i, mask=here, other=0.0).to(tl.float32) / gain
    second = tl.load(product + HALF + i, mask=here, other=0.0).to(tl.float32) / gain

    # 2. The rotation. Values are not rotated: cosine 1, sine 0.
    rotates = here & (head < N + K)
    c = tl.load(cos + b * HALF + i, mask=rotates, other=1.0)
    s = tl.load(sin + b * HALF + i, mask=rotates, other=0.0)
    first, second = first * c - second * s, second * c + first * s

    # 3. The store: queries into q, keys and values into the ring.
    if head < N:
        to = q + (b * N + head) * H
    else:
        # int64, as slots are: a long cache has more than 2^31 elements
        place = (b * K + (head - N) % K) * ring_size + tl.load(slots + b)
        to = (keys if head < N + K else values) + place * H
    tl.store(to + i, to_activation(first, q.dtype.element_ty), mask=here)
    tl.store(to + HALF + i, to_activation(second, q.dtype.element_ty), mask=here)


@triton.jit
def add_kernel(
    product, norm, residual, x, sums, D: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """One CTA: PARTS times 16 elements of one row of the residual."""
    b = tl.program_id(0)
    part = tl.program_id(1) * PARTS + tl.arange(0, PARTS)
    d = part[:, None] * 16 + tl.arange(0, 16)[None, :]
    here = d < D
    new = tl.load(product + b * D + d, mask=here, other=0.0).to(tl.float32)
    new += tl.load(residual + b * D + d, mask=here, other=0.0)
    # Several threads may hold, and so load, the same element: all before one of them stores it.
    tl.debug_barrier()
    tl.store(residual + b * D + d, new, mask=here)
    scaled = new * tl.load(norm + d, mask=here, other=0.0).to(tl.float32)
    tl.store(x + b * D + d, to_activation(scaled, x.dtype.element_ty), mask=here)
    tl.store(sums + b * (D // 16) + part, tl.sum(new * new, 1), mask=part < D // 16)


@triton.jit
def silu_kernel(
    gate_product, up_product, h, gain, F: tl.constexpr, BLOCK: tl.constexpr,
    JOINED: tl.constexpr,
):  # fmt: skip
    """One CTA: BLOCK elements of one row of h.

    JOINED  both products are one tensor, [B, 2F]
    """
    b = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < F
    at = b * F + column
    gate_at = at + b * F if JOINED else at
    up_at = gate_at + F if JOINED else at
    gate = tl.load(gate_product + gate_at, mask=here, other=0.0).to(tl.float32) / gain
    up = tl.load(up_product + up_at, mask=here, other=0.0).to(tl.float32) / gain
    tl.store(h + at, to_activation(gate * tl.sigmoid(gate) * up, h.dtype.element_ty), mask=here)


def normalise_launch(batch: int, D: int) -> Launch:
    """Shape of the launch that normalises. ValueError for a D that the kernel does not support."""
    require_multiple("hidden_size", D, 32)
    constants = dict(D=D, BLOCK=_BLOCK)
    return Launch((batch, triton.cdiv(D, _BLOCK)), constants, dict(num_warps=4))


def rotate_store_launch(batch: int, N: int, K: int, H: int, joined: bool) -> Launch:
    """Shape of the launch after the products of `qkv`."""
    require_multiple("head_dim", H, TILE)
    constants = dict(N=N, K=K, H=H, JOINED=joined)
    return Launch((batch, N + 2 * K), constants, dict(num_warps=1))


def add_launch(batch: int, D: int) -> Launch:
    """Shape of the launch after the product of `project`. ValueError as `normalise_launch`."""
    require_multiple("hidden_size", D, 32)
    constants = dict(D=D, PARTS=_PARTS)
    return Launch((batch, triton.cdiv(D, TILE * _PARTS)), constants, dict(num_warps=2))


def silu_launch(batch: int, F: int, joined: bool) -> Launch:
    """Shape of the launch after the products of `gate_up`."""
    constants = dict(F=F, BLOCK=_BLOCK, JOINED=joined)
    return Launch((batch, triton.cdiv(F, _BLOCK)), constants, dict(num_warps=4))


def qkv(
    x: Tensor,
    sums: Tensor,
    weight: Tensor | tuple[Planes, Planes, Planes],
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    eps: float,
    gain: float = 1.0,
    *,
    keep_bits: bool = False,
) -> None:
    """`decode.qkv.qkv` for 16 to 64 rows.

    keep_bits  the bits of a row do not depend on the others, nor on its place among them
    """
    B, N, H = q.shape
    K = keys.shape[1]
    products = _products(_normalised(x, sums, eps), weight, keep_bits)
    shape = rotate_store_launch(B, N, K, H, joined=len(products) == 1)
    tensors = (*_filled(products, 3), cos, sin, slots, q, keys, values)
    shape.run(rotate_store_kernel, *tensors, gain, keys.shape[2])


def project(
    y: Tensor,
    weight: Tensor | Planes,
    norm: Tensor,
    residual: Tensor,
    x: Tensor,
    sums: Tensor,
    *,
    keep_bits: bool = False,
) -> None:
    """`decode.projection.project` for 16 to 64 rows; keep_bits: see `qkv`."""
    (product,) = _products(y, weight, keep_bits)
    add_launch(*residual.shape).run(add_kernel, product, norm, residual, x, sums)


def gate_up(
    x: Tensor,
    sums: Tensor,
    weight: Tensor | tuple[Planes, Planes],
    h: Tensor,
    eps: float,
    gain: float = 1.0,
    *,
    keep_bits: bool = False,
) -> None:
    """`decode.gate_up.gate_up` for 16 to 64 rows; keep_bits: see `qkv`."""
    products = _products(_normalised(x, sums, eps), weight, keep_bits)
    shape = silu_launch(*h.shape, joined=len(products) == 1)
    shape.run(silu_kernel, *_filled(products, 2), h, gain)


def head(
    x: Tensor,
    sums: Tensor,
    weight: Tensor | Planes,
    logits: Tensor,
    eps: float,
    gain: float = 1.0,
    *,
    keep_bits: bool = False,
) -> None:
    """`decode.head.head` for 16 to 64 rows; keep_bits: see `qkv`."""
    (product,) = _products(_normalised(x, sums, eps), weight, keep_bits)
    logits[:, : weight.shape[0]].copy_(product if gain == 1 else product.float() / gain)


def _normalised(x: Tensor, sums: Tensor, eps: float) -> Tensor:
    """x, divided by the root mean square of its residual, but not by the gain: [B, D].

    So the results of cuBLAS are within fp16's range, and x keeps its digits.
    """
    arch_of(x)  # raises if no kernel can run on this device
    to = torch.empty_like(x)
    normalise_launch(*x.shape).run(normalise_kernel, x, sums, to, eps)
    return to


def _products(
    x: Tensor, weight: Tensor | Planes | tuple[Planes, ...], keep_bits: bool
) -> tuple[Tensor, ...]:
    """x W^T of a plain matrix, or of each packed one: [B, rows of the matrix] each.

    Packed ones may be side by side in one tensor.
    """
    if isinstance(weight, Tensor) and not keep_bits:
        return (F.linear(x.to(weight.dtype), weight),)
    if isinstance(weight, tuple) and is_joint(weight):
        product = x.new_empty(len(x), sum(part.rows for part in weight), dtype=torch.float32)
        joint_linear(x, None, weight, product)
        return (product,)
    products = []
    for matrix in weight if isinstance(weight, tuple) else (weight,):
        product = x.new_empty(len(x), matrix.shape[0], dtype=torch.float32)
        short_linear(x, None, matrix, product)
        products.append(product)
    return tuple(products)


def _filled(products: tuple[Tensor, ...], n: int) -> tuple[Tensor, ...]:
    """n arguments for a kernel: the products, or the same one n times if they are one tensor."""
    return products if len(products) == n else products * n
