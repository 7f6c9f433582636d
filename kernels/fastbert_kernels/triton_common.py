"""Functions used by all Triton kernels: the hash of `fastbert_kernels.hashing` (the same words), rounding and
products."""

import triton
import triton.language as tl

from fastbert_kernels.hashing import GOLDEN, LIGHT

_MIX_1 = tl.constexpr(0x7FEB352D)
_MIX_2 = tl.constexpr(0x846CA68B - 2**32)
_GOLDEN = tl.constexpr(GOLDEN)
_LIGHT = tl.constexpr(LIGHT)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def mix(x):
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _MIX_1
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _MIX_2
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def combine(key, value):
    return mix(mix(key + _GOLDEN) ^ value)


@triton.jit
def light_mix(rows, columns):
    y = (rows ^ columns) * _GOLDEN
    y = y ^ ((y >> 15) & 0x1FFFF)
    return y * _LIGHT


@triton.jit
def lowered(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """Cast float32 to the tensors' dtype. The interpreter truncates to bfloat16, so with UPCAST rounding is done
    here."""
    if UPCAST and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def product(a, b, UPCAST: tl.constexpr):
    """a b in float32. The interpreter's products of bfloat16 are wrong, so with UPCAST the operands are cast to
    float32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
