"""Cross-entropy over a vocabulary whose logits are there for a few rows at a time, forward and backward.

    L = sum_n -log softmax(h_n E^T + b)_{y_n}        dL/dlogits_n = softmax_n - onehot(y_n)

The gradient of a row's logits is known as soon as the row's loss is, up to the one number that comes from above. So all
gradients are made in the forward pass, chunk by chunk, and only multiplied in the backward pass: three products in all,
as with logits that are kept, and no second reading of the embedding.

Shapes: N rows, V words, D width, R rows held at a time.
"""

import torch
from torch import Tensor

from fastbert_kernels.backend import runs_kernels
from fastbert_kernels.cross_entropy.cpu import cpu_losses_and_slopes
from fastbert_kernels.cross_entropy.reference import check_loss, linear_cross_entropy_reference

CELLS = 1 << 25
"""Logits held at a time, or as many as the embedding has numbers if that is more: each chunk reads and writes the
embedding's gradient once, which with fewer rows than the embedding is wide would be the larger part of the traffic."""
FEW = 1 << 20
"""Without the kernel, up to this many logits are kept: a custom operator costs more than it saves there
(docs/lab-notes.md)."""
ALIGNMENT = 16
"""Rows of logits are padded to a multiple of this for the kernel: cuBLAS is slow at rows that begin anywhere."""


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

    Products are in hidden's type, or in autocast's as those of `F.linear` are; the softmax and the sums over chunks in
    at least float32. On a GPU a Triton kernel turns logits into losses and slopes, elsewhere PyTorch's operations do.

    Args:
        rows: R at most (default: by CELLS). Changes nothing beyond rounding.

    Returns:
        a number in at least float32, differentiable once in hidden, embedding and bias. A target that is neither a word
        nor `ignore_index` makes it NaN by the kernel, and is an error elsewhere.
    """
    check_loss(hidden, embedding, bias, target, reduction)
    if rows is not None and rows < 1:
        raise ValueError(f"rows must be at least 1, not {rows}")
    if rows is None and len(hidden) * len(embedding) <= FEW and not _has_kernel(hidden):
        given = {"ignore_index": ignore_index, "reduction": reduction}
        return linear_cross_entropy_reference(hidden, embedding, bias, target, **given)
    kind, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:  # which autocast lets be
        dtype = torch.get_autocast_dtype(kind)
    parameters = (hidden, embedding, bias)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in parameters]
    with torch.autocast(kind, enabled=False):
        total, *_ = losses_and_gradients(*parameters, target, ignore_index, rows, dtype, wanted)
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
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses, and of its gradients those that are wanted; empty tensors for the others. An operator that
    PyTorch knows, so that `torch.compile` need not look into it.

    Args:
        dtype: of the products.
        wanted: of hidden, embedding, bias.
    """
    wide = torch.promote_types(dtype, torch.float32)
    h, e, b = (None if x is None else x.to(dtype) for x in (hidden, embedding, bias))
    target, count, words, width = target.contiguous(), len(h), *e.shape
    # Chunks of about equal size: a short one at the end would read the whole embedding for a few rows.
    chunks = -(-count // (rows or max(width, CELLS // words)))
    rows, padded, losses_and_slopes = -(-count // max(1, chunks)), words, cpu_losses_and_slopes
    if _has_kernel(h):
        from fastbert_kernels.cross_entropy.triton_rows import triton_losses_and_slopes as losses_and_slopes

        padded = -(-words // ALIGNMENT) * ALIGNMENT
    buffer, losses = h.new_empty(rows, padded), h.new_empty(count, dtype=wide)
    to_hidden = h.new_empty(h.shape if wanted[0] else 0)
    to_embedding = (
        None if wanted[1] and count else h.new_zeros(e.shape if wanted[1] else 0, dtype=_gradient_dtype(dtype))
    )
    to_bias = h.new_zeros(words if wanted[2] else 0, dtype=wide)
    for start in range(0, count, max(1, rows)):
        part = slice(start, start + rows)
        logits = buffer[: len(h[part]), :words]
        if b is None:
            torch.mm(h[part], e.T, out=logits)
        else:
            torch.addmm(b, h[part], e.T, out=logits)
        losses_and_slopes(logits, target[part], ignore_index, losses[part], any(wanted))
        if wanted[0]:
            torch.mm(logits, e, out=to_hidden[part])
        if wanted[1]:
            to_embedding = _add(to_embedding, logits, h[part], _gradient_dtype(dtype) if chunks == 1 else wide)
        if wanted[2]:
            to_bias += logits.sum(0, dtype=wide if h.is_cuda else None)  # on a CPU that would copy all of them
    return losses.sum(), to_hidden, to_embedding.to(_gradient_dtype(dtype)), to_bias


def _has_kernel(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and runs_kernels(x, "linear_cross_entropy")


def _gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """How the embedding's gradient waits for the backward pass: in the products' type, as that of `F.linear` is, but
    for float16, which a sum over all rows could overflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def _add(total: Tensor | None, slopes: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """total + slopes^T hidden, in `dtype`."""
    if total is not None and hidden.dtype == dtype:
        return total.addmm_(slopes.T, hidden)
    if hidden.is_cuda and hidden.dtype != dtype:  # no other backend has 16-bit products that end in float32
        product = torch.mm(slopes.T, hidden, out_dtype=dtype)
    else:
        product = torch.mm(slopes.T, hidden).to(dtype)
    return product if total is None else total.add_(product)


@losses_and_gradients.register_fake
def _(hidden, embedding, bias, target, ignore_index, rows, dtype, wanted):
    wide = torch.promote_types(dtype, torch.float32)
    shapes = (x.shape if needed else (0,) for x, needed in zip((hidden, embedding, bias), wanted, strict=True))
    made = zip(shapes, (dtype, _gradient_dtype(dtype), wide), strict=True)
    return hidden.new_empty((), dtype=wide), *(hidden.new_empty(shape, dtype=own) for shape, own in made)


def _setup(ctx, inputs, output) -> None:
    *_, ctx.wanted = inputs
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


@torch.autograd.function.once_differentiable
def _backward(ctx, grad: Tensor, *_):
    # The product is in grad's type: a 0-dimensional factor of a 16-bit tensor would be rounded to 16 bits itself.
    made = zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    return *((x.to(grad.dtype) * grad).to(dtype) if wanted else None for x, dtype, wanted in made), *[None] * 5


losses_and_gradients.register_autograd(_backward, setup_context=_setup)
