"""One Triton kernel between the products of `linear_cross_entropy`: from a chunk of logits to losses and, in place, to
slopes, the derivatives of the loss by the logits.

The products are cuBLAS's, a chunk of rows at a time; this kernel reads each row of logits twice and writes it once. A
kernel that also made the products, in tiles that never leave the chip, would have to make the logits again for the
gradient of the hidden states and once more for that of the embedding: five products instead of three. What the chunk
costs instead is traffic, much of which stays in the L2 cache, since a chunk is chosen about as large.

A program has a row, so there are no atomics, and two runs give the same bits.

Shapes: R rows of the chunk, V words.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.backend import INTERPRETED
from fastbert_kernels.triton_common import LOG2E, lowered

BLOCK = 4096
"""Words of a tile."""
WARPS = 8
_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-1e38)


@triton.jit
def _tile(p_row, start, V, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Words start to start + BLOCK of a row: their numbers, their logits in float32, and which of them there are."""
    o_v = start + tl.arange(0, BLOCK)
    m_v = o_v < V
    # Without a mask wherever possible: under one, with a V that is no multiple of 16, loads are one number wide.
    b_x = tl.load(p_row + o_v, mask=m_v, other=float("-inf")) if MASKED else tl.load(p_row + o_v)
    return o_v, b_x.to(tl.float32), m_v


@triton.jit
def _fold(p_row, start, V, top, b_sum, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """The running maximum, and the sums of exp(x - maximum), one for each place of the tile, with one more tile."""
    _, b_x, _ = _tile(p_row, start, V, BLOCK, MASKED)
    new = tl.maximum(top, tl.max(b_x, 0))
    return new, b_sum * tl.exp2((top - new) * LOG2E) + tl.exp2((b_x - new) * LOG2E)


@triton.jit
def _turn(
    p_row, start, V, word, top, share, BLOCK: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """Overwrites a tile with exp(x - top) share - onehot."""
    o_v, b_x, m_v = _tile(p_row, start, V, BLOCK, MASKED)
    b_slope = tl.exp2((b_x - top) * LOG2E) * share - tl.where(o_v == word, 1.0, 0.0)
    b_slope = lowered(b_slope, p_row.dtype.element_ty, INTERPRETED)
    if MASKED:
        tl.store(p_row + o_v, b_slope, mask=m_v)
    else:
        tl.store(p_row + o_v, b_slope)


@triton.jit
def _clear(p_row, V, BLOCK: tl.constexpr):
    for start in range(0, V, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        tl.store(p_row + o_v, tl.zeros([BLOCK], p_row.dtype.element_ty), mask=o_v < V)


# Chunks begin anywhere in targets and losses, so those pointers' alignment would be a reason to compile again.
@triton.jit(do_not_specialize=["p_target", "p_loss", "ignore_index"])
def rows_kernel(
    p_logits, p_target, p_loss, row_stride, ignore_index, V,
    SLOPES: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The loss of a row; with SLOPES, its logits are overwritten with the loss's derivatives."""
    row = tl.program_id(0).to(tl.int64)  # R V may exceed 2^31
    p_row = p_logits + row * row_stride
    answer = tl.load(p_target + row)
    if answer == ignore_index:
        tl.store(p_loss + row, 0.0)
        if SLOPES:
            _clear(p_row, V, BLOCK)
    else:
        # Read before anything is overwritten. A target that is no word gives NaN instead of a foreign number.
        given = tl.load(p_row + answer, mask=(answer >= 0) & (answer < V), other=float("nan")).to(tl.float32)
        word, whole = answer.to(tl.int32), V // BLOCK * BLOCK
        # The maximum begins with a finite number, lest -inf - -inf arise where a whole tile is -inf.
        top, b_sum = tl.full([], _LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in range(0, whole, BLOCK):
            top, b_sum = _fold(p_row, start, V, top, b_sum, BLOCK, False)
        if whole < V:
            top, b_sum = _fold(p_row, whole, V, top, b_sum, BLOCK, True)
        total = tl.sum(b_sum, 0)
        # Differences of logits come first: a large logit has no digits left for the sum's logarithm.
        tl.store(p_loss + row, tl.log2(total) * _LN2 + (top - given))
        if SLOPES:
            for start in range(0, whole, BLOCK):
                _turn(p_row, start, V, word, top, 1.0 / total, BLOCK, False, INTERPRETED)
            if whole < V:
                _turn(p_row, whole, V, word, top, 1.0 / total, BLOCK, True, INTERPRETED)


def triton_losses_and_slopes(logits: Tensor, target: Tensor, ignore_index: int, losses: Tensor, slopes: bool) -> None:
    """Writes the rows' losses and, if `slopes`, their derivatives over the logits.

    Args:
        logits: float32, bfloat16 or float16 [R, V], rows of any distance, words side by side.
        target: int64 [R], contiguous.
        losses: float32 [R], contiguous; 0 where the target is `ignore_index`.
    """
    count, words = logits.shape
    chosen = {"SLOPES": slopes, "BLOCK": min(BLOCK, triton.next_power_of_2(words)), "INTERPRETED": INTERPRETED}
    with torch.cuda.device_of(logits):
        given = logits, target, losses, logits.stride(0), ignore_index, words
        rows_kernel[(count,)](*given, **chosen, num_warps=WARPS)
