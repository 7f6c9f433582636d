"""The backward kernels of attention. Each walks along another axis, so that every number is summed by one program in a
fixed order:

    delta_kernel     Delta = rowsum(dO O)
    keys_kernel     a block of keys walks over the queries:   dV = drop(P)^T dO, dK = scale dS^T Q
    queries_kernel  a block of queries over the keys:         dQ = scale dS K
    bias_kernel     a tile of the bias over the sequences:    dB = sum of dS
    short_kernel    all of these at once where one tile holds a whole sequence

with P = 2^(S - L) made again tile by tile and dS = P (drop(dO V^T) - Delta).
"""

import triton
import triton.language as tl

from fastbert_kernels.attention.triton_tiles import (
    kept_share,
    load_numbers,
    load_places,
    load_rows,
    part,
    sequence,
    store_rows,
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
    tl.store(delta.at + row * delta.b + h * delta.h + m, tl.sum(o_tile * do_tile, 1), mask=m < T)


@triton.jit
def _probabilities(
    a, b, c, d, place_a, place_b, bias, untied, relative,
    padding, segments, dropout, lse, sequence, h, m, n, length, scale,
    CHECKED: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """P, drop(P) and drop(c d^T) of a tile: the last is dP where c and d are dO and V, as a and b are Q and K, or V and
    dO, as a and b are K and Q. `lse` is as m is."""
    s = tile_scores(
        a, b, place_a, place_b, bias, untied, relative,
        padding, segments, sequence, h, m, n, length, scale, CHECKED, EVEN, UPCAST,
    )  # fmt: skip
    p = tl.exp2(s - lse)
    dp = product(c, tl.trans(d), UPCAST)
    dropped = p
    if dropout is not None:
        kept = kept_share(dropout, sequence, h, m, n)
        dp, dropped = dp * kept, p * kept
    return p, dropped, dp


@triton.jit(do_not_specialize=["T", "B"])
def keys_kernel(
    q, k, v, bias, untied, relative, do, lse, delta, dk, dv, bounds, padding, segments, dropout, scale, T, B,
    H: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one sequence and head."""
    blocks = tl.cdiv(T, BLOCK_N)
    first, rest = (tl.program_id(0) % blocks) * BLOCK_N, tl.program_id(0) // blocks
    b, h = rest % B, rest // B
    row, start, length = sequence(bounds, b, T)
    if first >= length:
        return
    n, column = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    at_q, at_do = part(q, row, h, start), part(do, row, h, start)
    k_tile = load_rows(part(k, row, h, start), k, n, column, length, K, EVEN)
    v_tile = load_rows(part(v, row, h, start), v, n, column, length, K, EVEN)
    place_q = tl.zeros([BLOCK_M, BLOCK_K], k.at.dtype.element_ty)
    place_k = k_tile
    if untied is not None:
        place_k = load_places(untied.k, h, n, column, untied.count, K)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for begin in range(0, length, BLOCK_M):
        m = begin + tl.arange(0, BLOCK_M)
        q_tile = load_rows(at_q, q, m, column, length, K, EVEN)
        do_tile = load_rows(at_do, do, m, column, length, K, EVEN)
        if untied is not None:
            place_q = load_places(untied.q, h, m, column, untied.count, K)
        sums = load_numbers(lse, row, h, start, m, length, float("inf"), EVEN)
        deltas = load_numbers(delta, row, h, start, m, length, 0.0, EVEN)
        p, dropped, dp = _probabilities(
            k_tile, q_tile, v_tile, do_tile, place_k, place_q, bias, untied, relative,
            padding, segments, dropout, sums[None, :], b, h, m[None, :], n[:, None], length, scale, False, EVEN, UPCAST,
        )  # fmt: skip
        dv_tile += product(lowered(dropped, do_tile.dtype, UPCAST), do_tile, UPCAST)
        dk_tile += product(lowered(p * (dp - deltas[None, :]), q_tile.dtype, UPCAST), q_tile, UPCAST)
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
    at_k, at_v = part(k, row, h, start), part(v, row, h, start)
    q_tile = load_rows(part(q, row, h, start), q, m, column, length, K, EVEN)
    do_tile = load_rows(part(do, row, h, start), do, m, column, length, K, EVEN)
    place_q, place_k = q_tile, tl.zeros([BLOCK_N, BLOCK_K], k.at.dtype.element_ty)
    if untied is not None:
        place_q = load_places(untied.q, h, m, column, untied.count, K)
    sums = load_numbers(lse, row, h, start, m, length, float("inf"), EVEN)
    deltas = load_numbers(delta, row, h, start, m, length, 0.0, EVEN)
    dq_tile = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for begin in range(0, length, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        k_tile = load_rows(at_k, k, n, column, length, K, EVEN)
        v_tile = load_rows(at_v, v, n, column, length, K, EVEN)
        if untied is not None:
            place_k = load_places(untied.k, h, n, column, untied.count, K)
        p, _, dp = _probabilities(
            q_tile, k_tile, do_tile, v_tile, place_q, place_k, bias, untied, relative,
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
    """A tile of dbias [B / count, H, rows, T], which begins at the bias's row `first_row`: dS summed over `count`
    sequences in their order."""
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(T, BLOCK_N)
    tile, rest = tl.program_id(0) % (down * across), tl.program_id(0) // (down * across)
    h, group = rest % H, rest // H
    m = first_row + (tile // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    place_q = tl.zeros([BLOCK_M, BLOCK_K], k.at.dtype.element_ty)
    place_k = tl.zeros([BLOCK_N, BLOCK_K], k.at.dtype.element_ty)
    if untied is not None:
        place_q = load_places(untied.q, h, m, column, untied.count, K)
        place_k = load_places(untied.k, h, n, column, untied.count, K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in range(0, tl.minimum(count, B - group * count)):
        b = group * count + index
        row, start, length = sequence(bounds, b, T)
        q_tile = load_rows(part(q, row, h, start), q, m, column, length, K, EVEN)
        k_tile = load_rows(part(k, row, h, start), k, n, column, length, K, EVEN)
        v_tile = load_rows(part(v, row, h, start), v, n, column, length, K, EVEN)
        do_tile = load_rows(part(do, row, h, start), do, m, column, length, K, EVEN)
        sums = load_numbers(lse, row, h, start, m, length, float("inf"), EVEN)
        deltas = load_numbers(delta, row, h, start, m, length, 0.0, EVEN)
        p, _, dp = _probabilities(
            q_tile, k_tile, do_tile, v_tile, place_q, place_k, bias, untied, relative,
            padding, segments, dropout, sums[:, None], b, h, m[:, None], n[None, :], length, scale, True, EVEN, UPCAST,
        )  # fmt: skip
        acc += p * (dp - deltas[:, None])
    inside = (m[:, None] < first_row + rows) & (m[:, None] < T) & (n[None, :] < T)
    at = dbias.at + group.to(tl.int64) * dbias.b + h.to(tl.int64) * dbias.h
    tl.store(at + (m[:, None] - first_row) * dbias.m + n[None, :] * dbias.n, acc, mask=inside)


@triton.jit(do_not_specialize=["T", "B"])
def short_kernel(
    q, k, v, bias, untied, relative, do, lse, delta, dq, dk, dv, bounds, padding, segments, dropout, scale, T, B,
    H: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Delta, dQ, dK and dV of one sequence of at most BLOCK_N tokens in one head.

    Five products instead of seven, each tensor read once, and O not at all: a whole row of P is here, and with it
    Delta = rowsum(P drop(dO V^T)).
    """
    b, h = tl.program_id(0) % B, tl.program_id(0) // B
    row, start, length = sequence(bounds, b, T)
    n, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    at_q, at_do, at_dq = part(q, row, h, start), part(do, row, h, start), part(dq, row, h, start)
    k_tile = load_rows(part(k, row, h, start), k, n, column, length, K, EVEN)
    v_tile = load_rows(part(v, row, h, start), v, n, column, length, K, EVEN)
    place_q = tl.zeros([BLOCK_M, BLOCK_K], k.at.dtype.element_ty)
    place_k = k_tile
    if untied is not None:
        place_k = load_places(untied.k, h, n, column, untied.count, K)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for begin in range(0, length, BLOCK_M):
        m = begin + tl.arange(0, BLOCK_M)
        q_tile = load_rows(at_q, q, m, column, length, K, EVEN)
        do_tile = load_rows(at_do, do, m, column, length, K, EVEN)
        if untied is not None:
            place_q = load_places(untied.q, h, m, column, untied.count, K)
        sums = load_numbers(lse, row, h, start, m, length, float("inf"), EVEN)
        p, dropped, dp = _probabilities(
            k_tile, q_tile, v_tile, do_tile, place_k, place_q, bias, untied, relative,
            padding, segments, dropout, sums[None, :], b, h, m[None, :], n[:, None], length, scale, True, EVEN, UPCAST,
        )  # fmt: skip
        dv_tile += product(lowered(dropped, do_tile.dtype, UPCAST), do_tile, UPCAST)
        deltas = tl.sum(p * dp, 0)
        tl.store(delta.at + row * delta.b + h * delta.h + start + m, deltas, mask=m < length)
        ds = lowered(p * (dp - deltas[None, :]), q_tile.dtype, UPCAST)
        dk_tile += product(ds, q_tile, UPCAST)
        store_rows(at_dq, dq, m, column, length, product(tl.trans(ds), k_tile, UPCAST) * scale, K, UPCAST)
    store_rows(part(dv, row, h, start), dv, n, column, length, dv_tile, K, UPCAST)
    store_rows(part(dk, row, h, start), dk, n, column, length, dk_tile * scale, K, UPCAST)
