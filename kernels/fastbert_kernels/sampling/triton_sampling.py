"""Sampling of distinct words by two Triton kernels on a chunk of logits: one pass over all logits, then a few blocks
per row.

`block_kernel` reads every logit once and writes two numbers for each block of words: the largest logit, and the sum of
exp(logit - largest). `sampling_kernel` has a program for each row and holds the weights of the blocks in registers. In
each round it samples a block, reads the 64 logits of that block again, samples a word and sums the block without it. No
probabilities are written, there are no atomics, and the samples of a row do not depend on other rows.

Shapes: R rows, V words, B blocks of BLOCK words (the last may be shorter), K samples.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.sampling.reference import BLOCK, FLOOR
from fastbert_kernels.triton_common import LOG2E, combine

GROUP = 64
"""Maximum number of blocks that a program of `block_kernel` processes."""
_FLOOR = tl.constexpr(FLOOR)
_LOG_FLOOR = tl.constexpr(-900 * 0.6931471805599453)  # log FLOOR
_MAX_FRACTION = tl.constexpr(1 - 2.0**-52)
_UNIT = tl.constexpr(2.0**-52)


@triton.jit
def _load(p_row, p_allowed, o_v, V, excluded):
    """Logits in float32, -inf for disallowed words; and the mask of allowed words."""
    m_v = o_v < V
    b_allowed = (tl.load(p_allowed + o_v, mask=m_v, other=0) != 0) & (o_v != excluded)
    b_x = tl.load(p_row + o_v, mask=m_v, other=0.0).to(tl.float32)
    return tl.where(b_allowed, b_x, float("-inf")), b_allowed


@triton.jit
def _excluded(p_excluded, row):
    """The row's excluded word, or -1."""
    if p_excluded is None:
        word = tl.full([], -1, tl.int32)
    else:
        word = tl.load(p_excluded + row).to(tl.int32)
    return word


# Pointers to one number per row have any alignment, depending on the chunk; specializing on it would recompile.
@triton.jit(do_not_specialize=["p_excluded"])
def block_kernel(
    p_logits, p_allowed, p_excluded, p_max, p_sum, row_stride, V, B, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest logit (-inf if no word is allowed) and the sum of exp(logit - largest) of GROUP blocks of a row."""
    row = tl.program_id(0).to(tl.int64)  # R V may exceed 2^31
    o_b = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    o_v = o_b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [GROUP, BLOCK]
    m_b = o_b < B
    excluded = _excluded(p_excluded, row)
    b_x, _ = _load(p_logits + row * row_stride, p_allowed, o_v, V, excluded)
    b_max = tl.max(b_x, 1)  # [GROUP]
    level = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.sum(tl.exp2((b_x - level[:, None]) * LOG2E), 1)
    tl.store(p_max + row * B + o_b, b_max, mask=m_b)
    tl.store(p_sum + row * B + o_b, b_sum, mask=m_b)


@triton.jit
def _unit_interval(word):
    """float64 in [0, 1 - 2^-52] with 52 random bits from a hashed word."""
    high = word.to(tl.int64) & 0xFFFFFFFF
    low = (combine(word, 1).to(tl.int64) & 0xFFFFFFFF) >> 12
    return ((high << 20) | low).to(tl.float64) * _UNIT


@triton.jit
def _invert(b_w, fraction, index, N: tl.constexpr):
    """The index of the interval (of N, with lengths b_w) that contains the point at `fraction` of the total length, and
    the fraction of that interval before the point.

    A parallel sum need not ascend across intervals of length 0, so only intervals with a positive length count. If
    rounding leaves none behind the point, the last one with a positive length is selected.
    """
    b_end = tl.cumsum(b_w, 0)
    point = fraction * tl.max(b_end, 0)
    rank = tl.where(b_end > point, index, 2 * N - index)
    found = tl.min(tl.where(b_w > 0, rank, 2 * N), 0)
    found = tl.where(found < N, found, 2 * N - found)
    length = tl.sum(tl.where(index == found, b_w, 0.0), 0)
    start = tl.sum(tl.where(index == found, b_end, 0.0), 0) - length
    fraction = (point - start) / length
    return found, tl.minimum(tl.maximum(fraction, 0.0), _MAX_FRACTION)


@triton.jit(do_not_specialize=["p_excluded", "p_keys", "p_ids", "p_log", "K"])
def sampling_kernel(
    p_logits, p_allowed, p_excluded, p_floor, p_max, p_sum, p_keys, p_ids, p_log, row_stride, V, B, K,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """K samples of a row, in sampling order, and their log-probabilities.

    Args:
        p_floor: float64 [B], FLOOR times the number of allowed words of each block.
        p_max, p_sum: float32 [R, B], the output of `block_kernel`.
        BLOCKS, SAMPLES: B and K rounded up to a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + row * row_stride
    o_b, o_w, o_k = tl.arange(0, BLOCKS), tl.arange(0, BLOCK), tl.arange(0, SAMPLES)
    m_b = o_b < B
    b_max = tl.load(p_max + row * B + o_b, mask=m_b, other=float("-inf"))
    maximum = tl.max(b_max, 0)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    b_w = tl.load(p_sum + row * B + o_b, mask=m_b, other=0.0).to(tl.float64)
    b_w *= tl.exp2((b_max - maximum) * LOG2E).to(tl.float64)  # [BLOCKS]
    b_w = tl.where(b_w >= 0.0, b_w, 0.0)  # NaN counts as 0: allowed words have their floor
    log_total = tl.log(tl.sum(b_w, 0))
    b_w += tl.load(p_floor + o_b, mask=m_b, other=0.0)
    excluded = _excluded(p_excluded, row)
    if p_excluded is not None:
        known = tl.load(p_allowed + excluded, mask=(excluded >= 0) & (excluded < V), other=0) != 0
        b_w -= tl.where(known & (o_b == excluded // BLOCK), _FLOOR, 0.0)
    key = tl.load(p_keys + row)
    b_id = tl.zeros([SAMPLES], tl.int32) + B * BLOCK  # ids outside all blocks
    for i in range(K):
        block, fraction = _invert(b_w, _unit_interval(combine(key, i)), o_b, BLOCKS)
        o_v = block * BLOCK + o_w
        b_x, b_allowed = _load(p_row, p_allowed, o_v, V, excluded)
        # A bit for each removed word of the block; the words are distinct, so the sum is a bitwise or.
        removed = tl.sum(tl.where(b_id // BLOCK == block, tl.full([], 1, tl.int64) << (b_id % BLOCK), 0), 0)
        b_allowed &= ((removed >> o_w) & 1) == 0
        b_inside = tl.exp2((b_x - maximum) * LOG2E).to(tl.float64)
        b_inside = tl.where(b_allowed, tl.where(b_inside >= 0.0, b_inside, 0.0) + _FLOOR, 0.0)
        offset, _ = _invert(b_inside, fraction, o_w, BLOCK)
        b_id = tl.where(o_k == i, block * BLOCK + offset, b_id)
        b_w = tl.where(o_b == block, tl.sum(tl.where(o_w == offset, 0.0, b_inside), 0), b_w)
    m_k = o_k < K
    b_x = tl.load(p_row + b_id, mask=m_k, other=0.0).to(tl.float32) - maximum  # [SAMPLES]
    b_log = tl.where(tl.exp2(b_x * LOG2E) > 0, b_x - log_total, _LOG_FLOOR)
    tl.store(p_ids + row * K + o_k, b_id.to(tl.int64), mask=m_k)
    tl.store(p_log + row * K + o_k, b_log.to(tl.float32), mask=m_k)


def triton_sampling(
    logits: Tensor, keys: Tensor, excluded: Tensor | None, *, k: int, allowed: Tensor, floors: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch both kernels.

    Args:
        logits: float32, bfloat16 or float16 [R, V], not changed.
        keys: int32 [R].
        excluded: int64 [R].
        k: K, at most the number of allowed words of a row.
        allowed: int8 [B BLOCK], 0 for words that are not allowed in any row and for ids beyond V.
        floors: float64 [B], FLOOR times the number of allowed words of each block.

    Returns:
        ids, int64 [R, K]; log_probabilities, float32 [R, K].
    """
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    keys, excluded = keys.contiguous(), None if excluded is None else excluded.contiguous()
    count, words, blocks = *logits.shape, len(floors)
    ids = logits.new_empty(count, k, dtype=torch.int64)
    log_probabilities = logits.new_empty(count, k, dtype=torch.float32)
    if count == 0:
        return ids, log_probabilities
    maxima, sums = (logits.new_empty(count, blocks, dtype=torch.float32) for _ in range(2))
    padded = triton.next_power_of_2(blocks)
    group = min(GROUP, padded)
    with torch.cuda.device_of(logits):
        block_kernel[(count, triton.cdiv(blocks, group))](
            logits, allowed, excluded, maxima, sums, logits.stride(0), words, blocks, group, BLOCK, num_warps=4
        )  # fmt: skip
        sampling_kernel[(count,)](
            logits, allowed, excluded, floors, maxima, sums, keys, ids, log_probabilities, logits.stride(0), words,
            blocks, k, BLOCK, padded, triton.next_power_of_2(k), num_warps=warps(padded),
        )  # fmt: skip
    return ids, log_probabilities


def warps(blocks: int) -> int:
    """Number of warps of `sampling_kernel`: few, since reductions within a warp need no barrier, but enough that the
    weights of all blocks fit in registers."""
    return max(1, blocks // 512)
