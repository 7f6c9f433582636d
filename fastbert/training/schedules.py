"""Learning rate schedules: a linear warm-up, followed by one of several shapes until the end of the training."""

import math
from collections.abc import Callable

from fastbert.errors import UserError
from fastbert.training.options import ScheduleOptions


def warmup_steps(options: ScheduleOptions, steps: int) -> int:
    """Number of warm-up steps in a run of `steps` updates.

    Raises:
        UserError: the warm-up, or the sum of warm-up and decay, is longer than the run.
    """
    warmup = int(options.warmup) if options.warmup >= 1 else round(options.warmup * steps)
    if warmup > steps:
        raise UserError(f"a warm-up of {warmup} steps does not fit a run of {steps}; lower warmup or raise steps")
    if options.name == "wsd" and warmup + _decay_steps(options, steps) > steps:
        raise UserError(
            f"a warm-up of {warmup} and a decay of {_decay_steps(options, steps)} steps do not fit a run of {steps}; "
            "lower warmup or decay"
        )
    return warmup


def learning_rate_factor(options: ScheduleOptions, step: int, steps: int) -> float:
    """The learning rate of update number `step` of `steps`, counted from 0, as a fraction of the peak.

    With w warm-up steps the factor is (step + 1) / w while step < w: the first update already changes the weights, and
    update w - 1 has the peak rate. Afterwards, with p = (step - w) / (steps - w), it is linear 1 - p (1 - final),
    cosine final + (1 - final) (1 + cos pi p) / 2, constant 1, wsd 1 and then linear over the last fraction `decay` of
    the steps. `final` would be reached at step == steps, one step after the last update, whose rate is therefore not
    zero.

    Raises:
        UserError: see `warmup_steps`. It does not depend on `step`, so one call before the training checks the
            schedule.
    """
    warmup = warmup_steps(options, steps)
    if step < warmup:
        return (step + 1) / warmup
    return SHAPES[options.name](options, step, warmup, steps)


def _decay_steps(options: ScheduleOptions, steps: int) -> int:
    return round(options.decay * steps)


def _progress(step: int, first: int, last: int) -> float:
    """The position of `step` between `first` (0) and `last` (1), clamped."""
    return min(max((step - first) / max(last - first, 1), 0.0), 1.0)


def _linear(options: ScheduleOptions, step: int, first: int, steps: int) -> float:
    return 1 - (1 - options.final) * _progress(step, first, steps)


def _cosine(options: ScheduleOptions, step: int, first: int, steps: int) -> float:
    return options.final + (1 - options.final) * (1 + math.cos(math.pi * _progress(step, first, steps))) / 2


def _constant(options: ScheduleOptions, step: int, first: int, steps: int) -> float:
    return 1.0


def _wsd(options: ScheduleOptions, step: int, first: int, steps: int) -> float:
    return _linear(options, step, steps - _decay_steps(options, steps), steps)


# (options, step, first step after the warm-up, steps) -> fraction of the peak
SHAPES: dict[str, Callable[[ScheduleOptions, int, int, int], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "wsd": _wsd,
}
