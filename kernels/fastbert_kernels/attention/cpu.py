"""Exact attention on a CPU: plain products and softmax, chunk by chunk in the cache, with a custom backward pass.

The softmax computes powers of 2 without subtracting the largest score first. This is exact as long as the sums stay far
from the limits of float32, which is checked afterwards; other chunks are recomputed with the largest score subtracted.
A training step saves one matrix of probabilities, negative where dropout dropped them. Where that matrix would be too
large, nothing is saved and the backward pass recomputes it.

Shapes: B batch, H heads, T tokens, K head size. Matrices as in docs/kernels.md: S scores, P probabilities.
"""

import math
import platform
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert_kernels.attention.cpu_chunks import Chunk, ChunkPlan, Packing, chunk_plan
from fastbert_kernels.attention.reference import attention_reference, dropout_row_keys
from fastbert_kernels.hashing import GOLDEN, LIGHT, combine, threshold

SAVED_BYTES = 1 << 30
"""Probabilities of one call above this size are not saved, but recomputed in the backward pass."""
RANGE = (2.0**-60, 2.0**60)
"""Range of the sums of powers of 2 within which the result is as exact as with the largest score subtracted."""
SHORT = 1 << 16
"""Minimum number of scores of a float32 matrix to compute by chunks without gradients: for smaller ones copies cost
more than chunks save."""
SINGLE = 1 << 18
"""Minimum number of scores of a float32 matrix whose products oneDNN computes, one matrix at a time. It uses AVX-512 on
every CPU, while MKL is limited to AVX2 on those of AMD; for smaller matrices the calls cost more than this saves
(docs/lab-notes.md)."""


@torch.compiler.disable  # compiling the unrolled chunks would take minutes
def cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *,
    cu_seqlens: Tensor | None,
    key_padding: Tensor | None,
    segments: Tensor | None,
    scale: float,
    dropout_p: float,
    keys: Tensor | None,
) -> Tensor:
    """`attention_reference` for checked tensors on a CPU.

    Arguments as there, but `scale` is required, and `keys` with dropout.

    Returns:
        [B, H, queries, K], differentiable once.
    """
    masks = {"cu_seqlens": cu_seqlens, "key_padding": key_padding, "segments": segments}
    with torch.autocast("cpu", enabled=False):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias)):
            return _Attention.apply(
                q, k, v, bias, _ChunkedCall(q, k, **masks, scale=scale, dropout_p=dropout_p, keys=keys)
            )
        if q.dtype == torch.float32 and cu_seqlens is not None and int(cu_seqlens.diff().max()) ** 2 < SHORT:
            return attention_reference(q, k, v, bias, **masks, scale=scale, dropout_p=dropout_p, keys=keys)
        bare = bias is None and dropout_p == 0 and all(x is None for x in masks.values())
        if q.dtype == torch.float32 and bare and q.shape[2] * k.shape[2] < SHORT:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        call = _ChunkedCall(q, k, **masks, scale=scale, dropout_p=dropout_p, keys=keys)
        return call.forward(q, k, v, bias, save=False)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: "_ChunkedCall") -> Tensor:
        ctx.call, ctx.save = call, call.cells * q.element_size() <= SAVED_BYTES
        out, matrices, probabilities = call.forward(q, k, v, bias, ctx.save)
        ctx.save_for_backward(bias, *matrices, *probabilities)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        bias, *saved = ctx.saved_tensors
        count = 3 * len(ctx.call.groups)
        with torch.autocast("cpu", enabled=False):
            gradients = ctx.call.backward(grad, bias, saved[:count], saved[count:], ctx.needs_input_grad)
        return *gradients, None


class _ChunkedCall:
    """The options of a call: groups of sequences of equal length, each with its chunks, scale and dropout."""

    def __init__(self, q, k, cu_seqlens, key_padding, segments, scale: float, dropout_p: float, keys) -> None:
        heads = q.shape[1]
        self.packing = None if cu_seqlens is None else Packing(cu_seqlens, heads)
        if self.packing is None:
            shapes = [(len(q), q.shape[2], k.shape[2], key_padding, slice(None))]
        else:
            shapes = self.packing.shapes()
        single = SINGLE if q.dtype == torch.float32 and _onednn() is not None else math.inf
        self.groups = []
        for batch, queries, length, padding, numbers in shapes:
            chunks = chunk_plan((batch, heads, queries, length), padding, segments, single)
            dropout = None
            if dropout_p and threshold(dropout_p) > threshold(0.0):
                dropout = _ChunkDropout(dropout_row_keys(keys[numbers], heads, queries), length, dropout_p)
            self.groups.append(_Group(chunks, scale, dropout, q.dtype))
        self.cells = sum(group.plan.cells for group in self.groups)

    def split(self, x: Tensor, gradient: bool = False) -> list[Tensor]:
        """The contiguous matrices [B H, T, K] of each group."""
        parts = [x] if self.packing is None else self.packing.split(x, gradient)
        return [part.contiguous().flatten(0, 1) for part in parts]

    def join(self, parts: list[Tensor], heads: int) -> Tensor:
        parts = [part.unflatten(0, (-1, heads)) for part in parts]
        return parts[0] if self.packing is None else self.packing.join(parts)

    def forward(self, q, k, v, bias, save: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The output; and for the backward pass q, k, v by group and, with `save`, the probabilities of the chunks."""
        matrices = [x for qkv in zip(*map(self.split, (q, k, v)), strict=True) for x in qkv]
        outs, saved = [], []
        for group, first in zip(self.groups, range(0, len(matrices), 3), strict=True):
            out, probabilities = group.forward(*matrices[first : first + 3], bias, save)
            outs.append(out)
            saved += probabilities
        return self.join(outs, q.shape[1]), matrices, saved

    def backward(self, grad, bias, matrices: list[Tensor], saved: list[Tensor], required) -> list[Tensor | None]:
        dbias = None
        if bias is not None and required[3]:
            dbias = torch.zeros(bias.shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        gradients, rest = [], iter(saved)
        for group, d_out, first in zip(self.groups, self.split(grad, True), range(0, len(matrices), 3), strict=True):
            probabilities = [next(rest, None) for _ in group.plan.chunks]
            tensors = matrices[first : first + 3]
            gradients.append(group.backward(d_out, *tensors, bias, probabilities, dbias, required))
        by_tensor = zip(*gradients, strict=True)
        joined = [None if parts[0] is None else self.join(parts, grad.shape[1]) for parts in by_tensor]
        return [*joined, None if dbias is None else dbias.to(bias.dtype)]


class _Work:
    """Named memory that the chunks of a pass reuse."""

    def __init__(self) -> None:
        self.flat: dict[str, Tensor] = {}
        self.views: dict[tuple, Tensor] = {}
        self.bias_part: tuple[slice, ...] | None = None
        """Heads, queries and keys of the bias in memory."""

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        key = name, dtype, *shape
        if key not in self.views:
            count = math.prod(shape)
            if name not in self.flat or len(self.flat[name]) < count * dtype.itemsize:
                self.flat[name] = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
            self.views[key] = self.flat[name][: count * dtype.itemsize].view(dtype).view(shape)
        return self.views[key]

    def times(self, name: str, a: Tensor, b: Tensor, alpha: float = 1.0, out: Tensor | None = None) -> Tensor:
        """The product alpha a b [N, I, L] of a [N, I, J] and b [N, J, L], written to `out` if given, else to memory
        `name`, or to new memory if `name` is empty."""
        if (
            a.dtype == torch.float32
            and len(a) == 1
            and a.shape[1] * max(a.shape[2], b.shape[2]) >= SINGLE
            and _onednn()
        ):
            result = self.single(a[0], b[0], alpha)[None]
        else:
            result = out
            if out is None or not out.is_contiguous():
                shape = (len(a), a.shape[1], b.shape[2])
                result = self(name, shape, a.dtype) if name else torch.empty(shape, dtype=a.dtype)
            torch.baddbmm(result, a, b, beta=0, alpha=alpha, out=result)
        return result if out is None or result is out else out.copy_(result)

    @staticmethod
    def single(a: Tensor, b: Tensor, alpha: float) -> Tensor:
        """The product alpha a b of float32 matrices by oneDNN."""
        if alpha != 1.0:  # scale the smaller one
            a, b = (a * alpha, b) if a.numel() < b.numel() else (a, b * alpha)
        if a.stride(1) == 1:
            return _onednn()(a, b.t())
        return _onednn()(b.t().contiguous(), a).t()  # oneDNN would copy a


class _ChunkDropout:
    """Dropout of a chunk with the hash of `keep_mask`."""

    def __init__(self, row_keys: Tensor, columns: int, p: float) -> None:
        self.row_keys, self.threshold, self.scale = row_keys, threshold(p), 1.0 / (1.0 - p)
        self.columns = combine(torch.arange(columns, dtype=torch.int32), 0)

    def keep(self, p: Tensor, chunk: Chunk, work: _Work) -> Tensor:
        """A copy of `p` [rows, H, queries, keys] with zeros for dropped cells."""
        words, other = (work(name, p.shape, torch.int32) for name in ("words", "shifted"))
        rows = self.row_keys[chunk.rows, chunk.heads, chunk.queries, None]
        torch.bitwise_xor(rows, self.columns[chunk.keys], out=words).mul_(GOLDEN)
        torch.bitwise_right_shift(words, 15, out=other)
        words.bitwise_xor_(other.bitwise_and_(0x1FFFF)).mul_(LIGHT)
        # The fastest selection on a CPU copies numbers where others exceed a threshold; here both are integers.
        bits = torch.int32 if p.dtype == torch.float32 else torch.int64
        retained = work("retained", p.shape, bits)
        torch.ops.aten.threshold_backward(p.view(bits), words.to(bits), self.threshold - 1, grad_input=retained)
        return retained.view(p.dtype)


class _Group:
    """Attention of sequences of equal length; q, k, v, the output and the gradients are contiguous matrices [B H, T,
    K]."""

    def __init__(self, plan: ChunkPlan, scale: float, dropout: _ChunkDropout | None, dtype: torch.dtype) -> None:
        self.plan, self.scale, self.dropout = plan, scale, dropout
        self.dtype, self.wide = dtype, torch.promote_types(dtype, torch.float32)
        self.exact = [False] * len(plan.chunks)
        """Flags of the chunks: whether the largest scores are subtracted."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, save: bool) -> tuple[Tensor, list[Tensor]]:
        """The output, and with `save` the signed probabilities of each chunk."""
        work, saved = _Work(), [None] * len(self.plan.chunks)
        out = torch.empty(*q.shape[:2], v.shape[2], dtype=self.dtype)
        sums = torch.empty(q.shape[0] * q.shape[1], dtype=self.wide)
        sums_of = sums.split([math.prod(chunk.shape[:3]) for chunk in self.plan.chunks])
        scale = 1.0 if self.dropout is None else -self.dropout.scale

        def run(number: int) -> None:
            chunk = self.plan.chunks[number]
            signed, used = self.probabilities(q, k, bias, number, work, save, sums_of[number])
            saved[number] = signed if save else None
            work.times("o", used, v[chunk.matrices, chunk.keys], scale, out[chunk.matrices, chunk.queries])

        for number in range(len(saved)):
            run(number)
        least, most = (float(x) for x in sums.aminmax())
        if not RANGE[0] <= least <= most <= RANGE[1]:
            for number, chunk in enumerate(self.plan.chunks):
                if not _in_range(chunk, sums_of[number]):
                    self.exact[number] = True
                    run(number)
        return out, saved if save else []

    def probabilities(
        self, q: Tensor, k: Tensor, bias: Tensor | None, number: int, work: _Work, keep: bool, sums: Tensor
    ) -> tuple[Tensor, Tensor]:
        """P of a chunk [rows H, queries, keys], negative where dropped, and the factor of V: P without dropout, else
        -P, with 0 for dropped cells. With `keep` the first is in new memory."""
        chunk = self.plan.chunks[number]
        narrow = self.dtype != self.wide
        columns = k[chunk.matrices, chunk.keys].mT
        s = work.times("" if keep else "s", q[chunk.matrices, chunk.queries], columns, self.scale / math.log(2))
        p = s
        if narrow:
            s = work("wide", s.shape, self.wide).copy_(s)
        cells = s.view(chunk.shape)
        if bias is not None:
            cells.add_(self.bias(bias, chunk, work))
        if self.exact[number]:
            if chunk.allowed is not None:
                cells.masked_fill_(~chunk.allowed, torch.finfo(s.dtype).min)
            s.sub_(s.amax(-1, keepdim=True))
        s.exp2_()
        if chunk.allowed is not None:
            cells.mul_(work("allowed", chunk.allowed.shape, self.wide).copy_(chunk.allowed))
        sums = torch.sum(s, -1, keepdim=True, out=sums.view(*s.shape[:2], 1))
        factor = sums.clamp_min(torch.finfo(s.dtype).tiny).reciprocal_()
        if self.dropout is None:
            s.mul_(factor)
            return (p.copy_(s),) * 2 if narrow else (s, s)
        used = self.dropout.keep(cells.mul_(factor.neg_().view(*chunk.shape[:3], 1)), chunk, work).view(s.shape)
        s.add_(used, alpha=-2.0)
        return (p.copy_(s), work("used", s.shape, self.dtype).copy_(used)) if narrow else (s, used)

    def bias(self, bias: Tensor, chunk: Chunk, work: _Work) -> Tensor:
        """The chunk's part of the bias, times log2 e."""
        values = _chunk_of_bias(bias, chunk)
        scaled = work("bias", values.shape, self.wide)
        part = chunk.heads, chunk.queries, chunk.keys
        if len(bias) > 1 or work.bias_part != part:
            scaled.copy_(values).mul_(1 / math.log(2))
            work.bias_part = part
        return scaled

    def backward(
        self, grad, q, k, v, bias, saved: list[Tensor | None], dbias: Tensor | None, required
    ) -> list[Tensor | None]:
        """dQ, dK, dV where required; adds the gradient of the bias to `dbias` [1 or B, 1 or H, queries, T]."""
        work = _Work()
        scale = 1.0 if self.dropout is None else self.dropout.scale
        dq = torch.empty_like(q) if required[0] else None
        dk, dv = (self.total(x) if needed else None for x, needed in zip((k, v), required[1:], strict=False))
        for number, chunk in enumerate(self.plan.chunks):
            q_, k_, v_ = q[chunk.matrices, chunk.queries], k[chunk.matrices, chunk.keys], v[chunk.matrices, chunk.keys]
            p = saved[number]
            if p is None:
                sums = work("sums", chunk.shape[:3], self.wide)
                p, _ = self.probabilities(q, k, bias, number, work, False, sums)
            used, do = p, grad[chunk.matrices, chunk.queries]
            dp = work.times("dp", do, v_.mT, scale)
            if self.dropout is not None:
                used = torch.clamp(p, min=0.0, out=work("used", p.shape, p.dtype))
                torch.ops.aten.threshold_backward(dp, p, 0.0, grad_input=dp)
                p = torch.abs(p, out=work("abs", p.shape, p.dtype))
            if dv is not None:
                self.add(dv[chunk.matrices, chunk.keys], used.mT, do, scale, work)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype, grad_input=dp)
            if dbias is not None:
                _add_bias(_chunk_of_bias(dbias, chunk), ds.view(chunk.shape), work)
            if dq is not None:
                work.times("dq", ds, k_, self.scale, dq[chunk.matrices, chunk.queries])
            if dk is not None:
                self.add(dk[chunk.matrices, chunk.keys], ds.mT, q_, self.scale, work)
        return [None if x is None else x.to(self.dtype) for x in (dq, dk, dv)]

    def total(self, x: Tensor) -> Tensor:
        """Memory for a gradient: written once if chunks are whole, else zeros in at least float32 to which chunks
        add."""
        return torch.empty_like(x) if self.plan.whole else torch.zeros_like(x, dtype=self.wide)

    def add(self, total: Tensor, a: Tensor, b: Tensor, alpha: float, work: _Work) -> None:
        if self.plan.whole:
            work.times("gradient", a, b, alpha, total)
        else:
            total.add_(work.times("gradient", a, b, alpha))


def _chunk_of_bias(bias: Tensor, chunk: Chunk) -> Tensor:
    """The chunk's part [1 or rows, 1 or H, queries, keys] of a tensor with the shape of the bias."""
    rows, heads = (slice(None) if bias.shape[i] == 1 else part for i, part in enumerate((chunk.rows, chunk.heads)))
    return bias[rows, heads, chunk.queries, chunk.keys]


def _add_bias(total: Tensor, ds: Tensor, work: _Work) -> None:
    """Add dS [rows, H, queries, keys] to `total` [1 or rows, 1 or H, queries, keys]."""
    if summed := [i for i in (0, 1) if total.shape[i] < ds.shape[i]]:
        # `sum` with a dtype would cast into new memory, which costs more than the sum itself.
        wide = ds if ds.dtype == total.dtype else work("wide", ds.shape, total.dtype).copy_(ds)
        ds = torch.sum(wide, summed, keepdim=True, out=work("sum of dS", total.shape, total.dtype))
    total.add_(ds)


def _in_range(chunk: Chunk, sums: Tensor) -> bool:
    """Report whether the sums of all queries with at least one allowed key are in RANGE."""
    sums = sums.view(chunk.shape[:3])
    valid = (sums >= RANGE[0]) & (sums <= RANGE[1])
    if chunk.allowed is not None:
        valid |= ~chunk.allowed.any(-1)
    return bool(valid.all())


@cache
def _onednn() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Function of x [I, J] and w [L, J] that returns x w^T in float32; None where this build of PyTorch lacks it."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default
        operator(torch.ones(2, 3), torch.ones(4, 3), None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return lambda x, w: operator(x, w, None, "none", [], "")
