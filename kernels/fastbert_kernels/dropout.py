"""Dropout whose mask is a function of keys: the same in every pass, on every device, for every split of the batch."""

import torch
from torch import Tensor

from fastbert_kernels.hashing import combine, light_mix, threshold


def keep_mask(row_keys: Tensor, columns: int, p: float) -> Tensor:
    """Which cells are kept.

    Args:
        row_keys: int32 [...], one hashed key for each row of cells.
        columns: cells in a row.
        p: probability that a cell is dropped.

    Returns:
        bool [..., columns].
    """
    index = torch.arange(columns, dtype=torch.int32, device=row_keys.device)
    return light_mix(row_keys[..., None], combine(index, 0)) >= threshold(p)


class _HashDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, row_keys: Tensor, p: float) -> Tensor:
        keep = keep_mask(row_keys, x.shape[-1], p)
        ctx.save_for_backward(keep)
        ctx.scale = 1.0 / (1.0 - p)
        return (x * keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (keep,) = ctx.saved_tensors
        return (grad * keep).mul_(ctx.scale), None, None


def hash_dropout(x: Tensor, row_keys: Tensor, p: float) -> Tensor:
    """Inverted dropout of `x` [..., D] by `row_keys` int32 [...], the shape of `x` without its last dimension."""
    if row_keys.shape != x.shape[:-1]:
        raise ValueError(f"row_keys {tuple(row_keys.shape)} must have the shape of x {tuple(x.shape)} without the last")
    return x if p == 0 else _HashDropout.apply(x, row_keys, p)
