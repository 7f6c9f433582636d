"""Launches of the attention kernels, as custom PyTorch operators.

Shapes as in `triton_tiles`. With `bounds` the packed sequences are a batch of B = 1, and T in a bias is the length of
the longest.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from fastbert_kernels.attention.distances import add_diagonals
from fastbert_kernels.attention.triton_backward import (
    bias_kernel,
    delta_kernel,
    keys_kernel,
    queries_kernel,
    short_kernel,
)
from fastbert_kernels.attention.triton_forward import forward_kernel
from fastbert_kernels.attention.triton_stored import stored_bias_kernel, stored_queries_kernel
from fastbert_kernels.attention.triton_tiles import (
    Bias,
    HeadRows,
    KernelDropout,
    RowValues,
    StoredGradient,
    TokenValues,
    Untied,
)
from fastbert_kernels.backend import INTERPRETED
from fastbert_kernels.configurations import TENSOR_CLASSES, Tiles, tensor_class, tiles
from fastbert_kernels.hashing import threshold

KERNELS = {
    "forward": forward_kernel,
    "keys": keys_kernel,
    "queries": queries_kernel,
    "bias": bias_kernel,
    "short": short_kernel,
}
SHORT = (64, 128)
"""Tile sizes of `short_kernel`, whose tile has a whole sequence."""
PROGRAMS = 528
"""Target number of programs of `bias_kernel`: four for each multiprocessor of an H100. A constant, since the number of
groups of sequences decides the order of summation."""
STORED_PROGRAMS = 128
"""Minimum number of programs of the keys or short kernel for a group of pairs whose gradient of the scores is stored:
about one for each multiprocessor of an A100 or H100. With fewer most of the GPU would be idle; it is recomputed."""
STORED_BIAS = {"BLOCK_M": 64, "BLOCK_N": 16}
"""Tile of `stored_bias_kernel`: small, since it has nothing but loads, which many programs hide."""
MIB = 1 << 20
STRIPE_CELLS = 1 << 24
"""Number of values of the bias's gradient in memory at a time, where only the gradients of its components are
needed."""


class _Launches:
    """The arguments that all kernels of one call have in common, and their launches."""

    def __init__(
        self, q, bias, untied, relative, bounds, key_padding, segments, keys, scale, dropout_p, longest
    ) -> None:
        self.packed, self.heads, self.head_size = bounds is not None, q.shape[1], q.shape[3]
        self.tensor_class = tensor_class(self.head_size, q.dtype)
        self.batch = len(bounds) - 1 if self.packed else len(q)
        bounds, keys = (None if x is None else x.contiguous() for x in (bounds, keys))
        self.longest = longest if self.packed else q.shape[2]
        self.pairs = self.batch * self.heads
        self.block_k = max(16, triton.next_power_of_2(self.head_size))
        padding = None if key_padding is None else _token_values(key_padding.view(torch.int8))
        segments = (
            None if segments is None else _token_values(segments if segments.dtype == torch.int64 else segments.int())
        )
        dropout = KernelDropout(keys, threshold(dropout_p), 1.0 / (1.0 - dropout_p)) if dropout_p else None
        self.short = self.longest <= SHORT[-1] and self.tensor_class == TENSOR_CLASSES[0]
        self.tensors = {"bias": None, "untied": untied, "relative": relative, "bounds": bounds, "dropout": dropout}
        self.tensors |= {"padding": padding, "segments": segments}
        if bias is not None:
            strides = [0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)]
            self.tensors["bias"] = Bias(bias, *strides)
        self.numbers = {"scale": scale, "T": self.longest, "B": self.batch, "H": self.heads, "K": self.head_size}

    def __call__(self, name: str, programs: int, blocks: dict[str, int], warps: int, stages: int, **more: Any) -> None:
        arguments = {**self.tensors, **self.numbers, **more}
        options = {"EVEN": self.even(blocks), "UPCAST": INTERPRETED, "num_warps": warps, "num_stages": stages}
        KERNELS[name][(programs,)](**arguments, **options, **blocks, BLOCK_K=self.block_k)

    def even(self, blocks: dict[str, int]) -> bool:
        """Report whether all tiles are entirely within the sequences."""
        return not self.packed and all(self.longest % size == 0 for size in blocks.values())

    def tiles(self, name: str) -> Tiles:
        """The configuration of a kernel for this call."""
        chosen = tiles(name, self.tensor_class, self.tensors["untied"] is not None)
        keys = next(size for size in SHORT if self.longest <= size) if name == "short" else chosen.keys
        return chosen._replace(keys=keys)

    def by_blocks(self, name: str, axis: str, pairs: int | None = None, **more: Any) -> None:
        """Launch a kernel with a program for each block of queries ("M") or keys ("N") of all sequences and heads, or
        of a number of pairs of them."""
        chosen = self.tiles(name)
        blocks = {"BLOCK_M": chosen.queries, "BLOCK_N": chosen.keys}
        programs = triton.cdiv(self.longest, blocks[f"BLOCK_{axis}"]) * (self.pairs if pairs is None else pairs)
        self(name, programs, blocks, chosen.warps, chosen.stages, **more)

    def bias_gradient(self, biases: int, first_row: int, rows: int, device, **more: Any) -> Tensor:
        """dS of consecutive rows, float32 [biases, H, rows, T]: summed over the sequences if `biases` is 1."""
        chosen = tiles("bias", self.tensor_class, self.tensors["untied"] is not None)
        blocks = {"BLOCK_M": chosen.queries, "BLOCK_N": chosen.keys}
        down, across = triton.cdiv(rows, chosen.queries), triton.cdiv(self.longest, chosen.keys)
        groups, count = self.groups(biases, down * across * self.heads)
        out = torch.empty(groups, self.heads, rows, self.longest, dtype=torch.float32, device=device)
        more |= {"dbias": Bias(out, *out.stride()), "first_row": first_row, "rows": rows, "count": count}
        self("bias", down * across * self.heads * groups, blocks, chosen.warps, chosen.stages, **more)
        return out if biases > 1 else out.sum(0, keepdim=True)

    def groups(self, biases: int, programs: int) -> tuple[int, int]:
        """Number of groups in which sequences are summed, and number of sequences per group."""
        if biases > 1:
            return self.batch, 1
        count = triton.cdiv(self.batch, triton.cdiv(PROGRAMS, programs))
        return triton.cdiv(self.batch, count), count

    def stored_group(self, element_size: int, bias_required: bool) -> tuple[int, int]:
        """Number of pairs of a sequence and a head whose dS is stored at a time, and its number of columns; 0 pairs if
        dS is recomputed."""
        chosen = self.tiles("short" if self.short else "keys")
        block = max(chosen.queries, self.tiles("stored_queries").queries, STORED_BIAS["BLOCK_M"])
        columns = triton.cdiv(self.longest, block) * block
        if not chosen.stored or self.tensors["untied"] is not None or (self.short and not bias_required):
            return 0, columns
        pairs = min(self.pairs, chosen.stored * MIB // (self.longest * columns * element_size))
        programs = triton.cdiv(self.longest, chosen.keys) * pairs
        return pairs if pairs == self.pairs or programs >= STORED_PROGRAMS else 0, columns

    def stored_backward(self, pairs: int, columns: int, dq, dk, dv, dbias: Tensor | None, common) -> None:
        """All gradients, with dS of `pairs` pairs in memory at a time; dQ is that of the short kernel where it runs.

        Args:
            dbias: float32 [1 or B, H, T, T], or None.
        """
        stored = dk.new_empty(pairs, self.longest, columns)
        group = StoredGradient(stored, *stored.stride()[:2])
        gradients = {"dk": _rows(dk), "dv": _rows(dv), "stored": group}
        for first in range(0, self.pairs, pairs):
            count = min(pairs, self.pairs - first)
            if self.short:
                self.by_blocks("short", "N", count, **common, **gradients, dq=_rows(dq), first_pair=first)
            else:
                self.by_blocks("keys", "N", count, **common, **gradients, first_pair=first)
                self.stored_queries(count, group, common["k"], _rows(dq), first)
            if dbias is not None:
                self.stored_bias(count, group, dbias, first)

    def stored_queries(self, pairs: int, stored: StoredGradient, k: HeadRows, dq: HeadRows, first_pair: int) -> None:
        chosen = self.tiles("stored_queries")
        blocks = {"BLOCK_M": chosen.queries, "BLOCK_N": chosen.keys}
        arguments = {"stored": stored, "k": k, "dq": dq, "bounds": self.tensors["bounds"], "first_pair": first_pair}
        options = {"EVEN": self.even(blocks), "UPCAST": INTERPRETED, "BLOCK_K": self.block_k}
        options |= {"num_warps": chosen.warps, "num_stages": chosen.stages}
        programs = triton.cdiv(self.longest, chosen.queries) * pairs
        stored_queries_kernel[(programs,)](**arguments, **self.numbers, **blocks, **options)

    def stored_bias(self, pairs: int, stored: StoredGradient, dbias: Tensor, first_pair: int) -> None:
        per_output = self.batch // len(dbias)
        outputs = (first_pair + pairs - 1) // per_output - first_pair // per_output + 1
        arguments = {"stored": stored, "dbias": Bias(dbias, *dbias.stride()), "bounds": self.tensors["bounds"]}
        arguments |= {"T": self.longest, "B": self.batch, "first_pair": first_pair, "pairs": pairs}
        programs = math.prod(triton.cdiv(self.longest, size) for size in STORED_BIAS.values()) * outputs
        options = {"EVEN": self.even(STORED_BIAS), **STORED_BIAS, "num_warps": 4}
        stored_bias_kernel[(programs,)](**arguments, per_output=per_output, **options)


def _rows(x: Tensor) -> HeadRows:
    return HeadRows(x, *x.stride())


def _row_values(x: Tensor) -> RowValues:
    return RowValues(x, *x.stride()[:2])


def _token_values(x: Tensor) -> TokenValues:
    return TokenValues(x, *x.stride())


def _untied(pos_q, pos_k, theta) -> Untied | None:
    return None if pos_q is None else Untied(pos_q, pos_k, theta, pos_q.shape[1])


@torch.library.custom_op("fastbert_kernels::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    theta: Tensor | None,
    relative: Tensor | None,
    bounds: Tensor | None,
    key_padding: Tensor | None,
    segments: Tensor | None,
    keys: Tensor | None,
    scale: float,
    dropout_p: float,
    longest: int,
) -> tuple[Tensor, Tensor]:
    """The forward kernel.

    Args:
        q, k, v: [B, H, T, K], any strides.
        bias: [1 or B, H, T, T]; or, instead of it,
        pos_q, pos_k: [H, P, K], contiguous, of q's dtype, P at least the length of the longest sequence, with
        theta: float32 [H, 2], contiguous, and
        relative: float32 [H, 2 P - 1], contiguous, or None.
        bounds: int32 [sequences + 1], the start of each packed sequence and the end of the last.
        key_padding: bool [B, T], False for masked keys; not with `bounds`.
        segments: integers [B, T]; a query attends to keys of its segment; not with `bounds`.
        keys: int32 [B or sequences], hashed keys of the dropout.
        scale: factor of the products.
        dropout_p: dropout probability.
        longest: length of the longest sequence, with `bounds`.

    Returns:
        O, with q's order of strides; L, float32 [B, H, T].
    """
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    untied = _untied(pos_q, pos_k, theta)
    call = _Launches(q, bias, untied, relative, bounds, key_padding, segments, keys, scale, dropout_p, longest)
    with torch.cuda.device_of(q):  # Triton launches on the current device, and tiles are selected for it
        call.by_blocks("forward", "M", q=_rows(q), k=_rows(k), v=_rows(v), out=_rows(out), lse=_row_values(lse))
    return out, lse


@attention_forward.register_fake
def _(q, *more):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("fastbert_kernels::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    theta: Tensor | None,
    relative: Tensor | None,
    bounds: Tensor | None,
    key_padding: Tensor | None,
    segments: Tensor | None,
    keys: Tensor | None,
    scale: float,
    dropout_p: float,
    longest: int,
    bias_required: bool,
) -> list[Tensor]:
    """dQ, dK, dV, and if `bias_required` the gradient of the bias or of those of its four components that are given."""
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    untied = _untied(pos_q, pos_k, theta)
    call = _Launches(q, bias, untied, relative, bounds, key_padding, segments, keys, scale, dropout_p, longest)
    delta = torch.empty_like(lse)
    common = {"q": _rows(q), "k": _rows(k), "v": _rows(v), "do": _rows(grad), "lse": _row_values(lse)}
    common["delta"] = _row_values(delta)
    with torch.cuda.device_of(q):
        if not call.short:
            block = {"BLOCK_M": 32, "BLOCK_K": call.block_k}
            programs = triton.cdiv(q.shape[2], 32) * q.shape[0] * q.shape[1]
            sizes = {"T": q.shape[2], "H": call.heads, "K": call.head_size}
            delta_kernel[(programs,)](_rows(out), _rows(grad), _row_values(delta), **sizes, **block)
        pairs, columns = call.stored_group(q.element_size(), bias_required)
        if pairs:
            dbias = None
            if bias_required:
                dbias = torch.empty(bias.shape, dtype=torch.float32, device=q.device)
            call.stored_backward(pairs, columns, dq, dk, dv, dbias, common)
            return [dq, dk, dv, *([] if dbias is None else [dbias.to(bias.dtype)])]
        every = {"stored": None, "first_pair": 0}
        if call.short:
            call.by_blocks("short", "N", **common, dq=_rows(dq), dk=_rows(dk), dv=_rows(dv), **every)
        else:
            call.by_blocks("keys", "N", **common, dk=_rows(dk), dv=_rows(dv), **every)
            call.by_blocks("queries", "M", **common, dq=_rows(dq))
        if not bias_required:
            return [dq, dk, dv]
        if bias is not None:
            whole = call.bias_gradient(len(bias), 0, call.longest, q.device, **common)
            return [dq, dk, dv, whole.to(bias.dtype)]
        return [dq, dk, dv, *_component_gradients(call, pos_q, pos_k, theta, relative, scale, q.device, common)]


def _component_gradients(call: _Launches, pos_q, pos_k, theta, relative, scale: float, device, common) -> list[Tensor]:
    """Gradients of the bias's components, from stripes of the bias's gradient."""
    wide = [x.float() for x in (pos_q, pos_k)]
    sums = [torch.zeros_like(x, dtype=torch.float32) for x in (pos_q, pos_k, theta, relative) if x is not None]
    length = call.longest
    step = max(128, STRIPE_CELLS // (call.heads * length) // 128 * 128)
    for first in range(0, length, step):
        rows = min(step, length - first)
        stripe = call.bias_gradient(1, first, rows, device, **common)[0]  # [H, rows, T]
        if first == 0:
            sums[2][:, 0] = stripe[:, 0].sum(1)
            stripe[:, 0] = 0.0
        sums[2][:, 1] += stripe[:, :, 0].sum(1)
        stripe[:, :, 0] = 0.0
        sums[0][:, first : first + rows] = scale * stripe @ wide[1][:, :length]
        sums[1][:, :length] += scale * stripe.transpose(1, 2) @ wide[0][:, first : first + rows]
        if relative is not None:
            add_diagonals(sums[3], stripe, first)
    components = [x for x in (pos_q, pos_k, theta, relative) if x is not None]
    return [total.to(x.dtype) for total, x in zip(sums, components, strict=True)]


@attention_backward.register_fake
def _(grad, out, lse, q, k, v, bias, pos_q, pos_k, theta, relative, *more):
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    if more[-1]:
        of_bias = [torch.empty_like(x) for x in (pos_q, pos_k, theta, relative) if x is not None]
        if bias is not None:
            of_bias = [torch.empty_like(bias, memory_format=torch.contiguous_format)]
        gradients += of_bias
    return gradients


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.dropout_p, ctx.longest = inputs
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx, grad, _):
    out, lse, *tensors = ctx.saved_tensors
    required = any(ctx.needs_input_grad[3:8])
    dq, dk, dv, *of_bias = attention_backward(grad, out, lse, *tensors, ctx.scale, ctx.dropout_p, ctx.longest, required)
    gradients = [None] * 5  # of the bias and its components
    if required:
        indices = [0] if tensors[3] is not None else [i for i in range(1, 5) if tensors[3 + i] is not None]
        for i, value in zip(indices, of_bias, strict=True):
            gradients[i] = value if ctx.needs_input_grad[3 + i] else None
    return dq, dk, dv, *gradients, *[None] * 7


attention_forward.register_autograd(_backward, setup_context=_setup)


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    key_padding: Tensor | None = None,
    segments: Tensor | None = None,
    scale: float,
    dropout_p: float = 0.0,
    keys: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Attention by the Triton kernels on any device (on a CPU with TRITON_INTERPRET=1)."""
    longest = bias.shape[2] if bias is not None else max_seqlen or q.shape[2]
    if bias is not None:
        bias = bias.expand(-1, q.shape[1], -1, -1)
    untied = (None, None, None, None)
    masks = (cu_seqlens, key_padding, segments)
    return attention_forward(q, k, v, bias, *untied, *masks, keys, scale, dropout_p, longest)[0]
