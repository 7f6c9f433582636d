"""Replay: a fixed fraction of the rows of a run is old data, so that a model that learns a new text forgets less of the
old one (arXiv 2403.08763).

Row n of a run (counted from 0, for each sequence length) is old exactly if floor((n + 1) r) > floor(n r). It is then
row floor(n r) in the order of the old data; otherwise row n - floor(n r) in the order of the new data. The fraction r
is exact in every prefix of the run, and there is no state: any row can be read without the previous ones.
"""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated

import numpy as np

from fastbert.config import BOOKKEEPING
from fastbert.errors import UserError
from fastbert.ranges import Range, Seed, check_values


@dataclass(frozen=True)
class ReplayOptions:
    """Old data among the rows of a run that continues pretraining."""

    data: str | None = field(default=None, metadata=BOOKKEEPING)
    """Old data: a prepared folder, whose vocabulary is that of --data or its beginning, or a source to prepare with the
    tokenizer of --init-from, or else that of --data. Its held-out documents are validated under the name old, for any
    fraction. Default: no replay."""
    fraction: Annotated[float, Range(0, below=1)] = 0.05
    """Fraction of the rows that are old data; the number of new rows is smaller by as much. 0.05 for a weak shift, 0.25
    for a strong one; with 0 the old data is only validated."""
    seed: Seed | None = None
    """Seed of the order of the old data (default: the seed of the run in --init-from, so that its order is repeated;
    otherwise --seed)."""

    def __post_init__(self) -> None:
        check_values(self)

    def check(self) -> None:
        """Raises a UserError if options of replay are given without data."""
        for name in ("fraction", "seed"):
            if self.data is None and getattr(self, name) != getattr(ReplayOptions, name):
                raise UserError(f"--replay.{name} needs the old data, --replay.data; give it, or leave it out")

    @property
    def active(self) -> bool:
        """True if there are old rows."""
        return self.data is not None and self.fraction > 0

    def inactive(self) -> set[str]:
        """Names of the options without effect."""
        return set() if self.active else {"fraction", "seed"}


class ReplaySchedule:
    """Division of the rows of a run into old and new ones.

    Args:
        fraction: r, read as the decimal number in which it is written: 0.1 is one tenth.
    """

    def __init__(self, fraction: float) -> None:
        self.fraction = Fraction(str(fraction))

    def old_before(self, number: int) -> int:
        """Number of old rows among the first `number` rows, floor(n r)."""
        return number * self.fraction.numerator // self.fraction.denominator

    def divide(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Divides the rows with these numbers in the run (from 0).

        Returns:
            bool [N], true for old rows; int64 [N], the number of each row among the old or the new ones.
        """
        exact = [int(number) for number in numbers]  # Python's integers do not overflow
        before = np.array([self.old_before(number) for number in exact], dtype=np.int64)
        old = np.array([self.old_before(number + 1) for number in exact], dtype=np.int64) > before
        return old, np.where(old, before, np.asarray(numbers, dtype=np.int64) - before)
