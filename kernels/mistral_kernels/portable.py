"""The few expressions that differ between a GPU and Triton's interpreter, and between GPUs.

Kernels take one constexpr for it, ARCH, and pass it to the helpers here; no kernel body tests it
itself:

    0   PORTABLE: Triton's interpreter on a CPU. It has no inline assembly and no launch control,
        and holds bfloat16 as bare bits, so that a product of two is silently wrong: they are
        widened to float32 first.
    80  Ampere, Ada (sm_80 to sm_89) and the smaller Blackwells (sm_120 and later), whose matrix
        instructions and shared memory are like theirs; no programmatic dependent launch
    90  Hopper (sm_90) and Blackwell (sm_100 to sm_110)
"""

import functools
import math
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_PORTABLE = 0
TRITON_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Launch(NamedTuple):
    """How to start one kernel: the part that a launcher and the ahead-of-time compilation share."""

    grid: tuple[int, ...]
    constants: dict[str, Any]  # the kernel's constexpr arguments
    options: dict[str, Any]  # num_warps, num_stages, maxnreg

    def run(self, kernel: Any, *arguments: Any, pdl: bool = False) -> None:
        """Start `kernel`.

        With `pdl` (programmatic dependent launch) its CTAs may begin before the previous kernel of
        the stream has ended.

        Raises ValueError for a non-contiguous tensor: kernels get addresses, not strides.
        """
        for name, argument in zip(kernel.arg_names, arguments):
            if isinstance(argument, Tensor) and not argument.is_contiguous():
                raise ValueError(
                    f"{name} {list(argument.shape)} must be contiguous for these kernels"
                )
        options = self.options | {"launch_pdl": True} if pdl else self.options
        tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
        # Triton launches on the current device, not on that of its arguments.
        with torch.cuda.device_of(tensor):
            kernel[self.grid](*arguments, **self.constants, **options)


def spaced(name: str, x: Tensor, dims: int = 1) -> tuple[Tensor, int]:
    """A tensor whose tokens may lie apart, as columns of a wider one do.

    dims  of one token, the last ones; they are contiguous

    Returns its memory as one dimension, and how many elements there are from a token to the next.
    Raises ValueError, which names the tensor, if its tokens are not evenly spaced.
    """
    width = math.prod(x.shape[-dims:])
    if x.is_contiguous():
        return x, width
    try:
        tokens = x.view(-1, width)
    except RuntimeError:  # of PyTorch: no such view
        tokens = None
    if tokens is None or tokens.stride(1) != 1:
        raise ValueError(f"the tokens of {name} {list(x.shape)} must be contiguous")
    stride = tokens.stride(0)
    return tokens.as_strided(((len(tokens) - 1) * stride + width,), (1,)), stride


def arch_for(capability: int) -> int:
    """The ARCH of a compute capability: 89 for 8.9, 120 for 12.0."""
    return 90 if 90 <= capability < 120 else 80


@functools.cache
def _device_arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        raise ValueError(
            f"GPU {index} has compute capability {major}.{minor}; these kernels need 8.0 or later"
        )
    return arch_for(10 * major + minor)


def arch_of(tensor: Tensor) -> int:
    """The ARCH of kernels on the device of `tensor`. ValueError if none can run there."""
    if tensor.device.type == "cuda":
        return _device_arch(tensor.device.index)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _PORTABLE
    raise ValueError(
        f"these kernels need a CUDA GPU, not {tensor.device} (or TRITON_INTERPRET=1, to run slowly)"
    )


def activation(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 to the dtype of activations, as `to_activation` in the kernels."""
    limit = torch.finfo(dtype).max if dtype == torch.float16 else math.inf
    return x.clamp(-limit, limit).to(dtype)


def require(condition: bool, message: str) -> None:
    """ValueError with `message` unless `condition`."""
    if not condition:
        raise ValueError(message)


@triton.constexpr_function
def row_width(V):
    """Columns of a row of logits, or of flags of tokens: V rounded up to a multiple of 4.

    So every row begins at a multiple of 16 bytes, and no load of 16 bytes reaches into another row.
    """
    return (V + 3) // 4 * 4


@triton.jit
def wait_for_producer(ARCH: tl.constexpr):
    """Wait for the previous kernel: between the loads of weights and the first use of its results.

    It is needed even without dependent launch: nothing else keeps ptxas from moving the loads of
    weights down to their use. With it a thread has 18 loads in flight, without it 7 (Q4_K, read
    from the SASS).
    """
    if ARCH >= 90:
        tl.extra.cuda.gdc_wait()
    elif ARCH > 0:
        tl.debug_barrier()


@triton.jit
def release_consumer(ARCH: tl.constexpr):
    """Let the next kernel start and load its weights; it waits for our stores itself."""
    if ARCH >= 90:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def dot_operand(x, ARCH: tl.constexpr):
    """x in a dtype that `tl.dot` supports."""
    if ARCH == 0:
        x = x.to(tl.float32)
    return x


@triton.jit
def to_activation(x, dtype: tl.constexpr):
    """fp32 to the dtype of activations.

    In fp16 a value out of range becomes the largest one; NaN stays NaN.
    """
    if dtype == tl.float16:
        x = tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.constexpr_function
def _shift(source, to, by):
    """PTX: `source`, shifted right by `by` bits (left if negative), to `to`."""
    return f"{'shr' if by >= 0 else 'shl'}.b32 {to}, {source}, {abs(by)};"


@triton.constexpr_function
def _scaled_bits_asm(shift, mask):
    """PTX for two 16-bit words at once, one in each half of a register."""
    bits = _shift("$1", "t", shift) + f" and.b32 t, t, 0x{mask:04x}{mask:04x};"
    return "{.reg .b32 t; " + bits + " fma.rn.f16x2 $0, t, $2, $3;}"


@triton.constexpr_function
def _joined_bits_asm(shift, mask, high_shift, high_mask):
    """The same with high bits from a second word; lop3 with 0xEA is (a & b) | c."""
    bits = (
        _shift("$1", "t", shift)
        + f" and.b32 t, t, 0x{mask:04x}{mask:04x}; "
        + _shift("$2", "h", high_shift)
    )
    joined = f" lop3.b32 t, h, 0x{high_mask:04x}{high_mask:04x}, t, 0xEA;"
    return "{.reg .b32 t, h; " + bits + joined + " fma.rn.f16x2 $0, t, $3, $4;}"


@triton.jit
def _bits(word, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """16-bit words, shifted to the right by SHIFT (left if negative) and masked, as int32."""
    wide = word.to(tl.int32) & 0xFFFF
    return (wide >> SHIFT if SHIFT >= 0 else wide << -SHIFT) & MASK


@triton.jit
def _scaled(bits, scale, offset):
    product = bits.to(tl.float32) * 2.0**-24 * scale.to(tl.float32)
    return (product + offset.to(tl.float32)).to(scale.dtype)


@triton.jit
def scaled_bits(word, scale, offset, SHIFT: tl.constexpr, MASK: tl.constexpr, ARCH: tl.constexpr):
    """(word >> SHIFT & MASK) * 2^-24 * scale + offset, in the dtype of scale and offset.

    word  int16

    In fp16 on a GPU nothing is converted: denormal fp16 numbers are the multiples of 2^-24, so the
    bits of an integer below 1,024 are the fp16 number of that integer times 2^-24. A mask, then one
    multiply-add for two weights.
    """
    if ARCH > 0 and scale.dtype == tl.float16:
        out = tl.inline_asm_elementwise(
            _scaled_bits_asm(SHIFT, MASK),
            "=r,r,r,r",
            [word, scale, offset],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        out = _scaled(_bits(word, SHIFT, MASK), scale, offset)
    return out


@triton.jit
def scaled_joined_bits(
    word, high, scale, offset, SHIFT: tl.constexpr, MASK: tl.constexpr, HIGH_SHIFT: tl.constexpr,
    HIGH_MASK: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """`scaled_bits` of values with high bits in another word: high >> HIGH_SHIFT & HIGH_MASK."""
    if ARCH > 0 and scale.dtype == tl.float16:
        out = tl.inline_asm_elementwise(
            _joined_bits_asm(SHIFT, MASK, HIGH_SHIFT, HIGH_MASK), "=r,r,r,r,r",
            [word, high, scale, offset],
            dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        out = _scaled(_bits(word, SHIFT, MASK) | _bits(high, HIGH_SHIFT, HIGH_MASK), scale, offset)
    return out
