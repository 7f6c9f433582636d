"""Replay: which rows are old, in which order, and that nothing else changes."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data.batches import InMemory, PackedRows, Replay, ReplayedRows, TrainingBatches
from fastbert.data.replay import ReplaySchedule
from fastbert.data.stages import BatchPlan, Stage
from fastbert.errors import UserError

CPU = torch.device("cpu")
CLS, SEP = 2, 3


def rows(first: int, tokens: int, length: int) -> PackedRows:
    """Rows of the tokens first, first + 1, ..."""
    return PackedRows(InMemory(np.arange(first, first + tokens)), length, CLS, SEP)


def batches(plan: BatchPlan, fraction: float, seed: int = 7, new: int = 1000, old: int = 500) -> TrainingBatches:
    """Batches of new tokens from 10,000 on and old ones from 100 on."""
    both = {length: (rows(10_000, new, length), rows(100, old, length)) for length in plan.lengths}
    if not fraction:
        return TrainingBatches({length: pair[0] for length, pair in both.items()}, plan, 4, 3, CPU)
    joined = {length: ReplayedRows(*pair, fraction) for length, pair in both.items()}
    return TrainingBatches(joined, plan, 4, 3, CPU, replay=Replay(ReplaySchedule(fraction), seed))


def texts(found: TrainingBatches, steps: int) -> list[tuple[int, ...]]:
    """The rows of the first steps, without [CLS]."""
    return [tuple(row[1:]) for step in range(steps) for batch in found.at(step) for row in batch.input_ids.tolist()]


@settings(max_examples=200)
@given(st.fractions(0, 1, max_denominator=1000), st.integers(0, 2**62))
def test_the_fraction_is_exact_in_every_prefix(fraction: Fraction, start: int) -> None:
    """By counting rows one by one, with exact arithmetic, also far beyond the integers that float64 holds."""
    if fraction == 1:
        return
    schedule = ReplaySchedule(0.0)
    schedule.fraction = fraction
    numbers = np.arange(start, start + 50, dtype=np.uint64).astype(np.int64)
    old, within = schedule.divide(numbers)
    counts = {True: start * fraction.numerator // fraction.denominator}
    counts[False] = start - counts[True]
    for number, is_old, index in zip(numbers.tolist(), old.tolist(), within.tolist(), strict=True):
        assert is_old == ((number + 1) * fraction // 1 > number * fraction // 1)
        assert index == counts[is_old]
        counts[is_old] += 1
        assert counts[True] == (number + 1) * fraction // 1


def test_the_fraction_is_the_decimal_number() -> None:
    """0.1 as a binary number is slightly more than a tenth, which would give the tenth row of ten too early or late."""
    schedule = ReplaySchedule(0.1)
    assert schedule.fraction == Fraction(1, 10)
    assert [schedule.old_before(10 * n) for n in (1, 3, 7, 10**15)] == [1, 3, 7, 10**15]
    assert ReplaySchedule(1e-5).fraction == Fraction(1, 100_000)


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.3, 0.99])
def test_old_rows_are_those_of_the_old_run_in_its_order(fraction: float) -> None:
    """And new rows are those of a run without replay. Several epochs of the old data."""
    steps, plan = 80, BatchPlan.constant(8, 10)
    old_run = TrainingBatches({10: rows(100, 500, 10)}, plan, 4, 7, CPU)
    mixed, alone, before = texts(batches(plan, fraction), steps), texts(batches(plan, 0), steps), texts(old_run, steps)
    old = [text for text in mixed if text[0] < 10_000]
    assert len(old) == int(Fraction(str(fraction)) * len(mixed))
    assert old == before[: len(old)]
    new = [text for text in mixed if text[0] >= 10_000]
    assert new == alone[: len(new)]
    spread = [sum(text[0] < 10_000 for text in mixed[first : first + 8]) for first in range(0, len(mixed), 8)]
    assert max(spread) - min(spread) <= 1  # every batch has its part


def test_each_length_has_its_own_order() -> None:
    plan = BatchPlan((Stage(0, 8, 10), Stage(10, 4, 20)))
    mixed, alone = (texts(batches(plan, fraction), 40) for fraction in (0.25, 0))
    for length in (10, 20):
        of_length = [text for text in mixed if len(text) == length - 1]
        assert sum(text[0] < 10_000 for text in of_length) == len(of_length) // 4
        new = [text for text in of_length if text[0] >= 10_000]
        assert new == [text for text in alone if len(text) == length - 1][: len(new)]


@pytest.mark.parametrize("fraction", [0.0, 0.4])
def test_the_order_of_the_last_length_is_that_of_a_run_without_another(fraction: float) -> None:
    """The rows of a run of 16, then 32 tokens are repeated by a run of 32 tokens, and the other way round."""
    both = batches(BatchPlan((Stage(0, 8, 16), Stage(2, 4, 32))), fraction)
    assert texts(both, 6)[16:] == texts(batches(BatchPlan.constant(4, 32), fraction), 4)


def test_accumulation_changes_nothing() -> None:
    plan = BatchPlan.constant(8, 10)
    one, other = batches(plan, 0.3), batches(plan, 0.3)
    other.micro_batch_size = 8
    assert texts(one, 20) == texts(other, 20)


def test_too_little_data_is_refused() -> None:
    plan = BatchPlan.constant(8, 10)
    with pytest.raises(UserError, match="the corpus has 7 sequences of 10 tokens, less than one batch of 8"):
        batches(plan, 0.3, new=71)
    with pytest.raises(UserError, match=r"old data of --replay\.data has less than one sequence of 10 tokens"):
        batches(plan, 0.3, old=8)
