"""Valid values of options: declared with the option, checked by one function, and refused with uniform messages.

    warmup: Annotated[float, Range(0, below=1)] = 0.06
    steps: Count | None = None

Fields without a declaration have the limits of their type: 32-bit whole numbers, finite numbers in the range of
float32, and text that can be used in a path and in one line of a message.
"""

import math
import re
import types
import typing
import unicodedata
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any

from fastbert.errors import OptionError, brief, choose

LARGEST = 2**31 - 1
"""Largest count of steps, sequences, or tokens in a file."""
LARGEST_SEED = 2**63 - 1
"""The hashes use 64 bits of a seed, and records contain signed 64-bit numbers."""
SMALLEST_FLOAT, LARGEST_FLOAT = 1e-30, 1e30
"""Range of numbers without declared bounds, so that they and their products fit into float32."""
LONGEST_TEXT = 4096
"""Characters; the longest path in Linux."""
LONGEST_NAME = 255
"""Bytes of a name in a path."""


@dataclass(frozen=True)
class Range:
    """An interval; a bound of None means the limit of the type."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def problem(self, value: float) -> str | None:
        """Reason why `value` is outside the interval, as the end of a sentence; None if it is inside."""
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be a finite number, not {value}"
        if self._contains(value):
            return _limits(value, self)
        return f"must {self._violated(value)}, not {brief(value)}"

    def _contains(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _violated(self, value: float) -> str:
        """The bound that `value` violates; for fractions both bounds, as an interval."""
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if low is not None and high is not None and high <= 1:
            opening, closing = "[" if self.above is None else "(", "]" if self.below is None else ")"
            return f"be in {opening}{low}, {high}{closing}"
        if low is not None and value <= low:
            return f"be at least {low:,}" if self.above is None else f"be greater than {low:,}"
        return f"be at most {high:,}" if self.below is None else f"be less than {high:,}"


def _limits(value: float, given: Range) -> str | None:
    """Reason why a value exceeds the limits of its type, for bounds that are not `given`."""
    if isinstance(value, int):
        if given.most is None and abs(value) > LARGEST:
            return f"must be at {f'most {LARGEST:,}' if value > 0 else f'least -{LARGEST:,}'}, not {brief(value)}"
    elif value and given.most is None and given.below is None and not SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT:
        zero = "0 or " if given._contains(0.0) else ""
        return f"must be {zero}between {SMALLEST_FLOAT:g} and {LARGEST_FLOAT:g}, not {brief(value)}"
    elif not value and math.copysign(1, value) < 0:
        return "must not be -0.0; write 0"
    return None


ANY = Range()
Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, LARGEST_SEED)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(0)]
Probability = Annotated[float, Range(0, 1)]
Rate = Annotated[float, Range(0, below=1)]
Part = Annotated[float, Range(above=0, most=1)]
"""A fraction in (0, 1]."""
Fraction = Annotated[float, Range(above=0, below=1)]
"""A fraction in (0, 1)."""
Workers = Annotated[int, Range(0, 4096)]
"""Number of processes or threads, 0 for a default."""
Processes = Annotated[int, Range(1, 4096)]
Retries = Annotated[int, Range(0, 10)]
Vocabulary = Annotated[int, Range(256, 2**20)]
"""Vocabulary size for training a tokenizer; the trainer reserves memory for all entries."""
Layers = Annotated[int, Range(1, 1000)]
Width = Annotated[int, Range(1, 2**16)]
Tokens = Annotated[int, Range(1, 2**53)]
Minutes = Annotated[float, Range(above=0, most=5_256_000)]
PROSE = "prose"
Texts = Annotated[tuple[str, ...], PROSE]
"""Texts for a model, which are no names: of any length, with line breaks. The job checks them."""
Length = Annotated[int, Range(2, 2**20)]
"""Tokens in a sequence, at least [CLS] and one more."""


def number_of(text: str) -> float:
    """Parses a number. Unlike Python, it refuses 1_000 and digits of other scripts.

    Raises:
        ValueError: the text is not a number.
    """
    if "_" in text or not text.strip().isascii():
        raise ValueError(f"{brief(text)} is not a number")
    return float(text)


def text_problem(value: str) -> str | None:
    """Reason why a text is not a valid option, as the end of a sentence; None if it is valid."""
    if not value.strip():
        return "is empty; give a value, or leave the option out"
    if len(value) > LONGEST_TEXT:
        return f"has {len(value):,} characters, more than {LONGEST_TEXT:,}"
    if any(len(name.encode(errors="replace")) > LONGEST_NAME for name in re.split("[/,]", value)):
        return f"contains a name that is too long, of more than {LONGEST_NAME} bytes: {brief(value)}"
    if "\0" in value:
        return f"contains a zero byte: {brief(value)}"
    if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in value):
        return f"contains a line break or another control character: {brief(value)}"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return f"is not UTF-8 text: {brief(value)}"
    return None


def problem_of(value: Any, hint: Any) -> str | None:
    """Reason why a value of the right type is invalid for an option declared as `hint`; None if it is valid."""
    if PROSE in getattr(hint, "__metadata__", ()):
        return None
    if isinstance(value, str):
        return text_problem(value)
    if isinstance(value, tuple):
        return next((problem for one in value if (problem := problem_of(one, hint))), None)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return range_of(hint).problem(value)
    return None


def range_of(hint: Any) -> Range:
    """The range that a type hint declares, also within `| None`; ANY if it declares none."""
    for declared in getattr(hint, "__metadata__", ()):
        if isinstance(declared, Range):
            return declared
    found = (range_of(part) for part in typing.get_args(hint))
    return next((one for one in found if one is not ANY), ANY)


@cache
def hints_of(cls: type) -> dict[str, Any]:
    """Name -> type hint of the fields of a dataclass, including annotations."""
    return typing.get_type_hints(cls, include_extras=True)


def plain(hint: Any) -> Any:
    """A type hint without `| None` and annotations."""
    if typing.get_origin(hint) is Annotated:
        return plain(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(plain(arm) for arm in typing.get_args(hint) if arm is not types.NoneType)
    return hint


def takes_none(hint: Any) -> bool:
    """Returns True if a type hint allows None."""
    return any(arm is types.NoneType or takes_none(arm) for arm in typing.get_args(hint))


def check_values(options: Any) -> None:
    """Checks every field of a dataclass against its declared range or `choice`; groups check themselves.

    Raises:
        UserError: a field is invalid; the message names the first one.
    """
    hints = hints_of(type(options))
    for field in fields(options):
        value = getattr(options, field.name)
        if choices := field.metadata.get("choices"):
            choose(field.metadata["what"] or field.name, value, choices)
        elif not is_dataclass(value) and (problem := problem_of(value, hints[field.name])):
            raise OptionError(options, field.name, problem)
