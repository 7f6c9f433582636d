"""The definition of attention with an additive, learned bias, in plain products, and the checks and keys that all
implementations use.

Shapes: B batch, H heads, T queries and keys, K head size. Packed sequences of unequal lengths are a batch of one whose
T is their total length; T in the bias is then the length of the longest.
"""

import itertools

import torch
from torch import Tensor

from fastbert_kernels.dropout import hash_dropout
from fastbert_kernels.hashing import combine, mix, signed


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    key_padding: Tensor | None = None,
    segments: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    keys: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> Tensor:
    """Definition of `attention`, by plain products and a softmax in at least float32.

        softmax(scale q k^T + bias, over the allowed keys) v

    Args:
        q: [B, H, T, K], or another number of queries.
        k, v: [B, H, T, K].
        bias: [1 or B, 1 or H, queries, T], added to the scaled scores.
        cu_seqlens: int32 [sequences + 1], the start of each packed sequence and the end of the last. B is 1, the bias
            is indexed by position in the sequence, and tokens attend within their sequence.
        key_padding: bool [B, T], False for masked keys (padding).
        segments: int [B, T]; a query attends to the keys of its segment, such as its document.
        scale: factor of q k^T, K ** -0.5 if None.
        dropout_p: dropout probability.
        seed: random seed of the dropout, hashed with the row index; or give
        keys: int32 [B or sequences], one hashed key for each, so that the dropout of a row does not depend on its
            index.
        query_positions: int64 [B, queries], the positions of the queries, for segments and dropout; 0, 1, ... if None.

    Returns:
        [B, H, queries, K]; zeros where a query sees no key.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    check_attention(q, k, v, bias, cu_seqlens, key_padding, segments, dropout_p, seed, keys, query_positions)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = dropout_keys(q, cu_seqlens, dropout_p, seed, keys)
    if cu_seqlens is None:
        allowed = allowed_pairs(key_padding, segments, q.shape[2], query_positions)
        return _plain(q, k, v, bias, allowed, scale, dropout_p, keys, query_positions)
    parts = []
    bounds = cu_seqlens.tolist()
    if bounds != sorted(bounds) or bounds[0] != 0 or bounds[-1] != q.shape[2]:
        raise ValueError(f"cu_seqlens must ascend from 0 to the {q.shape[2]} tokens, not {bounds[:3]} ... {bounds[-1]}")
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        q_, k_, v_ = (x[:, :, start:end] for x in (q, k, v))
        bias_ = None if bias is None else bias[:, :, : end - start, : end - start]
        key = None if keys is None else keys[number : number + 1]
        parts.append(_plain(q_, k_, v_, bias_, None, scale, dropout_p, key))
    return torch.cat(parts, 2)


def allowed_pairs(
    key_padding: Tensor | None, segments: Tensor | None, queries: int, query_positions: Tensor | None = None
) -> Tensor | None:
    """Mask of allowed keys, bool [B, 1, 1 or queries, T], for the queries at `query_positions` or the first `queries`;
    None if all are allowed."""
    allowed = None if key_padding is None else key_padding[:, None, None, :]
    if segments is None:
        return allowed
    of_query = segments[:, :queries] if query_positions is None else segments.gather(1, query_positions)
    same = (of_query[:, :, None] == segments[:, None, :])[:, None]
    return same if allowed is None else allowed & same


def dropout_row_keys(keys: Tensor, heads: int, length: int, query_positions: Tensor | None = None) -> Tensor:
    """int32 [B, H, T], one hashed key for each row of the attention matrix, from one key for each row of the batch."""
    head = torch.arange(heads, dtype=torch.int32, device=keys.device)
    query = (
        torch.arange(length, dtype=torch.int32, device=keys.device)
        if query_positions is None
        else query_positions.int()[:, None]
    )
    return combine(combine(keys[:, None], head)[:, :, None], query)


def _plain(q, k, v, bias, allowed, scale: float, dropout_p: float, keys, query_positions=None) -> Tensor:
    """Attention of a batch of sequences of equal length."""
    # Scaling the queries costs T x K products instead of T x T.
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
        rows = dropout_row_keys(keys, q.shape[1], q.shape[2], query_positions)
        probabilities = hash_dropout(probabilities, rows, dropout_p)
    return probabilities.to(v.dtype) @ v


def dropout_keys(q: Tensor, cu_seqlens: Tensor | None, dropout_p: float, seed: int | None, keys: Tensor | None):
    """Keys [B or sequences], one for each row of the batch or packed sequence; None without dropout."""
    if not dropout_p or keys is not None:
        return keys if dropout_p else None
    count = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
    start = torch.full((1,), signed(seed), dtype=torch.int32, device=q.device)
    return combine(mix(start), torch.arange(count, dtype=torch.int32, device=q.device))


def check_attention(
    q, k, v, bias, cu_seqlens, key_padding, segments, dropout_p: float, seed, keys, query_positions=None
) -> None:
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"q, k, v must be [B, H, T, K], not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not match")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"q ({q.dtype}, {q.device}), k ({k.dtype}, {k.device}) and v ({v.dtype}, {v.device}) must have "
            "the same dtype and device"
        )
    if query_positions is not None and (cu_seqlens is not None or query_positions.shape != (len(q), q.shape[2])):
        raise ValueError(
            f"query_positions {tuple(query_positions.shape)} must be [B, queries] {(len(q), q.shape[2])}, "
            "without cu_seqlens"
        )
    if segments is not None and query_positions is None and q.shape[2] > k.shape[2]:
        raise ValueError(f"with segments there cannot be more queries ({q.shape[2]}) than keys ({k.shape[2]})")
    batch, heads, queries, size = q.shape
    length = k.shape[2]
    if size == 0:
        raise ValueError(f"q {tuple(q.shape)} must be [B, H, T, K] with K at least 1")
    if bias is not None:
        fits = bias.dim() == 4 and bias.shape[0] in (1, batch) and bias.shape[1] in (1, heads)
        if not fits or (cu_seqlens is None and bias.shape[2:] != (queries, length)):
            scores = (batch, heads, queries, length)
            raise ValueError(f"bias {tuple(bias.shape)} does not fit scores [B, H, T, T] {scores}")
        if bias.shape[2] != bias.shape[3] and cu_seqlens is not None:
            raise ValueError(f"bias {tuple(bias.shape)} must be square for packed sequences, indexed by position")
        if not bias.is_floating_point():
            raise ValueError(f"bias must be floating-point, not {bias.dtype}")
    tensors = {"bias": bias, "cu_seqlens": cu_seqlens, "key_padding": key_padding, "segments": segments, "keys": keys}
    for name, x in {**tensors, "query_positions": query_positions}.items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}; they must be on one device")
    for name, x, dtype in (("key_padding", key_padding, "bool"), ("segments", segments, "int")):
        if x is None:
            continue
        if x.shape != (batch, length):
            raise ValueError(f"{name} {tuple(x.shape)} must be [B, T] {(batch, length)}")
        if (x.dtype == torch.bool) != (dtype == "bool") or x.is_floating_point() or x.is_complex():
            raise ValueError(f"{name} must be {dtype}, not {x.dtype}")
    if cu_seqlens is not None:
        if batch != 1 or queries != length or key_padding is not None or segments is not None:
            raise ValueError("with cu_seqlens, B must be 1, and there is no key_padding, segments or shorter q")
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype != torch.int32:
            raise ValueError(
                f"cu_seqlens must be int32 [sequences + 1], not {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
            )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), not {dropout_p}")
    if dropout_p:
        rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
        if (seed is None) == (keys is None) or (keys is not None and keys.shape != (rows,)):
            raise ValueError(f"dropout needs a seed, or one int32 key for each of the {rows} rows")
        if keys is not None and keys.dtype != torch.int32:
            raise ValueError(f"keys must be int32, not {keys.dtype}")
