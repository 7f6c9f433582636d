"""What the time of a run is made of, and the steps that fit into a budget in minutes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

from fastbert.data.stages import Plan, steps_within
from fastbert.pretraining.options import PretrainOptions

FRACTION = 0.05  # of a budget in minutes that timing its steps takes
SHORT = 200  # steps
LEAST, MOST = 3.0, 60.0  # seconds, of that: the least only where it is below a fifth of the budget


@dataclass(frozen=True)
class Costs:
    """Seconds of a run's parts."""

    start: float
    step: Callable[[int, int], float]
    """(batch_size, length) -> of a step."""
    validation: float
    checkpoint: float
    finish: float

    def spans(self, plan: Plan, options: PretrainOptions, done: int, steps: int) -> dict[str, float]:
        """The time of the steps after `done` in a run of `steps` steps, part by part, by name."""
        validations, checkpoints = saves_between(options, done, steps)
        return {
            "start": self.start,
            f"{steps - done} steps": plan.total(self.step, done, steps),
            f"{validations} validations": validations * self.validation,
            f"{checkpoints} checkpoints": checkpoints * self.checkpoint,
            "export and curves": self.finish,
        }

    def steps_in(self, seconds: float, plan: Callable[[int], Plan], options: PretrainOptions) -> int:
        """The steps of a run that takes about `seconds`, all its parts counted; at least those of the shortest run.

        Args:
            plan: steps -> the plan of a run of that many.
        """

        def total(steps: int) -> float:
            return sum(self.spans(plan(steps), options, 0, steps).values())

        least = options.stages.least_steps
        steps = steps_within(seconds, total, least)
        if steps >= SHORT:
            return steps
        # Their number of validations is uneven: 19 steps have 19 of them, 20 have ten.
        return max((steps for steps in range(least, SHORT) if total(steps) <= seconds), default=least)


def timing_window(seconds: float) -> float:
    """Seconds in which the steps of a run are timed that may take `seconds`."""
    return min(max(FRACTION * seconds, min(LEAST, 0.2 * seconds)), MOST)


def intervals(options: PretrainOptions, steps: int) -> tuple[int, int]:
    """Steps between validations and between checkpoints, in a run of `steps` steps."""
    return options.eval_every or max(1, steps // 10), options.checkpoint_every or min(1000, max(1, steps // 5))


def saves_between(options: PretrainOptions, done: int, steps: int) -> tuple[int, int]:
    """Validations and checkpoints after step `done` of a run of `steps` steps; each validation is taken for the best so
    far, and is then kept."""
    eval_every, checkpoint_every = intervals(options, steps)
    marked = {steps, *options.milestone_steps()}

    def between(*intervals: int) -> int:
        """The steps in (done, steps] that are marked or a multiple of one of the intervals."""
        others = sum(done < step <= steps and all(step % interval for interval in intervals) for step in marked)
        return others + sum(
            (-1) ** (count + 1) * (steps // math.lcm(*chosen) - min(done, steps) // math.lcm(*chosen))
            for count in range(1, len(intervals) + 1)
            for chosen in combinations(intervals, count)
        )

    return between(eval_every), between(eval_every, checkpoint_every)


def shown_spans(spans: dict[str, float]) -> str:
    return ", ".join(f"{name} {shown_time(span)}" for name, span in spans.items())


def shown_time(value: float) -> str:
    if value < 60:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02} h" if minutes >= 60 else f"{minutes}:{rest:02} min"
