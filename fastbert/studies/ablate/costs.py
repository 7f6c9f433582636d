"""Costs of an ablation's variants in steps, FLOPs and minutes, and the numbers of steps at which they cost the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from fastbert.config import digest
from fastbert.data import stages as batches
from fastbert.errors import plural
from fastbert.model.options import EncoderOptions
from fastbert.pretraining.budget import time_training
from fastbert.pretraining.options import PretrainOptions, science
from fastbert.pretraining.setup import PretrainSetup
from fastbert.progress import progress
from fastbert.streams import echo
from fastbert.studies.ablate.comparability import ValidationOptions, validation_options
from fastbert.studies.ablate.options import Budget
from fastbert.training.timing import undisturbed

ROUNDS, ROUND_SECONDS, ROUND_STEPS = 5, 2.0, 30  # timing rounds; upper limits of a round in seconds and steps

StepShape = tuple[int, int]  # (sequences in a step, tokens in a sequence)


@dataclass(frozen=True)
class PlannedVariant:
    """A variant with its size and costs."""

    name: str
    setup: PretrainSetup
    parameters: int
    """Parameters of all networks."""
    checkpoint_bytes: int
    step_flops: dict[StepShape, int]
    """FLOPs of a step in closed form, all networks together."""
    step_seconds: dict[StepShape, float] = field(default_factory=dict)
    """Measured seconds of a step."""
    steps: int = 0
    """The budget, without the annealing at the end."""
    lengths: tuple[int, ...] = ()
    """Length of the validation sequences, in tokens, at each point."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """Values other than options that identify its trainings: with `mode: data` the hashes of the fixed splits and of
    the weights it starts from."""
    replays_by_seed: bool = False
    """True if the order of replayed data is that of the training's seed: it is not given, and there is no run in
    --init-from of which it could be the seed."""

    def total(self, costs: Mapping[StepShape, float], steps: int, options: PretrainOptions) -> float:
        """Cost of the first `steps` steps of a training with `options`, from the costs of a step."""
        return replace(self.setup, options=options).plan().total(lambda *shape: costs[shape], 0, steps)

    def flops_to(self, point: "MeasuredPoint") -> float:
        return self.total(self.step_flops, point.steps, point.options)

    def minutes_to(self, point: "MeasuredPoint") -> float:
        """Minutes up to a point, each step at its measured time."""
        return self.total(self.step_seconds, point.steps, point.options) / 60

    def length_at(self, point: "MeasuredPoint") -> int:
        """Length of the validation sequences, in tokens, at a point."""
        return replace(self.setup, options=point.options).plan().at(point.steps - 1).length

    def mean(self, costs: Mapping[StepShape, float]) -> float:
        """Cost of a step, averaged over a run if its stages differ."""
        return (
            self.setup.plan(batches.NOMINAL_STEPS).total(lambda *shape: costs[shape], 0, batches.NOMINAL_STEPS)
            / batches.NOMINAL_STEPS
        )

    @property
    def flops(self) -> float:
        """FLOPs of a step, averaged over a run if its stages differ."""
        return self.mean(self.step_flops)

    @property
    def validation_options(self) -> ValidationOptions:
        """Options that define the validation; losses are comparable if they are equal."""
        return validation_options(self.setup.options, self.lengths)


@dataclass(frozen=True)
class MeasuredPoint:
    """A point at which a pretraining is measured."""

    fraction: float
    """Position of the point, as a fraction of the budget."""
    steps: int
    """Steps up to the point, including those of its annealing."""
    job: str
    """Id of the pretraining, or of the branch, that is measured after `steps` steps."""
    seed: int
    options: PretrainOptions
    """Options of that training."""


def needs_time(budget: Budget) -> bool:
    return budget.equal == "minutes" or budget.minutes is not None


def equal_steps(budget: Budget, variants: list[PlannedVariant]) -> list[int]:
    """Number of steps of each variant, the baseline first, at which it costs the same as the baseline. A budget in
    minutes needs variants that have been timed."""
    first = variants[0]
    setup = first.setup
    steps = {
        "steps": lambda: budget.steps,
        "tokens": lambda: batches.steps_within(
            budget.tokens, lambda count: setup.plan(count).tokens(0, count), setup.options.stages.least_steps
        ),
        "flops": lambda: budget.flops / first.flops,
        "minutes": lambda: 60 * budget.minutes / first.mean(first.step_seconds),
    }
    (size,) = [name for name in steps if getattr(budget, name) is not None]
    step_costs = {
        "steps": lambda variant: 1,
        "flops": lambda variant: variant.flops,
        "minutes": lambda variant: variant.mean(variant.step_seconds),
    }
    costs = list(map(step_costs[budget.equal], variants))
    count = max(1, round(steps[size]()))
    return [max(1, round(count * costs[0] / cost)) for cost in costs]


def timing_key(setup: PretrainSetup, shape: StepShape) -> str:
    """Hash of everything that the time of a step depends on."""
    options = setup.options
    machine = {"threads": options.machine.threads, "device": str(setup.device), "precision": setup.precision}
    described = science(options, setup.fingerprint) | machine | {"micro_batch_size": options.micro_batch_size}
    described |= {"first_fraction": None, "shape": shape, "encoder": setup.config.to_dict()}
    without = {one.name for one in fields(EncoderOptions)}  # resolved in `encoder`
    if not options.notes.enabled:  # how often their words occur depends on the data
        without |= {"data", "init_from", "replay.fraction", "replay.seed"}
    return digest({name: value for name, value in described.items() if name not in without})


def timed_round(setup: PretrainSetup, objective: nn.Module, seconds: float, plan: batches.BatchPlan) -> float:
    """Seconds of a step, measured in one round."""
    return time_training(setup, objective, seconds, plan, ROUND_STEPS).seconds


def step_seconds(variants: Sequence[PlannedVariant], known: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Seconds per step of each variant and shape: known ones are reused, others are measured in rounds in which the
    variants alternate. Next to known ones, a known one (the baseline's, if it is) is measured again with the others,
    which are scaled by its change: the machine may be slower or faster than it was."""
    wanted = {timing_key(v.setup, shape): (v, shape) for v in variants for shape in sorted(v.step_flops)}
    found = {key: known[key] for key in wanted if key in known}
    left = {key: value for key, value in wanted.items() if key not in found}
    if not left:
        return found
    names = plural(len({variant.name for variant, _ in left.values()}), "variant")
    reference = next(iter(found), None)
    if reference is not None:
        left[reference] = wanted[reference]
    measured: dict[str, list[float]] = {}
    echo(f"timing the steps of {names}, in {ROUNDS} rounds")
    with progress("timing steps", ROUNDS * len(left), "timings") as shown:
        for _ in range(ROUNDS):
            for key, (variant, shape) in left.items():
                plan = batches.BatchPlan.constant(*shape)
                seconds = timed_round(variant.setup, variant.setup.objective(), ROUND_SECONDS, plan)
                measured.setdefault(key, []).append(seconds)
                shown.update(shown.done + 1)
    change = undisturbed(found[reference]) / undisturbed(measured[reference]) if reference is not None else 1.0
    return {key: [change * seconds for seconds in measured[key]] for key in measured} | found


def timed_variants(
    variants: list[PlannedVariant], known: Mapping[str, list[float]]
) -> tuple[list[PlannedVariant], dict[str, list[float]]]:
    """The variants with the step times of the fastest rounds, and the step times of all rounds."""
    seconds, found = step_seconds(variants, known), []
    for variant in variants:
        rounds = {shape: seconds[timing_key(variant.setup, shape)] for shape in variant.step_flops}
        found.append(replace(variant, step_seconds={shape: undisturbed(rounds[shape]) for shape in rounds}))
    return found, seconds
