"""Exact attention with a learned bias in Triton: forward, and a backward whose every number is summed by one program.

    S = scale Q K^T + bias, over the allowed keys     P = softmax(S)     O = drop(P) V

The forward pass walks over the keys of a block of queries and keeps a running maximum and sum, so S is never written;
it leaves L, the base-2 logarithm of the sum of exponentials of each row. With Delta = rowsum(dO O), which is also
rowsum(drop(P) dP) under dropout, the backward pass recomputes P = 2^(S log2 e - L) in three kernels:

    keys     a program for a block of keys walks over the queries:    dV = drop(P)^T dO,  dK = scale dS^T Q
    queries  a program for a block of queries walks over the keys:    dQ = scale dS K
    bias     a program for a tile of the bias walks over the batch:   dB = sum over b of dS
             with dS = P (drop(dO V^T) - Delta)

Nothing is added atomically, so two runs give the same bits. Nine products in all, of which the gradient of the bias
takes two. A row that sees no key has O = 0, L = +inf, and so P = 0 and no gradient.

Shapes: B batch (or sequences), H heads, T queries and keys (of the longest sequence), K head size. Sequences packed
one after the other are given as B = 1 with `cu_seqlens` [sequences + 1]; the bias is then by place in the sequence.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.hashing import GOLDEN, LIGHT, threshold

LOG2E = 1.4426950408889634
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_MIX_1 = tl.constexpr(0x7FEB352D)
_MIX_2 = tl.constexpr(0x846CA68B - 2**32)
_GOLDEN = tl.constexpr(GOLDEN)
_LIGHT = tl.constexpr(LIGHT)
_LOG2E = tl.constexpr(LOG2E)


# --- the hash of fastbert_kernels.hashing


@triton.jit
def _mix(x):
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _MIX_1
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _MIX_2
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def _combine(key, value):
    return _mix(_mix(key + _GOLDEN) ^ value)


@triton.jit
def _kept(row_keys, columns, limit):
    """bool, broadcast: which cells dropout keeps."""
    y = row_keys ^ _combine(columns, 0)
    y = y * _GOLDEN
    y = y ^ ((y >> 15) & 0x1FFFF)
    y = y * _LIGHT
    return y >= limit


# --- parts of all kernels


@triton.jit
def _span(CU, b, T, VARLEN: tl.constexpr):
    """Where sequence `b` starts in its row, and its length."""
    if VARLEN:
        start = tl.load(CU + b)
        return start, tl.load(CU + b + 1) - start
    return 0, T


@triton.jit
def _rows(X, offsets, columns, length, stride_t, stride_k, K: tl.constexpr):
    """[offsets, columns] of a matrix of `length` rows and K columns, zeros beyond."""
    inside = (offsets[:, None] < length) & (columns[None, :] < K)
    return tl.load(X + offsets[:, None] * stride_t + columns[None, :] * stride_k, mask=inside, other=0.0)


@triton.jit
def _product(a, b, UPCAST: tl.constexpr):
    """a b in float32. The interpreter's products of bfloat16 are wrong, so there the operands are cast up."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _scores(
    q, k, BIAS, PAD, SEG, m, n, length, scale, b, stride_bm, stride_bn, stride_pb, stride_pn, stride_sb, stride_sn,
    HAS_BIAS: tl.constexpr, PADDED: tl.constexpr, SEGMENTED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """log2(e) times the scores [m, n], -inf where a key may not be seen."""
    s = _product(q, tl.trans(k), UPCAST) * (scale * _LOG2E)
    seen = (m[:, None] < length) & (n[None, :] < length)
    if HAS_BIAS:
        bias = tl.load(BIAS + m[:, None] * stride_bm + n[None, :] * stride_bn, mask=seen, other=0.0)
        s += bias.to(tl.float32) * _LOG2E
    if PADDED:
        real = tl.load(PAD + b * stride_pb + n * stride_pn, mask=n < length, other=0)
        seen = seen & (real[None, :] != 0)
    if SEGMENTED:
        of_query = tl.load(SEG + b * stride_sb + m * stride_sn, mask=m < length, other=0)
        of_key = tl.load(SEG + b * stride_sb + n * stride_sn, mask=n < length, other=0)
        seen = seen & (of_query[:, None] == of_key[None, :])
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _dropped(x, KEYS, b, h, m, n, limit, kept_scale):
    """x [m, n] after dropout."""
    rows = _combine(_combine(tl.load(KEYS + b), h), m)
    return tl.where(_kept(rows[:, None], n[None, :], limit), x * kept_scale, 0.0)


# --- kernels


@triton.jit
def forward_kernel(
    Q, KEY, V, BIAS, OUT, LSE, CU, PAD, SEG, KEYS, scale, limit, kept_scale, T,
    stride_qb, stride_qh, stride_qt, stride_qk, stride_kb, stride_kh, stride_kt, stride_kk,
    stride_vb, stride_vh, stride_vt, stride_vk, stride_ob, stride_oh, stride_ot, stride_ok,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_lb, stride_lh, stride_pb, stride_pn, stride_sb, stride_sn,
    H: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, VARLEN: tl.constexpr, PADDED: tl.constexpr,
    SEGMENTED: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of BLOCK_M queries of one sequence and head."""
    first, bh = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    b, h = bh // H, bh % H
    start, length = _span(CU, b, T, VARLEN)
    if first >= length:
        return
    row = 0 if VARLEN else b
    row = row.to(tl.int64) if not VARLEN else row
    m, column = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    Q += row * stride_qb + h * stride_qh + start * stride_qt
    KEY += row * stride_kb + h * stride_kh + start * stride_kt
    V += row * stride_vb + h * stride_vh + start * stride_vt
    BIAS += b.to(tl.int64) * stride_bb + h * stride_bh
    q = _rows(Q, m, column, length, stride_qt, stride_qk, K)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for begin in range(0, length, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        k = _rows(KEY, n, column, length, stride_kt, stride_kk, K)
        s = _scores(
            q, k, BIAS, PAD, SEG, m, n, length, scale, b, stride_bm, stride_bn, stride_pb, stride_pn,
            stride_sb, stride_sn, HAS_BIAS, PADDED, SEGMENTED, UPCAST,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, p = tl.exp2(top - level), tl.exp2(s - level[:, None])
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            p = _dropped(p, KEYS, b, h, m, n, limit, kept_scale)
        v = _rows(V, n, column, length, stride_vt, stride_vk, K)
        out = out * shrink[:, None] + _product(p.to(v.dtype), v, UPCAST)
        top = higher
    none = total == 0.0
    out = out / tl.where(none, 1.0, total)[:, None]
    lse = tl.where(none, float("inf"), top + tl.log2(tl.where(none, 1.0, total)))
    inside = (m[:, None] < length) & (column[None, :] < K)
    OUT += row * stride_ob + h * stride_oh + start * stride_ot
    tl.store(OUT + m[:, None] * stride_ot + column[None, :] * stride_ok, out.to(OUT.dtype.element_ty), mask=inside)
    tl.store(LSE + row * stride_lb + h * stride_lh + start + m, lse, mask=m < length)


@triton.jit
def _ds(
    q, k, v, do, lse, delta, BIAS, PAD, SEG, KEYS, m, n, length, scale, limit, kept_scale, b, h,
    stride_bm, stride_bn, stride_pb, stride_pn, stride_sb, stride_sn,
    HAS_BIAS: tl.constexpr, PADDED: tl.constexpr, SEGMENTED: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """drop(P) and dS, [m, n]."""
    s = _scores(
        q, k, BIAS, PAD, SEG, m, n, length, scale, b, stride_bm, stride_bn, stride_pb, stride_pn, stride_sb, stride_sn,
        HAS_BIAS, PADDED, SEGMENTED, UPCAST,
    )  # fmt: skip
    p = tl.exp2(s - lse[:, None])
    dp = _product(do, tl.trans(v), UPCAST)
    dropped = p
    if DROPOUT:
        kept = _dropped(tl.full(p.shape, 1.0, tl.float32), KEYS, b, h, m, n, limit, kept_scale)
        dp, dropped = dp * kept, p * kept
    return dropped, p * (dp - delta[:, None])


@triton.jit
def keys_kernel(
    Q, KEY, V, BIAS, DO, LSE, DELTA, DK, DV, CU, PAD, SEG, KEYS, scale, limit, kept_scale, T,
    stride_qb, stride_qh, stride_qt, stride_qk, stride_kb, stride_kh, stride_kt, stride_kk,
    stride_vb, stride_vh, stride_vt, stride_vk, stride_ob, stride_oh, stride_ot, stride_ok,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_lb, stride_lh, stride_pb, stride_pn, stride_sb, stride_sn,
    stride_db, stride_dh, stride_dt, stride_dk,
    H: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, VARLEN: tl.constexpr, PADDED: tl.constexpr,
    SEGMENTED: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of BLOCK_N keys of one sequence and head."""
    first, bh = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    b, h = bh // H, bh % H
    start, length = _span(CU, b, T, VARLEN)
    if first >= length:
        return
    row = 0 if VARLEN else b
    row = row.to(tl.int64) if not VARLEN else row
    n, column = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    Q += row * stride_qb + h * stride_qh + start * stride_qt
    KEY += row * stride_kb + h * stride_kh + start * stride_kt
    V += row * stride_vb + h * stride_vh + start * stride_vt
    DO += row * stride_ob + h * stride_oh + start * stride_ot
    LSE += row * stride_lb + h * stride_lh + start
    DELTA += row * stride_lb + h * stride_lh + start
    BIAS += b.to(tl.int64) * stride_bb + h * stride_bh
    k = _rows(KEY, n, column, length, stride_kt, stride_kk, K)
    v = _rows(V, n, column, length, stride_vt, stride_vk, K)
    dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for begin in range(0, length, BLOCK_M):
        m = begin + tl.arange(0, BLOCK_M)
        q = _rows(Q, m, column, length, stride_qt, stride_qk, K)
        do = _rows(DO, m, column, length, stride_ot, stride_ok, K)
        lse = tl.load(LSE + m, mask=m < length, other=float("inf"))
        delta = tl.load(DELTA + m, mask=m < length, other=0.0)
        dropped, ds = _ds(
            q, k, v, do, lse, delta, BIAS, PAD, SEG, KEYS, m, n, length, scale, limit, kept_scale, b, h,
            stride_bm, stride_bn, stride_pb, stride_pn, stride_sb, stride_sn,
            HAS_BIAS, PADDED, SEGMENTED, DROPOUT, UPCAST,
        )  # fmt: skip
        dv += _product(tl.trans(dropped.to(do.dtype)), do, UPCAST)
        dk += _product(tl.trans(ds.to(q.dtype)), q, UPCAST)
    inside = (n[:, None] < length) & (column[None, :] < K)
    place = row * stride_db + h * stride_dh + (start + n[:, None]) * stride_dt + column[None, :] * stride_dk
    tl.store(DK + place, (dk * scale).to(DK.dtype.element_ty), mask=inside)
    tl.store(DV + place, dv.to(DV.dtype.element_ty), mask=inside)


@triton.jit
def queries_kernel(
    Q, KEY, V, BIAS, DO, LSE, DELTA, DQ, CU, PAD, SEG, KEYS, scale, limit, kept_scale, T,
    stride_qb, stride_qh, stride_qt, stride_qk, stride_kb, stride_kh, stride_kt, stride_kk,
    stride_vb, stride_vh, stride_vt, stride_vk, stride_ob, stride_oh, stride_ot, stride_ok,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_lb, stride_lh, stride_pb, stride_pn, stride_sb, stride_sn,
    stride_db, stride_dh, stride_dt, stride_dk,
    H: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, VARLEN: tl.constexpr, PADDED: tl.constexpr,
    SEGMENTED: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dQ of a block of BLOCK_M queries of one sequence and head."""
    first, bh = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    b, h = bh // H, bh % H
    start, length = _span(CU, b, T, VARLEN)
    if first >= length:
        return
    row = 0 if VARLEN else b
    row = row.to(tl.int64) if not VARLEN else row
    m, column = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    Q += row * stride_qb + h * stride_qh + start * stride_qt
    KEY += row * stride_kb + h * stride_kh + start * stride_kt
    V += row * stride_vb + h * stride_vh + start * stride_vt
    DO += row * stride_ob + h * stride_oh + start * stride_ot
    BIAS += b.to(tl.int64) * stride_bb + h * stride_bh
    place = row * stride_lb + h * stride_lh + start + m
    q = _rows(Q, m, column, length, stride_qt, stride_qk, K)
    do = _rows(DO, m, column, length, stride_ot, stride_ok, K)
    lse = tl.load(LSE + place, mask=m < length, other=float("inf"))
    delta = tl.load(DELTA + place, mask=m < length, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for begin in range(0, length, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        k = _rows(KEY, n, column, length, stride_kt, stride_kk, K)
        v = _rows(V, n, column, length, stride_vt, stride_vk, K)
        _, ds = _ds(
            q, k, v, do, lse, delta, BIAS, PAD, SEG, KEYS, m, n, length, scale, limit, kept_scale, b, h,
            stride_bm, stride_bn, stride_pb, stride_pn, stride_sb, stride_sn,
            HAS_BIAS, PADDED, SEGMENTED, DROPOUT, UPCAST,
        )  # fmt: skip
        dq += _product(ds.to(k.dtype), k, UPCAST)
    inside = (m[:, None] < length) & (column[None, :] < K)
    place = row * stride_db + h * stride_dh + (start + m[:, None]) * stride_dt + column[None, :] * stride_dk
    tl.store(DQ + place, (dq * scale).to(DQ.dtype.element_ty), mask=inside)


@triton.jit
def bias_kernel(
    Q, KEY, V, BIAS, DO, LSE, DELTA, DBIAS, CU, PAD, SEG, KEYS, scale, limit, kept_scale, T, COUNT,
    stride_qb, stride_qh, stride_qt, stride_qk, stride_kb, stride_kh, stride_kt, stride_kk,
    stride_vb, stride_vh, stride_vt, stride_vk, stride_ob, stride_oh, stride_ot, stride_ok,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_lb, stride_lh, stride_pb, stride_pn, stride_sb, stride_sn,
    stride_db, stride_dh, stride_dm, stride_dn,
    H: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, VARLEN: tl.constexpr, PADDED: tl.constexpr,
    SEGMENTED: tl.constexpr, DROPOUT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of the bias's gradient, summed over COUNT sequences from the first of its row on, in their order."""
    h, one = tl.program_id(2) % H, tl.program_id(2) // H
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    BIAS += one.to(tl.int64) * stride_bb + h * stride_bh
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in range(0, COUNT):
        b = one + index
        start, length = _span(CU, b, T, VARLEN)
        row = 0 if VARLEN else b
        row = row.to(tl.int64) if not VARLEN else row
        place = row * stride_lb + h * stride_lh + start + m
        q = _rows(Q + row * stride_qb + h * stride_qh + start * stride_qt, m, column, length, stride_qt, stride_qk, K)
        k = _rows(KEY + row * stride_kb + h * stride_kh + start * stride_kt, n, column, length, stride_kt, stride_kk, K)
        v = _rows(V + row * stride_vb + h * stride_vh + start * stride_vt, n, column, length, stride_vt, stride_vk, K)
        do = _rows(DO + row * stride_ob + h * stride_oh + start * stride_ot, m, column, length, stride_ot, stride_ok, K)
        lse = tl.load(LSE + place, mask=m < length, other=float("inf"))
        delta = tl.load(DELTA + place, mask=m < length, other=0.0)
        _, ds = _ds(
            q, k, v, do, lse, delta, BIAS, PAD, SEG, KEYS, m, n, length, scale, limit, kept_scale, b, h,
            stride_bm, stride_bn, stride_pb, stride_pn, stride_sb, stride_sn,
            HAS_BIAS, PADDED, SEGMENTED, DROPOUT, UPCAST,
        )  # fmt: skip
        acc += ds
    inside = (m[:, None] < T) & (n[None, :] < T)
    place = one.to(tl.int64) * stride_db + h * stride_dh + m[:, None] * stride_dm + n[None, :] * stride_dn
    tl.store(DBIAS + place, acc.to(DBIAS.dtype.element_ty), mask=inside)


# --- from tensors to launches


TILES = {"forward": (128, 64, 8, 2), "keys": (64, 64, 4, 2), "queries": (128, 64, 8, 2), "bias": (64, 64, 8, 2)}
"""Of each kernel, for 16-bit heads of up to 64: queries, keys, warps, stages."""


def blocks(kernel: str, head_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles, warps and stages."""
    queries, keys, warps, stages = TILES[kernel]
    if dtype == torch.float32:
        queries, keys, warps, stages = 32, 32, 4, 2
    elif head_size > 64:
        queries, keys, warps, stages = 64, 64, 8, 2
    block_k = max(16, triton.next_power_of_2(head_size))
    return {"BLOCK_M": queries, "BLOCK_N": keys, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}


KERNELS = {"forward": forward_kernel, "keys": keys_kernel, "queries": queries_kernel, "bias": bias_kernel}


class _Launch:
    """What all four kernels are given, by name."""

    def __init__(self, q, k, v, out, bias, cu_seqlens, key_padding, segments, keys, scale, dropout_p, longest) -> None:
        self.q = q
        self.packed = cu_seqlens is not None
        self.batch = len(cu_seqlens) - 1 if self.packed else len(q)
        self.heads, self.head_size = q.shape[1], q.shape[3]
        self.longest = longest if self.packed else q.shape[2]
        none = q  # a pointer that is not followed
        self.pointers = {
            "BIAS": none if bias is None else bias,
            "CU": none if cu_seqlens is None else cu_seqlens,
            "PAD": none if key_padding is None else key_padding.view(torch.int8),
            "SEG": none if segments is None else segments,
            "KEYS": none if keys is None else keys,
        }
        self.numbers = {
            "scale": scale,
            "limit": threshold(dropout_p),
            "kept_scale": 1.0 / (1.0 - dropout_p),
            "T": self.longest,
        }
        self.strides = {}
        for name, x in (("q", q), ("k", k), ("v", v), ("o", out)):
            self.strides |= dict(zip((f"stride_{name}{axis}" for axis in "bhtk"), x.stride(), strict=True))
        whole = (0, 0, 0, 0) if bias is None else bias.stride()
        if bias is not None and bias.shape[0] == 1:
            whole = (0, *whole[1:])
        self.strides |= dict(zip(("stride_bb", "stride_bh", "stride_bm", "stride_bn"), whole, strict=True))
        self.strides |= {"stride_lb": q.shape[1] * q.shape[2], "stride_lh": q.shape[2]}
        pad = (0, 0) if key_padding is None else key_padding.stride()
        self.strides |= {"stride_pb": pad[0], "stride_pn": pad[1]}
        of = (0, 0) if segments is None else segments.stride()
        self.strides |= {"stride_sb": of[0], "stride_sn": of[1]}
        self.switches = {
            "H": self.heads,
            "K": self.head_size,
            "HAS_BIAS": bias is not None,
            "VARLEN": self.packed,
            "PADDED": key_padding is not None,
            "SEGMENTED": segments is not None,
            "DROPOUT": dropout_p > 0,
            "UPCAST": INTERPRETED,
        }

    def blocks(self, kernel: str) -> dict[str, int]:
        return blocks(kernel, self.head_size, self.q.dtype)

    def over_rows(self, kernel: str, axis: str) -> tuple[int, int]:
        """The grid of a kernel with a program for each block of queries (M) or keys (N)."""
        return triton.cdiv(self.longest, self.blocks(kernel)[f"BLOCK_{axis}"]), self.batch * self.heads

    def __call__(self, name: str, grid, **tensors) -> None:
        common = {**self.pointers, **self.numbers, **self.strides, **self.switches, **self.blocks(name)}
        KERNELS[name][grid](**tensors, **common)


@torch.library.custom_op("fastbert_kernels::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    key_padding: Tensor | None,
    segments: Tensor | None,
    keys: Tensor | None,
    scale: float,
    dropout_p: float,
    longest: int,
) -> tuple[Tensor, Tensor]:
    """The forward kernel.

    Args:
        q, k, v: [B, H, T, K], of any strides.
        bias: [1 or B, H, T, T]; with `cu_seqlens` T is the longest sequence.
        cu_seqlens: int32 [sequences + 1], where each sequence of a B of 1 begins, and the end of the last.
        key_padding: bool [B, T], False for keys that no query may see; not with `cu_seqlens`.
        segments: int32 [B, T]; a query sees keys of its own segment; not with `cu_seqlens`.
        keys: int32 [B or sequences], of the dropout.
        longest: the length of the longest sequence, with `cu_seqlens`.

    Returns:
        O; L, float32 [B, H, T].
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    launch = _Launch(q, k, v, out, bias, cu_seqlens, key_padding, segments, keys, scale, dropout_p, longest)
    launch("forward", launch.over_rows("forward", "M"), Q=q, KEY=k, V=v, OUT=out, LSE=lse)
    return out, lse


@attention_forward.register_fake
def _(q, k, v, bias, cu_seqlens, key_padding, segments, keys, scale, dropout_p, longest):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("fastbert_kernels::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    key_padding: Tensor | None,
    segments: Tensor | None,
    keys: Tensor | None,
    scale: float,
    dropout_p: float,
    longest: int,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV, dB; dB is empty where it is not needed."""
    grad = grad.contiguous()
    delta = (grad.float() * out.float()).sum(-1)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    launch = _Launch(q, k, v, grad, bias, cu_seqlens, key_padding, segments, keys, scale, dropout_p, longest)
    common = {"Q": q, "KEY": k, "V": v, "DO": grad, "LSE": lse, "DELTA": delta}
    strides = dict(zip(("stride_db", "stride_dh", "stride_dt", "stride_dk"), dq.stride(), strict=True))
    launch("keys", launch.over_rows("keys", "N"), **common, DK=dk, DV=dv, **strides)
    launch("queries", launch.over_rows("queries", "M"), **common, DQ=dq, **strides)
    if not bias_needs_grad:
        return dq, dk, dv, q.new_empty(0)
    dbias = torch.empty_like(bias, dtype=torch.float32, memory_format=torch.contiguous_format)
    strides = dict(zip(("stride_db", "stride_dh", "stride_dm", "stride_dn"), dbias.stride(), strict=True))
    rows, columns = (launch.over_rows("bias", axis)[0] for axis in "MN")
    count = launch.batch if len(bias) == 1 else 1
    launch("bias", (rows, columns, len(bias) * launch.heads), **common, DBIAS=dbias, COUNT=count, **strides)
    return dq, dk, dv, dbias.to(bias.dtype)


@attention_backward.register_fake
def _(
    grad, q, k, v, bias, out, lse, cu_seqlens, key_padding, segments, keys, scale, dropout_p, longest, bias_needs_grad
):  # fmt: skip
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if bias_needs_grad else q.new_empty(0)
    return dq, dk, dv, dbias


def _setup(ctx, inputs, output) -> None:
    q, k, v, bias, cu_seqlens, key_padding, segments, keys, ctx.scale, ctx.dropout_p, ctx.longest = inputs
    ctx.save_for_backward(q, k, v, bias, *output, cu_seqlens, key_padding, segments, keys)


def _backward(ctx, grad, _):
    q, k, v, bias, out, lse, cu_seqlens, key_padding, segments, keys = ctx.saved_tensors
    needed = bias is not None and ctx.needs_input_grad[3]
    numbers = (ctx.scale, ctx.dropout_p, ctx.longest, needed)
    dq, dk, dv, dbias = attention_backward(
        grad, q, k, v, bias, out, lse, cu_seqlens, key_padding, segments, keys, *numbers
    )
    return dq, dk, dv, dbias if needed else None, *[None] * 7


attention_forward.register_autograd(_backward, setup_context=_setup)
