"""Interface of a source of documents, and splitting of long documents."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastbert.data.hashing import document_hash
from fastbert.errors import UserError

LONGEST_DOCUMENT = 2**20  # characters; longer documents are split at line ends, which bounds the memory of all steps
EXCERPT_CHUNKS = 64  # minimum number of chunks in an excerpt, if the source has more
_LEADING = re.compile(r"[\s\ufeff]*")


@dataclass(frozen=True)
class Chunk:
    """A stretch of a source that is read without those before it: a file, or rows of a dataset."""

    size: int
    """Bytes as stored (compressed); 0 if they are unknown."""
    read: Callable[[], Iterator[tuple[int, str]]] = field(repr=False)
    """Yields (bytes of the chunk read so far, text)."""
    part: int | None = 0
    """Index in `Source.parts` of the source that it belongs to; None if `read` sets `Source.part`."""


@dataclass
class Source:
    """Documents in a fixed order."""

    spec: str
    """The source as the user wrote it."""
    name: str
    """Short name for file names."""
    identity: dict[str, Any]
    """JSON that changes when the text may have changed."""
    size: int
    """Total of `position` in bytes as stored (compressed), or 0 if it is unknown before the end."""
    chunks: Sequence[Chunk] = field(repr=False)
    """The whole source, in order."""
    position: int = 0
    """Bytes of `size` that `documents()` has read so far; if `size` is unknown, bytes of text."""
    part: int = 0
    """Index in `parts` of the source that yielded the last document."""

    warnings: Sequence[str] = ()
    """Warnings for the user before the source is read."""
    ended_by: int | None = None
    """The part that ran out, in a mixture that was read to its end."""
    parts: "Sequence[Source]" = field(default=(), repr=False, compare=False)
    """The sources that a list or mixture consists of; any other source is its only part."""
    weights: Sequence[float] | None = None
    """Fraction of the text's bytes of each part of a mixture."""
    sliced: bool = False
    """True if `chunks` are not all of the source."""

    def __post_init__(self) -> None:
        self.parts = self.parts or (self,)

    def documents(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """Non-empty documents without white space at their ends, at most LONGEST_DOCUMENT characters each.

        Args:
            start, stop: reads the chunks start ... stop - 1 (by default all).

        Raises:
            UserError: a part of the source that is read as a whole has no document, or it cannot be read.
        """
        stop = len(self.chunks) if stop is None else stop
        without = set() if self.sliced else {chunk.part for chunk in self.chunks[start:stop]}
        without -= {chunk.part for chunk in (*self.chunks[:start], *self.chunks[stop:])}
        self.position = done = sum(chunk.size for chunk in self.chunks[:start])
        for number in range(start, stop):
            chunk, position = self.chunks[number], 0
            for position, text in chunk.read():
                self.position = done + position
                if chunk.part is not None:
                    self.part = chunk.part
                for piece in cut(text, LONGEST_DOCUMENT):
                    without.discard(chunk.part)
                    yield piece
            done += chunk.size or position
            last = number + 1 == stop or self.chunks[number + 1].part != chunk.part
            if last and chunk.part in without:
                raise no_text(self.spec if chunk.part is None else self.parts[chunk.part].spec)

    def groups(self, size: int) -> list[tuple[int, int]]:
        """(start, stop) of successive chunks with at least `size` bytes together, except for the last ones."""
        groups, start, held = [], 0, 0
        for stop, chunk in enumerate(self.chunks, 1):
            held += chunk.size
            if held >= size or stop == len(self.chunks):
                groups.append((start, stop))
                start, held = stop, 0
        return groups

    def slice(self, start: int, stop: int) -> "Source":
        """The chunks start ... stop - 1 as a source."""
        out = copy.copy(self)
        out.chunks, out.sliced = self.chunks[start:stop], True
        out.size = sum(chunk.size for chunk in out.chunks)
        return out

    def excerpt(self, limit: int) -> Iterator[tuple[float, str]]:
        """Yields (fraction read so far, document) for a part of the source that represents it, at most about `limit`
        bytes of text: the beginnings of the chunks if there are few, otherwise of EXCERPT_CHUNKS chunks or more,
        selected by a hash of their number. Each contributes in proportion to its size."""
        selected = self._selected(limit)
        usual = sum(chunk.size for chunk in selected) / len(selected) or 1.0
        total = sum(chunk.size or usual for chunk in selected)
        done = left = 0.0  # left: bytes of text that earlier chunks did not have
        for chunk in selected:
            weight, held = chunk.size or usual, 0
            quota = left + limit * weight / total
            with closing(chunk.read()) as rows:
                for position, text in rows:
                    if chunk.part is not None:
                        self.part = chunk.part
                    for piece in cut(text, LONGEST_DOCUMENT):
                        held += text_bytes(piece)
                        read = max(position / chunk.size if chunk.size else 0, held / quota)
                        yield (done + weight * min(1, read)) / total, piece
                    if held >= quota:
                        break
            left = quota - held
            done += weight

    def _selected(self, limit: int) -> list[Chunk]:
        """The chunks of an excerpt, in order."""
        selected, held = [], 0
        for number in np.argsort(document_hash(0, 0, len(self.chunks)), kind="stable").tolist():
            if len(selected) >= EXCERPT_CHUNKS and held >= limit:
                break
            selected.append(number)
            held += self.chunks[number].size
        return [self.chunks[number] for number in sorted(selected)]


def no_text(spec: str) -> UserError:
    return UserError(f"source {spec!r} has no text; give one with documents (a blank line between them)")


def cut(text: str, limit: int) -> Iterable[str]:
    """Pieces of at most `limit` characters, cut at the last line end that fits, otherwise at white space, otherwise
    anywhere.

    White space at their ends, byte order marks at their beginning and empty pieces are dropped.
    """
    if len(text) > limit:
        return filter(None, _pieces(text, limit))
    text = text.rstrip()  # nearly every document, so this avoids a generator
    text = text[_LEADING.match(text).end() :]
    return (text,) if text else ()


def cut_early(beginning: str) -> tuple[list[str], str]:
    """The pieces of `cut` at LONGEST_DOCUMENT that do not depend on the text after `beginning`, and the remaining text
    of `beginning`."""
    *ready, rest = _pieces(beginning, LONGEST_DOCUMENT)
    # White space at the end may separate words of the document, or end it; more white space makes no difference.
    return ready, rest + beginning[len(beginning.rstrip()) :][:LONGEST_DOCUMENT]


def _pieces(text: str, limit: int) -> Iterator[str]:
    """The pieces of `cut`; the last one may be empty."""
    text = text.rstrip()
    start = _LEADING.match(text).end()
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1
        if end <= start:
            end = text.rfind(" ", start, start + limit) + 1
        if end <= start:
            end = start + limit
        yield text[start:end].rstrip()
        start = _LEADING.match(text, end).end()
    yield text[start:]


def text_bytes(text: str) -> int:
    """UTF-8 bytes of `text`."""
    return len(text) if text.isascii() else len(text.encode())
