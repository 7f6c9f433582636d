"""A 32-bit integer hash on int32 tensors: the only source of randomness, so that it can be recomputed anywhere.

The hash words are the same in eager and compiled mode, on any device and inside a Triton kernel. Products of int32 wrap
everywhere, and arithmetic shifts are masked so that they act as logical shifts.
"""

import numpy as np
import torch
from torch import Tensor

GOLDEN = -1640531527  # 0x9E3779B9 as int32, the odd number nearest to 2^32 / golden ratio
_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B - 2**32
LIGHT = -2048144789  # 0x85EBCA6B as int32
_SHIFTS = np.uint32(16), np.uint32(15)


def signed(value: int) -> int:
    """`value` modulo 2^32, as the int32 with the same bits."""
    return (value + 2**31) % 2**32 - 2**31


def mix(x: Tensor) -> Tensor:
    """A bijection of int32 words in which every input bit flips every output bit with probability near one half.

    Multipliers and shifts are those of lowbias32, found by Wellons' search.

    Raises:
        ValueError: `x` is not int32. Wider integers would give other words, and differ between devices.
    """
    if x.dtype != torch.int32:
        raise ValueError(f"words to hash must be int32, not {x.dtype}")
    if x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling():
        return _mix_on_cpu(x)
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _MIX_1
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _MIX_2
    return x ^ ((x >> 16) & 0xFFFF)


def _mix_on_cpu(x: Tensor) -> Tensor:
    """`mix` in numpy, whose calls take a third of PyTorch's time: a training step hashes many small tensors."""
    return torch.from_numpy(mix_array(x.numpy().view(np.uint32).copy()).view(np.int32))


def mix_array(x: np.ndarray) -> np.ndarray:
    """`mix` of uint32 words, in place."""
    x ^= x >> _SHIFTS[0]
    x *= np.uint32(_MIX_1)
    x ^= x >> _SHIFTS[1]
    x *= np.uint32(_MIX_2 % 2**32)
    x ^= x >> _SHIFTS[0]
    return x


def mix_word(x: int) -> int:
    """`mix` of one word, 0 to 2^32 - 1."""
    x ^= x >> 16
    x = x * _MIX_1 % 2**32
    x ^= x >> 15
    x = x * (_MIX_2 % 2**32) % 2**32
    return x ^ x >> 16


def combine_words(key: int, value: int) -> int:
    """`combine` of two words, 0 to 2^32 - 1: no tensors, which on a GPU would be a dozen launches."""
    return mix_word(mix_word((key + GOLDEN) % 2**32) ^ value)


def combine(key: Tensor, value: Tensor | int) -> Tensor:
    """Key derived from `key` and `value` (broadcast): int32, for a fixed key a bijection in `value`."""
    if isinstance(value, int):
        value = signed(value)
    return mix(mix(key + GOLDEN) ^ value)


def uniform(words: Tensor, count: int | Tensor) -> Tensor:
    """Integers, int64 in [0, count), from int32 hash words by multiply and shift (bias below count / 2^32)."""
    return ((words.long() & 0xFFFFFFFF) * count) >> 32


def threshold(probability: float) -> int:
    """The int32 that a hash word is below with `probability` (0 to 1). It is even, since `dropout.py` halves it."""
    return min(2 * round(probability * 2**31), 2**32 - 2) - 2**31


def light_mix(rows: Tensor, columns: Tensor) -> Tensor:
    """Hash words for the cells of a table from hashed keys of its rows and columns (broadcast), with two products per
    cell.

    Sufficient for dropout, which compares only the high bits; `mix` costs 50 % more.
    """
    y = torch.bitwise_xor(rows, columns)
    y *= GOLDEN
    y ^= (y >> 15).bitwise_and_(0x1FFFF)
    y *= LIGHT
    return y
