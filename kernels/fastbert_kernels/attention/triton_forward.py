"""The forward kernel of attention: a block of queries walks over the keys with a running maximum and sum."""

import triton
import triton.language as tl

from fastbert_kernels.attention.triton_tiles import (
    kept_share,
    load_places,
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
    """O and L = log2 of the sums of BLOCK_M queries of one sequence and head; +inf where no key was seen.

    Programs of a head stand together, whatever the sequence: they share its bias in the L2 cache.
    """
    blocks = tl.cdiv(T, BLOCK_M)
    first, rest = (tl.program_id(0) % blocks) * BLOCK_M, tl.program_id(0) // blocks
    b, h = rest % B, rest // B
    row, start, length = sequence(bounds, b, T)
    if first >= length:
        return
    m, column = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    at_k, at_v = part(k, row, h, start), part(v, row, h, start)
    q_tile = load_rows(part(q, row, h, start), q, m, column, length, K, EVEN)
    place_q, place_k = q_tile, tl.zeros([BLOCK_N, BLOCK_K], k.at.dtype.element_ty)
    if untied is not None:
        place_q = load_places(untied.q, h, m, column, untied.count, K)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for begin in range(0, length, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        k_tile = load_rows(at_k, k, n, column, length, K, EVEN)
        if untied is not None:
            place_k = load_places(untied.k, h, n, column, untied.count, K)
        s = tile_scores(
            q_tile, k_tile, place_q, place_k, bias, untied, relative,
            padding, segments, b, h, m[:, None], n[None, :], length, scale, True, EVEN, UPCAST,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, p = tl.exp2(top - level), tl.exp2(s - level[:, None])
        total = total * shrink + tl.sum(p, 1)
        if dropout is not None:
            p = p * kept_share(dropout, b, h, m[:, None], n[None, :])
        v_tile = load_rows(at_v, v, n, column, length, K, EVEN)
        acc = acc * shrink[:, None] + product(lowered(p, v_tile.dtype, UPCAST), v_tile, UPCAST)
        top = higher
    none = total == 0.0
    acc = acc / tl.where(none, 1.0, total)[:, None]
    sums = tl.where(none, float("inf"), top + tl.log2(tl.where(none, 1.0, total)))
    store_rows(part(out, row, h, start), out, m, column, length, acc, K, UPCAST)
    tl.store(lse.at + row * lse.b + h * lse.h + start + m, sums, mask=m < length)
