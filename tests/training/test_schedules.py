"""Learning rate schedules compared with transformers and closed forms, and their properties."""

import math
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from fastbert.errors import UserError
from fastbert.training.options import ScheduleOptions
from fastbert.training.schedules import SHAPES, learning_rate_factor, warmup_steps


def transformers_factors(make, steps):
    """The factors of a transformers schedule at steps 0 .. steps - 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    factors = []
    for _ in range(steps + 1):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize(
    ("options", "make"),
    [
        (ScheduleOptions("linear", 10), lambda o: transformers.get_linear_schedule_with_warmup(o, 10, 100)),
        (ScheduleOptions("cosine", 10), lambda o: transformers.get_cosine_schedule_with_warmup(o, 10, 100)),
        (
            ScheduleOptions("cosine", 10, final=0.1),
            lambda o: transformers.get_cosine_with_min_lr_schedule_with_warmup(o, 10, 100, min_lr_rate=0.1),
        ),
        (ScheduleOptions("constant", 10), lambda o: transformers.get_constant_schedule_with_warmup(o, 10)),
        (
            ScheduleOptions("wsd", 10, final=0.1, decay=0.3),
            lambda o: transformers.get_wsd_schedule(o, 10, 30, 100, decay_type="linear", min_lr_ratio=0.1),
        ),
    ],
    ids=["linear", "cosine", "cosine to a tenth", "constant", "wsd"],
)
def test_agrees_with_transformers(options, make):
    """Step by step after the warm-up; one step ahead during the warm-up, since the first update must not be lost."""
    theirs = transformers_factors(make, 100)
    ours = [learning_rate_factor(options, step, 100) for step in range(100)]
    # transformers' wsd starts its warm-up from final instead of zero: only its end can be compared.
    warmup = theirs[10:11] if options.name == "wsd" else theirs[1:11]
    assert ours[10 - len(warmup) : 10] == pytest.approx(warmup)
    assert ours[10:] == pytest.approx(theirs[10:100])


@given(
    name=st.sampled_from(sorted(SHAPES)),
    warmup=st.one_of(st.floats(0, 0.5), st.integers(1, 50)),
    final=st.floats(0, 1),
    decay=st.floats(0, 0.45),
    steps=st.integers(100, 1000),
)
def test_properties_of_all_schedules(name, warmup, final, decay, steps):
    """Never zero, never above the peak, increasing in the warm-up and never increasing after it."""
    options = ScheduleOptions(name, warmup, final, decay)
    factors = [learning_rate_factor(options, step, steps) for step in range(steps)]
    n = warmup_steps(options, steps)
    assert min(factors) > 0 and max(factors) == pytest.approx(1)
    assert factors[:n] == pytest.approx([(step + 1) / n for step in range(n)])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(factors[n:], factors[n + 1 :], strict=False))
    if name == "linear":
        assert factors[-1] == pytest.approx(1 - (1 - final) * (1 - 1 / (steps - n)))
    assert learning_rate_factor(options, steps, steps) == pytest.approx(
        1 if name == "constant" or (name == "wsd" and round(decay * steps) == 0) else final
    )


def test_warmup_is_a_fraction_below_one_and_steps_from_one():
    assert warmup_steps(ScheduleOptions(warmup=0.25), 1000) == 250
    assert warmup_steps(ScheduleOptions(warmup=1), 1000) == 1
    assert warmup_steps(ScheduleOptions(warmup=250), 1000) == 250
    assert learning_rate_factor(ScheduleOptions(warmup=0), 0, 10) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "cosin"}, "did you mean 'cosine'"),
        ({"warmup": -0.1}, "warmup must be at least 0, not -0.1"),
        ({"warmup": 10.5}, "warmup must be .* a whole number of steps, not 10.5"),
        ({"warmup": math.nan}, "warmup must be a finite number, not nan"),
        ({"warmup": math.inf}, "warmup must be a finite number, not inf"),
        ({"final": 1.5}, r"final must be in \[0, 1\], not 1.5"),
        ({"decay": -1.0}, r"decay must be in \[0, 1\], not -1.0"),
    ],
)
def test_wrong_options_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        replace(ScheduleOptions(), **change)


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="warm-up of 101 steps does not fit a run of 100"):
        learning_rate_factor(ScheduleOptions(warmup=101), 0, 100)
    with pytest.raises(UserError, match="warm-up of 60 and a decay of 50 steps do not fit a run of 100"):
        learning_rate_factor(ScheduleOptions("wsd", warmup=60, decay=0.5), 0, 100)
