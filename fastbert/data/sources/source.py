"""What a source of documents is: leaves that read a format, and several of them one after the other or mixed."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastbert.errors import UserError

LONGEST_DOCUMENT = 2**20  # characters; longer ones are cut at line ends, which bounds everybody's memory
_LEADING = re.compile(r"[\s\ufeff]*")


@dataclass
class Source:
    """Documents in a fixed order."""

    spec: str
    """What the user wrote."""
    name: str
    """Short and fit for a file name."""
    identity: dict[str, Any]
    """JSON that changes when the text may have changed."""
    size: int
    """The unit of `position`: bytes as stored (compressed), or 0 where nobody knows before the end."""
    read: Callable[[], Iterator[tuple[int, str]]] = field(repr=False)
    """Yields (bytes read so far, text)."""
    position: int = 0
    """Bytes of `size` that the running `documents()` has read; where that is unknown, bytes of text."""
    part: int = 0
    """Which of `parts` gave the document last yielded."""

    warnings: Sequence[str] = ()
    """What the user should know of it before it is read."""
    ended_by: int | None = None
    """In a mixture that was read to its end, the part that ran out."""
    parts: "Sequence[Source]" = field(default=(), repr=False, compare=False)
    """The sources this one is made of; a plain one is its own only part."""
    weights: Sequence[float] | None = None
    """Fractions of the text's bytes that the parts have in a mixture."""

    def __post_init__(self) -> None:
        self.parts = self.parts or (self,)

    def documents(self) -> Iterator[str]:
        """Non-empty documents without white space at their ends, at most LONGEST_DOCUMENT characters each.

        Raises:
            UserError: the source holds no document, or cannot be read (file, place and remedy are named).
        """
        self.position, empty = 0, True
        for position, text in self.read():
            self.position = position
            for piece in cut(text, LONGEST_DOCUMENT):
                empty = False
                yield piece
        if empty:
            raise UserError(f"source {self.spec!r} holds no text; give one with documents (a blank line between them)")


def cut(text: str, limit: int) -> Iterable[str]:
    """Pieces of at most `limit` characters, cut at the last line end that fits, else white space, else anywhere.

    White space at their ends, byte order marks at their beginning and empty pieces are dropped.
    """
    if len(text) > limit:
        return filter(None, _pieces(text, limit))
    text = text.rstrip()  # nearly every document, and so without a generator
    text = text[_LEADING.match(text).end() :]
    return (text,) if text else ()


def cut_early(beginning: str) -> tuple[list[str], str]:
    """The pieces of `cut` at LONGEST_DOCUMENT that do not depend on what follows `beginning` in its document, and what
    then stands for the rest of it."""
    *ready, rest = _pieces(beginning, LONGEST_DOCUMENT)
    # White space may be the end, which is no reason to cut, or lie between words; more of it makes no difference.
    return ready, rest + beginning[len(beginning.rstrip()) :][:LONGEST_DOCUMENT]


def _pieces(text: str, limit: int) -> Iterator[str]:
    """Those of `cut`, the last of which, behind the last cut, may be empty."""
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
