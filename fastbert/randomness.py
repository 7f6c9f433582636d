"""Stateless randomness: hashes of (seed, purpose, step, index in the global batch).

Nothing has to be saved to resume a run exactly, and neither the micro-batch size nor the number of processes changes a
random number, because rows are indexed by their position in the global batch.
"""

import torch
from fastbert_kernels.hashing import GOLDEN, combine, mix, signed
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
}


def row_keys(seed: int, purpose: str, step: int, row_indices: Tensor) -> Tensor:
    """One int32 key for each row of a batch.

    Args:
        seed: seed of the experiment.
        purpose: one of PURPOSES, so that random numbers for different purposes are independent.
        step: optimizer step, from 0.
        row_indices: integer [B], index of each row in the global batch.
    """
    key = torch.zeros((), dtype=torch.int32, device=row_indices.device)
    for word in (seed, seed >> 32, PURPOSES[purpose], step, step >> 32):
        key = combine(key, signed(word))
    return combine(key, row_indices.to(torch.int32))


def permute(index: Tensor, count: int, seed: int, epoch: int) -> Tensor:
    """Applies a keyed permutation of range(count) to `index` (int64, any shape), in constant memory.

    A Feistel network over the next even power of two is applied until the result is in the range. It is a bijection,
    so every epoch visits each row once.
    """
    if count < 1 or count > 2**62:
        raise ValueError(f"cannot permute {count} rows")
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    keys = mix(row_keys(seed, "order", epoch, torch.arange(4)) + GOLDEN)  # four rounds: Luby and Rackoff 1988

    def rounds(x: Tensor) -> Tensor:
        left, right = x >> half, x & low
        for key in keys:
            left, right = right, left ^ (mix(key ^ right.to(torch.int32)).long() & low)  # `combine`, its key mixed once
        return (left << half) | right

    out = rounds(index)
    while bool((outside := out >= count).any()):
        out[outside] = rounds(out[outside])
    return out
