"""e^x of eight values at once, and SwiGLU, which is made of it."""

import numpy as np

from mistral_kernels.cpu.compiler import part
from mistral_kernels.cpu.lanes import (
    as_floats,
    floats_at,
    floats_of,
    larger,
    multiply_add,
    power_of_two,
    rounded,
    smaller,
    store_floats,
)


@part
def exp(value):
    """e^x of Floats to 2e-7; beyond -87 and 88 it is that of -87 and 88. NaN stays NaN.

    e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln 2 / 2. ln 2 is subtracted in two parts, the
    first of which times n is exact; e^r is a polynomial. Source: Cephes, expf.c.
    """
    x = larger(smaller(value, floats_of(np.float32(88))), floats_of(np.float32(-87)))
    n = rounded(x * floats_of(np.float32(1.44269504)))
    r = multiply_add(as_floats(n), floats_of(np.float32(-0.693359375)), x)
    r = multiply_add(as_floats(n), floats_of(np.float32(2.12194440e-4)), r)
    p = floats_of(np.float32(1.9875691500e-4))
    p = multiply_add(p, r, floats_of(np.float32(1.3981999507e-3)))
    p = multiply_add(p, r, floats_of(np.float32(8.3334519073e-3)))
    p = multiply_add(p, r, floats_of(np.float32(4.1665795894e-2)))
    p = multiply_add(p, r, floats_of(np.float32(1.6666665459e-1)))
    p = multiply_add(p, r, floats_of(np.float32(5.0000001201e-1)))
    p = multiply_add(p, r * r, r + floats_of(np.float32(1)))
    zero_or_nan = value * floats_of(np.float32(0))
    return p * power_of_two(n) + zero_or_nan


@part
def swiglu(gate, up, count, out):
    """out = gate / (1 + e^-gate) * up, for `count` float32 at these addresses, a multiple of 8."""
    one = floats_of(np.float32(1))
    zero = floats_of(np.float32(0))
    for i in range(0, 4 * count, 32):
        g = floats_at(gate + i)
        sigmoid = one / (one + exp(zero - g))
        store_floats(out + i, g * sigmoid * floats_at(up + i))
