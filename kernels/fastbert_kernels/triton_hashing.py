"""The hash of `fastbert_kernels.hashing` inside Triton kernels: the same words."""

import triton
import triton.language as tl

from fastbert_kernels.hashing import GOLDEN, LIGHT

_MIX_1 = tl.constexpr(0x7FEB352D)
_MIX_2 = tl.constexpr(0x846CA68B - 2**32)
_GOLDEN = tl.constexpr(GOLDEN)
_LIGHT = tl.constexpr(LIGHT)


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
