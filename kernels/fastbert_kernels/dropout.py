"""Dropout with a mask that is a function of keys: the same in every pass, on every device and for every division of
the batch."""

import torch
from torch import Tensor

from fastbert_kernels.hashing import combine, light_mix, threshold


def keep_mask(row_keys: Tensor, columns: int, p: float) -> Tensor:
    """Mask of the cells that dropout retains.

    Args:
        row_keys: int32 [...], one hashed key for each row of cells.
        columns: number of cells in a row.
        p: dropout probability.

    Returns:
        bool [..., columns], False for dropped cells.

    Raises:
        ValueError: `row_keys` are not int32.
    """
    if row_keys.dtype != torch.int32:
        raise ValueError(f"row_keys must be int32, not {row_keys.dtype}")
    index = torch.arange(columns, dtype=torch.int32, device=row_keys.device)
    return light_mix(row_keys[..., None], combine(index, 0)) >= threshold(p)


_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
"""Integer type of the same width, for `_cpu_mask`."""


def _cpu_mask(row_keys: Tensor, columns: int, p: float) -> Tensor:
    """`keep_mask` as int8 [..., columns]: -1 (all bits set) for retained cells, 0 for dropped ones.

    On a CPU comparisons and products with bool take several times as long as these shifts. The result is the same,
    since the threshold is even.
    """
    index = torch.arange(columns, dtype=torch.int32)
    words = light_mix(row_keys[..., None], combine(index, 0))
    words.bitwise_right_shift_(1).sub_(threshold(p) // 2).bitwise_right_shift_(31)  # -1 where dropped
    return words.to(torch.int8).bitwise_not_()


def _cpu_dropped(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    bits = _BITS[x.dtype]
    return torch.bitwise_and(x.contiguous().view(bits), mask.to(bits)).view(x.dtype).mul_(scale)


class _HashDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, row_keys: Tensor, p: float) -> Tensor:
        ctx.scale = 1.0 / (1.0 - p)
        ctx.bits = x.device.type == "cpu" and x.dtype in _BITS
        mask = (_cpu_mask if ctx.bits else keep_mask)(row_keys, x.shape[-1], p)
        ctx.save_for_backward(mask)
        return _cpu_dropped(x, mask, ctx.scale) if ctx.bits else (x * mask).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (mask,) = ctx.saved_tensors
        return _cpu_dropped(grad, mask, ctx.scale) if ctx.bits else (grad * mask).mul_(ctx.scale), None, None


def hash_dropout(x: Tensor, row_keys: Tensor, p: float) -> Tensor:
    """Inverted dropout of `x` [..., D] with `row_keys` int32 [...], one for each vector of `x`.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; a probability outside [0, 1).
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p must lie in [0, 1), not {p}")
    if not x.is_floating_point() or row_keys.dtype != torch.int32:
        raise ValueError(f"x must be floating-point and row_keys int32, not {x.dtype} and {row_keys.dtype}")
    if x.device != row_keys.device:
        raise ValueError(f"row_keys are on {row_keys.device} and x on {x.device}; they must be on one device")
    if row_keys.shape != x.shape[:-1]:
        raise ValueError(f"row_keys {tuple(row_keys.shape)} must have the shape of x {tuple(x.shape)} without the last")
    return x if p == 0 else _HashDropout.apply(x, row_keys, p)
