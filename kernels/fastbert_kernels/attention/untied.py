"""TUPE's attention from the components of its bias (arXiv 2006.15595), without a T x T matrix for long sequences.

    a_ij = scale q_i k_j^T + reset( scale p_i u_j^T + b_bucket(j - i) )
    reset(v)_ij = cls_to_all where i = 0, all_to_cls where only j = 0, v_ij elsewhere

with p and u the queries and keys of the positions. For short sequences the bias is computed as a matrix [H, T, T] for
all rows of the batch. Where that matrix would not stay in the L2 cache, the kernels compute it tile by tile, at the
cost of one more product. Without kernels it is computed for a few queries at a time and recomputed in the backward
pass.

Shapes: B batch, H heads, T tokens, K head size, P positions (at least the length of the longest sequence), R buckets.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastbert_kernels.attention.dispatch import attention, unsupported
from fastbert_kernels.attention.distances import from_diagonals, relative_bucket
from fastbert_kernels.attention.reference import (
    allowed_pairs,
    attention_reference,
    check_attention,
    dropout_keys,
    dropout_row_keys,
)
from fastbert_kernels.backend import runs_kernels
from fastbert_kernels.dropout import hash_dropout

BIAS_BYTES = 16 << 20
"""A float32 bias [H, T, T] of up to this size is computed as a matrix on a GPU: a third of an H100's L2 cache."""
CELLS = 1 << 23
"""Number of scores [B, H, queries, T] computed at a time without kernels (those of one query at least)."""


def untied_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_q: Tensor,
    pos_k: Tensor,
    cls_to_all: Tensor,
    all_to_cls: Tensor,
    relative_table: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    key_padding: Tensor | None = None,
    segments: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    keys: Tensor | None = None,
    max_distance: int = 128,
) -> Tensor:
    """Attention with TUPE-A's bias, or with TUPE-R's if `relative_table` is given; differentiable in every input.

    Args:
        q, k, v: [B, H, T, K]; packed sequences with `cu_seqlens`, B = 1.
        pos_q, pos_k: [H, P, K], the queries p U_Q and keys p U_K of the positions by head; position 0 is [CLS].
        cls_to_all, all_to_cls: [H], theta_1 and theta_2, added to the scaled scores.
        relative_table: [R, H], T5's bias of each bucket of distances, added to the scaled scores.
        scale: factor of both products, (2 K) ** -0.5 if None, as in the paper.
        cu_seqlens, key_padding, segments, dropout_p, seed, keys: as in `attention`. With `segments` positions are
            still counted from the start of the row.
        max_distance: distance from which on the last bucket is used.

    Returns:
        [B, H, T, K].

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    scale = (2 * q.shape[-1]) ** -0.5 if scale is None else scale
    options = {"cu_seqlens": cu_seqlens, "key_padding": key_padding, "segments": segments, "dropout_p": dropout_p}
    options |= {"scale": scale, "seed": seed, "keys": keys}
    check_attention(q, k, v, None, cu_seqlens, key_padding, segments, dropout_p, seed, keys)
    if q.shape != v.shape or q.shape != k.shape:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must have the same shape")
    parts = untied_parts(q, pos_q, pos_k, cls_to_all, all_to_cls, relative_table, cu_seqlens is not None, max_distance)
    positions = parts[0].shape[1]
    large = q.numel() and 4 * len(cls_to_all) * positions**2 > BIAS_BYTES
    if large and runs_kernels(q, "untied_attention") and unsupported(q) is None:
        return by_kernels(q, k, v, parts, **options)
    if q.device.type == "cuda" or len(q) * q.shape[1] * positions**2 <= CELLS:
        return by_matrix(q, k, v, parts, **options)
    return by_stripes(q, k, v, parts, **options)


def untied_attention_reference(q, k, v, pos_q, pos_k, cls_to_all, all_to_cls, relative_table=None, **options) -> Tensor:
    """Definition of `untied_attention`: `attention_reference` with the bias as a matrix."""
    scale = options.pop("scale", None) or (2 * q.shape[-1]) ** -0.5
    packed = options.get("cu_seqlens") is not None
    distance = options.pop("max_distance", 128)
    parts = untied_parts(q, pos_q, pos_k, cls_to_all, all_to_cls, relative_table, packed, distance)
    bias = bias_rows(*parts, scale=scale, first=0, rows=parts[0].shape[1], length=parts[0].shape[1])
    return attention_reference(q, k, v, bias[None], scale=scale, **options)


def bias_rows(
    pos_q: Tensor,
    pos_k: Tensor,
    theta: Tensor,
    by_distance: Tensor | None = None,
    *,
    scale: float,
    first: int,
    rows: int,
    length: int,
) -> Tensor:
    """Consecutive rows of the bias.

    Args:
        pos_q, pos_k: [H, P, K].
        theta: [H, 2], cls_to_all and all_to_cls.
        by_distance: [H, 2 P - 1], a value for each distance 1 - P to P - 1.
        scale: factor of the product.
        first, rows: the first row and the number of rows.
        length: number of columns.

    Returns:
        [H, rows, length].
    """
    bias = (scale * pos_q[:, first : first + rows]) @ pos_k[:, :length].transpose(1, 2)
    if by_distance is not None:
        bias = bias + from_diagonals(by_distance, first, rows, length)
    theta = theta.to(bias.dtype)
    column = torch.arange(length, device=bias.device)
    bias = torch.where(column == 0, theta[:, 1, None, None], bias)
    row = torch.arange(first, first + rows, device=bias.device)
    return torch.where(row[:, None] == 0, theta[:, 0, None, None], bias)


def by_kernels(q, k, v, parts, *, cu_seqlens, key_padding, segments, scale, dropout_p, seed, keys) -> Tensor:
    """Untied attention by the Triton kernels; `parts` are those of `untied_parts`."""
    from fastbert_kernels.attention.triton_launch import attention_forward

    pos_q, pos_k, theta, by_distance = parts
    positions = pos_q.to(q.dtype).contiguous(), pos_k.to(q.dtype).contiguous()
    biases = theta.float().contiguous(), None if by_distance is None else by_distance.float().contiguous()
    longest = q.shape[2] if cu_seqlens is None else pos_q.shape[1]
    keys = dropout_keys(q, cu_seqlens, dropout_p, seed, keys)
    masks = (cu_seqlens, key_padding, segments)
    return attention_forward(q, k, v, None, *positions, *biases, *masks, keys, scale, dropout_p, longest)[0]


def by_matrix(q, k, v, parts, *, scale, **options) -> Tensor:
    """Untied attention by `attention` with the bias [H, T, T]."""
    length = parts[0].shape[1]
    bias = bias_rows(*parts, scale=scale, first=0, rows=length, length=length)
    return attention(q, k, v, bias[None], scale=scale, **options)


def by_stripes(q, k, v, parts, *, cu_seqlens, key_padding, segments, scale, dropout_p, seed, keys) -> Tensor:
    """Untied attention by plain products for a few queries at a time."""
    keys = dropout_keys(q, cu_seqlens, dropout_p, seed, keys)
    if cu_seqlens is None:
        return _striped(q, k, v, parts, key_padding, segments, scale, dropout_p, keys)
    out = []
    for number, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        if start == end:
            continue
        qkv = [x[:, :, start:end] for x in (q, k, v)]
        key = None if keys is None else keys[number : number + 1]
        out.append(_striped(*qkv, parts, None, None, scale, dropout_p, key))
    return torch.cat(out, 2)


def _striped(q, k, v, parts, key_padding, segments, scale: float, dropout_p: float, keys) -> Tensor:
    """Untied attention of sequences of equal length, one stripe of queries after the other."""
    batch, heads, length, _ = q.shape
    rows = max(1, CELLS // (batch * heads * length))
    allowed = None if segments is not None else allowed_pairs(key_padding, None, length)
    row_keys = dropout_row_keys(keys, heads, length) if dropout_p else None
    out = []
    for first in range(0, length, rows):
        part = slice(first, first + rows)
        if segments is not None:
            allowed = (segments[:, part, None] == segments[:, None, :])[:, None]
            allowed = allowed if key_padding is None else allowed & key_padding[:, None, None, :]
        stripe_keys = None if row_keys is None else row_keys[:, :, part]
        options = allowed, stripe_keys, scale, dropout_p, first
        out.append(checkpoint(_stripe, q[:, :, part], k, v, parts, *options, use_reentrant=False))
    return torch.cat(out, 2)


def _stripe(q, k, v, parts, allowed, row_keys, scale: float, dropout_p: float, first: int) -> Tensor:
    """Attention of the queries q, the first of which has the position `first`."""
    bias = bias_rows(*parts, scale=scale, first=first, rows=q.shape[2], length=k.shape[2])
    scores = (q * scale) @ k.transpose(-1, -2) + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if allowed is not None:
        probabilities = probabilities * allowed.any(-1, keepdim=True)
    if dropout_p:
        probabilities = hash_dropout(probabilities, row_keys, dropout_p)
    return probabilities.to(v.dtype) @ v


def untied_parts(q, pos_q, pos_k, cls_to_all, all_to_cls, relative_table, packed: bool, max_distance: int):
    """Components of the bias: pos_q and pos_k [H, P, K], theta [H, 2], by_distance [H, 2 P - 1] or None. P is T, or
    with `packed` the number of given positions.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    heads, length, size = q.shape[1:]
    if length == 0:
        raise ValueError(f"q {tuple(q.shape)} must be [B, H, T, K] with T at least 1")
    for name, x in (("pos_q", pos_q), ("pos_k", pos_k)):
        if x.dim() != 3 or x.shape[0] != heads or x.shape[2] != size or (not packed and x.shape[1] < length):
            raise ValueError(
                f"{name} {tuple(x.shape)} must be [H, P, K] {(heads, 'P', size)} with P at least T {length}"
            )
    if pos_q.shape != pos_k.shape:
        raise ValueError(f"pos_q {tuple(pos_q.shape)} and pos_k {tuple(pos_k.shape)} must have the same shape")
    for name, x in (("cls_to_all", cls_to_all), ("all_to_cls", all_to_cls)):
        if x.shape != (heads,):
            raise ValueError(f"{name} {tuple(x.shape)} must be [H] {(heads,)}")
    tensors = {"pos_q": pos_q, "pos_k": pos_k, "cls_to_all": cls_to_all, "all_to_cls": all_to_cls}
    if relative_table is not None:
        tensors["relative_table"] = relative_table
        if relative_table.dim() != 2 or relative_table.shape[1] != heads or relative_table.shape[0] % 4:
            raise ValueError(
                f"relative_table {tuple(relative_table.shape)} must be [R, H] {('R', heads)} with R a multiple of 4"
            )
        if max_distance <= len(relative_table) // 4:
            raise ValueError(f"max_distance {max_distance} must exceed a quarter of the {len(relative_table)} buckets")
    for name, x in tensors.items():
        if x.device != q.device or not x.is_floating_point():
            raise ValueError(f"{name} ({x.dtype}, {x.device}) must be floating-point and on q's device, {q.device}")
    if not packed:
        pos_q, pos_k = pos_q[:, :length], pos_k[:, :length]
    by_distance = None
    if relative_table is not None:
        positions = pos_q.shape[1]
        distance = torch.arange(1 - positions, positions, device=q.device)
        bucket = relative_bucket(distance, len(relative_table), max_distance)
        by_distance = F.embedding(bucket, relative_table).T
    return pos_q, pos_k, torch.stack([cls_to_all, all_to_cls], 1), by_distance
