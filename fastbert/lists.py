"""Lists in one option: commas between names. A name with a comma in it is put in double quotes; a path that exists
needs none."""

import csv
from collections.abc import Callable

from fastbert.errors import UserError, brief

MOST_COMMAS = 8  # in a path of a list; in one that stands alone there is no limit


def words(text: str) -> list[str]:
    """The names in `text` without white space around them; empty ones are left out. `a,"b, c"` are two.

    Raises:
        UserError: a quote is not closed, or something follows one that is.
    """
    try:
        rows = list(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error:
        raise UserError(
            f"{brief(text)} is no list of names: put double quotes around a name with a comma, as in 'a,\"b, c\"'"
        ) from None
    return [word.strip() for row in rows for word in row if word.strip()]


def paths(text: str, exists: Callable[[str], bool]) -> list[str]:
    """The paths in `text`. Where a path with commas exists, it is one: the longest that begins at a part is it.

    Args:
        exists: whether something is called so.
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
        if name:
            found.append(name)
        first = end
    return found
