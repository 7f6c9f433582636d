"""Slices of a task: named conditions on an example, in the task's YAML file, and the metrics on each.

    slices:
      - {name: long, min_words: 20}
      - {name: negated, pattern: "\\\\b(not|never)\\\\b|n't"}
      - {name: news, column: source, equals: news}
      - {name: similar, min_shared: 0.5}

An example with several conditions must fulfil all of them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from fastbert.config import from_dict
from fastbert.errors import OptionError, UserError, brief
from fastbert.finetuning.patterns import compile_pattern
from fastbert.finetuning.rows import Example
from fastbert.inheritance import read_yaml
from fastbert.ranges import Natural, Range, check_values

KEY = "slices"
ALL = "all examples"
"""Name of the row of all examples, in tables of slices."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Slice:
    """A subset of the examples of a task."""

    name: str
    """Name in tables."""
    min_words: Natural | None = None
    """Smallest number of words, of both texts together; words are separated by white space."""
    max_words: Natural | None = None
    """Largest number of words."""
    pattern: str | None = None
    """Regular expression of Python's re that is found in one of the texts. A pattern with nested repetitions can take
    very long."""
    column: str | None = None
    """Column of the files that `equals` is compared with."""
    equals: str | None = None
    """Content of the column, as text."""
    min_shared: Annotated[float, Range(0, 1)] | None = None
    """Smallest fraction of the different words of a pair that both texts have, in lower case (Jaccard index)."""
    max_shared: Annotated[float, Range(0, 1)] | None = None
    """Largest such fraction."""

    def __post_init__(self) -> None:
        check_values(self)
        if not self.name.strip():
            raise OptionError(self, "name", "is empty; give the slice a name")
        if self.name == ALL:
            raise OptionError(self, "name", f"is {ALL}, which tables have without a slice; give it another name")
        if all(getattr(self, field.name) is None for field in fields(self)[1:]):
            conditions = ", ".join(field.name for field in fields(self)[1:])
            raise UserError(f"the slice {brief(self.name, str)} has no condition; give one or more of {conditions}")
        if (self.column is None) != (self.equals is None):
            raise UserError(f"the slice {brief(self.name, str)}: column and equals belong together; give both")
        for least, most in ((self.min_words, self.max_words), (self.min_shared, self.max_shared)):
            if least is not None and most is not None and least > most:
                raise UserError(f"the slice {brief(self.name, str)}: the minimum {least} is above the maximum {most}")
        if self.pattern is not None:
            try:
                compile_pattern(self.pattern)
            except UserError as error:
                raise UserError(f"the slice {brief(self.name, str)}: {error}") from None

    @property
    def compares_texts(self) -> bool:
        return self.min_shared is not None or self.max_shared is not None

    @cached_property
    def _pattern(self) -> re.Pattern:
        return compile_pattern(self.pattern)

    def contains(self, example: Example) -> bool:
        texts = [example.text] if example.pair is None else [example.text, example.pair]
        count = sum(len(text.split()) for text in texts)
        if not (self.min_words or 0) <= count <= (count if self.max_words is None else self.max_words):
            return False
        if self.pattern is not None and not any(map(self._pattern.search, texts)):
            return False
        if self.column is not None and as_text(example.cells.get(self.column)) != self.equals:
            return False
        if self.compares_texts:
            first, second = (set(_WORD.findall(text.lower())) for text in texts)
            in_both = len(first & second) / max(1, len(first | second))
            return (self.min_shared or 0.0) <= in_both <= (1.0 if self.max_shared is None else self.max_shared)
        return True


def as_text(value: Any) -> str:
    """A cell as the text that `equals` is compared with: whole numbers without a point, true and false."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value).strip()


def slices_from(values: Any, where: str) -> tuple[Slice, ...]:
    """The slices in a list of mappings; `where` names their origin in errors.

    Raises:
        UserError: it is no such list, a slice is invalid, or two have one name.
    """
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: {KEY} must be a list of slices, such as - {{name: long, min_words: 20}}")
    found: dict[str, Slice] = {}
    for number, value in enumerate(values, 1):
        one = from_dict(Slice, value, f"{where}: {KEY}, number {number}")
        if one.name in found:
            raise UserError(f"{where}: two slices are called {brief(one.name, str)}; rename one")
        found[one.name] = one
    return tuple(found.values())


def load_slices(path: str) -> tuple[Slice, ...]:
    """The slices in a YAML file with the one key `slices`.

    Raises:
        UserError: it cannot be read, has other keys, or has an invalid slice.
    """
    values, where = read_yaml(path)
    if not isinstance(values, dict) or set(values) != {KEY}:
        raise UserError(f"{where}: expected the key {KEY} with a list of slices, and no other")
    return slices_from(values[KEY], where)


def split_off(path: str | Path) -> tuple[dict[str, Any], str, tuple[Slice, ...]]:
    """The other options in a task's YAML file, their origin, and its slices."""
    values, where = read_yaml(path)
    slices = slices_from(values.pop(KEY), where) if isinstance(values, dict) and KEY in values else ()
    return values, where, slices


def columns_of(slices: Sequence[Slice]) -> tuple[str, ...]:
    """Columns that the slices read."""
    return tuple(dict.fromkeys(one.column for one in slices if one.column is not None))


def masks(slices: Sequence[Slice], examples: Sequence[Example], where: str) -> dict[str, np.ndarray]:
    """Slice -> bool [N], the examples in it.

    Raises:
        UserError: a slice compares two texts and the examples have one, or it has no example.
    """
    found = {}
    for one in slices:
        if one.compares_texts and examples[0].pair is None:
            raise UserError(
                f"the slice {brief(one.name, str)} compares the two texts of a pair, and {where} has single texts; "
                "leave min_shared and max_shared out"
            )
        found[one.name] = np.array([one.contains(example) for example in examples])
        if not found[one.name].any():
            raise UserError(
                f"the slice {brief(one.name, str)} has none of the {len(examples)} examples of {where}; change its "
                "condition, or leave it out"
            )
    return found


def slice_head(task: str, name: str) -> str:
    """Name of the head of a slice."""
    return f"{task}, slice {name}"


Masks = Mapping[str, Mapping[str, np.ndarray]]
"""Dev split -> slice -> bool [N], the examples in it."""
