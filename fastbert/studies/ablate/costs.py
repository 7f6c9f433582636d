"""What the variants of an ablation cost, in steps, FLOPs and minutes, and the steps that make them cost the same."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from fastbert.config import digest
from fastbert.data import stages as batches
from fastbert.pretraining.budget import time_training
from fastbert.pretraining.options import PretrainOptions, science
from fastbert.pretraining.setup import PretrainSetup, data_fingerprint
from fastbert.progress import progress
from fastbert.streams import echo
from fastbert.studies.ablate.options import Budget
from fastbert.studies.ablate.questions import Questions, questions
from fastbert.studies.shared.report import plural
from fastbert.training.timing import undisturbed

ROUNDS, ROUND_SECONDS, ROUND_STEPS = 5, 2.0, 30  # of timing; in a round at most

StepShape = tuple[int, int]  # (sequences in a step, tokens in a sequence)


@dataclass(frozen=True)
class PlannedVariant:
    """A variant with its numbers."""

    name: str
    setup: PretrainSetup
    parameters: int
    """Of all networks."""
    checkpoint_bytes: int
    step_flops: dict[StepShape, int]
    """Of a step, in closed form, all networks."""
    step_seconds: dict[StepShape, float] = field(default_factory=dict)
    """Of a step, as measured."""
    steps: int = 0
    """Its budget; with annealing, without that at the end."""
    lengths: tuple[int, ...] = ()
    """Tokens in a sequence of the validation at each point."""

    def total(self, costs: Mapping[StepShape, float], steps: int, options: PretrainOptions) -> float:
        """Of the first `steps` of a training with `options`."""
        return replace(self.setup, options=options).plan().total(lambda *shape: costs[shape], 0, steps)

    def flops_to(self, place: "MeasuredPoint") -> float:
        return self.total(self.step_flops, place.steps, place.options)

    def minutes_to(self, place: "MeasuredPoint") -> float:
        """Each step at its measured time."""
        return self.total(self.step_seconds, place.steps, place.options) / 60

    def length_at(self, place: "MeasuredPoint") -> int:
        """Tokens in a sequence of the validation there."""
        return replace(self.setup, options=place.options).plan().at(place.steps - 1).length

    def mean(self, costs: Mapping[StepShape, float]) -> float:
        """Of a step; where stages differ, over a run."""
        return (
            self.setup.plan(batches.NOMINAL_STEPS).total(lambda *shape: costs[shape], 0, batches.NOMINAL_STEPS)
            / batches.NOMINAL_STEPS
        )

    @property
    def flops(self) -> float:
        """Of a step; where stages differ, their mean over a run."""
        return self.mean(self.step_flops)

    @property
    def questions(self) -> Questions:
        """What the validation asks: losses are comparable where this is equal."""
        return questions(self.setup.options, self.lengths)


@dataclass(frozen=True)
class MeasuredPoint:
    """A point at which a pretraining is measured."""

    share: float
    """Of the budget."""
    steps: int
    """What it cost: steps up to it and, with annealing, of its branch."""
    job: str
    """Id of the pretraining, or of the branch, whose state after `steps` steps it is."""
    seed: int
    options: PretrainOptions
    """Of that training."""


def needs_time(budget: Budget) -> bool:
    return budget.equal == "minutes" or budget.minutes is not None


def equal_steps(budget: Budget, variants: list[PlannedVariant]) -> list[int]:
    """The steps of each variant, the baseline first, such that all cost what the baseline does. Where minutes are asked
    for, the variants must have been timed."""
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
    of_a_step = {
        "steps": lambda variant: 1,
        "flops": lambda variant: variant.flops,
        "minutes": lambda variant: variant.mean(variant.step_seconds),
    }
    costs = list(map(of_a_step[budget.equal], variants))
    count = max(1, round(steps[size]()))
    return [max(1, round(count * costs[0] / cost)) for cost in costs]


def timing_key(setup: PretrainSetup, shape: StepShape) -> str:
    """Names what the time of a step depends on."""
    options = setup.options
    machine = {"threads": options.machine.threads, "device": str(setup.device), "precision": setup.precision}
    described = (
        science(options, data_fingerprint(setup.dataset)) | machine | {"micro_batch_size": options.micro_batch_size}
    )
    return digest(described | {"first_fraction": None, "shape": shape})


def timed_round(setup: PretrainSetup, objective: nn.Module, seconds: float, plan: batches.BatchPlan) -> float:
    """The time of a step in one round."""
    return time_training(setup, objective, seconds, plan, ROUND_STEPS).seconds


def step_seconds(variants: Iterable[PlannedVariant], known: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Seconds of a step of each variant and shape: those that are known, else measured in rounds, the variants in
    turn."""
    wanted = {timing_key(v.setup, shape): (v, shape) for v in variants for shape in sorted(v.step_flops)}
    found = {key: known[key] for key in wanted if key in known}
    left = {key: value for key, value in wanted.items() if key not in found}
    if not left:
        return found
    echo(f"timing the steps of {plural(len({v.name for v, _ in left.values()}), 'variant')}, in {ROUNDS} rounds")
    with progress("timing steps", ROUNDS * len(left), "timings") as shown:
        for _ in range(ROUNDS):
            for key, (variant, shape) in left.items():
                plan = batches.BatchPlan.constant(*shape)
                took = timed_round(variant.setup, variant.setup.objective(), ROUND_SECONDS, plan)
                found.setdefault(key, []).append(took)
                shown.update(shown.done + 1)
    return found


def timed_variants(
    variants: list[PlannedVariant], known: Mapping[str, list[float]]
) -> tuple[list[PlannedVariant], dict[str, list[float]]]:
    """The variants with the times of their steps, those of the fastest rounds; and all rounds."""
    seconds, found = step_seconds(variants, known), []
    for variant in variants:
        rounds = {shape: seconds[timing_key(variant.setup, shape)] for shape in variant.step_flops}
        found.append(replace(variant, step_seconds={shape: undisturbed(rounds[shape]) for shape in rounds}))
    return found, seconds
