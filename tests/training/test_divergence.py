"""Skipped updates are counted and reported, and the fifth in a row ends the training with advice."""

from dataclasses import dataclass

import pytest

from fastbert.errors import UserError
from fastbert.training.divergence import guard


@dataclass
class Counts:
    skipped: int = 0
    skipped_in_row: int = 0


GOOD = {"loss": 1.0, "norm": 2.0, "finite": 1.0}
BAD = {"loss": float("inf"), "norm": 3.0, "finite": 0.0}


def test_good_updates_reset_the_count() -> None:
    counts, messages = Counts(), []
    made = [guard(counts, step, BAD if step % 5 else GOOD, messages.append, lambda: "") for step in range(20)]
    assert made == [step % 5 == 0 for step in range(20)]
    assert (counts.skipped, counts.skipped_in_row) == (16, 4)
    assert len(messages) == 16 and messages[0] == "step 2: loss inf, gradient norm 3; update skipped"


def test_five_in_a_row_stop_the_training() -> None:
    counts, messages, asked = Counts(skipped=7), [], []

    def advice() -> str:
        asked.append(1)
        return "; rest a while"

    for step in range(4):
        assert not guard(counts, step, BAD, messages.append, advice)
    assert not asked
    with pytest.raises(UserError, match=r"not finite in 5 steps in a row, up to step 5; rest a while$"):
        guard(counts, 4, BAD, messages.append, advice)
    assert counts.skipped == 12 and len(messages) == 5
