"""Losses and gradients of a chunk of logits by PyTorch operations, a few rows at a time in a CPU's cache."""

import torch
from torch import Tensor

BLOCK = 1 << 18
"""Number of logits whose softmax is computed at a time: 1 MiB in float32."""


def cpu_row_losses(logits: Tensor, target: Tensor, ignore_index: int, losses: Tensor, gradients: bool) -> None:
    """`triton_row_losses` without a bias, for any floating dtype and device. The rows processed at a time stay in a
    CPU's cache from the softmax to the gradients."""
    counted = (target != ignore_index)[:, None]
    targets = torch.where(counted, target[:, None], 0)
    rows = max(1, BLOCK // logits.shape[1])
    buffer = losses.new_empty(0 if logits.dtype == losses.dtype else min(rows, len(logits)), logits.shape[1])
    for start in range(0, len(logits), rows):
        chunk = slice(start, start + rows)
        part, words, loss = logits[chunk], targets[chunk], losses[chunk, None]
        wide = part if logits.dtype == losses.dtype else buffer[: len(part)].copy_(part)
        target_logits, maximum = wide.gather(1, words), wide.amax(1, keepdim=True)
        softmax = torch.softmax(wide, 1, out=wide)  # in place: all implementations read a number before they write it
        # The largest probability is 1 / sum(exp(x - maximum)), which gives the sum without another pass.
        loss.copy_(maximum - target_logits - softmax.amax(1, keepdim=True).log())
        if gradients:
            softmax.scatter_add_(1, words, torch.full_like(target_logits, -1.0))
            if softmax is not part:
                part.copy_(softmax)
    ignored = ~counted[:, 0]
    losses.masked_fill_(ignored, 0.0)
    if gradients and bool(ignored.any()):
        logits.masked_fill_(ignored[:, None], 0.0)
