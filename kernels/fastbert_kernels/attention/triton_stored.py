"""The backward kernels of attention that read a stored gradient of the scores, dS^T, instead of recomputing it:

    stored_queries_kernel  a block of queries iterates over the keys:          dQ = scale dS K
    stored_bias_kernel     a tile of the bias over the group's sequences:      dB = dB + sum of dS

The keys or short kernel of `triton_backward` stores dS for a group of pairs of a sequence and a head, which should fit
into the L2 cache. Pairs are numbered by head, then by sequence, so that every sum of dB has the order of the sequences,
whatever the size of the groups: it changes no bit of a result.
"""

import triton
import triton.language as tl

from fastbert_kernels.attention.triton_tiles import load_rows, load_stored, part, sequence, store_rows
from fastbert_kernels.triton_common import product


@triton.jit(do_not_specialize=["T", "B", "first_pair"])
def stored_queries_kernel(
    stored, k, dq, bounds, scale, T, B, first_pair,
    H: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one of the group's pairs."""
    blocks = tl.cdiv(T, BLOCK_M)
    first, slot = (tl.program_id(0) % blocks) * BLOCK_M, tl.program_id(0) // blocks
    b, h = (first_pair + slot) % B, (first_pair + slot) // B
    row, start, length = sequence(bounds, b, T)
    if first >= length:
        return
    m, column = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    p_k = part(k, row, h, start)
    dq_tile = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for begin in range(0, length, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        ds = load_stored(stored, slot, n, m, length, EVEN)
        dq_tile += product(tl.trans(ds), load_rows(p_k, k, n, column, length, K, EVEN), UPCAST)
    store_rows(part(dq, row, h, start), dq, m, column, length, dq_tile * scale, K, UPCAST)


@triton.jit(do_not_specialize=["T", "B", "first_pair", "pairs", "per_output"])
def stored_bias_kernel(
    stored, dbias, bounds, T, B, first_pair, pairs, per_output, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of dbias, float32 [1 or B, H, T, T]: adds the dS of those of the group's pairs that have this bias.

    Args:
        pairs: number of pairs of the group.
        per_output: number of pairs that have the same bias: B sequences of a head, or 1.
    """
    down, across = tl.cdiv(T, BLOCK_N), tl.cdiv(T, BLOCK_M)
    tile, output = tl.program_id(0) % (down * across), tl.program_id(0) // (down * across) + first_pair // per_output
    n = (tile // across) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (tile % across) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = tl.maximum(output * per_output, first_pair)
    end = tl.minimum((output + 1) * per_output, first_pair + pairs)
    biases = B // per_output
    p_dbias = dbias.ptr + (output % biases).to(tl.int64) * dbias.b + (output // biases).to(tl.int64) * dbias.h
    p_tile = p_dbias + m[None, :] * dbias.m + n[:, None] * dbias.n
    inside = (n[:, None] < T) & (m[None, :] < T)
    acc = tl.load(p_tile, mask=inside & (begin > output * per_output), other=0.0)  # the sum of earlier groups
    for pair in tl.range(begin, end, num_stages=4):
        _, _, length = sequence(bounds, pair % B, T)
        ds = load_stored(stored, pair - first_pair, n, m, length, EVEN).to(tl.float32)
        if not EVEN:
            ds = tl.where(m[None, :] < length, ds, 0.0)
        acc += ds
    tl.store(p_tile, acc, mask=inside)
