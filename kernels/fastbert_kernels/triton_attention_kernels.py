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

import triton
import triton.language as tl

from fastbert_kernels.hashing import GOLDEN, LIGHT

LOG2E = 1.4426950408889634

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
def _sequence(CU, b, h, T, VARLEN: tl.constexpr):
    """Of sequence b and head h: both, the row of the tensors it lies in, where it starts there, and its length."""
    if VARLEN:
        start = tl.load(CU + b)
        return b, h, b.to(tl.int64) * 0, start, tl.load(CU + b + 1) - start
    return b, h, b.to(tl.int64), b * 0, b * 0 + T


@triton.jit
def _at(X, row, h, start, stride_b, stride_h, stride_t):
    """Where a sequence's part of a head begins in X."""
    return X + row * stride_b + h * stride_h + start * stride_t


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
    b, h, row, start, length = _sequence(CU, bh // H, bh % H, T, VARLEN)
    if first >= length:
        return
    m, column = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    Q = _at(Q, row, h, start, stride_qb, stride_qh, stride_qt)
    KEY = _at(KEY, row, h, start, stride_kb, stride_kh, stride_kt)
    V = _at(V, row, h, start, stride_vb, stride_vh, stride_vt)
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
    OUT = _at(OUT, row, h, start, stride_ob, stride_oh, stride_ot)
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
    b, h, row, start, length = _sequence(CU, bh // H, bh % H, T, VARLEN)
    if first >= length:
        return
    n, column = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    Q = _at(Q, row, h, start, stride_qb, stride_qh, stride_qt)
    KEY = _at(KEY, row, h, start, stride_kb, stride_kh, stride_kt)
    V = _at(V, row, h, start, stride_vb, stride_vh, stride_vt)
    DO = _at(DO, row, h, start, stride_ob, stride_oh, stride_ot)
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
    b, h, row, start, length = _sequence(CU, bh // H, bh % H, T, VARLEN)
    if first >= length:
        return
    m, column = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    Q = _at(Q, row, h, start, stride_qb, stride_qh, stride_qt)
    KEY = _at(KEY, row, h, start, stride_kb, stride_kh, stride_kt)
    V = _at(V, row, h, start, stride_vb, stride_vh, stride_vt)
    DO = _at(DO, row, h, start, stride_ob, stride_oh, stride_ot)
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
        b, h, row, start, length = _sequence(CU, one + index, h, T, VARLEN)
        place = row * stride_lb + h * stride_lh + start + m
        q = _rows(_at(Q, row, h, start, stride_qb, stride_qh, stride_qt), m, column, length, stride_qt, stride_qk, K)
        k = _rows(_at(KEY, row, h, start, stride_kb, stride_kh, stride_kt), n, column, length, stride_kt, stride_kk, K)
        v = _rows(_at(V, row, h, start, stride_vb, stride_vh, stride_vt), n, column, length, stride_vt, stride_vk, K)
        do = _rows(_at(DO, row, h, start, stride_ob, stride_oh, stride_ot), m, column, length, stride_ot, stride_ok, K)
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
