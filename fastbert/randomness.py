"""Stateless randomness: hashes of (seed, purpose, step, index in the global batch).

Nothing has to be saved to resume a run exactly, and neither the micro-batch size nor the number of processes changes a
random number, because rows are indexed by their position in the global batch.
"""

import numpy as np
import torch
from fastbert_kernels.hashing import GOLDEN, combine_words, mix, mix_array, mix_word, signed
from torch import Tensor

PURPOSES = {
    "dropout": 1,
    "mask": 2,
    "validation-mask": 3,
    "order": 4,
    "generator-dropout": 5,
    "sample": 6,
    "pair": 7,
    "task": 8,
    "offset": 9,
}


def row_keys(seed: int, purpose: str, step: int, row_indices: Tensor) -> Tensor:
    """One int32 key for each row of a batch.

    Args:
        seed: seed of the experiment.
        purpose: one of PURPOSES, so that random numbers for different purposes are independent.
        step: optimizer step, from 0.
        row_indices: integer [B], index of each row in the global batch.
    """
    return mix(row_indices.to(torch.int32) ^ signed(_hashed(seed, purpose, step)))


def random_below(seed: int, purpose: str, step: int, count: int) -> int:
    """One number from 0 to `count` - 1 for a whole step; arguments as for `row_keys`."""
    return _hashed(seed, purpose, step) % count


def _hashed(seed: int, purpose: str, step: int) -> int:
    """The word with which the indices of all rows are combined."""
    key = 0
    for word in (seed, seed >> 32, PURPOSES[purpose], step, step >> 32):
        key = combine_words(key, word % 2**32)
    return mix_word((key + GOLDEN) % 2**32)


def permute(index: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Applies a keyed permutation of range(count) to `index` (int64, any shape), in constant memory.

    A Feistel network over the next even power of two is applied until the result is in the range. It is a bijection,
    so every epoch visits each row once.
    """
    if count < 1 or count > 2**62:
        raise ValueError(f"cannot permute {count} rows")
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    words = (mix_word(_hashed(seed, "order", epoch) ^ number) for number in range(4))
    keys = [np.uint32(mix_word((word + GOLDEN) % 2**32)) for word in words]  # four rounds: Luby and Rackoff 1988

    def rounds(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & low
        for key in keys:
            left, right = right, left ^ (mix_array(right.astype(np.uint32) ^ key) & low)
        return (left << half) | right

    out = rounds(index)
    while (outside := out >= count).any():
        out[outside] = rounds(out[outside])
    return out
