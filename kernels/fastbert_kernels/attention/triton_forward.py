"""The forward kernel of attention: a block of queries iterates over the keys with a running maximum and sum."""

import triton
import triton.language as tl

from fastbert_kernels.attention.triton_tiles import (
    dropout_factor,
    load_positions,
    load_rows,
    part,
    sequence,
    store_rows,
    tile_scores,
)
from fastbert_kernels.triton_common import lowered, product


@triton.jit(do_not_specialize=["T", "B"])
def forward_kernel(
    q, k, v, bias, untied, relative, out, lse, bounds, padding, segments, dropout, scale, T, B,
    H: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """O, and L = log2 of the sum of exponentials (+inf where all keys are masked), of BLOCK_M queries of one sequence
    and head.

    Programs of the same head are adjacent, for all sequences, so that its bias stays in the L2 cache.
    """
    blocks = tl.cdiv(T, BLOCK_M)
    first, rest = (tl.program_id(0) % blocks) * BLOCK_M, tl.program_id(0) // blocks
    b, h = rest % B, rest // B
    row, start, length = sequence(bounds, b, T)
    if first >= length:
        return
    m, column = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    p_k, p_v = part(k, row, h, start), part(v, row, h, start)
    q_tile = load_rows(part(q, row, h, start), q, m, column, length, K, EVEN)
    pos_q, pos_k = q_tile, tl.zeros([BLOCK_N, BLOCK_K], k.ptr.dtype.element_ty)
    if untied is not None:
        pos_q = load_positions(untied.q, h, m, column, untied.count, K)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for begin in range(0, length, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        k_tile = load_rows(p_k, k, n, column, length, K, EVEN)
        if untied is not None:
            pos_k = load_positions(untied.k, h, n, column, untied.count, K)
        s = tile_scores(
            q_tile, k_tile, pos_q, pos_k, bias, untied, relative,
            padding, segments, b, h, m[:, None], n[None, :], length, scale, True, EVEN, UPCAST,
        )  # fmt: skip
        new_maximum = tl.maximum(maximum, tl.max(s, 1))
        level = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        rescale, p = tl.exp2(maximum - level), tl.exp2(s - level[:, None])
        total = total * rescale + tl.sum(p, 1)
        if dropout is not None:
            p = p * dropout_factor(dropout, b, h, m[:, None], n[None, :])
        v_tile = load_rows(p_v, v, n, column, length, K, EVEN)
        acc = acc * rescale[:, None] + product(lowered(p, v_tile.dtype, UPCAST), v_tile, UPCAST)
        maximum = new_maximum
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    sums = tl.where(empty, float("inf"), maximum + tl.log2(tl.where(empty, 1.0, total)))
    store_rows(part(out, row, h, start), out, m, column, length, acc, K, UPCAST)
    tl.store(lse.ptr + row * lse.b + h * lse.h + start + m, sums, mask=m < length)
