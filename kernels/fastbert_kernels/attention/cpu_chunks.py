"""Division of CPU attention into chunks whose scores stay in the cache, and the range of keys that each chunk needs.

Shapes: B batch, H heads, T tokens, K head size.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CELLS = 1 << 20
"""Scores in a chunk: 4 MiB in float32. Smaller chunks are no faster (docs/lab-notes.md), and each costs a dozen
parallel operations, which are slow while another program uses a core. A constant, since it decides the order of
summation."""
BLOCK = 256
"""Queries in a chunk of long rows with segments, few enough that the keys of other segments can be skipped."""
STEP = 32
"""Keys are skipped in multiples of this, which limits the number of product sizes: oneDNN compiles each size."""


@dataclass(frozen=True)
class Chunk:
    """A block of the scores [B, H, queries, keys]: consecutive rows, heads, queries and keys."""

    matrices: slice
    """Rows and heads as indices into [B H, T, K]."""
    rows: slice
    heads: slice
    queries: slice
    keys: slice
    shape: tuple[int, int, int, int]
    """Number of rows, heads, queries and keys."""
    allowed: Tensor | None
    """bool [rows, 1, 1 or queries, keys], False for masked scores; None if none is masked."""


@dataclass(frozen=True)
class ChunkPlan:
    """Chunks in the order in which they are computed: rows vary fastest, so that a shared bias stays in the cache."""

    chunks: list[Chunk]
    whole: bool
    """True if each chunk has all queries and all keys of its rows."""

    @property
    def cells(self) -> int:
        return sum(math.prod(chunk.shape) for chunk in self.chunks)


def chunk_plan(
    shape: tuple[int, int, int, int], key_padding: Tensor | None, segments: Tensor | None, single: float
) -> ChunkPlan:
    """Chunks of scores [B, H, queries, keys]; each matrix of at least `single` scores is a chunk."""
    batch, heads, queries, keys = shape
    by_segments = segments is not None and queries > 2 * BLOCK
    queries_of = _cut(queries, BLOCK if by_segments else max(1, min(queries, CELLS // keys)))
    cells = queries_of[0].stop * keys
    count = 1 if cells >= single else max(1, CELLS // cells)
    heads_of = _cut(heads, heads if count >= 2 * heads else count)
    rows_of = _cut(batch, max(1, count // heads))
    masks = {}
    if key_padding is not None or segments is not None:
        masks = {(q.start, b.start): _mask(key_padding, segments, b, q) for q in queries_of for b in rows_of}
    chunks = []
    for h, q, b in itertools.product(heads_of, queries_of, rows_of):
        span, allowed = masks.get((q.start, b.start), (slice(0, keys), None))
        size = tuple(part.stop - part.start for part in (b, h, q, span))
        matrices = slice(b.start * heads + h.start, (b.stop - 1) * heads + h.stop)
        chunks.append(Chunk(matrices, b, h, q, span, size, allowed))
    return ChunkPlan(chunks, len(queries_of) == 1 and all(chunk.shape[3] == keys for chunk in chunks))


def _cut(size: int, step: int) -> list[slice]:
    return [slice(start, min(size, start + step)) for start in range(0, size, step)]


def _mask(
    key_padding: Tensor | None, segments: Tensor | None, rows: slice, queries: slice
) -> tuple[slice, Tensor | None]:
    """The range of keys that a chunk needs, and its mask of allowed scores (None if all are allowed)."""
    allowed = None if key_padding is None else key_padding[rows, None, None]
    if segments is not None:
        same = (segments[rows, queries, None] == segments[rows, None, :])[:, None]
        allowed = same if allowed is None else allowed & same
    needed = allowed.flatten(0, 2).any(0).nonzero()
    first, last = (int(needed[0]), int(needed[-1])) if len(needed) else (0, 0)
    span = slice(first // STEP * STEP, min(allowed.shape[3], (last // STEP + 1) * STEP))
    allowed = allowed[..., span]
    return span, None if allowed.all() else allowed


class Packing:
    """Conversion of packed sequences into batches of sequences of about equal length, and back. The unit that is moved
    is a row of the K numbers of a token and head."""

    def __init__(self, cu_seqlens: Tensor, heads: int) -> None:
        self.bounds, self.heads = cu_seqlens.tolist(), heads
        sizes = [end - start for start, end in itertools.pairwise(self.bounds)]
        groups: dict[int, list[int]] = {}
        for number, size in enumerate(sizes):
            if size:
                groups.setdefault(min(max(sizes), _rounded(size)), []).append(number)
        self.groups = sorted(groups.items())
        """(padded length, indices of the sequences)"""
        self.sizes = [torch.tensor([sizes[number] for number in numbers]) for _, numbers in self.groups]
        first = 0
        self.tokens, self.back, padding = [], torch.empty(self.bounds[-1], heads, dtype=torch.int64), []
        for (length, numbers), size in zip(self.groups, self.sizes, strict=True):
            position, size = torch.arange(length), size[:, None]
            token = cu_seqlens[numbers].long()[:, None] + position.minimum(size - 1)
            shape = len(numbers), heads, length
            row = torch.arange(first, first + math.prod(shape)).view(shape)
            real = position < size
            self.tokens.append(token)
            self.back[token[real]] = row.transpose(1, 2)[real]
            padding.append(row.transpose(1, 2)[~real].flatten())
            first += row.numel()
        self.padding = torch.cat(padding)

    def shapes(self) -> Iterator[tuple[int, int, int, Tensor | None, list[int]]]:
        """Number of sequences, queries, keys; bool [sequences, length], False for padding (None if there is none); and
        the indices of the sequences, for each group."""
        for (length, numbers), sizes in zip(self.groups, self.sizes, strict=True):
            padding = None if (sizes == length).all() else torch.arange(length) < sizes[:, None]
            yield len(numbers), length, length, padding, numbers

    def split(self, x: Tensor, gradient: bool) -> list[Tensor]:
        """Convert [1, H, tokens, K] to [sequences, H, length, K] for each group. Padding repeats the last token; in a
        gradient it is 0."""
        size = x.shape[3]
        if x.stride(3) != 1 or x.stride(1) % size or x.stride(2) % size:
            x = x.contiguous()
        by_head, by_token = (x.stride(i) // size for i in (1, 2))
        last = (self.heads - 1) * by_head + (x.shape[2] - 1) * by_token
        rows = x.as_strided((last + 1, size), (size, 1))
        head = by_head * torch.arange(self.heads)[:, None]
        index = [(head + by_token * token[:, None]) for token in self.tokens]
        flat = rows.index_select(0, torch.cat([part.flatten() for part in index]))
        if gradient:
            flat.index_fill_(0, self.padding, 0.0)
        parts = zip(index, flat.split([part.numel() for part in index]), strict=True)
        return [part.view(*number.shape, size) for number, part in parts]

    def join(self, parts: list[Tensor]) -> Tensor:
        """Reverse of `split`, without the padding."""
        flat = torch.cat([part.flatten(0, 2) for part in parts])
        rows = flat.index_select(0, self.back.flatten())
        return rows.view(*self.back.shape, -1).transpose(0, 1)[None]


def _rounded(size: int) -> int:
    """Round up to a multiple of 16, or of 1/32 of the next power of two: little padding, and few sizes of products."""
    step = max(16, (1 << (size - 1).bit_length()) // 32)
    return -(-size // step) * step
