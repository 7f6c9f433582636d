"""One Triton kernel between the products of `linear_cross_entropy`: adds the bias to a chunk of logits, computes their
losses and overwrites the logits with their gradients. With the bias in the product, PyTorch would first copy it
into every row of padded logits.

cuBLAS computes the products, a chunk of rows at a time; this kernel reads each row of logits twice and writes it once.
A kernel that also computed the products, in on-chip tiles, would recompute the logits for the gradient of the hidden
states and again for that of the embedding: five products instead of three. The cost of a chunk is memory traffic, much
of which stays in the L2 cache, since a chunk has about its size.

Each program processes one row, so there are no atomics, and two runs give the same bits.

Shapes: R rows of the chunk, V words.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.backend import INTERPRETED
from fastbert_kernels.triton_common import LOG2E, lowered

BLOCK = 4096
"""Words in a tile."""
WARPS = 8
_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-1e38)


@triton.jit
def _tile(p_row, p_bias, start, V, BIAS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Words start to start + BLOCK of a row: their ids, their logits in float32, and the mask of ids below V."""
    o_v = start + tl.arange(0, BLOCK)
    m_v = o_v < V
    # Without a mask wherever possible: with a mask, and V not a multiple of 16, loads are one number wide.
    b_x = tl.load(p_row + o_v, mask=m_v, other=float("-inf")) if MASKED else tl.load(p_row + o_v)
    b_x = b_x.to(tl.float32)
    if BIAS:
        b_x += (tl.load(p_bias + o_v, mask=m_v, other=0.0) if MASKED else tl.load(p_bias + o_v)).to(tl.float32)
    return o_v, b_x, m_v


@triton.jit
def _accumulate(
    p_row, p_bias, start, V, maximum, b_sum, BIAS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Add a tile to the running maximum and to the sums of exp(x - maximum), one for each column of the tile."""
    _, b_x, _ = _tile(p_row, p_bias, start, V, BIAS, BLOCK, MASKED)
    new_maximum = tl.maximum(maximum, tl.max(b_x, 0))
    return new_maximum, b_sum * tl.exp2((maximum - new_maximum) * LOG2E) + tl.exp2((b_x - new_maximum) * LOG2E)


@triton.jit
def _write_gradient(
    p_row, p_bias, start, V, word, maximum, factor,
    BIAS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Overwrite a tile with exp(x - maximum) factor - onehot."""
    o_v, b_x, m_v = _tile(p_row, p_bias, start, V, BIAS, BLOCK, MASKED)
    b_grad = tl.exp2((b_x - maximum) * LOG2E) * factor - tl.where(o_v == word, 1.0, 0.0)
    b_grad = lowered(b_grad, p_row.dtype.element_ty, INTERPRETED)
    if MASKED:
        tl.store(p_row + o_v, b_grad, mask=m_v)
    else:
        tl.store(p_row + o_v, b_grad)


@triton.jit
def _clear(p_row, V, BLOCK: tl.constexpr):
    for start in range(0, V, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        tl.store(p_row + o_v, tl.zeros([BLOCK], p_row.dtype.element_ty), mask=o_v < V)


# Pointers into targets and losses have any alignment, depending on the chunk; specializing on it would recompile.
@triton.jit(do_not_specialize=["p_target", "p_loss", "ignore_index"])
def rows_kernel(
    p_logits, p_bias, p_target, p_loss, row_stride, ignore_index, V,
    GRADIENTS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The loss of a row; with GRADIENTS, its logits are overwritten with their gradients."""
    row = tl.program_id(0).to(tl.int64)  # R V may exceed 2^31
    p_row = p_logits + row * row_stride
    target = tl.load(p_target + row)
    if target == ignore_index:
        tl.store(p_loss + row, 0.0)
        if GRADIENTS:
            _clear(p_row, V, BLOCK)
    else:
        # Read before anything is overwritten. A target that is not a word id gives NaN, not a number of another row.
        m_word = (target >= 0) & (target < V)
        target_logit = tl.load(p_row + target, mask=m_word, other=float("nan")).to(tl.float32)
        if BIAS:
            target_logit += tl.load(p_bias + target, mask=m_word, other=0.0).to(tl.float32)
        word, whole = target.to(tl.int32), V // BLOCK * BLOCK
        # The maximum starts finite, to avoid -inf - -inf where a whole tile is -inf.
        maximum, b_sum = tl.full([], _LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in range(0, whole, BLOCK):
            maximum, b_sum = _accumulate(p_row, p_bias, start, V, maximum, b_sum, BIAS, BLOCK, False)
        if whole < V:
            maximum, b_sum = _accumulate(p_row, p_bias, whole, V, maximum, b_sum, BIAS, BLOCK, True)
        total = tl.sum(b_sum, 0)
        # Subtract logits first: added to a large logit, the logarithm of the sum would lose its digits.
        tl.store(p_loss + row, tl.log2(total) * _LN2 + (maximum - target_logit))
        if GRADIENTS:
            for start in range(0, whole, BLOCK):
                _write_gradient(p_row, p_bias, start, V, word, maximum, 1.0 / total, BIAS, BLOCK, False, INTERPRETED)
            if whole < V:
                _write_gradient(p_row, p_bias, whole, V, word, maximum, 1.0 / total, BIAS, BLOCK, True, INTERPRETED)


def triton_row_losses(
    logits: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, losses: Tensor, gradients: bool
) -> None:
    """Write the rows' losses and, if `gradients`, overwrite the logits with their gradients.

    Args:
        logits: float32, bfloat16 or float16 [R, V], any stride of rows, stride 1 of words.
        bias: [V], contiguous, added to every row.
        target: int64 [R], contiguous.
        losses: float32 [R], contiguous; 0 where the target is `ignore_index`.
    """
    count, words = logits.shape
    options = {"GRADIENTS": gradients, "BIAS": bias is not None, "INTERPRETED": INTERPRETED}
    options["BLOCK"] = min(BLOCK, triton.next_power_of_2(words))
    with torch.cuda.device_of(logits):
        arguments = logits, logits if bias is None else bias, target, losses, logits.stride(0), ignore_index, words
        rows_kernel[(count,)](*arguments, **options, num_warps=WARPS)
