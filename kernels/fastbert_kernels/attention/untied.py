"""TUPE's attention from its parts (arXiv 2006.15595), without a T x T matrix where sequences are long.

    a_ij = scale q_i k_j^T + reset( scale p_i u_j^T + b_bucket(j - i) )
    reset(v)_ij = cls_to_all where i = 0, all_to_cls where only j = 0, v_ij elsewhere

with p and u the queries and keys of the places. Short sequences get the bias as a matrix [H, T, T], which all rows of
the batch share. Where that would not stay in the L2 cache, the kernels make it tile by tile, at the price of one more
product. Without kernels it is there for some queries at a time, and made again in the backward pass.

Shapes: B batch, H heads, T tokens, K head size, P places (at least the longest sequence's), R buckets.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastbert_kernels.attention.dispatch import attention, no_kernel
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
"""A float32 bias [H, T, T] of up to this size is made as a matrix on a GPU: a third of an H100's L2 cache."""
CELLS = 1 << 23
"""Scores [B, H, queries, T] that there are at a time without kernels, as far as one query allows."""


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
    """Attention with TUPE-A's bias, or TUPE-R's if there is a `relative_table`; gradients flow to every input.

    Args:
        q, k, v: [B, H, T, K]; with `cu_seqlens` all sequences one after the other, B = 1.
        pos_q, pos_k: [H, P, K], the queries p U_Q and keys p U_K of the places by head; place 0 is [CLS].
        cls_to_all, all_to_cls: [H], theta_1 and theta_2, as they stand in the scores.
        relative_table: [R, H], T5's bias of each bucket of distances, up to `max_distance`; as it stands in the scores.
        scale: of both products, (2 K) ** -0.5 if None: the paper's.
        cu_seqlens, key_padding, segments, dropout_p, seed, keys: as in `attention`. With `segments` places are still
            those in the row.

    Returns:
        [B, H, T, K].

    Raises:
        ValueError: shapes or types that do not fit, named.
    """
    scale = (2 * q.shape[-1]) ** -0.5 if scale is None else scale
    given = {"cu_seqlens": cu_seqlens, "key_padding": key_padding, "segments": segments, "dropout_p": dropout_p}
    given |= {"scale": scale, "seed": seed, "keys": keys}
    check_attention(q, k, v, None, cu_seqlens, key_padding, segments, dropout_p, seed, keys)
    if q.shape != v.shape or q.shape != k.shape:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must have the same shape")
    parts = untied_parts(q, pos_q, pos_k, cls_to_all, all_to_cls, relative_table, cu_seqlens is not None, max_distance)
    places = parts[0].shape[1]
    large = q.numel() and 4 * len(cls_to_all) * places**2 > BIAS_BYTES
    if large and runs_kernels(q, "untied_attention") and no_kernel(q) is None:
        return by_kernels(q, k, v, parts, **given)
    if q.device.type == "cuda" or len(q) * q.shape[1] * places**2 <= CELLS:
        return by_matrix(q, k, v, parts, **given)
    return by_stripes(q, k, v, parts, **given)


def untied_attention_reference(q, k, v, pos_q, pos_k, cls_to_all, all_to_cls, relative_table=None, **given) -> Tensor:
    """`untied_attention` by `attention_reference` with the bias as a matrix."""
    scale = given.pop("scale", None) or (2 * q.shape[-1]) ** -0.5
    packed = given.get("cu_seqlens") is not None
    distance = given.pop("max_distance", 128)
    parts = untied_parts(q, pos_q, pos_k, cls_to_all, all_to_cls, relative_table, packed, distance)
    bias = bias_rows(*parts, scale=scale, first=0, rows=parts[0].shape[1], length=parts[0].shape[1])
    return attention_reference(q, k, v, bias[None], scale=scale, **given)


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
    """Some rows of the bias.

    Args:
        pos_q, pos_k: [H, P, K].
        theta: [H, 2], cls_to_all and all_to_cls.
        by_distance: [H, 2 P - 1], a number for each distance 1 - P to P - 1.
        first, rows: which rows.
        length: of a row.

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
    """By the Triton kernels; `parts` as `untied_parts` gives them."""
    from fastbert_kernels.attention.triton_launch import attention_forward

    pos_q, pos_k, theta, by_distance = parts
    places = pos_q.to(q.dtype).contiguous(), pos_k.to(q.dtype).contiguous()
    numbers = theta.float().contiguous(), None if by_distance is None else by_distance.float().contiguous()
    longest = q.shape[2] if cu_seqlens is None else pos_q.shape[1]
    keys = dropout_keys(q, cu_seqlens, dropout_p, seed, keys)
    masks = (cu_seqlens, key_padding, segments)
    return attention_forward(q, k, v, None, *places, *numbers, *masks, keys, scale, dropout_p, longest)[0]


def by_matrix(q, k, v, parts, *, scale, **given) -> Tensor:
    """By `attention` with the bias [H, T, T]."""
    length = parts[0].shape[1]
    bias = bias_rows(*parts, scale=scale, first=0, rows=length, length=length)
    return attention(q, k, v, bias[None], scale=scale, **given)


def by_stripes(q, k, v, parts, *, cu_seqlens, key_padding, segments, scale, dropout_p, seed, keys) -> Tensor:
    """By plain products for some queries at a time."""
    keys = dropout_keys(q, cu_seqlens, dropout_p, seed, keys)
    if cu_seqlens is None:
        return _striped(q, k, v, parts, key_padding, segments, scale, dropout_p, keys)
    out = []
    for number, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        if start == end:
            continue
        own = [x[:, :, start:end] for x in (q, k, v)]
        own_keys = None if keys is None else keys[number : number + 1]
        out.append(_striped(*own, parts, None, None, scale, dropout_p, own_keys))
    return torch.cat(out, 2)


def _striped(q, k, v, parts, key_padding, segments, scale: float, dropout_p: float, keys) -> Tensor:
    """Sequences of equal length."""
    batch, heads, length, _ = q.shape
    rows = max(1, CELLS // (batch * heads * length))
    allowed = None if segments is not None else allowed_pairs(key_padding, None, length)
    cells = dropout_row_keys(keys, heads, length) if dropout_p else None
    out = []
    for first in range(0, length, rows):
        part = slice(first, first + rows)
        if segments is not None:
            allowed = (segments[:, part, None] == segments[:, None, :])[:, None]
            allowed = allowed if key_padding is None else allowed & key_padding[:, None, None, :]
        own = None if cells is None else cells[:, :, part]
        out.append(
            checkpoint(_stripe, q[:, :, part], k, v, parts, allowed, own, scale, dropout_p, first, use_reentrant=False)
        )
    return torch.cat(out, 2)


def _stripe(q, k, v, parts, allowed, row_keys, scale: float, dropout_p: float, first: int) -> Tensor:
    """Of the queries from `first` on."""
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
    """pos_q, pos_k [H, P, K], theta [H, 2], by_distance [H, 2 P - 1] or None; P is T, or with `packed` what is given.

    Raises:
        ValueError: what does not fit.
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
    others = {"pos_q": pos_q, "pos_k": pos_k, "cls_to_all": cls_to_all, "all_to_cls": all_to_cls}
    if relative_table is not None:
        others["relative_table"] = relative_table
        if relative_table.dim() != 2 or relative_table.shape[1] != heads or relative_table.shape[0] % 4:
            raise ValueError(
                f"relative_table {tuple(relative_table.shape)} must be [R, H] {('R', heads)} with R a multiple of 4"
            )
        if max_distance <= len(relative_table) // 4:
            raise ValueError(f"max_distance {max_distance} must exceed a quarter of the {len(relative_table)} buckets")
    for name, x in others.items():
        if x.device != q.device or not x.is_floating_point():
            raise ValueError(f"{name} ({x.dtype}, {x.device}) must be floating-point and on q's device, {q.device}")
    if not packed:
        pos_q, pos_k = pos_q[:, :length], pos_k[:, :length]
    by_distance = None
    if relative_table is not None:
        places = pos_q.shape[1]
        bucket = relative_bucket(torch.arange(1 - places, places, device=q.device), len(relative_table), max_distance)
        by_distance = F.embedding(bucket, relative_table).T
    return pos_q, pos_k, torch.stack([cls_to_all, all_to_cls], 1), by_distance
