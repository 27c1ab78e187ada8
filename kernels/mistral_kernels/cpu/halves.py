"""Float16 to float32 and back, with the processor's instructions or, if it has none, with integers.

Most have them: every 64-bit ARM processor, and of x86 those since 2012 (F16C). For the others LLVM
would call a function of a compiler's library that a process does not have.
"""

import functools

from llvmlite import ir

from mistral_kernels.cpu.emit import F16, F32, I16, I32, assembly, constant

_HALVES = ir.VectorType(F16, 8)
_WORDS = ir.VectorType(I16, 8)
_SUMS = ir.VectorType(I32, 8)
_FLOATS = ir.VectorType(F32, 8)
_PROBE = """
define <8 x float> @probe(<8 x half> %halves) {
  %floats = fpext <8 x half> %halves to <8 x float>
  ret <8 x float> %floats
}"""


def widened(b: ir.IRBuilder, words: ir.Value) -> ir.Value:
    """The bits of 8 float16 (int16) as 8 float32."""
    if has_instructions():
        return b.fpext(b.bitcast(words, _HALVES), _FLOATS)
    bits = b.zext(words, _SUMS)
    sign = b.shl(b.and_(bits, constant(0x8000, _SUMS)), constant(16, _SUMS))
    # Exponent and mantissa at their places of a float32: 2^112 times too small, because the
    # exponents of the two begin at -15 and at -127. That is exact for subnormal ones, too.
    magnitude = b.shl(b.and_(bits, constant(0x7FFF, _SUMS)), constant(13, _SUMS))
    value = b.fmul(b.bitcast(magnitude, _FLOATS), constant(2.0**112, _FLOATS))
    # Infinity and NaN have the highest exponent in both.
    special = b.icmp_signed(">=", magnitude, constant(0x7C00 << 13, _SUMS))
    top = b.select(special, constant(0x7F800000, _SUMS), constant(0, _SUMS))
    return b.bitcast(b.or_(b.or_(b.bitcast(value, _SUMS), top), sign), _FLOATS)


def narrowed(b: ir.IRBuilder, floats: ir.Value) -> ir.Value:
    """8 float32 rounded to float16, ties to even: their bits (int16)."""
    if has_instructions():
        return b.bitcast(b.fptrunc(floats, _HALVES), _WORDS)
    bits = b.bitcast(floats, _SUMS)
    sign = b.and_(b.lshr(bits, constant(16, _SUMS)), constant(0x8000, _SUMS))
    magnitude = b.and_(bits, constant(0x7FFFFFFF, _SUMS))
    # 1. From 2^-14 on: another exponent, and 13 bits of the mantissa rounded away.
    odd = b.and_(b.lshr(magnitude, constant(13, _SUMS)), constant(1, _SUMS))
    up = b.add(b.sub(magnitude, constant(112 << 23, _SUMS)), b.add(odd, constant(0xFFF, _SUMS)))
    normal = b.lshr(up, constant(13, _SUMS))
    # 2. Below, a half is a multiple of 2^-24, which is the last bit of 0.5: adding 0.5 rounds.
    half = constant(0.5, _FLOATS)
    shifted = b.bitcast(b.fadd(b.bitcast(magnitude, _FLOATS), half), _SUMS)
    subnormal = b.sub(shifted, constant(0x3F000000, _SUMS))
    # 3. From 65520 on infinity; a NaN keeps its upper bits, of which one is set.
    payload = b.or_(b.lshr(magnitude, constant(13, _SUMS)), constant(0x7E00, _SUMS))
    nan = b.and_(payload, constant(0x7FFF, _SUMS))
    is_nan = b.icmp_signed(">", magnitude, constant(0x7F800000, _SUMS))
    special = b.select(is_nan, nan, constant(0x7C00, _SUMS))
    small = b.icmp_signed("<", magnitude, constant(113 << 23, _SUMS))
    large = b.icmp_signed(">=", magnitude, constant(143 << 23, _SUMS))
    kept = b.select(large, special, b.select(small, subnormal, normal))
    return b.trunc(b.or_(kept, sign), _WORDS)


@functools.cache
def has_instructions() -> bool:
    """Whether numba compiles for a processor that converts float16: LLVM is asked."""
    return "__extendhfsf2" not in assembly(_PROBE)
