"""What the attention kernels share: how their tensors are handed over, and the tile of scores [M, N] all of them make.

Shapes: B batch (or sequences), H heads, T queries and keys (of the longest sequence), K head size, M queries and N
keys of a tile. Sequences packed one after the other are a B of 1 with their bounds [sequences + 1]; places, and with
them the bias, are by sequence.

A group of tensors that a call does not have is None, and its code is not compiled. None is always an argument of its
own, never a field of a group: Triton 3.6 cannot compare such a field with None.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastbert_kernels.triton_common import LOG2E, combine, light_mix, lowered, product


class HeadRows(NamedTuple):
    """A tensor [B, H, T, K]: where it is, and its strides."""

    at: Any
    b: Any
    h: Any
    t: Any
    k: Any


class Numbers(NamedTuple):
    """A tensor [B, H, T], contiguous in T."""

    at: Any
    b: Any
    h: Any


class Bias(NamedTuple):
    """[1 or B, H, T, T], added to the scores; the stride of a dimension of one is 0."""

    at: Any
    b: Any
    h: Any
    m: Any
    n: Any


class Untied(NamedTuple):
    """TUPE's bias by its parts, by place: scale q k^T without the first row and column, `theta` there."""

    q: Any
    """[H, P, K], contiguous."""
    k: Any
    theta: Any
    """float32 [H, 2]: of the first query with every key, of every other query with the first key."""
    count: Any
    """P."""


class Cells(NamedTuple):
    """A tensor [B, T] that says which keys a query may see, and its strides."""

    at: Any
    b: Any
    t: Any


class KernelDropout(NamedTuple):
    keys: Any
    """int32 [B]."""
    limit: Any
    """A cell is kept if its hash is at least this."""
    scale: Any


@triton.jit
def sequence(bounds, b, T):
    """Of sequence b: the row of the tensors it lies in, where it starts there, and its length."""
    if bounds is None:
        row, start, length = b.to(tl.int64), b.to(tl.int64) * 0, b * 0 + T
    else:
        begin = tl.load(bounds + b)
        row, start, length = b.to(tl.int64) * 0, begin.to(tl.int64), tl.load(bounds + b + 1) - begin
    return row, start, length


@triton.jit
def part(x, row, h, start):
    """Where a head's part of a sequence begins in a tensor of `HeadRows`."""
    return x.at + row * x.b + h.to(tl.int64) * x.h + start * x.t


@triton.jit
def load_rows(at, x, offsets, columns, length, K: tl.constexpr, EVEN: tl.constexpr):
    """[offsets, columns] of a part of `x`, zeros beyond `length` rows (unless EVEN: there are none) and K columns."""
    place = at + offsets[:, None] * x.t + columns[None, :] * x.k
    if EVEN and columns.shape[0] == K:
        values = tl.load(place)
    elif EVEN:
        values = tl.load(place, mask=columns[None, :] < K, other=0.0)
    elif columns.shape[0] == K:
        values = tl.load(place, mask=offsets[:, None] < length, other=0.0)
    else:
        values = tl.load(place, mask=(offsets[:, None] < length) & (columns[None, :] < K), other=0.0)
    return values


@triton.jit
def store_rows(at, x, offsets, columns, length, values, K: tl.constexpr, UPCAST: tl.constexpr):
    inside = (offsets[:, None] < length) & (columns[None, :] < K)
    place = at + offsets[:, None] * x.t + columns[None, :] * x.k
    tl.store(place, lowered(values, x.at.dtype.element_ty, UPCAST), mask=inside)


@triton.jit
def load_numbers(x, row, h, start, offsets, length, other, EVEN: tl.constexpr):
    place = x.at + row * x.b + h * x.h + start + offsets
    if EVEN:
        values = tl.load(place)
    else:
        values = tl.load(place, mask=offsets < length, other=other)
    return values


@triton.jit
def load_places(at, h, offsets, columns, count, K: tl.constexpr):
    """[offsets, columns] of a head's place vectors; zeros for the first, whose scores are numbers of their own."""
    inside = (offsets[:, None] > 0) & (offsets[:, None] < count) & (columns[None, :] < K)
    return tl.load(at + (h * count + offsets[:, None]) * K + columns[None, :], mask=inside, other=0.0)


@triton.jit
def tile_scores(
    a, b, place_a, place_b, bias, untied, relative, padding, segments, sequence, h, m, n, length, scale,
    CHECKED: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """log2(e) times the scores of a tile, -inf where a key may not be seen: [M, N], or [N, M] where the products behind
    it want the keys first.

    Args:
        a, b: queries and keys [M, K] and [N, K], or keys and queries.
        place_a, place_b: with `untied`, what `load_places` gave for the same.
        relative: float32 [H, 2 P - 1], with `untied`: a number for each distance, by key - query + P - 1; or None.
        padding: `Cells` of int8, 0 for keys that nobody sees; or None.
        segments: `Cells` of int32 or int64, of which a query sees its own; or None.
        m, n: the places of the queries and the keys, [M, 1] and [1, N], or [1, M] and [N, 1].
        CHECKED: keys beyond the sequence's length are -inf too; elsewhere what they give is never used.
        EVEN: the tile lies within the sequence.
    """
    s = product(a, tl.trans(b), UPCAST)
    if untied is not None:
        s += product(place_a, tl.trans(place_b), UPCAST)
    s = s * (scale * LOG2E)
    if bias is not None:
        place = bias.at + sequence.to(tl.int64) * bias.b + h.to(tl.int64) * bias.h + (m * bias.m + n * bias.n)
        if EVEN:
            s += tl.load(place).to(tl.float32) * LOG2E
        else:
            s += tl.load(place, mask=(m < length) & (n < length), other=0.0).to(tl.float32) * LOG2E
    if untied is not None:
        first = untied.theta + h * 2
        beside = tl.where(n == 0, tl.load(first + 1), 0.0)
        if relative is not None:
            distance = n - m + untied.count - 1
            known = (distance >= 0) & (distance < 2 * untied.count - 1) & (n > 0)
            beside += tl.load(relative + h * (2 * untied.count - 1) + distance, mask=known, other=0.0)
        s += tl.where(m == 0, tl.load(first), beside) * LOG2E
    if CHECKED and not EVEN:
        s = tl.where(n < length, s, float("-inf"))
    if padding is not None:
        real = tl.load(padding.at + sequence * padding.b + n * padding.t, mask=n < length, other=0)
        s = tl.where(real != 0, s, float("-inf"))
    if segments is not None:
        start = segments.at + sequence * segments.b
        of_query = tl.load(start + m * segments.t, mask=m < length, other=0)
        of_key = tl.load(start + n * segments.t, mask=n < length, other=0)
        s = tl.where(of_query == of_key, s, float("-inf"))
    return s


@triton.jit
def kept_share(dropout, sequence, h, m, n):
    """What dropout multiplies a tile of probabilities with: 0 or 1 / (1 - p); m and n as in `tile_scores`."""
    rows = combine(combine(tl.load(dropout.keys + sequence), h), m)
    return tl.where(light_mix(rows, combine(n, 0)) >= dropout.limit, dropout.scale, 0.0)
