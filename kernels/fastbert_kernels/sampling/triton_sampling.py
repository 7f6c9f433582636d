"""Draws of distinct words by two Triton kernels on a chunk of logits: a pass over all of it, then a few blocks a row.

`block_kernel` reads every logit once and leaves two numbers for each block of words: its largest logit, and the sum of
exp(logit - largest). `sampling_kernel` has a program for each row. It holds the weights of the blocks in registers. In
each round it picks a block, reads the 64 logits of that block again, picks a word and subtracts the word's weight from
the block's. No probability is ever written, nothing is added by atomics, and the words of a row do not depend on the
rows around it.

Shapes: R rows, V words, B blocks of BLOCK words (the last may be short of some), K draws.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.sampling.reference import BLOCK, FLOOR
from fastbert_kernels.triton_common import LOG2E, combine

GROUP = 64
"""Blocks of words that a program of `block_kernel` takes at most."""
_FLOOR = tl.constexpr(FLOOR)
_LEFT_OVER = tl.constexpr(-900 * 0.6931471805599453)  # log FLOOR
_LARGEST_SHARE = tl.constexpr(1 - 2.0**-52)
_UNIT = tl.constexpr(2.0**-52)


@triton.jit
def _load(p_row, p_drawable, o_v, V, excluded):
    """Logits in float32, -inf for words that may not be drawn, and which may."""
    m_v = o_v < V
    b_drawable = (tl.load(p_drawable + o_v, mask=m_v, other=0) != 0) & (o_v != excluded)
    b_x = tl.load(p_row + o_v, mask=m_v, other=0.0).to(tl.float32)
    return tl.where(b_drawable, b_x, float("-inf")), b_drawable


@triton.jit
def _excluded(p_excluded, row):
    """The row's excluded word; -1 where there is none."""
    if p_excluded is None:
        word = tl.full([], -1, tl.int32)
    else:
        word = tl.load(p_excluded + row).to(tl.int32)
    return word


# Chunks begin anywhere in what has a number a row, so these pointers' alignment would be a reason to compile again.
@triton.jit(do_not_specialize=["p_excluded"])
def block_kernel(
    p_logits, p_drawable, p_excluded, p_top, p_sum, row_stride, V, B, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Of some blocks of a row the largest logit (-inf if nothing may be drawn) and the sum of exp(logit - largest)."""
    row = tl.program_id(0).to(tl.int64)  # R V may exceed 2^31
    o_b = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    o_v = o_b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [GROUP, BLOCK]
    m_b = o_b < B
    excluded = _excluded(p_excluded, row)
    b_x, _ = _load(p_logits + row * row_stride, p_drawable, o_v, V, excluded)
    b_top = tl.max(b_x, 1)  # [GROUP]
    level = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_sum = tl.sum(tl.exp2((b_x - level[:, None]) * LOG2E), 1)
    tl.store(p_top + row * B + o_b, b_top, mask=m_b)
    tl.store(p_sum + row * B + o_b, b_sum, mask=m_b)


@triton.jit
def _unit_interval(word):
    """float64 in [0, 1 - 2^-52] with 52 random bits from a hashed word."""
    high = word.to(tl.int64) & 0xFFFFFFFF
    low = (combine(word, 1).to(tl.int64) & 0xFFFFFFFF) >> 12
    return ((high << 20) | low).to(tl.float64) * _UNIT


@triton.jit
def _invert(b_w, share, index, N: tl.constexpr):
    """In which of N intervals of lengths b_w `share` of their whole length falls, and the share of it before the point.

    A parallel sum need not ascend where a length is nothing: an interval counts only if it has one, and should rounding
    leave none behind the point, the last that has one is taken.
    """
    b_end = tl.cumsum(b_w, 0)
    point = share * tl.max(b_end, 0)
    rank = tl.where(b_end > point, index, 2 * N - index)
    at = tl.min(tl.where(b_w > 0, rank, 2 * N), 0)
    at = tl.where(at < N, at, 2 * N - at)
    length = tl.sum(tl.where(index == at, b_w, 0.0), 0)
    start = tl.sum(tl.where(index == at, b_end, 0.0), 0) - length
    share = (point - start) / length
    return at, tl.minimum(tl.maximum(share, 0.0), _LARGEST_SHARE)


@triton.jit(do_not_specialize=["p_excluded", "p_keys", "p_ids", "p_logs", "K"])
def sampling_kernel(
    p_logits, p_drawable, p_excluded, p_floor, p_top, p_sum, p_keys, p_ids, p_logs, row_stride, V, B, K,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """K words of a row, in the order drawn, and their log-probabilities.

    Args:
        p_floor: float64 [B], FLOOR times the words of a block that may be drawn.
        p_top, p_sum: float32 [R, B], what `block_kernel` left.
        BLOCKS, DRAWS: B and K up to the next power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + row * row_stride
    o_b, o_w, o_k = tl.arange(0, BLOCKS), tl.arange(0, BLOCK), tl.arange(0, DRAWS)
    m_b = o_b < B
    b_top = tl.load(p_top + row * B + o_b, mask=m_b, other=float("-inf"))
    top = tl.max(b_top, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    b_w = tl.load(p_sum + row * B + o_b, mask=m_b, other=0.0).to(tl.float64)
    b_w *= tl.exp2((b_top - top) * LOG2E).to(tl.float64)  # [BLOCKS]
    b_w = tl.where(b_w >= 0.0, b_w, 0.0)  # NaN is nothing: what may be drawn is down to its floor
    log_total = tl.log(tl.sum(b_w, 0))
    b_w += tl.load(p_floor + o_b, mask=m_b, other=0.0)
    excluded = _excluded(p_excluded, row)
    if p_excluded is not None:
        known = tl.load(p_drawable + excluded, mask=(excluded >= 0) & (excluded < V), other=0) != 0
        b_w -= tl.where(known & (o_b == excluded // BLOCK), _FLOOR, 0.0)
    key = tl.load(p_keys + row)
    b_id = tl.zeros([DRAWS], tl.int32) + B * BLOCK  # words of no block
    for draw in range(K):
        block, share = _invert(b_w, _unit_interval(combine(key, draw)), o_b, BLOCKS)
        o_v = block * BLOCK + o_w
        b_x, b_drawable = _load(p_row, p_drawable, o_v, V, excluded)
        # A bit for each word of the block that is gone; the words are distinct, so their bits add up.
        gone = tl.sum(tl.where(b_id // BLOCK == block, tl.full([], 1, tl.int64) << (b_id % BLOCK), 0), 0)
        b_drawable &= ((gone >> o_w) & 1) == 0
        b_inside = tl.exp2((b_x - top) * LOG2E).to(tl.float64)
        b_inside = tl.where(b_drawable, tl.where(b_inside >= 0.0, b_inside, 0.0) + _FLOOR, 0.0)
        place, _ = _invert(b_inside, share, o_w, BLOCK)
        b_id = tl.where(o_k == draw, block * BLOCK + place, b_id)
        b_w = tl.where(o_b == block, tl.sum(tl.where(o_w == place, 0.0, b_inside), 0), b_w)
    m_k = o_k < K
    b_x = tl.load(p_row + b_id, mask=m_k, other=0.0).to(tl.float32) - top  # [DRAWS]
    b_log = tl.where(tl.exp2(b_x * LOG2E) > 0, b_x - log_total, _LEFT_OVER)
    tl.store(p_ids + row * K + o_k, b_id.to(tl.int64), mask=m_k)
    tl.store(p_logs + row * K + o_k, b_log.to(tl.float32), mask=m_k)


def triton_sampling(
    logits: Tensor, keys: Tensor, excluded: Tensor | None, *, k: int, drawable: Tensor, floors: Tensor
) -> tuple[Tensor, Tensor]:
    """Launches both kernels.

    Args:
        logits: float32, bfloat16 or float16 [R, V], not changed.
        keys: int32 [R].
        excluded: int64 [R].
        k: K, at most the words a row may draw.
        drawable: int8 [B BLOCK], 0 for words that no row may draw and for those beyond V.
        floors: float64 [B], FLOOR times the words of each block that may be drawn.

    Returns:
        ids, int64 [R, K]; log_probabilities, float32 [R, K].
    """
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    keys, excluded = keys.contiguous(), None if excluded is None else excluded.contiguous()
    count, words, blocks = *logits.shape, len(floors)
    ids = logits.new_empty(count, k, dtype=torch.int64)
    logs = logits.new_empty(count, k, dtype=torch.float32)
    if count == 0:
        return ids, logs
    tops, sums = (logits.new_empty(count, blocks, dtype=torch.float32) for _ in range(2))
    padded = triton.next_power_of_2(blocks)
    group = min(GROUP, padded)
    with torch.cuda.device_of(logits):
        block_kernel[(count, triton.cdiv(blocks, group))](
            logits, drawable, excluded, tops, sums, logits.stride(0), words, blocks, group, BLOCK, num_warps=4
        )  # fmt: skip
        sampling_kernel[(count,)](
            logits, drawable, excluded, floors, tops, sums, keys, ids, logs, logits.stride(0), words, blocks, k,
            BLOCK, padded, triton.next_power_of_2(k), num_warps=warps(padded),
        )  # fmt: skip
    return ids, logs


def warps(blocks: int) -> int:
    """Warps of `sampling_kernel`: few, since reductions within one warp need no barrier, but enough that the weights of
    all blocks fit in registers."""
    return max(1, blocks // 512)
