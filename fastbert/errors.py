"""What a user can put right is a `UserError`: the command line prints it without a traceback and exits with 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend. The message says what is wrong, where, and how to mend it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown `name`: the closest of `known`, then all of them, as the end of a sentence."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def choose(what: str, name: str, known: Iterable[str]) -> str:
    """`name` if it is one of `known`.

    Raises:
        UserError: names the nearest known one.
    """
    known = list(known)
    if name not in known:
        raise UserError(f"unknown {what} {name!r}; {nearest(name, known)}")
    return name
