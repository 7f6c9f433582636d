"""Exact attention with an additive, learned bias.

Shapes: B batch, H heads, T queries and keys, K head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert_kernels.dropout import hash_dropout
from fastbert_kernels.hashing import combine


def _check(q: Tensor, k: Tensor, v: Tensor, bias, allowed, dropout_p: float, keys) -> None:
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"q, k, v must be [B, H, T, K], not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit each other")
    scores = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    for name, x, heads in (("bias", bias, scores[1]), ("allowed", allowed, 1)):
        if x is not None and (x.dim() != 4 or x.shape[0] not in (1, scores[0]) or x.shape[1] not in (1, heads)):
            raise ValueError(f"{name} {tuple(x.shape)} does not fit scores [B, H, T, T] {scores}")
    if allowed is not None and allowed.dtype != torch.bool:
        raise ValueError(f"allowed must be bool, not {allowed.dtype}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), not {dropout_p}")
    if dropout_p and (keys is None or keys.shape != q.shape[:1]):
        raise ValueError("dropout needs one int32 key for each row of the batch")


def dropout_row_keys(keys: Tensor, heads: int, length: int) -> Tensor:
    """int32 [B, H, T]: the hashed key of each row of the attention matrix, from one key for each row of the batch."""
    head = torch.arange(heads, dtype=torch.int32, device=keys.device)
    query = torch.arange(length, dtype=torch.int32, device=keys.device)
    return combine(combine(keys[:, None], head)[:, :, None], query)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    allowed: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_keys: Tensor | None = None,
) -> Tensor:
    """What `attention` means, in plain products and a softmax in at least float32.

        softmax(scale q k^T + bias, over the allowed keys) v

    Args:
        q, k, v: [B, H, T, K].
        bias: [1 or B, 1 or H, T, T], added to the scaled scores.
        allowed: bool [1 or B, 1, 1 or T, T], which keys a query may see; a query with none gives zeros.
        scale: of the scores, K ** -0.5 if None.
        dropout_p: share of the probabilities that is dropped.
        dropout_keys: int32 [B], one key for each row of the batch; needed for dropout.

    Returns:
        [B, H, T, K].

    Raises:
        ValueError: shapes that do not fit, named.
    """
    _check(q, k, v, bias, allowed, dropout_p, dropout_keys)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # The scale goes to the queries: T x K numbers instead of T x T.
    scores = (q * scale) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    wide = torch.float32 if scores.dtype in (torch.float16, torch.bfloat16) else scores.dtype
    probabilities = scores.softmax(-1, dtype=wide)
    if allowed is not None:
        probabilities = probabilities * allowed.any(-1, keepdim=True)
    if dropout_p:
        keys = dropout_row_keys(dropout_keys, q.shape[1], q.shape[2])
        probabilities = hash_dropout(probabilities, keys, dropout_p)
    return probabilities.to(v.dtype) @ v


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    allowed: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_keys: Tensor | None = None,
) -> Tensor:
    """`attention_reference` by the fastest way this machine has; arguments and result as there.

    On a GPU and without dropout that is PyTorch's fused attention. On CPUs plain products are as fast or faster, and
    PyTorch's own dropout is not reproducible, so everything else takes the reference's way.
    """
    if q.device.type != "cuda" or dropout_p:
        return attention_reference(
            q, k, v, bias, allowed=allowed, scale=scale, dropout_p=dropout_p, dropout_keys=dropout_keys
        )
    _check(q, k, v, bias, allowed, dropout_p, dropout_keys)
    mask = None if bias is None else bias.to(q.dtype)
    if allowed is not None:
        zeros = mask if mask is not None else torch.zeros((), dtype=q.dtype, device=q.device)
        mask = zeros.masked_fill(~allowed, torch.finfo(q.dtype).min)
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out if allowed is None else out * allowed.any(-1, keepdim=True)
