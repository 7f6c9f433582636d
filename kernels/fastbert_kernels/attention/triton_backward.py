"""The backward kernels of attention. Each iterates over another axis, so that one program sums each gradient in a fixed
order:

    delta_kernel    Delta = rowsum(dO O)
    keys_kernel     a block of keys iterates over the queries:    dV = drop(P)^T dO, dK = scale dS^T Q
    queries_kernel  a block of queries over the keys:             dQ = scale dS K
    bias_kernel     a tile of the bias over the sequences:        dB = sum of dS
    short_kernel    all but dB at once, for sequences that fit into one tile

with P = 2^(S - L), recomputed tile by tile, and dS = P (drop(dO V^T) - Delta). The keys and short kernels can store dS
for those of `triton_stored`, which then compute dQ and dB without recomputing P.

A pair is a sequence b of B and a head h of H, number h B + b. If dS is stored, the keys and short kernels process
consecutive pairs from `first_pair` on.
"""

import triton
import triton.language as tl

from fastbert_kernels.attention.triton_tiles import (
    dropout_factor,
    load_positions,
    load_row_values,
    load_rows,
    part,
    sequence,
    store_rows,
    stored_tile,
    tile_scores,
)
from fastbert_kernels.triton_common import lowered, product


@triton.jit(do_not_specialize=["T"])
def delta_kernel(out, do, delta, T, H: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Delta of BLOCK_M rows of one head."""
    blocks = tl.cdiv(T, BLOCK_M)
    first, rest = (tl.program_id(0) % blocks) * BLOCK_M, tl.program_id(0) // blocks
    row, h = (rest // H).to(tl.int64), rest % H
    m, column = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    o_tile = load_rows(part(out, row, h, 0), out, m, column, T, K, False).to(tl.float32)
    do_tile = load_rows(part(do, row, h, 0), do, m, column, T, K, False).to(tl.float32)
    tl.store(delta.ptr + row * delta.b + h * delta.h + m, tl.sum(o_tile * do_tile, 1), mask=m < T)


@triton.jit
def _probabilities(
    a, b, c, d, pos_a, pos_b, bias, untied, relative,
    padding, segments, dropout, lse, sequence, h, m, n, length, scale,
    CHECKED: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """P, drop(P) and dP = drop(c d^T) of a tile. Either a, b, c, d are Q, K, dO, V, or K, Q, V, dO. `lse` has the shape
    of m."""
    s = tile_scores(
        a, b, pos_a, pos_b, bias, untied, relative,
        padding, segments, sequence, h, m, n, length, scale, CHECKED, EVEN, UPCAST,
    )  # fmt: skip
    p = tl.exp2(s - lse)
    dp = product(c, tl.trans(d), UPCAST)
    dropped = p
    if dropout is not None:
        factor = dropout_factor(dropout, sequence, h, m, n)
        dp, dropped = dp * factor, p * factor
    return p, dropped, dp


@triton.jit
def _store_gradient(stored, slot, n, m, length, values, EVEN: tl.constexpr):
    """Store a tile [N, M] of dS^T. Columns beyond `length` queries are zeros, those of whole tiles."""
    if EVEN:
        tl.store(stored_tile(stored, slot, n, m), values)
    else:
        tl.store(stored_tile(stored, slot, n, m), values, mask=n[:, None] < length)


@triton.jit(do_not_specialize=["T", "B", "first_pair"])
def keys_kernel(
    q, k, v, bias, untied, relative, do, lse, delta, dk, dv, stored, bounds, padding, segments, dropout, scale, T, B,
    first_pair, H: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one sequence and head, and dS if it is `stored`."""
    blocks = tl.cdiv(T, BLOCK_N)
    first, slot = (tl.program_id(0) % blocks) * BLOCK_N, tl.program_id(0) // blocks
    pair = slot
    if stored is not None:
        pair += first_pair
    b, h = pair % B, pair // B
    row, start, length = sequence(bounds, b, T)
    if first >= length:
        return
    n, column = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    p_q, p_do = part(q, row, h, start), part(do, row, h, start)
    k_tile = load_rows(part(k, row, h, start), k, n, column, length, K, EVEN)
    v_tile = load_rows(part(v, row, h, start), v, n, column, length, K, EVEN)
    pos_q = tl.zeros([BLOCK_M, BLOCK_K], k.ptr.dtype.element_ty)
    pos_k = k_tile
    if untied is not None:
        pos_k = load_positions(untied.k, h, n, column, untied.count, K)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for begin in range(0, length, BLOCK_M):
        m = begin + tl.arange(0, BLOCK_M)
        q_tile = load_rows(p_q, q, m, column, length, K, EVEN)
        do_tile = load_rows(p_do, do, m, column, length, K, EVEN)
        if untied is not None:
            pos_q = load_positions(untied.q, h, m, column, untied.count, K)
        sums = load_row_values(lse, row, h, start, m, length, float("inf"), EVEN)
        deltas = load_row_values(delta, row, h, start, m, length, 0.0, EVEN)
        p, dropped, dp = _probabilities(
            k_tile, q_tile, v_tile, do_tile, pos_k, pos_q, bias, untied, relative,
            padding, segments, dropout, sums[None, :], b, h, m[None, :], n[:, None], length, scale, False, EVEN, UPCAST,
        )  # fmt: skip
        dv_tile += product(lowered(dropped, do_tile.dtype, UPCAST), do_tile, UPCAST)
        ds = lowered(p * (dp - deltas[None, :]), q_tile.dtype, UPCAST)
        dk_tile += product(ds, q_tile, UPCAST)
        if stored is not None:
            _store_gradient(stored, slot, n, m, length, ds, EVEN)
    store_rows(part(dk, row, h, start), dk, n, column, length, dk_tile * scale, K, UPCAST)
    store_rows(part(dv, row, h, start), dv, n, column, length, dv_tile, K, UPCAST)


@triton.jit(do_not_specialize=["T", "B"])
def queries_kernel(
    q, k, v, bias, untied, relative, do, lse, delta, dq, bounds, padding, segments, dropout, scale, T, B,
    H: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one sequence and head."""
    blocks = tl.cdiv(T, BLOCK_M)
    first, rest = (tl.program_id(0) % blocks) * BLOCK_M, tl.program_id(0) // blocks
    b, h = rest % B, rest // B
    row, start, length = sequence(bounds, b, T)
    if first >= length:
        return
    m, column = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    p_k, p_v = part(k, row, h, start), part(v, row, h, start)
    q_tile = load_rows(part(q, row, h, start), q, m, column, length, K, EVEN)
    do_tile = load_rows(part(do, row, h, start), do, m, column, length, K, EVEN)
    pos_q, pos_k = q_tile, tl.zeros([BLOCK_N, BLOCK_K], k.ptr.dtype.element_ty)
    if untied is not None:
        pos_q = load_positions(untied.q, h, m, column, untied.count, K)
    sums = load_row_values(lse, row, h, start, m, length, float("inf"), EVEN)
    deltas = load_row_values(delta, row, h, start, m, length, 0.0, EVEN)
    dq_tile = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for begin in range(0, length, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        k_tile = load_rows(p_k, k, n, column, length, K, EVEN)
        v_tile = load_rows(p_v, v, n, column, length, K, EVEN)
        if untied is not None:
            pos_k = load_positions(untied.k, h, n, column, untied.count, K)
        p, _, dp = _probabilities(
            q_tile, k_tile, do_tile, v_tile, pos_q, pos_k, bias, untied, relative,
            padding, segments, dropout, sums[:, None], b, h, m[:, None], n[None, :], length, scale, True, EVEN, UPCAST,
        )  # fmt: skip
        dq_tile += product(lowered(p * (dp - deltas[:, None]), k_tile.dtype, UPCAST), k_tile, UPCAST)
    store_rows(part(dq, row, h, start), dq, m, column, length, dq_tile * scale, K, UPCAST)


@triton.jit(do_not_specialize=["T", "B", "first_row", "rows", "count"])
def bias_kernel(
    q, k, v, bias, untied, relative, do, lse, delta, dbias, bounds, padding, segments, dropout, scale, T, B,
    first_row, rows, count,
    H: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of dbias [B / count, H, rows, T], whose first row is row `first_row` of the bias: dS summed over `count`
    sequences in order."""
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(T, BLOCK_N)
    tile, rest = tl.program_id(0) % (down * across), tl.program_id(0) // (down * across)
    h, group = rest % H, rest // H
    m = first_row + (tile // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    pos_q = tl.zeros([BLOCK_M, BLOCK_K], k.ptr.dtype.element_ty)
    pos_k = tl.zeros([BLOCK_N, BLOCK_K], k.ptr.dtype.element_ty)
    if untied is not None:
        pos_q = load_positions(untied.q, h, m, column, untied.count, K)
        pos_k = load_positions(untied.k, h, n, column, untied.count, K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in range(0, tl.minimum(count, B - group * count)):
        b = group * count + index
        row, start, length = sequence(bounds, b, T)
        q_tile = load_rows(part(q, row, h, start), q, m, column, length, K, EVEN)
        k_tile = load_rows(part(k, row, h, start), k, n, column, length, K, EVEN)
        v_tile = load_rows(part(v, row, h, start), v, n, column, length, K, EVEN)
        do_tile = load_rows(part(do, row, h, start), do, m, column, length, K, EVEN)
        sums = load_row_values(lse, row, h, start, m, length, float("inf"), EVEN)
        deltas = load_row_values(delta, row, h, start, m, length, 0.0, EVEN)
        p, _, dp = _probabilities(
            q_tile, k_tile, do_tile, v_tile, pos_q, pos_k, bias, untied, relative,
            padding, segments, dropout, sums[:, None], b, h, m[:, None], n[None, :], length, scale, True, EVEN, UPCAST,
        )  # fmt: skip
        acc += p * (dp - deltas[:, None])
    inside = (m[:, None] < first_row + rows) & (m[:, None] < T) & (n[None, :] < T)
    p_dbias = dbias.ptr + group.to(tl.int64) * dbias.b + h.to(tl.int64) * dbias.h
    tl.store(p_dbias + (m[:, None] - first_row) * dbias.m + n[None, :] * dbias.n, acc, mask=inside)


@triton.jit(do_not_specialize=["T", "B", "first_pair"])
def short_kernel(
    q, k, v, bias, untied, relative, do, lse, delta, dq, dk, dv, stored, bounds, padding, segments, dropout, scale, T,
    B, first_pair, H: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Delta, dQ, dK and dV of one sequence of at most BLOCK_N tokens in one head, and dS if it is `stored`.

    This takes five products instead of seven and reads each tensor once, but not O: the tile has whole rows of P, so
    Delta = rowsum(P drop(dO V^T)).
    """
    slot = tl.program_id(0)
    pair = slot
    if stored is not None:
        pair += first_pair
    b, h = pair % B, pair // B
    row, start, length = sequence(bounds, b, T)
    n, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    p_q, p_do, p_dq = part(q, row, h, start), part(do, row, h, start), part(dq, row, h, start)
    k_tile = load_rows(part(k, row, h, start), k, n, column, length, K, EVEN)
    v_tile = load_rows(part(v, row, h, start), v, n, column, length, K, EVEN)
    pos_q = tl.zeros([BLOCK_M, BLOCK_K], k.ptr.dtype.element_ty)
    pos_k = k_tile
    if untied is not None:
        pos_k = load_positions(untied.k, h, n, column, untied.count, K)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for begin in range(0, length, BLOCK_M):
        m = begin + tl.arange(0, BLOCK_M)
        q_tile = load_rows(p_q, q, m, column, length, K, EVEN)
        do_tile = load_rows(p_do, do, m, column, length, K, EVEN)
        if untied is not None:
            pos_q = load_positions(untied.q, h, m, column, untied.count, K)
        sums = load_row_values(lse, row, h, start, m, length, float("inf"), EVEN)
        p, dropped, dp = _probabilities(
            k_tile, q_tile, v_tile, do_tile, pos_k, pos_q, bias, untied, relative,
            padding, segments, dropout, sums[None, :], b, h, m[None, :], n[:, None], length, scale, True, EVEN, UPCAST,
        )  # fmt: skip
        dv_tile += product(lowered(dropped, do_tile.dtype, UPCAST), do_tile, UPCAST)
        deltas = tl.sum(p * dp, 0)
        tl.store(delta.ptr + row * delta.b + h * delta.h + start + m, deltas, mask=m < length)
        ds = lowered(p * (dp - deltas[None, :]), q_tile.dtype, UPCAST)
        if stored is not None:
            _store_gradient(stored, slot, n, m, length, ds, EVEN)
        dk_tile += product(ds, q_tile, UPCAST)
        store_rows(p_dq, dq, m, column, length, product(tl.trans(ds), k_tile, UPCAST) * scale, K, UPCAST)
    store_rows(part(dv, row, h, start), dv, n, column, length, dv_tile, K, UPCAST)
    store_rows(part(dk, row, h, start), dk, n, column, length, dk_tile * scale, K, UPCAST)
