"""Cross-entropy over a vocabulary whose logits are there for a few rows at a time, forward and backward.

    L = sum_n -log softmax(h_n E^T + b)_{y_n}        dL/dlogits_n = softmax_n - onehot(y_n)

The gradient of a row's logits is known as soon as the row's loss is, up to the one number that comes from above. So all
gradients are made in the forward pass, chunk by chunk, and only multiplied in the backward pass: three products in all,
as with logits that are kept, and no second reading of the embedding.

Shapes: N rows, V words, D width, R rows held at a time.
"""

import torch
from torch import Tensor

CELLS = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Logits held at a time."""


def linear_cross_entropy(
    hidden: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    rows: int | None = None,
) -> Tensor:
    """`F.cross_entropy(F.linear(hidden, embedding, bias), target)` without [N, V] in memory.

    Under autocast the products are in its precision, as those of `F.linear` are; the softmax and the sums over rows are
    in at least float32.

    Args:
        hidden: [N, D].
        embedding: [V, D].
        bias: [V].
        target: int64 [N].
        ignore_index: a target that does not count.
        reduction: mean (over the rows that count; NaN if none does) or sum.
        rows: R (default: by CELLS). Changes nothing beyond rounding.

    Returns:
        a number in at least float32, differentiable once in hidden, embedding and bias.

    Raises:
        ValueError: shapes that do not fit, another reduction.
    """
    if hidden.dim() != 2 or embedding.dim() != 2 or hidden.shape[1] != embedding.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and embedding {tuple(embedding.shape)} must be [N, D], [V, D]")
    if target.shape != hidden.shape[:1]:
        raise ValueError(f"target {tuple(target.shape)} must be [N] for hidden {tuple(hidden.shape)}")
    if bias is not None and bias.shape != embedding.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [V] for embedding {tuple(embedding.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, not {reduction!r}")
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    rows = rows or max(1, CELLS[kind] // len(embedding))
    with torch.autocast(kind, enabled=False):
        total = _LinearCrossEntropy.apply(hidden, embedding, bias, target, ignore_index, rows, dtype)
    return total if reduction == "sum" else total / (target != ignore_index).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, embedding, bias, target, ignore_index: int, rows: int, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        h, e = hidden.to(dtype), embedding.to(dtype)
        b = None if bias is None else bias.to(dtype)
        counted = target != ignore_index
        answers = torch.where(counted, target, 0)[:, None]
        total = torch.zeros((), dtype=wide, device=h.device)
        wanted = any(ctx.needs_input_grad[:3])
        if wanted:
            to_hidden = torch.empty_like(h)
            to_embedding = torch.zeros(e.shape, dtype=wide, device=h.device)
            to_bias = torch.zeros(len(e), dtype=wide, device=h.device)
        for start in range(0, len(h), rows):
            part = slice(start, start + rows)
            logits = (h[part] @ e.T if b is None else torch.addmm(b, h[part], e.T)).to(wide)
            answer, counts = answers[part], counted[part][:, None]
            sums = logits.logsumexp(1, keepdim=True)
            total += ((sums - logits.gather(1, answer)) * counts).sum()
            if not wanted:
                continue
            slope = logits.sub_(sums).exp_().mul_(counts)  # of the logits
            slope.scatter_add_(1, answer, -counts.to(wide))
            to_bias += slope.sum(0)
            slope = slope.to(dtype)
            torch.mm(slope, e, out=to_hidden[part])
            if dtype == wide:
                to_embedding.addmm_(slope.T, h[part])
            else:
                to_embedding += slope.T @ h[part]
        if wanted:
            ctx.save_for_backward(to_hidden, to_embedding, to_bias)
            ctx.dtypes = hidden.dtype, embedding.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        made = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        return *((x * grad).to(dtype) if needed else None for x, dtype, needed in made), None, None, None, None
