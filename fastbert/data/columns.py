"""Columns to read from a table: one or more with text, and possibly one with labels."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastbert.errors import UserError, brief, nearest


@dataclass(frozen=True)
class Columns:
    texts: tuple[str, ...]
    label: str | None = None
    """A column of any type."""
    label_may_lack: bool = False
    remedy: str = "choose with --column"
    """Advice in the error for a column that is missing or contains no text."""
    class_names: bool = False
    """Replace integers with the names that the features of `datasets` define, and -1 by a missing label."""
    lists: bool = False
    """Texts may be lists of texts."""
    others: tuple[str, ...] = ()
    """Columns of any type, whose cells follow that of the label."""

    @property
    def names(self) -> tuple[str, ...]:
        """All columns, in the order of a row's cells."""
        return (*self.texts, *(() if self.label is None else (self.label,)), *self.others)

    def check(self, found: Sequence[str], where: str, hint: str = "") -> None:
        """Raises a UserError that lists the columns `found` if a column is missing or occurs twice.

        Args:
            where: names the file in error messages.
            hint: replaces the remedy for a missing column.
        """
        for name in self.names:
            if name not in found:
                if name == self.label and self.label_may_lack:
                    continue
                known = nearest(name, found) if found else "it has none"
                raise UserError(f"{where} has no column {brief(name)}; {known}; {hint or self.remedy}")
            if (count := list(found).count(name)) > 1:
                raise UserError(f"{where}: {count} columns are called {brief(name)}; rename one, or {self.remedy}")
