"""Rows of a task's tables, each with the file and line it came from, and the examples made of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from fastbert.errors import UserError
from fastbert.ranges import number_of


class Row(NamedTuple):
    """One example as it stands in its file."""

    where: str
    """File and line, for errors."""
    text: str
    pair: str | None
    label: Any
    """A word or number as found; None where there is none. Of words, a list of tags."""
    words: tuple[tuple[int, int], ...] | None = None
    """The character range of each word, where the words have the labels."""
    lines: tuple[int, ...] | None = None
    """Of each word, in a file with a word a line."""


@dataclass(frozen=True)
class Example:
    """One row of a split."""

    index: int
    """From 0, in the order of the file."""
    text: str
    pair: str | None
    label: Any
    """As the task's kind reads it: the id of a class, a number, ...; None where the split has none."""
    words: tuple[tuple[int, int], ...] | None = None
    """The character range of each word, where the words have labels."""


class TaskSource(Protocol):
    """Where the rows of a task come from."""

    def rows(self, split: str, warnings: list[str]) -> Iterator[Row]:
        """The rows of a split; what the user should know of them is appended to `warnings`."""
        ...


def make_row(where: str, columns: Sequence[str], values: Sequence[Any], may_be_empty: bool = False) -> Row:
    """A Row of the texts in `columns`, followed in `values` by the label.

    Raises:
        UserError: a text is no text, or is empty.
    """
    for column, value in zip(columns, values[:-1], strict=True):
        if not isinstance(value, str):
            kind = "missing" if value is None else f"of type {type(value).__name__}, not text"
            raise UserError(f"{where}: {column!r} is {kind}; fix the row or name another column")
        if not may_be_empty and not value.strip():
            raise UserError(f"{where}: the text {column!r} is empty; fill it in or drop the row")
    return Row(where, values[0], values[1] if len(columns) == 2 else None, values[-1])


def number_in(value: Any) -> float | None:
    """The number that a cell holds, also one that is not finite; None if it holds none."""
    try:
        return None if isinstance(value, bool) else number_of(value) if isinstance(value, str) else float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return None
