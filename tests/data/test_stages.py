"""Plans of batches: properties of any plan, explicit examples, and budgets."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data.stages import GROWTH_STAGES, BatchPlan, Stage, StageOptions, all_shapes, make_plan, steps_within
from fastbert.errors import UserError


@st.composite
def runs(sample):
    """(options, batch_size, length, steps) of all kinds."""
    start, times = sample(st.integers(1, 6)), sample(st.integers(2, 40))
    first, longer = sample(st.integers(2, 30)), sample(st.integers(2, 5))
    warmup = sample(st.one_of(st.floats(0.01, 0.99), st.integers(1, 50)))
    options = StageOptions(
        **sample(st.sampled_from(({}, {"first_length": first}, {"first_length": first, "first_offset": True}))),
        first_fraction=sample(st.floats(0.01, 0.99)),
        initial_batch_size=sample(st.sampled_from((None, start))),
        batch_warmup=float(warmup),
    )
    options.check(start * times, first * longer)
    return options, start * times, first * longer, sample(st.integers(options.least_steps, 400))


@given(runs())
def test_sums_equal_the_sums_of_single_steps(run) -> None:
    options, batch_size, length, steps = run
    plan = make_plan(options, batch_size, length, steps)
    stages = [plan.at(step) for step in range(steps)]
    half = steps // 3
    assert plan.tokens(half, steps) == sum(stage.batch_size * stage.length for stage in stages[half:])
    assert plan.total(lambda batch, length: batch**2 + length, half, steps) == sum(
        stage.batch_size**2 + stage.length for stage in stages[half:]
    )
    counts = dict.fromkeys(plan.lengths, 0)
    for step, stage in enumerate(stages):
        assert plan.sequences_before(step) == counts[stage.length]  # each sequence follows the one before it
        counts[stage.length] += stage.batch_size


@given(runs())
def test_batches_and_lengths_only_grow_to_the_requested_values(run) -> None:
    options, batch_size, length, steps = run
    stages = [make_plan(options, batch_size, length, steps).at(step) for step in range(steps)]
    lengths = [stage.length for stage in stages]
    assert lengths == sorted(lengths) and lengths[-1] == length
    if options.first_length is not None and steps > 1:
        assert abs(lengths.count(options.first_length) - options.first_fraction * steps) <= 1
    for stage in stages:  # offsets reach the last position of the longest rows, and no further
        assert stage.length + stage.largest_offset == (length if options.first_offset else stage.length)
    tokens = [stage.tokens for stage in stages]  # no step of the first length has others than it would have without
    assert tokens == sorted(tokens) and all(count % length == 0 for count in tokens)
    assert len(set(tokens)) <= GROWTH_STAGES + 1
    assert {stage.shape for stage in stages} <= all_shapes(options, batch_size, length)
    if options.initial_batch_size is None:
        assert set(tokens) == {batch_size * length}
    else:
        warmup = options.batch_warmup if options.batch_warmup >= 1 else options.batch_warmup * steps
        small = [count // length for count in tokens if count < batch_size * length]
        assert abs(len(small) - warmup) <= 0.5 and all(count % options.initial_batch_size == 0 for count in small)


@settings(max_examples=50)
@given(runs(), st.integers(1, 10**6))
def test_a_budget_in_tokens_is_used_up_to_less_than_a_step(run, budget) -> None:
    options, batch_size, length, _ = run

    def tokens(steps: int) -> int:
        return make_plan(options, batch_size, length, steps).tokens(0, steps)

    steps = steps_within(budget, tokens, options.least_steps)
    assert tokens(steps) <= budget or steps == options.least_steps
    assert tokens(steps + 1) > budget


def test_the_recipe_of_bert() -> None:
    plan = make_plan(StageOptions(first_length=128), 64, 512, 1000)
    assert plan.stages == (Stage(0, 256, 128), Stage(900, 64, 512))
    assert plan.describe(1000) == "1000 steps: 900 of 256 x 128 tokens, 100 of 64 x 512 tokens"
    assert plan.describe(900) == "900 steps of 256 x 128 tokens"
    assert [plan.sequences_before(step) for step in (0, 1, 899, 900, 901)] == [0, 256, 899 * 256, 0, 64]


def test_a_batch_grows_in_equal_parts() -> None:
    plan = make_plan(StageOptions(initial_batch_size=2, batch_warmup=90.0), 20, 16, 1000)
    assert [stage.batch_size for stage in plan.stages] == [2, 4, 6, 8, 10, 12, 14, 16, 20]
    assert [stage.first for stage in plan.stages] == [90 * i // 8 for i in range(9)]
    both = make_plan(StageOptions(8, 0.5, initial_batch_size=10, batch_warmup=0.7), 20, 16, 10)
    assert both.stages == (Stage(0, 20, 8), Stage(5, 10, 16), Stage(7, 20, 16))
    assert make_plan(StageOptions(), 20, 16, 10) == BatchPlan.constant(20, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_offset": True}, "first_offset has no effect without first_length; add --first-length"),
        ({"first_length": 16}, "first_length 16 is not shorter than length 16"),
        ({"first_length": 99}, "give the longest as --length"),
        ({"first_length": 7}, "cannot be cut into whole sequences of 7"),
        ({"first_length": 0}, "first_length must be at least 2, not 0"),
        ({"first_fraction": 1.0}, r"must be in \(0, 1\), not 1.0"),
        ({"first_fraction": math.nan}, "must be a finite number, not nan"),
        ({"initial_batch_size": 8}, "initial_batch_size 8 does not divide batch_size 8"),
        ({"initial_batch_size": 3}, "initial_batch_size 3 does not divide batch_size 8"),
        ({"batch_warmup": 1.5}, "whole number of steps"),
        ({"batch_warmup": 0.0}, "must be greater than 0, not 0.0"),
    ],
)
def test_wrong_options_are_refused(options, message) -> None:
    with pytest.raises(UserError, match=message):
        StageOptions(**options).check(8, 16)


def test_a_batch_that_grows_beyond_the_run_is_refused() -> None:
    with pytest.raises(UserError, match="grows for 11 steps, longer than the run of 10"):
        make_plan(StageOptions(initial_batch_size=4, batch_warmup=11.0), 8, 16, 10)
