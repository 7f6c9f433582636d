"""From a chunk of logits to losses and slopes by PyTorch's operations, a few rows at a time in a CPU's cache."""

import torch
from torch import Tensor

BLOCK = 1 << 18
"""Logits whose softmax is taken at a time without the kernel: 1 MiB in float32."""


def cpu_losses_and_slopes(logits: Tensor, target: Tensor, ignore_index: int, losses: Tensor, slopes: bool) -> None:
    """`triton_losses_and_slopes` for any floating type and device; what is taken at a time stays in a CPU's cache from
    the softmax to the slopes."""
    counted = (target != ignore_index)[:, None]
    answers = torch.where(counted, target[:, None], 0)
    rows = max(1, BLOCK // logits.shape[1])
    work = losses.new_empty(0 if logits.dtype == losses.dtype else min(rows, len(logits)), logits.shape[1])
    for start in range(0, len(logits), rows):
        here = slice(start, start + rows)
        part, answer, found = logits[here], answers[here], losses[here, None]
        wide = part if logits.dtype == losses.dtype else work[: len(part)].copy_(part)
        given, top = wide.gather(1, answer), wide.amax(1, keepdim=True)
        softmax = torch.softmax(wide, 1, out=wide)  # every implementation reads a number before it writes it
        # The largest probability is 1 / sum(exp(x - top)), which gives the sum without a pass of its own.
        found.copy_(top - given - softmax.amax(1, keepdim=True).log())
        if slopes:
            softmax.scatter_add_(1, answer, torch.full_like(given, -1.0))
            if softmax is not part:
                part.copy_(softmax)
    ignored = ~counted[:, 0]
    losses.masked_fill_(ignored, 0.0)
    if slopes and bool(ignored.any()):
        logits.masked_fill_(ignored[:, None], 0.0)
