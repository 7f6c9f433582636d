"""Cross-entropy over a vocabulary with the logits of a few rows in memory at a time, forward and backward.

    L = sum_n -log softmax(h_n E^T + b)_{y_n}        dL/dlogits_n = softmax_n - onehot(y_n)

The gradient of a row's logits is known with the row's loss, up to the scalar gradient of the loss. So all gradients are
computed in the forward pass, chunk by chunk, and multiplied by that scalar in the backward pass: three products in all,
as with saved logits, and no logits are recomputed.

Shapes: N rows, V words, D width, R rows in memory at a time.
"""

import torch
from torch import Tensor

from fastbert_kernels.backend import runs_kernels
from fastbert_kernels.cross_entropy.cpu import cpu_row_losses
from fastbert_kernels.cross_entropy.reference import check_loss, linear_cross_entropy_reference

CELLS = 1 << 25
"""Logits in memory at a time, or the size of the embedding if that is larger: each chunk reads and writes the
embedding's gradient once, which would dominate memory traffic if a chunk had fewer rows than the embedding is wide."""
FEW = 1 << 20
"""Maximum number of logits to compute without chunks if there is no kernel: for fewer the custom operator costs more
than it saves (docs/lab-notes.md)."""
ALIGNMENT = 16
"""Rows of logits are padded to a multiple of this for the kernel: cuBLAS is slow for unaligned rows."""


def linear_cross_entropy(
    hidden: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    rows: int | None = None,
) -> Tensor:
    """`linear_cross_entropy_reference` without [N, V] in memory; arguments and errors as there.

    Products are computed in hidden's dtype, or in that of autocast, as in `F.linear`; the softmax and the sums over
    chunks in at least float32. Losses and gradients of the logits come from a Triton kernel on a GPU and from PyTorch
    operations elsewhere.

    Args:
        rows: maximum of R (default: by CELLS). Changes the result by rounding only.

    Returns:
        a scalar in at least float32, differentiable once in hidden, embedding and bias. For a target that is neither a
        word nor `ignore_index` the kernel returns NaN, and PyTorch raises an error.
    """
    check_loss(hidden, embedding, bias, target, reduction)
    if rows is not None and rows < 1:
        raise ValueError(f"rows must be at least 1, not {rows}")
    if rows is None and len(hidden) * len(embedding) <= FEW and not _has_kernel(hidden):
        options = {"ignore_index": ignore_index, "reduction": reduction}
        return linear_cross_entropy_reference(hidden, embedding, bias, target, **options)
    kind, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:  # autocast leaves float64 unchanged
        dtype = torch.get_autocast_dtype(kind)
    parameters = (hidden, embedding, bias)
    required = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in parameters]
    with torch.autocast(kind, enabled=False):
        total, *_ = losses_and_gradients(*parameters, target, ignore_index, rows, dtype, required)
    return total if reduction == "sum" else total / (target != ignore_index).sum()


@torch.library.custom_op("fastbert_kernels::linear_cross_entropy", mutates_args=())
def losses_and_gradients(
    hidden: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    rows: int | None,
    dtype: torch.dtype,
    required: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses and its gradients, with empty tensors for gradients that are not required. A custom
    operator, so that `torch.compile` does not trace into it.

    Args:
        dtype: dtype of the products.
        required: whether the gradients of hidden, embedding and bias are required.
    """
    wide = torch.promote_types(dtype, torch.float32)
    h, e, b = (None if x is None else x.to(dtype) for x in (hidden, embedding, bias))
    target, count, words, width = target.contiguous(), len(h), *e.shape
    # Chunks of about equal size: a short last one would read the whole embedding for a few rows.
    chunks = -(-count // (rows or max(width, CELLS // words)))
    rows, padded, fused = -(-count // max(1, chunks)), words, _has_kernel(h)
    if fused:
        from fastbert_kernels.cross_entropy.triton_rows import triton_row_losses

        b = None if b is None else b.contiguous()
        padded = -(-words // ALIGNMENT) * ALIGNMENT
    buffer, losses = h.new_empty(rows, padded), h.new_empty(count, dtype=wide)
    d_hidden = h.new_empty(h.shape if required[0] else 0)
    d_embedding = (
        None if required[1] and count else h.new_zeros(e.shape if required[1] else 0, dtype=_gradient_dtype(dtype))
    )
    d_bias = h.new_zeros(words if required[2] else 0, dtype=wide)
    for start in range(0, count, max(1, rows)):
        part = slice(start, start + rows)
        logits = buffer[: len(h[part]), :words]
        if b is None or fused:
            torch.mm(h[part], e.T, out=logits)
        else:
            torch.addmm(b, h[part], e.T, out=logits)
        if fused:
            triton_row_losses(logits, b, target[part], ignore_index, losses[part], any(required))
        else:
            cpu_row_losses(logits, target[part], ignore_index, losses[part], any(required))
        if required[0]:
            torch.mm(logits, e, out=d_hidden[part])
        if required[1]:
            d_embedding = _accumulate(d_embedding, logits, h[part], _gradient_dtype(dtype) if chunks == 1 else wide)
        if required[2]:
            d_bias += logits.sum(0, dtype=wide if h.is_cuda else None)  # on a CPU a dtype would copy all logits
    return losses.sum(), d_hidden, d_embedding.to(_gradient_dtype(dtype)), d_bias


def _has_kernel(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and runs_kernels(x, "linear_cross_entropy")


def _gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which the embedding's gradient is saved for the backward pass: that of the products, as in `F.linear`,
    but float32 for float16, which a sum over all rows could overflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def _accumulate(total: Tensor | None, gradients: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """total + gradients^T hidden, in `dtype`; `gradients` are those of the logits."""
    if total is not None and hidden.dtype == dtype:
        return total.addmm_(gradients.T, hidden)
    if hidden.is_cuda and hidden.dtype != dtype:  # only CUDA has 16-bit products with float32 output
        product = torch.mm(gradients.T, hidden, out_dtype=dtype)
    else:
        product = torch.mm(gradients.T, hidden).to(dtype)
    return product if total is None else total.add_(product)


@losses_and_gradients.register_fake
def _(hidden, embedding, bias, target, ignore_index, rows, dtype, required):
    wide = torch.promote_types(dtype, torch.float32)
    shapes = (x.shape if needed else (0,) for x, needed in zip((hidden, embedding, bias), required, strict=True))
    saved = zip(shapes, (dtype, _gradient_dtype(dtype), wide), strict=True)
    return hidden.new_empty((), dtype=wide), *(hidden.new_empty(shape, dtype=dtype) for shape, dtype in saved)


def _setup(ctx, inputs, output) -> None:
    *_, ctx.required = inputs
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


@torch.autograd.function.once_differentiable
def _backward(ctx, grad: Tensor, *_):
    # The product is in grad's dtype: as a 0-dimensional factor of a 16-bit tensor, grad would be rounded to 16 bits.
    saved = zip(ctx.saved_tensors, ctx.dtypes, ctx.required, strict=True)
    return *((x.to(grad.dtype) * grad).to(dtype) if required else None for x, dtype, required in saved), *[None] * 5


losses_and_gradients.register_autograd(_backward, setup_context=_setup)
