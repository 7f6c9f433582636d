"""Estimates the time of each part of a run, and the number of steps that fit into a budget in minutes."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations

from torch import nn

from fastbert.data.stages import NOMINAL_STEPS, BatchPlan, make_plan, steps_within
from fastbert.model.memory import training_memory
from fastbert.pretraining.options import PretrainOptions
from fastbert.pretraining.setup import PretrainSetup
from fastbert.progress import progress
from fastbert.streams import echo
from fastbert.training.checkpoints import existing
from fastbert.training.hardware import synchronize
from fastbert.training.lagged import LaggedScalars
from fastbert.training.schedules import learning_rate_factor, resolved
from fastbert.training.step import objective_step
from fastbert.training.timing import Timed, repeat_in, time_in_groups, writing_seconds
from fastbert.training.world import World

LEAST_TIMED, MOST_TIMED = 4, 2000  # steps
FRACTION = 0.05  # fraction of a budget in minutes that is spent on timing steps
LEAST, MOST = 3.0, 60.0  # bounds of that time in seconds; it never exceeds a fifth of the budget
SHORT = 200  # steps; the length of a shorter run is found by trying all


@dataclass(frozen=True)
class Costs:
    """Seconds that each part of a run takes."""

    start: float
    step: Callable[[int, int], float]
    """(batch_size, length) -> seconds of a step."""
    validation: float
    checkpoint: float
    export: float
    finish: float

    def spans(self, plan: BatchPlan, options: PretrainOptions, done: int, steps: int, exports: int) -> dict[str, float]:
        """Time of the steps after `done` in a run of `steps` steps, with `exports` exports between them: name of a part
        -> seconds."""
        validations, checkpoints = saves_between(options, done, steps)
        validations += options.validated_first and done == 0
        return {
            "start": self.start,
            f"{steps - done} steps": plan.total(self.step, done, steps),
            f"{validations} validations": validations * self.validation,
            f"{checkpoints} checkpoints": checkpoints * self.checkpoint,
            **({f"{exports} exports": exports * self.export} if exports else {}),
            "export and curves": self.finish,
        }

    def steps_in(self, seconds: float, plan: Callable[[int], BatchPlan], options: PretrainOptions) -> int:
        """Number of steps of a run whose parts take about `seconds` together, but at least that of the shortest run.
        `plan` maps a number of steps to the batches of the run."""
        exports = len(options.word_counts())

        def total(steps: int) -> float:
            return sum(self.spans(plan(steps), options, 0, steps, exports).values())

        least = options.stages.least_steps
        steps = steps_within(seconds, total, least)
        if steps >= SHORT:
            return steps
        # The number of validations is not monotonic: 19 steps have 19 validations, 20 steps have 10.
        return max((steps for steps in range(least, SHORT) if total(steps) <= seconds), default=least)


def timing_window(seconds: float) -> float:
    """Seconds to spend on timing the steps of a run with a budget of `seconds`."""
    return min(max(FRACTION * seconds, min(LEAST, 0.2 * seconds)), MOST)


def intervals(options: PretrainOptions, steps: int) -> tuple[int, int]:
    """Intervals of validations and of checkpoints, in a run of `steps` steps."""
    return options.eval_every or max(1, steps // 10), options.checkpoint_every or min(1000, max(1, steps // 5))


def saves_between(options: PretrainOptions, done: int, steps: int) -> tuple[int, int]:
    """Numbers of validations and checkpoints after step `done` of a run of `steps` steps. Each validation is assumed to
    be the best so far, which saves a checkpoint."""
    eval_every, checkpoint_every = intervals(options, steps)
    marked = {steps, *options.marked_steps(steps)}

    def between(*intervals: int) -> int:
        """The number of steps in (done, steps] that are marked or a multiple of one of the intervals."""
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


def check_steps(options: PretrainOptions) -> None:
    """Raises a UserError, before data is prepared, if stages or schedule do not fit the number of steps."""
    steps = steps_of(options)
    if steps is not None:
        replace(options, steps=steps).milestone_steps()
        make_plan(options.stages, options.batch_size, options.length, steps)
        learning_rate_factor(options.schedule, 0, steps)


def steps_of(options: PretrainOptions) -> int | None:
    """The number of steps; None for a budget in minutes."""
    if options.tokens is None:
        return options.steps

    def tokens(steps: int) -> int:
        return make_plan(options.stages, options.batch_size, options.length, steps).tokens(0, steps)

    return steps_within(options.tokens, tokens, options.stages.least_steps)


def resolve_steps(setup: PretrainSetup) -> PretrainOptions:
    """The options with a budget in tokens or minutes converted to steps, with all intervals set, and with the phases of
    the infinite schedule as numbers of steps."""
    options = setup.options
    steps = steps_in(setup, options.minutes * 60.0) if options.minutes is not None else steps_of(options)
    eval_every, checkpoint_every = intervals(options, steps)
    return replace(
        options,
        steps=steps,
        eval_every=eval_every,
        checkpoint_every=checkpoint_every,
        schedule=resolved(options.schedule, steps),
        machine=replace(options.machine, micro_batch_size=options.micro_batch_size),
    )


def steps_in(setup: PretrainSetup, seconds: float) -> int:
    """The number of steps of a run that takes about `seconds`, by timing a few steps and the other parts of a run on
    networks that are discarded. Prints the plan."""
    begin, shared = time.perf_counter(), shared_with(setup.world)
    objective = setup.objective()
    built = shared(time.perf_counter() - begin)
    writing = setup.world.first_decides(
        lambda: writing_seconds(existing(setup.options.out or "runs"), checkpoint_size(objective))
    )
    window = timing_window(seconds)
    timed = stage_timer(setup, objective, window)
    setup.plan(NOMINAL_STEPS).total(timed, 0, NOMINAL_STEPS)  # times the stages of all but the shortest runs
    costs = Costs(
        start=built,  # the networks are built again
        step=timed,
        validation=repeat_in(window / 2, lambda: setup.validate(objective), shared=shared),
        checkpoint=writing,
        export=writing / 3,  # weights without moments
        finish=writing / 3,
    )
    spent = shared(time.perf_counter() - begin)
    # On all ranks, with the same times: it may time the stages of a short run, which takes all of them.
    steps = costs.steps_in(seconds - spent, setup.plan, setup.options)
    plan = setup.plan(steps)
    spans = {"timing": spent, **costs.spans(plan, setup.options, 0, steps, len(setup.options.word_counts()))}
    total = sum(spans.values())
    echo(
        f"planned for {seconds / 60:g} minutes: {plan.describe(steps)}, "
        f"{plan.total(timed, 0, steps) / steps:.3g} s a step; expected {shown_time(total)}: {shown_spans(spans)}"
    )
    return steps


def seconds_per_step(setup: PretrainSetup, objective: nn.Module, seconds: float) -> float:
    """Seconds of a training step on `objective`, measured in about `seconds`; the mean over the run if its stages
    differ."""
    steps = setup.options.steps or NOMINAL_STEPS
    return setup.plan(steps).total(stage_timer(setup, objective, seconds), 0, steps) / steps


def stage_timer(setup: PretrainSetup, objective: nn.Module, seconds: float) -> Callable[[int, int], float]:
    """Function (batch_size, length) -> seconds of a step. It times a shape when first called with it; all stages
    together take about `seconds`."""
    each = seconds / len(setup.plan(NOMINAL_STEPS).stages)
    return cache(lambda batch_size, length: timed_step(setup, objective, each, BatchPlan.constant(batch_size, length)))


@progress("timing steps")
def timed_step(setup: PretrainSetup, objective: nn.Module, seconds: float, plan: BatchPlan) -> float:
    """Seconds of a training step on `objective` on an otherwise idle machine, measured in about `seconds`."""
    found = time_training(setup, objective, seconds, plan, MOST_TIMED)
    if found.disturbed:
        echo(
            f"other processes disturbed the timing of steps: the mean is {found.mean:.3g} s; the 10th percentile, "
            f"{found.seconds:.3g} s, is used"
        )
    return found.seconds


def time_training(setup: PretrainSetup, objective: nn.Module, seconds: float, plan: BatchPlan, most: int) -> Timed:
    """Times training steps on `objective` in about `seconds`, `most` of them at most."""
    batches = setup.batches(plan)
    updater = setup.updater(objective)
    objective.train()
    lagged, numbers = LaggedScalars(), itertools.count()

    def step() -> None:
        number = next(numbers)
        scalars = objective_step(updater, batches.at(number), setup.options.seed, number, learning_rate=0.0)
        lagged.push(number, scalars)  # as in training, the host is one step ahead of the device

    wait = partial(synchronize, setup.device)
    step()  # warm-up
    wait()
    return time_in_groups(step, wait, seconds, least=LEAST_TIMED, most=most, shared=shared_with(setup.world))


def shared_with(world: World) -> Callable[[float], float]:
    """Function that maps a number to that of the first rank."""
    return lambda number: world.first_decides(lambda: number)


def expected_memory(setup: PretrainSetup, parameters: int) -> int:
    """Bytes of main memory that the training needs, estimated; 0 (unknown) if it runs on a GPU.

    Args:
        parameters: number of parameters of all networks.
    """
    if setup.device.type != "cpu":
        return 0
    options = setup.options
    tokens = min(options.micro_batch_size, options.batch_size) * options.length
    return training_memory(parameters, options.of_objective.networks(setup.config), tokens, 5, predicts_words=True)


def checkpoint_size(objective: nn.Module) -> int:
    """Bytes of a checkpoint: weights and two moments, and buffers."""
    state = sum(buffer.numel() * buffer.element_size() for buffer in objective.buffers())
    return 12 * objective.parameter_count() + state
