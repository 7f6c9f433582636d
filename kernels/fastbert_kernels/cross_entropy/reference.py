"""The definition of cross-entropy over a vocabulary. Shapes: N rows, V words, D width."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_reference(
    hidden: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Definition of `linear_cross_entropy`: a product, and the cross-entropy of its softmax in at least float32.

    Args:
        hidden: floating [N, D].
        embedding: floating [V, D].
        bias: floating [V].
        target: int64 [N], word ids or `ignore_index`.
        ignore_index: target of rows that are ignored.
        reduction: mean (over the rows that are not ignored; NaN if there are none) or sum.

    Returns:
        a scalar in at least float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; an empty vocabulary; another reduction.
    """
    check_loss(hidden, embedding, bias, target, reduction)
    logits = F.linear(hidden, embedding, bias)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), target, ignore_index=ignore_index, reduction=reduction)


def check_loss(hidden: Tensor, embedding: Tensor, bias: Tensor | None, target: Tensor, reduction: str) -> None:
    if hidden.dim() != 2 or embedding.dim() != 2 or hidden.shape[1] != embedding.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and embedding {tuple(embedding.shape)} must be [N, D], [V, D]")
    if len(embedding) == 0:
        raise ValueError(f"embedding {tuple(embedding.shape)} must be [V, D] with V at least 1")
    if target.shape != hidden.shape[:1]:
        raise ValueError(f"target {tuple(target.shape)} must be [N] for hidden {tuple(hidden.shape)}")
    if bias is not None and bias.shape != embedding.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [V] for embedding {tuple(embedding.shape)}")
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, not {target.dtype}")
    for name, x in (("hidden", hidden), ("embedding", embedding), ("bias", bias), ("target", target)):
        if x is None:
            continue
        if x is not target and not x.is_floating_point():
            raise ValueError(f"{name} must be floating, not {x.dtype}")
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device} and hidden on {hidden.device}; they must be on one device")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, not {reduction!r}")
