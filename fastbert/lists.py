"""Comma-separated lists in an option. A name that contains a comma is put in double quotes; an existing path needs no
quotes."""

import csv
from collections.abc import Callable

from fastbert.errors import UserError, brief

MOST_COMMAS = 8  # in a path of a list; a single path has no limit


def words(text: str) -> list[str]:
    """The names in `text` without white space around them. `a,"b, c"` are two.

    Raises:
        UserError: a quote is not closed, or something follows one that is; no name stands before or after a comma.
    """
    try:
        rows = list(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error:
        raise UserError(
            f"{brief(text)} is no list of names: put double quotes around a name with a comma, as in 'a,\"b, c\"'"
        ) from None
    return _named([word.strip() for row in rows for word in row], text)


def paths(text: str, exists: Callable[[str], bool]) -> list[str]:
    """The paths in `text`. Where a path with commas exists, it is one: the longest that begins at a part is it.

    Args:
        exists: whether something is called so.

    Raises:
        UserError: no path stands before or after a comma.
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
    """`names`, of which none may be empty; no names at all if all of them are."""
    if not any(names):
        return []
    if not all(names):
        raise UserError(f"{brief(text)} has no name before or after one of its commas; leave that comma out")
    return names
