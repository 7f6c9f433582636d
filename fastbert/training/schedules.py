"""Learning rate schedules: a linear warm-up, followed by one of several shapes until the end of the training.

With w warm-up steps, n the number of the update and N that of all updates, the infinite schedule (arXiv 2403.08763) has
four phases, where c is the constant rate as a fraction of the peak, f the final one, C the steps of the cooldown and A
those of the annealing:

    n <= w            n / w
    m = n - w <= C    c + (1 - c) (1 + cos(pi m / C)) / 2 or, with h(x) = 1 / sqrt(1 + 10 x) - 1,
                      c + (1 - c) (1 - h(m / C) / h(1))
    n <= N - A        c
    then              c^(1 - p) f^p with p = (n - N + A) / A, so that the last update has the rate f exactly

w, C and A are numbers of steps, so the rates up to update N - A do not depend on N.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from fastbert.errors import UserError
from fastbert.training.options import PretrainScheduleOptions, ScheduleOptions

STEEPNESS = 10.0  # of the inverse root
PHASES = ("warmup", "cooldown", "annealing")  # of infinite, with lengths that are fixed when a run starts


def warmup_steps(options: ScheduleOptions, steps: int) -> int:
    """Number of warm-up steps in a run of `steps` updates.

    Raises:
        UserError: the warm-up, or the sum of all phases with a length, is longer than the run.
    """
    warmup = _steps(options.warmup, steps)
    if warmup > steps:
        raise UserError(f"a warm-up of {warmup} steps does not fit a run of {steps}; lower warmup or train longer")
    if options.name == "wsd" and warmup + decay_steps(options, steps) > steps:
        raise UserError(
            f"a warm-up of {warmup} and a decay of {decay_steps(options, steps)} steps do not fit a run of {steps}; "
            "lower warmup or decay"
        )
    if options.name == "infinite":
        cooldown, annealing = _steps(options.cooldown, steps), annealing_steps(options, steps)
        if warmup + cooldown + annealing > steps:
            raise UserError(
                f"a warm-up of {warmup}, a cooldown of {cooldown} and an annealing of {annealing} steps do not fit a "
                f"run of {steps}; lower warmup, cooldown or annealing, or raise steps"
            )
    return warmup


def learning_rate_factor(options: ScheduleOptions, step: int, steps: int) -> float:
    """The learning rate of update number `step` of `steps`, counted from 0, as a fraction of the peak.

    With w warm-up steps the factor is (step + 1) / w while step < w: the first update already changes the weights, and
    update w - 1 has the peak rate. Afterwards, with p = (step - w) / (steps - w), it is linear 1 - p (1 - final),
    cosine final + (1 - final) (1 + cos pi p) / 2, constant 1, wsd 1 and then linear over the last fraction `decay` of
    the steps. `final` would be reached at step == steps, one step after the last update, whose rate is therefore not
    zero. Infinite is at the head of this module; it counts updates from 1 and reaches `final` at the last one.

    Raises:
        UserError: see `warmup_steps`. It does not depend on `step`, so one call before the training checks the
            schedule.
    """
    warmup = warmup_steps(options, steps)
    if step < warmup:
        return (step + 1) / warmup
    return SHAPES[options.name](options, step, warmup, steps)


def resolved(options: PretrainScheduleOptions, steps: int) -> PretrainScheduleOptions:
    """The schedule of a run of `steps` updates with the default of `final` set and, for infinite, with numbers of steps
    instead of fractions, so that its rates before the annealing are those of a longer run too."""
    options = replace(options, final=options.minimum)
    if options.name != "infinite":
        return options
    return replace(
        options,
        warmup=float(_steps(options.warmup, steps)),
        cooldown=float(_steps(options.cooldown, steps)),
        annealing=float(annealing_steps(options, steps)),
    )


def constant_phase(options: ScheduleOptions, steps: int) -> tuple[int, int] | None:
    """First and last number of updates done after which the rate is constant and its decay has not begun; None if the
    schedule has no constant phase. The decay of a run that branches off there begins with the next update."""
    warmup = warmup_steps(options, steps)
    if options.name == "constant":
        return warmup, steps
    if options.name == "wsd":
        return warmup, steps - decay_steps(options, steps)
    if options.name == "infinite":
        return warmup + _steps(options.cooldown, steps), steps - annealing_steps(options, steps)
    return None


def phase_lines(options: ScheduleOptions, steps: int) -> list[str]:
    """A line with the phases of the infinite schedule in a run of `steps` updates, before its first step; empty for
    other schedules."""
    if options.name != "infinite":
        return []
    first, last = constant_phase(options, steps)
    return [
        f"learning rate: warm-up to step {warmup_steps(options, steps)}, cooldown to step {first}, constant to step "
        f"{last}, annealing to step {steps}; up to step {last} the run can be lengthened (--resume with more --steps)"
    ]


def annealing_steps(options: PretrainScheduleOptions, steps: int) -> int:
    """Number of steps of infinite's annealing, at least one."""
    return max(1, _steps(options.annealing, steps))


def decay_steps(options: ScheduleOptions, steps: int) -> int:
    """Number of steps of wsd's decay."""
    return round(options.decay * steps)


def _steps(length: float, steps: int) -> int:
    """Number of steps of a length that is a fraction of `steps` if below 1."""
    return int(length) if length >= 1 else round(length * steps)


def _progress(step: int, first: int, last: int) -> float:
    """The position of `step` between `first` (0) and `last` (1), clamped."""
    return min(max((step - first) / max(last - first, 1), 0.0), 1.0)


def _linear(options: ScheduleOptions, step: int, first: int, steps: int) -> float:
    return 1 - (1 - options.minimum) * _progress(step, first, steps)


def _cosine(options: ScheduleOptions, step: int, first: int, steps: int) -> float:
    return options.minimum + (1 - options.minimum) * (1 + math.cos(math.pi * _progress(step, first, steps))) / 2


def _constant(options: ScheduleOptions, step: int, first: int, steps: int) -> float:
    return 1.0


def _wsd(options: ScheduleOptions, step: int, first: int, steps: int) -> float:
    return _linear(options, step, steps - decay_steps(options, steps), steps)


def _infinite(options: PretrainScheduleOptions, step: int, first: int, steps: int) -> float:
    done, cooldown, annealing = step + 1 - first, _steps(options.cooldown, steps), annealing_steps(options, steps)
    constant = options.constant
    if done <= cooldown:
        return constant + (1 - constant) * COOLDOWN_SHAPES[options.cooldown_shape](done / cooldown)
    progress = max(0, step + 1 - (steps - annealing)) / annealing
    return constant ** (1 - progress) * options.minimum**progress


def _inverse_root(progress: float) -> float:
    def height(x: float) -> float:
        return 1 / math.sqrt(1 + STEEPNESS * x) - 1

    return 1 - height(progress) / height(1)


# progress in the cooldown, from 0 to 1 -> part of the way down that remains, from 1 to 0
COOLDOWN_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "inverse-root": _inverse_root,
}

# (options, step, first step after the warm-up, steps) -> fraction of the peak
SHAPES: dict[str, Callable[[ScheduleOptions, int, int, int], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "wsd": _wsd,
    "infinite": _infinite,
}
