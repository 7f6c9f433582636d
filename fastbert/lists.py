"""Comma-separated lists in an option. A name that contains a comma must be in double quotes; an existing path needs no
quotes."""

import csv
from collections.abc import Callable

from fastbert.errors import UserError, brief

MOST_COMMAS = 8  # maximum in a path of a list; a single path has no limit


def words(text: str) -> list[str]:
    """The names in `text` without white space around them. `a,"b, c"` has two names.

    Raises:
        UserError: a quote is not closed or is followed by other text, or a name before or after a comma is missing.
    """
    try:
        rows = list(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error:
        raise UserError(
            f"{brief(text)} is not a list of names: put double quotes around a name with a comma, as in 'a,\"b, c\"'"
        ) from None
    return _named([word.strip() for row in rows for word in row], text)


def paths(text: str, exists: Callable[[str], bool]) -> list[str]:
    """The paths in `text`. If a path that contains commas exists, it is a single path; longer ones are preferred.

    Args:
        exists: returns True if a path exists.

    Raises:
        UserError: a path before or after a comma is missing.
    """
    if exists(text):
        return [text]
    parts, found, first = text.split(","), [], 0
    while first < len(parts):
        for end in range(min(len(parts), first + 1 + MOST_COMMAS), first, -1):
            whole = ",".join(parts[first:end])
            name = whole if exists(whole) else whole.strip()
            if end == first + 1 or exists(name):
                break
        found.append(name)
        first = end
    return _named(found, text)


def _named(names: list[str], text: str) -> list[str]:
    """Returns `names`, of which none may be empty; no names if all are empty."""
    if not any(names):
        return []
    if not all(names):
        raise UserError(f"{brief(text)} has no name before or after one of its commas; leave out that comma")
    return names
