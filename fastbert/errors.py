"""User errors and texts in messages. The command line prints a `UserError` without a traceback and exits with 2."""

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

MOST_LISTED = 50  # names in a message
LONGEST_SHOWN = 200  # characters of a value or a name in a message
LONGEST_MESSAGE = 2000  # characters
LINE = "\n  "  # starts another line of a message; other line breaks come from values and are escaped
# Control characters, including those that start terminal commands, other line breaks, and changes of direction.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class UserError(Exception):
    """User error: the message states the problem, where it is, and how to fix it."""


class OptionError(UserError):
    """Invalid value of an option. The caller, which knows whether it came from a flag or from a file, names the option
    accordingly."""

    def __init__(self, options: Any, name: str, problem: str) -> None:
        """
        Args:
            options: the dataclass of the option.
            name: name of the field.
            problem: rest of the sentence that begins with the name.
        """
        super().__init__(f"{name} {problem}")
        self.group, self.name, self.problem = type(options), name, problem


def nearest(name: str, known: Iterable[str]) -> str:
    """Hint for an unknown `name`: the closest of `known`, then all of them, as the end of a sentence."""
    known = sorted(known)
    close = closest(name, known)
    hint = f"did you mean {close!r}? " if close else ""
    listed = ", ".join(brief(one, str) for one in known[:MOST_LISTED])
    more = f" and {len(known) - MOST_LISTED:,} more" if len(known) > MOST_LISTED else ""
    return f"{hint}known: {listed}{more}"


def closest(name: str, known: Iterable[str], likeness: float = 0.5) -> str | None:
    """The name in `known` that is most similar to `name`, in upper or lower case; None if no similarity reaches
    `likeness`."""
    spelled = {one.lower(): one for one in known}
    close = difflib.get_close_matches(str(name)[:LONGEST_SHOWN].lower(), spelled, n=1, cutoff=likeness)
    return brief(spelled[close[0]], str) if close else None


def brief(value: Any, text: Callable[[Any], str] = repr) -> str:
    """`value` for a message, shortened if it is long, without control characters."""
    if isinstance(value, int) and value.bit_length() > 8 * LONGEST_SHOWN:  # Python refuses to print very long integers
        return f"a whole number of {value.bit_length():,} bits"
    shown = printable(text(value[: LONGEST_SHOWN + 1]) if isinstance(value, str | bytes | list) else text(value))
    return shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}..."


def abbreviated(items: list[str], separator: str = ", ") -> str:
    """The first five of `items` and the number of the others."""
    return separator.join(brief(item, str) for item in items[:5]) + (
        f" and {len(items) - 5} more" if len(items) > 5 else ""
    )


def plural(count: int, what: str) -> str:
    """The number with its noun: "1 pair", "1,340 pairs"."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def printable(text: str) -> str:
    """`text` with control characters escaped as in Python, such as \\x1b, so a terminal does not interpret them."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def visible(text: str) -> str:
    """`text` of several lines with all other control characters escaped, for printing to a terminal."""
    return "\n".join(map(printable, text.split("\n")))


def message_of(error: UserError) -> str:
    """The printed text of an error: at most `LONGEST_MESSAGE` characters, with the middle left out if it has more."""
    text = LINE.join(map(printable, str(error).split(LINE)))
    if len(text) <= LONGEST_MESSAGE:
        return text
    first, last = LONGEST_MESSAGE * 3 // 4, LONGEST_MESSAGE // 5
    return f"{text[:first]} [... {len(text) - first - last:,} characters ...] {text[-last:]}"


def about(name: str, problem: object) -> str:
    """The problem with one of several names, which begins with the name, for a message."""
    return str(problem) if str(problem).startswith(f"{name}:") else f"{name}: {problem}"


def choose(what: str, name: str, known: Iterable[str]) -> str:
    """Returns `name` if it is one of `known`.

    Raises:
        UserError: it is not; the message suggests the closest known name.
    """
    known = list(known)
    if name not in known:
        raise UserError(f"unknown {what} {brief(name)}; {nearest(name, known)}")
    return name
