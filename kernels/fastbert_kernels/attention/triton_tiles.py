"""Common parts of the attention kernels: the groups of arguments, and the computation of a tile of scores [M, N].

Shapes: B batch (or sequences), H heads, T queries and keys (of the longest sequence), K head size, M queries and N
keys of a tile, P positions of TUPE's bias. Packed sequences have B = 1 and `bounds` [sequences + 1]; positions, and so
the bias, count from the start of each sequence.

A group of arguments that a call lacks is None, and its code is not compiled. None is always a separate argument, never
a field of a group: Triton 3.6 cannot compare such a field with None.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastbert_kernels.triton_common import LOG2E, combine, light_mix, lowered, product


class HeadRows(NamedTuple):
    """A tensor [B, H, T, K]: pointer and strides."""

    ptr: Any
    b: Any
    h: Any
    t: Any
    k: Any


class RowValues(NamedTuple):
    """A tensor [B, H, T], contiguous in T: pointer and strides."""

    ptr: Any
    b: Any
    h: Any


class Bias(NamedTuple):
    """A bias [1 or B, H, T, T], added to the scores: pointer and strides, 0 for a dimension of size 1."""

    ptr: Any
    b: Any
    h: Any
    m: Any
    n: Any


class Untied(NamedTuple):
    """TUPE's bias by its components: scale q k^T, and `theta` in the first row and column."""

    q: Any
    """[H, P, K], contiguous."""
    k: Any
    theta: Any
    """float32 [H, 2]: bias of the first query with every key, and of every other query with the first key."""
    count: Any
    """P."""


class TokenValues(NamedTuple):
    """A tensor [B, T] that decides which keys a query attends to: pointer and strides."""

    ptr: Any
    b: Any
    t: Any


class StoredGradient(NamedTuple):
    """dS^T of a group of pairs of a sequence and a head, [pairs, T, columns], contiguous, with T rounded up to columns
    that whole tiles fill: pointer and strides."""

    ptr: Any
    pair: Any
    n: Any


class KernelDropout(NamedTuple):
    keys: Any
    """int32 [B]."""
    limit: Any
    """A cell is retained if its hash is at least this."""
    scale: Any


@triton.jit
def sequence(bounds, b, T):
    """Row of the tensors that contains sequence b, its start in that row, and its length."""
    if bounds is None:
        row, start, length = b.to(tl.int64), b.to(tl.int64) * 0, b * 0 + T
    else:
        begin = tl.load(bounds + b)
        row, start, length = b.to(tl.int64) * 0, begin.to(tl.int64), tl.load(bounds + b + 1) - begin
    return row, start, length


@triton.jit
def part(x, row, h, start):
    """Pointer to the start of a sequence in one head of a tensor."""
    return x.ptr + row * x.b + h.to(tl.int64) * x.h + start * x.t


@triton.jit
def load_rows(p_x, x, offsets, columns, length, K: tl.constexpr, EVEN: tl.constexpr):
    """Tile [offsets, columns] of the part of `x` at `p_x`, zeros beyond `length` rows (unless EVEN) and K columns."""
    p_tile = p_x + offsets[:, None] * x.t + columns[None, :] * x.k
    if EVEN and columns.shape[0] == K:
        values = tl.load(p_tile)
    elif EVEN:
        values = tl.load(p_tile, mask=columns[None, :] < K, other=0.0)
    elif columns.shape[0] == K:
        values = tl.load(p_tile, mask=offsets[:, None] < length, other=0.0)
    else:
        values = tl.load(p_tile, mask=(offsets[:, None] < length) & (columns[None, :] < K), other=0.0)
    return values


@triton.jit
def store_rows(p_x, x, offsets, columns, length, values, K: tl.constexpr, UPCAST: tl.constexpr):
    """Reverse of `load_rows`."""
    inside = (offsets[:, None] < length) & (columns[None, :] < K)
    p_tile = p_x + offsets[:, None] * x.t + columns[None, :] * x.k
    tl.store(p_tile, lowered(values, x.ptr.dtype.element_ty, UPCAST), mask=inside)


@triton.jit
def load_row_values(x, row, h, start, offsets, length, other, EVEN: tl.constexpr):
    """Values of the positions `offsets` of a sequence that starts at `start`; `other` beyond its length (unless
    EVEN)."""
    p_values = x.ptr + row * x.b + h * x.h + start + offsets
    if EVEN:
        values = tl.load(p_values)
    else:
        values = tl.load(p_values, mask=offsets < length, other=other)
    return values


@triton.jit
def stored_tile(stored, slot, n, m):
    """Pointers [N, M] into the gradient of the scores of the group's pair number `slot`, for keys n and queries m."""
    return stored.ptr + slot.to(tl.int64) * stored.pair + (n[:, None] * stored.n + m[None, :])


@triton.jit
def load_stored(stored, slot, n, m, length, EVEN: tl.constexpr):
    """Tile [N, M] of dS^T, zeros beyond `length` keys (unless EVEN). Columns beyond `length` queries are undefined: a
    mask along a row would make loads one number wide."""
    p_tile = stored_tile(stored, slot, n, m)
    if EVEN:
        values = tl.load(p_tile)
    else:
        values = tl.load(p_tile, mask=n[:, None] < length, other=0.0)
    return values


@triton.jit
def load_positions(p_x, h, offsets, columns, count, K: tl.constexpr):
    """Tile [offsets, columns] of the position vectors of a head; zeros for position 0, whose scores are `theta`."""
    inside = (offsets[:, None] > 0) & (offsets[:, None] < count) & (columns[None, :] < K)
    return tl.load(p_x + (h * count + offsets[:, None]) * K + columns[None, :], mask=inside, other=0.0)


@triton.jit
def tile_scores(
    a, b, pos_a, pos_b, bias, untied, relative, padding, segments, sequence, h, m, n, length, scale,
    CHECKED: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """log2(e) times the scores of a tile, -inf where a key is masked: [M, N], or [N, M] for products in which the keys
    come first.

    Args:
        a, b: queries and keys [M, K] and [N, K], or keys and queries.
        pos_a, pos_b: with `untied`, the tiles of `load_positions` for a and b.
        relative: float32 [H, 2 P - 1], with `untied`: a value for each distance, at index key - query + P - 1; or None.
        padding: `TokenValues` of int8, 0 for masked keys; or None.
        segments: `TokenValues` of int32 or int64; a query attends to keys of its segment; or None.
        m, n: positions of the queries and the keys, [M, 1] and [1, N], or [1, M] and [N, 1].
        CHECKED: keys beyond the sequence's length are -inf too; otherwise their scores are never used.
        EVEN: the tile is entirely within the sequence.
    """
    s = product(a, tl.trans(b), UPCAST)
    if untied is not None:
        s += product(pos_a, tl.trans(pos_b), UPCAST)
    s = s * (scale * LOG2E)
    if bias is not None:
        p_bias = bias.ptr + sequence.to(tl.int64) * bias.b + h.to(tl.int64) * bias.h + (m * bias.m + n * bias.n)
        if EVEN:
            s += tl.load(p_bias).to(tl.float32) * LOG2E
        else:
            s += tl.load(p_bias, mask=(m < length) & (n < length), other=0.0).to(tl.float32) * LOG2E
    if untied is not None:
        p_theta = untied.theta + h * 2
        other = tl.where(n == 0, tl.load(p_theta + 1), 0.0)
        if relative is not None:
            distance = n - m + untied.count - 1
            known = (distance >= 0) & (distance < 2 * untied.count - 1) & (n > 0)
            other += tl.load(relative + h * (2 * untied.count - 1) + distance, mask=known, other=0.0)
        s += tl.where(m == 0, tl.load(p_theta), other) * LOG2E
    if CHECKED and not EVEN:
        s = tl.where(n < length, s, float("-inf"))
    if padding is not None:
        real = tl.load(padding.ptr + sequence * padding.b + n * padding.t, mask=n < length, other=0)
        s = tl.where(real != 0, s, float("-inf"))
    if segments is not None:
        start = segments.ptr + sequence * segments.b
        of_query = tl.load(start + m * segments.t, mask=m < length, other=0)
        of_key = tl.load(start + n * segments.t, mask=n < length, other=0)
        s = tl.where(of_query == of_key, s, float("-inf"))
    return s


@triton.jit
def dropout_factor(dropout, sequence, h, m, n):
    """Factor of dropout for a tile of probabilities: 0 or 1 / (1 - p); m and n as in `tile_scores`."""
    rows = combine(combine(tl.load(dropout.keys + sequence), h), m)
    return tl.where(light_mix(rows, combine(n, 0)) >= dropout.limit, dropout.scale, 0.0)
