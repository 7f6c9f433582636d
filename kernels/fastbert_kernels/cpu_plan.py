"""How attention on a CPU is cut into chunks whose scores stay in the cache, and which keys each of them needs.

Shapes: B batch, H heads, T tokens, K head size.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CELLS = 1 << 18
"""Scores in a chunk: 1 MiB in float32, the size of two cores' L2 caches. A constant, since it decides the order in which
gradients are summed."""
BLOCK = 128
"""Queries of a chunk where rows hold several segments, so that it can skip the keys of other segments."""
STEP = 32
"""Keys are skipped in multiples of this, so that few sizes of products occur: oneDNN compiles each of them once."""
MIN_PRODUCT = 256
"""Queries and keys from which on a float32 product is made by oneDNN, one head at a time."""


@dataclass(frozen=True)
class Chunk:
    """Some scores: rows of the batch, heads, queries and keys."""

    rows: slice
    heads: slice
    queries: slice
    keys: slice
    allowed: Tensor | None
    """bool [rows, 1, 1 or queries, keys], where not all of them may be seen."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the scores."""
        return tuple(part.stop - part.start for part in (self.rows, self.heads, self.queries, self.keys))


@dataclass(frozen=True)
class Plan:
    """Chunks in the order in which they are computed: rows vary fastest, so that a shared bias stays in the cache."""

    chunks: list[Chunk]
    whole: bool
    """Whether each chunk holds all queries and all keys of its rows."""

    @property
    def cells(self) -> int:
        return sum(torch.Size(chunk.shape).numel() for chunk in self.chunks)


def plan(shape: tuple[int, int, int, int], key_padding: Tensor | None, segments: Tensor | None, single: bool) -> Plan:
    """Of scores [B, H, queries, keys]; `single` puts no two large matrices of scores in one chunk."""
    batch, heads, queries, keys = shape
    rows_of = _blocks(queries, BLOCK if segments is not None else max(1, min(queries, CELLS // keys)))
    block = rows_of[0].stop
    single = single and min(block, keys) >= MIN_PRODUCT
    per_chunk = 1 if single else max(1, CELLS // (block * keys))
    several_rows = per_chunk >= 2 * heads and block == queries
    heads_of = _blocks(heads, heads if several_rows else min(heads, per_chunk))
    batch_of = _blocks(batch, per_chunk // heads if several_rows else 1)
    if key_padding is None and segments is None:
        everything = slice(0, keys)
        parts = itertools.product(heads_of, rows_of, batch_of)
        return Plan([Chunk(b, h, q, everything, None) for h, q, b in parts], len(rows_of) == 1)
    masks = {(q.start, b.start): _mask(key_padding, segments, b, q, keys) for q in rows_of for b in batch_of}
    chunks = [Chunk(b, h, q, *masks[q.start, b.start]) for h, q, b in itertools.product(heads_of, rows_of, batch_of)]
    return Plan(chunks, len(rows_of) == 1 and all(chunk.shape[3] == keys for chunk in chunks))


def _blocks(size: int, step: int) -> list[slice]:
    return [slice(start, min(size, start + step)) for start in range(0, size, step)]


def _mask(
    key_padding: Tensor | None, segments: Tensor | None, rows: slice, queries: slice, keys: int
) -> tuple[slice, Tensor | None]:
    """The keys that a chunk needs, and which of them are allowed (None for all)."""
    allowed = None
    if segments is not None:
        own = segments[rows]
        allowed = (own[:, queries, None] == own[:, None, :])[:, None]
    if key_padding is not None:
        real = key_padding[rows][:, None, None]
        allowed = real if allowed is None else allowed & real
    needed = allowed.flatten(0, 2).any(0).nonzero()
    first, last = (int(needed[0]), int(needed[-1])) if len(needed) else (0, 0)
    span = slice(first // STEP * STEP, min(keys, (last // STEP + 1) * STEP))
    allowed = allowed[..., span]
    return span, None if allowed.all() else allowed


class Packing:
    """Sequences one after the other as batches of sequences of about equal length, and back."""

    def __init__(self, cu_seqlens: Tensor) -> None:
        bounds = cu_seqlens.tolist()
        self.tokens, self.sizes = bounds[-1] - bounds[0], [end - start for start, end in itertools.pairwise(bounds)]
        groups: dict[int, list[int]] = {}
        for number, size in enumerate(self.sizes):
            if size:
                groups.setdefault(min(max(self.sizes), _rounded(size)), []).append(number)
        self.groups = sorted(groups.items())
        """(padded length, numbers of the sequences)"""
        self.uniform = len(self.groups) == 1 and len(set(self.sizes)) == 1
        if not self.uniform:
            starts = cu_seqlens[:-1].long()
            places, real = [], []
            for length, numbers in self.groups:
                place = torch.arange(length)
                size = torch.tensor([self.sizes[number] for number in numbers])[:, None]
                places.append((starts[numbers][:, None] + place.minimum(size - 1)).flatten())
                real.append((place < size).flatten())
            self.index, self.real = torch.cat(places), torch.cat(real)
            self.back = torch.empty(self.tokens, dtype=torch.int64)
            self.back[self.index[self.real]] = self.real.nonzero()[:, 0]

    def split(self, x: Tensor, gradient: bool = False) -> Iterator[Tensor]:
        """[1, H, tokens, K] -> for each group [sequences, H, length, K]. Padding repeats the last token; in a gradient it
        is 0."""
        if self.uniform:
            yield x[0].unflatten(1, (len(self.sizes), -1)).transpose(0, 1)
            return
        padded = x[0].index_select(1, self.index)
        if gradient:
            padded.mul_(self.real[:, None])
        lengths = [length * len(numbers) for length, numbers in self.groups]
        for (length, _), part in zip(self.groups, padded.split(lengths, 1), strict=True):
            yield part.unflatten(1, (-1, length)).transpose(0, 1)

    def join(self, parts: list[Tensor]) -> Tensor:
        """The reverse of `split`, without the padding; laid out as [tokens, H, K]."""
        flat = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])  # [tokens with padding, H, K]
        if not self.uniform:
            flat = flat.index_select(0, self.back)
        return flat.transpose(0, 1)[None]

    def padding(self) -> Iterator[Tensor | None]:
        """For each group bool [sequences, length], False for padding; None if there is none."""
        for length, numbers in self.groups:
            sizes = torch.tensor([self.sizes[number] for number in numbers])
            yield None if (sizes == length).all() else torch.arange(length) < sizes[:, None]


def _rounded(size: int) -> int:
    """Up to a multiple of 16, or of an eighth of the next power of two: few groups, little padding."""
    step = max(16, (1 << (size - 1).bit_length()) // 8)
    return -(-size // step) * step
