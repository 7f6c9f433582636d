"""Exact attention on a CPU: plain products and softmax, chunk by chunk in the cache, with a backward pass of its own.

The softmax takes powers of 2 without subtracting the largest score first. That is exact as long as the sums stay far
from the ends of float32, which is looked up afterwards; chunks where they do not are computed again the usual way. What
a training step keeps is one matrix of probabilities, whose signs say what dropout dropped, or nothing where that would be
too large: then the backward pass computes it again.

Shapes: B batch, H heads, T tokens, K head size. Letters of matrices as in docs/kernels.md: S scores, P probabilities.
"""

import functools
import math
import platform
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbert_kernels.attention import dropout_row_keys
from fastbert_kernels.cpu_plan import Chunk, Packing, Plan, plan
from fastbert_kernels.hashing import GOLDEN, LIGHT, combine, threshold

SAVED_BYTES = 256 << 20
"""Probabilities of one call beyond this are computed again in the backward pass."""
RANGE = (2.0**-60, 2.0**60)
"""Sums of powers of 2 within it are as exact as with the largest score subtracted."""
ONEDNN_SIZE = 1 << 22
"""Multiplications from which on a float32 product of two matrices is made by oneDNN, which has AVX-512 for every CPU;
MKL keeps AMD's to AVX2. Below, a batched product saves more."""


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

    Args as there, but `scale` is given, and so are `keys` if there is dropout.

    Returns:
        [B, H, queries, K], laid out as [B, queries, H, K]. Its gradients can be taken once.
    """
    call = _Call(q, k, bias, cu_seqlens, key_padding, segments, scale, dropout_p, keys)
    with torch.autocast("cpu", enabled=False):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias)):
            return _Attention.apply(q, k, v, bias, call)
        return call.forward(q, k, v, bias, save=False)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: "_Call") -> Tensor:
        out, saved = call.forward(q, k, v, bias, save=call.cells * q.element_size() <= SAVED_BYTES)
        ctx.save_for_backward(q, k, v, bias, *saved)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, bias, *saved = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            return *ctx.call.backward(grad, q, k, v, bias, saved, ctx.needs_input_grad), None


class _Call:
    """What a call is given besides its tensors, as groups of sequences of equal length."""

    def __init__(self, q, k, bias, cu_seqlens, key_padding, segments, scale, dropout_p, keys) -> None:
        self.packing = None if cu_seqlens is None else Packing(cu_seqlens)
        single = q.dtype == torch.float32 and _onednn() is not None
        if self.packing is None:
            found = [(q.shape[0], q.shape[2], k.shape[2], key_padding, slice(None))]
        else:
            groups = zip(self.packing.groups, self.packing.padding(), strict=True)
            found = [(len(numbers), length, length, padding, numbers) for (length, numbers), padding in groups]
        self.groups = []
        for batch, queries, length, padding, numbers in found:
            chunks = plan((batch, q.shape[1], queries, length), padding, segments, single)
            dropout = None
            if dropout_p and threshold(dropout_p) > -(2**31):
                dropout = _Dropout(dropout_row_keys(keys[numbers], q.shape[1], queries), length, dropout_p)
            self.groups.append(_Group(chunks, scale, dropout, q.dtype))
        self.cells = sum(group.plan.cells for group in self.groups)

    def split(self, x: Tensor, gradient: bool = False) -> list[Tensor]:
        return [x] if self.packing is None else list(self.packing.split(x, gradient))

    def join(self, parts: list[Tensor]) -> Tensor:
        return parts[0] if self.packing is None else self.packing.join(parts)

    def forward(self, q, k, v, bias, save: bool) -> tuple[Tensor, list[Tensor]]:
        outs, saved = [], []
        for group, *qkv in zip(self.groups, *(self.split(x) for x in (q, k, v)), strict=True):
            out, kept = group.forward(*qkv, bias, save)
            outs.append(out)
            saved += kept
        return self.join(outs), saved

    def backward(self, grad, q, k, v, bias, saved: list[Tensor], wanted) -> list[Tensor | None]:
        wide = torch.promote_types(q.dtype, torch.float32)
        dbias = None if bias is None or not wanted[3] else torch.zeros(bias.shape, dtype=wide)
        parts = []
        rest = iter(saved)
        tensors_of = self.split(grad, gradient=True), *(self.split(x) for x in (q, k, v))
        for group, *tensors in zip(self.groups, *tensors_of, strict=True):
            own = [next(rest, None) for _ in group.plan.chunks]
            parts.append(group.backward(*tensors, bias, own, dbias, wanted))
        made = [None if part[0] is None else self.join(list(part)) for part in zip(*parts, strict=True)]
        return [*made, None if dbias is None else dbias.to(bias.dtype)]


class _Dropout:
    """The hash of `keep_mask`, for some cells at a time."""

    def __init__(self, row_keys: Tensor, columns: int, p: float) -> None:
        self.row_keys, self.threshold, self.scale = row_keys, threshold(p), 1.0 / (1.0 - p)
        self.columns = combine(torch.arange(columns, dtype=torch.int32), 0)

    def keep(self, p: Tensor, chunk: Chunk, work: "_Work") -> Tensor:
        """`p` [rows, H, queries, keys] with zeros where cells are dropped."""
        words, other = (work(name, p.shape, torch.int32) for name in ("words", "shifted"))
        rows = self.row_keys[chunk.rows, chunk.heads, chunk.queries, None]
        torch.bitwise_xor(rows, self.columns[chunk.keys], out=words)
        words.mul_(GOLDEN)
        torch.bitwise_right_shift(words, 15, out=other)
        words.bitwise_xor_(other.bitwise_and_(0x1FFFF)).mul_(LIGHT)
        # The fastest selection there is on a CPU copies numbers where others exceed a bound; both are int32 here.
        kept = work("kept", p.shape, p.dtype)
        bits = torch.int32 if p.dtype == torch.float32 else torch.int64
        torch.ops.aten.threshold_backward(p.view(bits), words.to(bits), self.threshold - 1, grad_input=kept.view(bits))
        return kept


class _Work:
    """Memory that the chunks of a pass use one after the other, by name, and what is written to it."""

    def __init__(self) -> None:
        self.flat: dict[tuple[str, torch.dtype], Tensor] = {}
        self.bias: tuple[tuple[slice, slice], Tensor] | None = None
        """The bias that chunks one after the other share."""

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        flat = self.flat.get((name, dtype))
        if flat is None or len(flat) < count:
            flat = self.flat[name, dtype] = torch.empty(count, dtype=dtype)
        return flat[:count].view(shape)

    def load(self, name: str, x: Tensor, chunk: Chunk, tokens: slice) -> Tensor:
        """A chunk's part of x [B, H, T, K], as contiguous matrices [rows H, tokens, K]."""
        part = x[chunk.rows, chunk.heads, tokens]
        if not part.is_contiguous():
            part = self(name, part.shape, part.dtype).copy_(part)
        return part.flatten(0, 1)

    def times(self, name: str, a: Tensor, b: Tensor, alpha: float = 1.0, out: Tensor | None = None) -> Tensor:
        """alpha a b for matrices a [N, I, J] and b [N, J, L], in `out` [N, I, L] if given, in new memory without `name`."""
        size = math.prod(a.shape) * b.shape[2]
        if a.dtype == torch.float32 and len(a) == 1 and size >= ONEDNN_SIZE and (linear := _onednn()) is not None:
            if alpha != 1.0:  # on the smaller operand
                a, b = (a * alpha, b) if b.shape[2] > a.shape[2] else (a, b * alpha)
            if a.stride(2) == 1:
                made = linear(a[0], b[0].t())
            else:  # oneDNN would copy a large matrix
                made = linear(b[0].t().contiguous(), a[0]).t()
            return made[None] if out is None else out.copy_(made[None])
        if out is None:
            shape = (len(a), a.shape[1], b.shape[2])
            out = self(name, shape, a.dtype) if name else torch.empty(shape, dtype=a.dtype)
        return torch.baddbmm(out, a, b, beta=0, alpha=alpha, out=out)


class _Group:
    """Attention of sequences of equal length."""

    def __init__(self, plan: Plan, scale: float, dropout: _Dropout | None, dtype: torch.dtype) -> None:
        self.plan, self.scale, self.dropout = plan, scale, dropout
        self.dtype, self.wide = dtype, torch.promote_types(dtype, torch.float32)
        self.exact = [False] * len(plan.chunks)
        """Of which chunks the largest scores are subtracted."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, save: bool) -> tuple[Tensor, list[Tensor]]:
        """The output, and if they are to be saved the signed probabilities of each chunk."""
        work, saved = _Work(), [None] * len(self.plan.chunks)
        batch, heads, queries, _ = q.shape
        out = torch.empty(batch, queries, heads, v.shape[3], dtype=self.dtype).transpose(1, 2)
        sums = torch.empty(batch * heads * queries, dtype=self.wide)
        sums_of = sums.split([math.prod(chunk.shape[:3]) for chunk in self.plan.chunks])
        scale = 1.0 if self.dropout is None else -self.dropout.scale

        def run(number: int) -> None:
            chunk = self.plan.chunks[number]
            signed, used = self.probabilities(q, k, bias, number, work, save, sums_of[number])
            saved[number] = signed if save else None
            made = work.times("o", used.flatten(0, 1), work.load("v", v, chunk, chunk.keys), scale)
            out[chunk.rows, chunk.heads, chunk.queries] = made.view(*chunk.shape[:3], -1)

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
        self,
        q: Tensor,
        k: Tensor,
        bias: Tensor | None,
        number: int,
        work: _Work,
        keep: bool,
        sums: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """P of a chunk [rows, H, queries, keys], negative where dropped, and what V is multiplied by: P without dropout,
        else -P where it is kept and 0 elsewhere. With `keep` the first is memory of its own."""
        chunk = self.plan.chunks[number]
        matrices = (chunk.shape[0] * chunk.shape[1], *chunk.shape[2:])
        narrow = self.dtype != self.wide
        own = torch.empty(matrices, dtype=self.dtype) if keep and narrow else None
        rows = work.load("q", q, chunk, chunk.queries)
        columns = work.load("k", k, chunk, chunk.keys)
        s = work.times("s" if narrow or not keep else "", rows, columns.mT, self.scale / math.log(2), own)
        if narrow:
            s = work("s", matrices, self.wide).copy_(s)
        s = s.view(chunk.shape)
        if bias is not None:
            s.add_(self.bias(bias, chunk, work))
        if self.exact[number]:
            if chunk.allowed is not None:
                s.masked_fill_(~chunk.allowed, torch.finfo(s.dtype).min)
            s.sub_(s.amax(-1, keepdim=True))
        s.exp2_()
        if chunk.allowed is not None:
            s.mul_(work("allowed", chunk.allowed.shape, self.wide).copy_(chunk.allowed))
        sums = work("sums", chunk.shape[:3], self.wide) if sums is None else sums.view(chunk.shape[:3])
        factor = torch.sum(s, -1, out=sums).clamp_min(torch.finfo(s.dtype).tiny).reciprocal_()[..., None]
        if self.dropout is None:
            s.mul_(factor)
            p = (work("p", matrices, self.dtype) if own is None else own).view(chunk.shape).copy_(s) if narrow else s
            return p, p
        used = self.dropout.keep(s.mul_(factor.neg_()), chunk, work)
        s.add_(used, alpha=-2.0)
        if not narrow:
            return s, used
        p = (work("p", matrices, self.dtype) if own is None else own).view(chunk.shape).copy_(s)
        return p, work("used", chunk.shape, self.dtype).copy_(used)

    def bias(self, bias: Tensor, chunk: Chunk, work: _Work) -> Tensor:
        """A chunk's part, times log2 e."""
        rows, heads = (slice(None) if bias.shape[i] == 1 else part for i, part in enumerate((chunk.rows, chunk.heads)))
        place = (heads, chunk.queries)
        if len(bias) > 1 or work.bias is None or work.bias[0] != place:
            part = bias[rows, heads, chunk.queries]
            work.bias = place, work("bias", part.shape, self.wide).copy_(part).mul_(1 / math.log(2))
        return work.bias[1][..., chunk.keys]

    def backward(
        self, grad, q, k, v, bias, saved: list[Tensor | None], dbias: Tensor | None, wanted
    ) -> list[Tensor | None]:
        """dQ, dK, dV where wanted; adds the gradient of the bias to `dbias` [1 or B, 1 or H, queries, T]."""
        work, whole = _Work(), self.plan.whole
        scale = 1.0 if self.dropout is None else self.dropout.scale
        dq = torch.empty(q.shape, dtype=self.dtype) if wanted[0] else None
        # Sums over blocks of queries, in at least float32.
        make = (
            functools.partial(torch.empty, dtype=self.dtype)
            if whole
            else functools.partial(torch.zeros, dtype=self.wide)
        )
        dk, dv = make(k.shape) if wanted[1] else None, make(v.shape) if wanted[2] else None
        in_wide = dbias is not None and bias.dtype == self.wide != self.dtype
        for number, chunk in enumerate(self.plan.chunks):
            p = saved[number]
            if p is None:
                p, _ = self.probabilities(q, k, bias, number, work, keep=False)
            used = p = p.flatten(0, 1)
            do = work.load("do", grad, chunk, chunk.queries)
            dp = work.times("dp", do, work.load("v", v, chunk, chunk.keys).mT, scale)
            if self.dropout is not None:
                used = torch.clamp(p, min=0.0, out=work("used", p.shape, p.dtype))
                torch.ops.aten.threshold_backward(dp, p, 0.0, grad_input=dp)
                p = torch.abs(p, out=work("abs", p.shape, p.dtype))
            if dv is not None:
                _add(dv, chunk, chunk.keys, whole, work, used.mT, do, scale)
            if in_wide:
                dp, p = (work(f"{name} wide", x.shape, self.wide).copy_(x) for name, x in (("dp", dp), ("p", p)))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype, grad_input=dp)
            if dbias is not None:
                _add_bias(dbias, chunk, ds.view(chunk.shape))
            ds = work("ds", ds.shape, self.dtype).copy_(ds) if in_wide else ds
            if dq is not None:
                _add(dq, chunk, chunk.queries, whole, work, ds, work.load("k", k, chunk, chunk.keys), self.scale)
            if dk is not None:
                _add(dk, chunk, chunk.keys, whole, work, ds.mT, work.load("q", q, chunk, chunk.queries), self.scale)
        return [None if x is None else x.to(self.dtype) for x in (dq, dk, dv)]


def _add(
    total: Tensor, chunk: Chunk, tokens: slice, whole: bool, work: _Work, a: Tensor, b: Tensor, alpha: float
) -> None:
    """Adds alpha a b to a chunk's part of `total` [B, H, T, K], or writes it where it is all there is."""
    part = total[chunk.rows, chunk.heads, tokens]
    if whole:
        work.times("", a, b, alpha, part.flatten(0, 1))
    else:
        made = work.times("gradient", a, b, alpha).view(part.shape)
        part.add_(made) if total.dtype != a.dtype or tokens is chunk.keys else part.copy_(made)


def _add_bias(total: Tensor, chunk: Chunk, ds: Tensor) -> None:
    rows, heads = (slice(None) if total.shape[i] == 1 else part for i, part in enumerate((chunk.rows, chunk.heads)))
    part = total[rows, heads, chunk.queries, chunk.keys]
    if total.shape[1] == 1 < ds.shape[1]:
        ds = ds.sum(1, keepdim=True, dtype=total.dtype)
    for number, one in enumerate(ds):
        part[0 if len(part) == 1 else number].add_(one)


def _in_range(chunk: Chunk, sums: Tensor) -> bool:
    sums = sums.view(chunk.shape[:3])
    good = (sums >= RANGE[0]) & (sums <= RANGE[1])
    if chunk.allowed is not None:
        good |= ~chunk.allowed.any(-1)
    return bool(good.all())


@cache
def _onednn() -> Callable[[Tensor, Tensor], Tensor] | None:
    """x [I, J], w [L, J] -> x w^T in float32; None where this build of PyTorch has no such operator."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default
        operator(torch.ones(2, 3), torch.ones(4, 3), None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return lambda x, w: operator(x, w, None, "none", [], "")
