"""Interface of a source of documents, and splitting of long documents."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastbert.errors import UserError

LONGEST_DOCUMENT = 2**20  # characters; longer documents are split at line ends, which bounds the memory of all steps
_LEADING = re.compile(r"[\s\ufeff]*")


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
    read: Callable[[], Iterator[tuple[int, str]]] = field(repr=False)
    """Yields (bytes read so far, text)."""
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

    def __post_init__(self) -> None:
        self.parts = self.parts or (self,)

    def documents(self) -> Iterator[str]:
        """Non-empty documents without white space at their ends, at most LONGEST_DOCUMENT characters each.

        Raises:
            UserError: the source has no document, or cannot be read.
        """
        self.position, empty = 0, True
        for position, text in self.read():
            self.position = position
            for piece in cut(text, LONGEST_DOCUMENT):
                empty = False
                yield piece
        if empty:
            raise UserError(f"source {self.spec!r} has no text; give one with documents (a blank line between them)")


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
