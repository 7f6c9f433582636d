"""How the learning rate runs over a training: a warm-up from near zero, then one of several shapes down to the end."""

import math
from collections.abc import Callable

from fastbert.errors import UserError
from fastbert.training.options import ScheduleOptions


def warmup_steps(options: ScheduleOptions, steps: int) -> int:
    """The length of the warm-up in a run of `steps` updates.

    Raises:
        UserError: the warm-up, or warm-up and decay together, are longer than the run.
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
    """The share of the peak learning rate for update number `step`, counted from 0, of `steps`.

    With w warm-up steps the factor is (step + 1) / w while step < w: the first update moves the weights, and update
    w - 1 has the peak. After it, with p = (step - w) / (steps - w), it follows the shape: linear 1 - p (1 - final),
    cosine final + (1 - final) (1 + cos pi p) / 2, constant 1, wsd 1 and then linear over the last `decay` of the steps.
    `final` would be reached at step == steps; the last planned update lies one step before, so it is not lost to a rate
    of zero.

    Raises:
        UserError: as `warmup_steps`; any call, step 0 for instance, shows it before work starts.
    """
    warmup = warmup_steps(options, steps)
    if step < warmup:
        return (step + 1) / warmup
    return SHAPES[options.name](options, step, warmup, steps)


def _decay_steps(options: ScheduleOptions, steps: int) -> int:
    return round(options.decay * steps)


def _progress(step: int, first: int, last: int) -> float:
    """Where `step` lies between `first` (0) and `last` (1), clamped."""
    return min(max((step - first) / max(last - first, 1), 0.0), 1.0)


def _linear(options: ScheduleOptions, step: int, first: int, steps: int) -> float:
    return 1 - (1 - options.final) * _progress(step, first, steps)


def _cosine(options: ScheduleOptions, step: int, first: int, steps: int) -> float:
    return options.final + (1 - options.final) * (1 + math.cos(math.pi * _progress(step, first, steps))) / 2


def _constant(options: ScheduleOptions, step: int, first: int, steps: int) -> float:
    return 1.0


def _wsd(options: ScheduleOptions, step: int, first: int, steps: int) -> float:
    return _linear(options, step, steps - _decay_steps(options, steps), steps)


# (options, step, first step after the warm-up, steps) -> share of the peak
SHAPES: dict[str, Callable[[ScheduleOptions, int, int, int], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "wsd": _wsd,
}
