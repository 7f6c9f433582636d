"""Rows of a task's tables, each with the place it came from."""

import math
from collections.abc import Iterator, Sequence
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
    """A word or number as found; None where there is none."""


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
