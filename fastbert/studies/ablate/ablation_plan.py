"""From an ablation's YAML file to its jobs: data prepared, all options checked and budgets turned into steps once,
before the first job starts.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastbert.config import digest, to_dict
from fastbert.errors import UserError
from fastbert.hub.export import export_model
from fastbert.hub.load import load_pretrained
from fastbert.hub.names import exported_weights
from fastbert.model.options import NoteDictionaryOptions
from fastbert.pretraining.budget import check_steps, checkpoint_size, resolve_steps
from fastbert.pretraining.options import PretrainOptions, science
from fastbert.pretraining.setup import (
    check_networks,
    data_fingerprint,
    data_folder,
    prepare_setup,
    tokenizer_to_prepare,
)
from fastbert.studies.ablate.costs import MeasuredPoint, PlannedVariant, equal_steps, needs_time, timed_variants
from fastbert.studies.ablate.options import Ablation
from fastbert.studies.ablate.pretrain_jobs import BRANCH, PRETRAIN
from fastbert.studies.ablate.questions import incomparable
from fastbert.studies.engine.jobs import Job
from fastbert.studies.engine.outcomes import RUN
from fastbert.studies.shared.finetune_jobs import OpenedTask, plan_tunings
from fastbert.studies.shared.grid import ModelEntry, prefixed
from fastbert.training.checkpoints import check_space
from fastbert.training.hardware import resolve_device
from fastbert.training.options import ScheduleOptions
from fastbert.training.schedules import learning_rate_factor, warmup_steps

PRETRAINING, ANNEALING = "pretraining", "annealing"  # in the place of a task's name


@dataclass
class AblationPlan:
    """The jobs of an ablation, and what they share."""

    variants: list[PlannedVariant]
    """The baseline first."""
    unigram_entropy: float
    """Nats, of the validation text."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """By `timing_key`, seconds of a step, in each round of timing."""
    jobs: list[Job] = field(default_factory=list)
    """Seed by seed and variant by variant; a job comes after the one it needs."""
    places: dict[str, list[MeasuredPoint]] = field(default_factory=dict)
    """Variant -> its points of all seeds."""

    @property
    def incomparable(self) -> dict[str, str]:
        """The variants whose validation losses cannot be compared with the baseline's, and why."""
        return incomparable((variant.name, variant.questions) for variant in self.variants)


def plan_ablation(
    ablation: Ablation, glue_dir: str | None, out: Path, known: Mapping[str, list[float]]
) -> AblationPlan:
    """Everything an ablation will run.

    Args:
        known: `AblationPlan.seconds` of an earlier call, so that minutes stay what they were.

    Raises:
        UserError: a variant, a task or a point that no job could be run with.
    """
    for variant in ablation.variants:  # before the data is prepared
        with prefixed(f"{ablation.path}: variants: {variant.name}"):
            check_networks(variant.options, resolve_device(variant.options.machine.device))
            if ablation.budget.equal == "steps" and ablation.anneal is None:
                check_steps(replace(variant.options, steps=ablation.budget.steps))
    folder = prepared(ablation)
    variants = []
    for variant in ablation.variants:
        with prefixed(f"{ablation.path}: variants: {variant.name}"):
            asked = replace(variant.options, data=str(folder))
            variants.append(planned(variant.name, shared(asked, ablation.anneal)))
    first = variants[0].setup
    unigram = first.dataset.split("validation").unigram_entropy
    tasks = open_tasks(ablation, glue_dir, variants)
    if needs_time(ablation.budget):
        variants, known = timed_variants(variants, known)
    steps = equal_steps(ablation.budget, variants)
    variants = [replace(variant, steps=count) for variant, count in zip(variants, steps, strict=True)]
    result = AblationPlan(variants, unigram)
    for seed in ablation.seeds:
        there: dict[str, str] = {}
        for variant in result.variants:
            with prefixed(f"{ablation.path}: variants: {variant.name}"):
                jobs, places = pretrainings(ablation, variant, seed)
            if (other := there.setdefault(jobs[0].id, variant.name)) != variant.name:
                raise UserError(
                    f"{ablation.path}: variants: {other} and {variant.name} would be the same training: what differs "
                    "between them has no effect with the rest of their options; leave one of them out"
                )
            result.jobs += jobs
            result.places[variant.name] = result.places.get(variant.name, []) + places
            for place in (place for place in places if place.share in ablation.tasks_at):
                result.jobs += finetunings(ablation, variant, tasks.get(variant.name, ()), place, out)
    trainings = 1 if ablation.anneal is None else len(ablation.points)
    variants = [replace(variant, lengths=lengths_at(variant, result.places[variant.name])) for variant in variants]
    every = len(ablation.seeds) * (len(ablation.points) + 2 * trainings)
    check_space(out, every * sum(variant.checkpoint_bytes for variant in variants))
    result.variants, result.seconds = timed_variants(variants, known)
    return result


# --- data and variants


def prepared(ablation: Ablation) -> Path:
    """The folder of the data, absolute, with the rare words that any variant has notes for."""
    base = ablation.variants[0].options
    notes = [variant.options.notes for variant in ablation.variants if variant.options.notes.enabled]
    if notes:
        least, most = min(band.min_count for band in notes), max(band.max_count for band in notes)
        base = replace(base, notes=NoteDictionaryOptions(enabled=True, min_count=least, max_count=most))
    with prefixed(ablation.path):
        pretrained = load_pretrained(base.init_from) if base.init_from is not None else None
        return data_folder(base, tokenizer_to_prepare(base, pretrained)).resolve()


def shared(options: PretrainOptions, anneal: float | None) -> PretrainOptions:
    """With annealing, sequences of a first length last until it begins."""
    if anneal is None:
        return options
    return replace(options, stages=replace(options.stages, first_fraction=1 / (1 + anneal)))


def planned(name: str, options: PretrainOptions) -> PlannedVariant:
    """Opens a variant as its jobs will."""
    setup = prepare_setup(options)
    setup.batches()  # refuses a corpus of less than one batch
    objective = setup.objective()
    return PlannedVariant(
        name=name,
        setup=setup,
        parameters=objective.parameter_count(),
        checkpoint_bytes=checkpoint_size(objective),
        step_flops={shape: objective.flops(*shape) for shape in setup.shapes()},
    )


# --- pretraining


def pretrainings(ablation: Ablation, variant: PlannedVariant, seed: int) -> tuple[list[Job], list[MeasuredPoint]]:
    """The training of a variant and a seed, with its branches, and where they are measured."""
    at = [max(1, round(point * variant.steps)) for point in ablation.points]
    if len(set(at)) < len(at):
        raise UserError(
            f"a budget of {variant.steps} steps is too short for the points {', '.join(map(str, ablation.points))}: "
            "two of them are the same step"
        )
    setup = replace(variant.setup, options=replace(variant.setup.options, seed=seed, steps=variant.steps))
    options = resolve_steps(setup)
    learning_rate_factor(options.schedule, 0, variant.steps)  # refuses a warm-up longer than the run
    if ablation.anneal is None:
        ends = [options] * len(at)
        jobs = [_pretraining(variant, seed, replace(options, milestones=_joined(at)))]
        trainings = jobs * len(at)
    elif options.stages.initial_batch_size:
        raise UserError(
            "with anneal every point has a training of its own length, and initial_batch_size would grow the batch of "
            "each at other steps; leave initial_batch_size or anneal out"
        )
    else:
        ends = [annealed(options, start, ablation.anneal, variant.steps) for start in at]
        trunk = _pretraining(variant, seed, replace(ends[-1], milestones=_joined(at[:-1])))
        branches = zip(ends[:-1], at[:-1], strict=True)
        jobs = [trunk, *(_pretraining(variant, seed, end, trunk, start) for end, start in branches)]
        trainings, at = [*jobs[1:], trunk], [end.steps for end in ends]
    made = zip(ablation.points, at, trainings, ends, strict=True)
    return jobs, [MeasuredPoint(point, steps, job.id, seed, end) for point, steps, job, end in made]


def lengths_at(variant: PlannedVariant, places: Sequence[MeasuredPoint]) -> tuple[int, ...]:
    """Tokens in a sequence of the validation at each point, which are the same for all seeds."""
    return tuple(variant.length_at(place) for place in places if place.seed == places[0].seed)


def annealed(options: PretrainOptions, start: int, share: float, steps: int) -> PretrainOptions:
    """A training whose rate is constant after the warm-up until `start` and falls to 0 in `share` of as many steps.
    Sequences of a first length last until `start` too, so that up to there all such trainings are the same.

    Args:
        steps: that a warm-up which is a share is a share of.
    """
    end = start + max(1, round(share * start))
    warmup = float(warmup_steps(replace(options.schedule, name="constant"), steps))
    schedule = ScheduleOptions("wsd", warmup, decay=(end - start) / end)
    learning_rate_factor(schedule, 0, end)  # refuses a warm-up that goes beyond the point
    return replace(options, steps=end, schedule=schedule, stages=replace(options.stages, first_fraction=start / end))


def _joined(steps: Sequence[int]) -> str | None:
    return ",".join(map(str, steps)) or None


def _pretraining(
    variant: PlannedVariant, seed: int, options: PretrainOptions, trunk: Job | None = None, start: int = 0
) -> Job:
    machine = options.machine
    identity = science(options, data_fingerprint(variant.setup.dataset)) | {
        "eval_sequences": options.eval_sequences,
        "threads": machine.threads,
        "precision": machine.precision,
        "milestones": options.milestones,
        "start": start,
    }
    without = ("out", "resume", "tokens", "minutes")
    bare = {name: value for name, value in to_dict(options).items() if name not in without}
    return Job(
        id=digest(identity),
        model=variant.name,
        task=PRETRAINING if trunk is None else ANNEALING,
        seed=seed,
        setting={"steps": options.steps} if trunk is None else {"from step": start, "steps": options.steps},
        identity=identity,
        options=bare,
        folder=str(Path.cwd()),
        cost=variant.total(variant.step_flops, options.steps, options)
        - variant.total(variant.step_flops, start, options),
        runner="fastbert.studies.ablate.pretrain_jobs:pretrain_job",
        kind=PRETRAIN if trunk is None else BRANCH,
        device=machine.device,
        after=trunk and trunk.id,
    )


# --- fine-tuning


def open_tasks(ablation: Ablation, glue_dir: str | None, variants: list[PlannedVariant]) -> dict[str, list[OpenedTask]]:
    """Opens every task as the fine-tunings of each variant will, with an encoder that has not learned anything.

    Returns:
        variant -> its tasks.
    """
    found: dict[str, list[OpenedTask]] = {}
    for variant in variants if ablation.grid.tasks else ():
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            setup = variant.setup
            export_model(setup.config, exported_weights(setup.objective().state_dict()), setup.dataset.tokenizer, model)
            for entry in ablation.grid.tasks:
                with prefixed(f"{ablation.path}: {variant.name}, {entry.name or entry.task}"):
                    task = plan_tunings(ablation.grid, ModelEntry(variant.name, str(model)), entry, glue_dir)
                    found.setdefault(variant.name, []).append(task)
        names = [task.name for task in found[variant.name]]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{ablation.path}: tasks: {name} is there twice; give one of them a name: of its own")
    return found


def finetunings(
    ablation: Ablation, variant: PlannedVariant, tasks: Sequence[OpenedTask], place: MeasuredPoint, out: Path
) -> list[Job]:
    """The jobs of one checkpoint: every task, setting and trial, the same for all variants."""
    run = out.resolve() / "jobs" / place.job / RUN
    checkpoint = str(run / "checkpoints" / f"step-{place.steps:08d}")
    jobs = []
    for task in tasks:
        for tuning in task.tunings:
            its = replace(tuning, options=replace(tuning.options, model=checkpoint))
            described = {name: value for name, value in tuning.identity.items() if name != "model"}  # a random encoder
            for trial in range(ablation.trials):
                seed = place.seed * ablation.trials + trial  # no two seeds of a variant share a head
                identity = described | {"seed": seed, "pretraining": place.job, "step": place.steps}
                setting = {**tuning.setting, "at": place.share, "trial": trial}
                job = its.job(variant.name, task.name, seed, identity)
                jobs.append(replace(job, seed=place.seed, setting=setting, after=place.job))
    return jobs
