"""Rows of a task's tables, with file and line for error messages, and the examples made from them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from fastbert.errors import UserError
from fastbert.ranges import number_of


class Row(NamedTuple):
    """One example as read from its file."""

    where: str
    """File and line, for errors."""
    text: str
    pair: str | None
    label: Any
    """A word or number as in the file, or a list of tags; None if there is none."""
    words: tuple[tuple[int, int], ...] | None = None
    """Character range of each word, if words have labels."""
    lines: tuple[int, ...] | None = None
    """Line number of each word in a file with one word per line."""
    soft: Any = None
    """Soft label as in the file: a list, an object, a number, or one of these as JSON text; None if there is none."""
    weight: float = 1.0
    cells: Mapping[str, Any] = MappingProxyType({})
    """Further columns that slices read."""


@dataclass(frozen=True)
class Example:
    """One row of a split."""

    index: int
    """Index in the file, from 0."""
    text: str
    pair: str | None
    label: Any
    """Label in the form of the task's kind: the id of a class, a number, ...; None if the split has none."""
    words: tuple[tuple[int, int], ...] | None = None
    """Character range of each word, if words have labels."""
    soft_label: tuple[float, ...] | float | None = None
    """The ideal value of the scores, trained on instead of `label`: the probabilities of the classes in id order, or a
    number."""
    weight: float = 1.0
    """Weight in the training loss, 0 or more. They are divided by their mean over the split."""
    cells: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Further columns that slices read."""


class TaskSource(Protocol):
    """A reader of the rows of a task."""

    def rows(self, split: str, warnings: list[str]) -> Iterator[Row]:
        """The rows of a split; appends to `warnings`."""
        ...


def make_row(where: str, columns: Sequence[str], values: Sequence[Any], may_be_empty: bool = False) -> Row:
    """The row with the texts of `columns` and the label, which is the last of `values`.

    Raises:
        UserError: a text is missing, empty or not text.
    """
    for column, value in zip(columns, values[:-1], strict=True):
        if not isinstance(value, str):
            kind = "missing" if value is None else f"of type {type(value).__name__}, not text"
            raise UserError(f"{where}: {column!r} is {kind}; fix the row or name another column")
        if not may_be_empty and not value.strip():
            raise UserError(f"{where}: the text {column!r} is empty; fill it in or drop the row")
    return Row(where, values[0], values[1] if len(columns) == 2 else None, values[-1])


def number_in(value: Any) -> float | None:
    """The number in a cell, which may be infinite or NaN; None if it is not a number."""
    try:
        return None if isinstance(value, bool) else number_of(value) if isinstance(value, str) else float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return None
