"""Learning rate schedules compared with transformers and closed forms, and their properties."""

import math
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.errors import UserError
from fastbert.training.options import COOLDOWNS, SCHEDULES, PretrainScheduleOptions, ScheduleOptions
from fastbert.training.schedules import constant_phase, learning_rate_factor, resolved, warmup_steps


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
    name=st.sampled_from(SCHEDULES),
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


GOLDEN = {5: 1.5e-4, 10: 3e-4, **dict.fromkeys((610, 611, 899, 900), 1.65e-4), 950: 7.035624e-5, 1000: 3e-5}
"""Learning rates of updates 1 ... 1000 of the infinite schedule, without those of the cooldown."""


@pytest.mark.parametrize(
    ("shape", "cooldown"),
    [
        ("cosine", {160: 2.802297e-4, 310: 2.325e-4, 460: 1.847703e-4}),
        ("inverse-root", {160: 2.100351e-4, 310: 1.856295e-4, 460: 1.730181e-4}),
    ],
)
def test_infinite_agrees_with_the_paper(shape, cooldown):
    """Published constants: W 10, C 600, K 290 of N 1000, which are the defaults."""
    for options in (
        PretrainScheduleOptions("infinite", 10, 0.1, cooldown=600, cooldown_shape=shape, constant=0.55, annealing=100),
        PretrainScheduleOptions("infinite", cooldown_shape=shape),
    ):
        assert constant_phase(options, 1000) == (610, 900)
        for update, rate in (GOLDEN | cooldown).items():
            assert f"{3e-4 * learning_rate_factor(options, update - 1, 1000):.6e}" == f"{rate:.6e}", update


@settings(max_examples=40)
@given(
    warmup=st.floats(0, 0.3),
    cooldown=st.floats(0, 0.3),
    annealing=st.floats(0.001, 0.3),
    constant=st.floats(0.3, 1),
    final=st.one_of(st.none(), st.floats(1e-4, 0.29)),
    shape=st.sampled_from(COOLDOWNS),
    steps=st.integers(40, 300),
    more=st.integers(0, 300),
)
def test_properties_of_infinite(warmup, cooldown, annealing, constant, final, shape, steps, more):
    """Its rates never rise after the warm-up, are exactly constant between the phases, end exactly with `final`, and
    are equal to the bit before the annealing of a longer run."""
    given_ones = PretrainScheduleOptions(
        "infinite", warmup, final, cooldown=cooldown, cooldown_shape=shape, constant=constant, annealing=annealing
    )
    options = resolved(given_ones, steps)
    assert resolved(options, steps + more) == options
    factors = [learning_rate_factor(options, step, steps) for step in range(steps)]
    assert factors == [learning_rate_factor(given_ones, step, steps) for step in range(steps)]
    first, last = constant_phase(options, steps)
    n = warmup_steps(options, steps)
    assert factors[:n] == pytest.approx([(step + 1) / n for step in range(n)])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(factors[n:], factors[n + 1 :], strict=False))
    assert set(factors[first:last]) <= {constant} and (first == n or factors[first - 1] == constant)
    assert factors[-1] == (0.1 if final is None else final) and last < steps
    assert all(later < earlier for earlier, later in zip(factors[last:], factors[last + 1 :], strict=False))
    longer = [learning_rate_factor(options, step, steps + more) for step in range(last)]
    assert longer == factors[:last] and constant_phase(options, steps + more) == (first, last + more)


def test_constant_phases_of_the_other_schedules():
    assert constant_phase(ScheduleOptions("constant", 0.1), 100) == (10, 100)
    assert constant_phase(ScheduleOptions("wsd", 5, decay=0.3), 100) == (5, 70)
    assert constant_phase(ScheduleOptions("linear"), 100) is constant_phase(ScheduleOptions("cosine"), 100) is None


def test_options_without_effect():
    infinite = {"cooldown", "cooldown_shape", "constant", "annealing"}
    assert PretrainScheduleOptions("infinite").inactive() == {"decay"}
    assert PretrainScheduleOptions("wsd").inactive() == infinite
    assert PretrainScheduleOptions("constant").inactive() == {"decay", "final", *infinite}


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final": 0.0}, "final must be greater than 0 for infinite, .* leave it out for 0.1"),
        ({"final": 0.6}, "final must not be greater than the constant rate, 0.55 of the peak, not 0.6"),
        ({"constant": 0.05}, "not be greater than the constant rate, 0.05 of the peak, not 0.1"),
        ({"constant": 0.0}, r"constant must be in \(0, 1\], not 0.0"),
        ({"annealing": 0.0}, "annealing must be greater than 0, not 0.0"),
        ({"annealing": 2.5}, "annealing must be .* a whole number of steps, not 2.5"),
        ({"cooldown": 7.5}, "cooldown must be .* a whole number of steps, not 7.5"),
        ({"cooldown_shape": "inverse"}, "did you mean 'inverse-root'"),
    ],
)
def test_wrong_options_of_infinite_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        PretrainScheduleOptions("infinite", **change)
    if "final" in change or change.get("constant"):  # without effect in the other schedules
        PretrainScheduleOptions("cosine", **change)


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="warm-up of 101 steps does not fit a run of 100"):
        learning_rate_factor(ScheduleOptions(warmup=101), 0, 100)
    with pytest.raises(UserError, match="warm-up of 60 and a decay of 50 steps do not fit a run of 100"):
        learning_rate_factor(ScheduleOptions("wsd", warmup=60, decay=0.5), 0, 100)
    with pytest.raises(UserError, match="warm-up of 1, a cooldown of 91 and an annealing of 10 steps do not fit a run"):
        learning_rate_factor(PretrainScheduleOptions("infinite", cooldown=91), 0, 100)
