"""Randomness is a function, not a state: hashes of (seed, purpose, step, place in the global batch).

Nothing has to be saved to continue a run exactly, and the size of a micro-batch or the number of processes changes no
draw, because the place counts through the global batch.
"""

import torch
from fastbert_kernels.hashing import combine, signed
from torch import Tensor

PURPOSES = {"dropout": 1, "mask": 2, "validation-mask": 3, "order": 4, "generator-dropout": 5, "sample": 6, "pair": 7}


def row_keys(seed: int, purpose: str, step: int, places: Tensor) -> Tensor:
    """One int32 key for each row of a batch.

    Args:
        seed: of the experiment.
        purpose: one of PURPOSES, so that different draws are independent.
        step: of the optimizer, from 0.
        places: integer [B], the rows' places in the global batch.
    """
    key = torch.zeros((), dtype=torch.int32, device=places.device)
    for word in (seed, seed >> 32, PURPOSES[purpose], step, step >> 32):
        key = combine(key, signed(word))
    return combine(key, places.to(torch.int32))


def permute(index: Tensor, count: int, seed: int, epoch: int) -> Tensor:
    """Where a keyed permutation of range(count) sends each of `index` (int64, any shape), in constant memory.

    A Feistel network over the next even power of two, walked until it lands inside the range: a bijection, so in
    every epoch each row is visited once.
    """
    if count < 1 or count > 2**62:
        raise ValueError(f"cannot permute {count} rows")
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    keys = row_keys(seed, "order", epoch, torch.arange(4))  # four rounds: Luby and Rackoff 1988

    def rounds(x: Tensor) -> Tensor:
        left, right = x >> half, x & low
        for key in keys:
            left, right = right, left ^ (combine(key, right.to(torch.int32)).long() & low)
        return (left << half) | right

    out = rounds(index)
    while bool((outside := out >= count).any()):
        out = torch.where(outside, rounds(out), out)
    return out
