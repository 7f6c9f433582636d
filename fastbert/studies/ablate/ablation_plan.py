"""Plan of an ablation, from its YAML file: before the first job starts, the data is prepared, all options are checked,
and budgets are converted to steps.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastbert.config import digest, to_dict
from fastbert.errors import UserError
from fastbert.hub.export import export_model
from fastbert.hub.load import load_pretrained
from fastbert.hub.names import exported_weights
from fastbert.model.config import check_length
from fastbert.model.options import NoteDictionaryOptions
from fastbert.model.positions import POSITIONS
from fastbert.pretraining.branch import annealed
from fastbert.pretraining.budget import check_steps, checkpoint_size, expected_memory, resolve_steps
from fastbert.pretraining.initial import tokenizer_to_prepare
from fastbert.pretraining.options import PretrainOptions, science
from fastbert.pretraining.setup import (
    check_networks,
    data_folder,
    prepare_setup,
)
from fastbert.pretraining.zero_shot.pairs import distinct_sentences, short_pairs
from fastbert.pretraining.zero_shot.scorer import Scorer
from fastbert.studies.ablate.comparability import incomparable
from fastbert.studies.ablate.costs import (
    MeasuredPoint,
    PlannedVariant,
    equal_steps,
    needs_time,
    timed_variants,
    timing_key,
)
from fastbert.studies.ablate.fixed_splits import FixedSplit, incomparable_on, never_compared, open_splits
from fastbert.studies.ablate.options import Ablation
from fastbert.studies.engine.jobs import Job
from fastbert.studies.engine.outcomes import RUN
from fastbert.studies.engine.store import JOBS
from fastbert.studies.shared.evaluate_jobs import EVALUATIONS, PlannedEvaluation, plan_evaluations
from fastbert.studies.shared.finetune_jobs import OpenedTask, plan_tunings
from fastbert.studies.shared.grid import ModelEntry, prefixed
from fastbert.studies.shared.pretrain_jobs import BRANCH, PRETRAIN, initial_weights, without_masked_head
from fastbert.studies.shared.trained import Columns
from fastbert.training.checkpoints import check_space
from fastbert.training.hardware import resolve_device
from fastbert.training.optimizers import optimizer_flops
from fastbert.training.schedules import learning_rate_factor, warmup_steps
from fastbert.training.splits import OLD

PRETRAINING, ANNEALING = "pretraining", "annealing"  # instead of a task's name


@dataclass
class AblationPlan:
    """The jobs of an ablation and its variants with their costs."""

    variants: list[PlannedVariant]
    """The baseline first."""
    unigram_entropy: float
    """Unigram entropy of the validation text, in nats."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """`timing_key` -> seconds per step in each timing round."""
    jobs: list[Job] = field(default_factory=list)
    """Ordered by seed, then by variant; a job comes after those that it depends on."""
    points: dict[str, list[MeasuredPoint]] = field(default_factory=dict)
    """Variant -> its measured points, of all seeds."""
    tasks: dict[str, Columns] = field(default_factory=dict)
    """Task -> its columns in a table of tasks."""
    evaluations: list[PlannedEvaluation] = field(default_factory=list)
    splits: list[FixedSplit] = field(default_factory=list)
    """The fixed validation splits of `mode: data`."""
    path: str = ""
    """YAML file, for errors."""

    @property
    def incomparable(self) -> dict[str, str]:
        """Variants whose validation losses, with `mode: data` those on all splits, cannot be compared with the
        baseline's -> the reason."""
        if self.splits:
            return never_compared(self.incomparable_on, [variant.name for variant in self.variants])
        return self._other_validations

    @property
    def _other_validations(self) -> dict[str, str]:
        """Variants with other validation options than the baseline -> the reason."""
        return incomparable((variant.name, variant.validation_options) for variant in self.variants)

    @property
    def incomparable_on(self) -> dict[str, dict[str, str]]:
        """Fixed split -> variants whose losses on it cannot be compared -> the reason."""
        vocabularies = {v.name: (v.setup.vocabulary, str(v.setup.dataset.folder)) for v in self.variants}
        return incomparable_on(self.splits, self.path, vocabularies, self._other_validations)

    @property
    def one_tokenizer(self) -> bool:
        """True if all variants have the same tokenizer, so that figures per token can be compared."""
        return len({variant.setup.vocabulary.fingerprint for variant in self.variants}) == 1

    @property
    def without_pll(self) -> dict[str, str]:
        """Variants without a pseudo-log-likelihood -> the reason."""
        return without_masked_head((variant.name, variant.setup.options.objective) for variant in self.variants)

    def spread(self, variant: PlannedVariant) -> float:
        """Relative difference between the slowest and the fastest timing round of a step of `variant`."""
        rounds = [self.seconds[timing_key(variant.setup, shape)] for shape in variant.step_flops]
        return max(max(times) / min(times) for times in rounds) - 1

    def evaluated_by(self, key: str) -> list[PlannedVariant]:
        """Variants with the evaluation `key`, pairs or pll."""
        left_out = self.without_pll if key == "pll" else {}
        return [variant for variant in self.variants if variant.name not in left_out]


def plan_ablation(
    ablation: Ablation, glue_dir: str | None, out: Path, known: Mapping[str, list[float]]
) -> AblationPlan:
    """Plans all jobs of an ablation.

    Args:
        known: `AblationPlan.seconds` of an earlier call, so that minutes are converted to the same numbers of steps.

    Raises:
        UserError: a variant, a task, an evaluation or a point is invalid.
    """
    evaluations, splits = plan_evaluations(ablation.grid), open_splits(ablation)
    for variant in ablation.variants:  # before the data is prepared
        with prefixed(f"{ablation.path}: variants: {variant.name}"):
            check_networks(variant.options, resolve_device(variant.options.machine.device))
            if ablation.budget.equal == "steps" and ablation.anneal is None:
                check_steps(replace(variant.options, steps=ablation.budget.steps))
    folders = prepare_data(ablation)
    variants = []
    for variant, folder in zip(ablation.variants, folders, strict=True):
        with prefixed(f"{ablation.path}: variants: {variant.name}"):
            options = replace(variant.options, data=str(folder))
            planned = plan_variant(variant.name, with_first_length(options, ablation.anneal))
            variants.append(replace(planned, identity=identity_of(planned, splits)))
    first = variants[0].setup
    unigram = first.dataset.split("validation").unigram_entropy
    tasks = open_tasks(ablation, glue_dir, variants)
    for evaluation in evaluations:
        if evaluation.key == "pairs":
            check_scores(ablation, evaluation, variants)
    if needs_time(ablation.budget):
        variants, known = timed_variants(variants, known)
    steps = equal_steps(ablation.budget, variants)
    variants = [replace(variant, steps=count) for variant, count in zip(variants, steps, strict=True)]
    described = {task.name: task.described for task in tasks.get(variants[0].name, ())}
    result = AblationPlan(
        variants, unigram, tasks=described, evaluations=evaluations, splits=splits, path=ablation.path
    )
    for seed in ablation.seeds:
        names: dict[str, str] = {}
        for variant in result.variants:
            with prefixed(f"{ablation.path}: variants: {variant.name}"):
                jobs, points = pretrainings(ablation, variant, seed)
            if (other := names.setdefault(jobs[0].id, variant.name)) != variant.name:
                raise UserError(
                    f"{ablation.path}: variants: {other} and {variant.name} are the same training: the options in "
                    "which they differ have no effect in this combination; remove one of them"
                )
            result.jobs += jobs
            result.points[variant.name] = result.points.get(variant.name, []) + points
            for point in (point for point in points if point.fraction in ablation.tasks_at):
                result.jobs += finetunings(ablation, variant, tasks.get(variant.name, ()), point, out)
            for evaluation in evaluations:
                if variant in result.evaluated_by(evaluation.key):
                    measured = (point for point in points if point.fraction in ablation.evaluate_at)
                    result.jobs += [evaluation_of(variant, evaluation, point, out) for point in measured]
    trainings = 1 if ablation.anneal is None else len(ablation.points)
    variants = [replace(variant, lengths=lengths_at(variant, result.points[variant.name])) for variant in variants]
    every = len(ablation.seeds) * (len(ablation.points) + 2 * trainings)
    check_space(out, every * sum(variant.checkpoint_bytes for variant in variants))
    result.variants, result.seconds = timed_variants(variants, known)
    return result


# --- data and variants


def prepare_data(ablation: Ablation) -> list[Path]:
    """Prepares the data, with the rare words of every variant's note dictionary; returns the absolute path of that of
    each variant. Without `mode: data` it is the baseline's for all."""
    notes = [variant.options.notes for variant in ablation.variants if variant.options.notes.enabled]
    changes = {}
    if notes:
        least, most = min(band.min_count for band in notes), max(band.max_count for band in notes)
        changes["notes"] = NoteDictionaryOptions(enabled=True, min_count=least, max_count=most)
    found = []
    for variant in ablation.variants if ablation.splits else ablation.variants[:1]:
        options = replace(variant.options, **changes)
        with prefixed(f"{ablation.path}: variants: {variant.name}" if ablation.splits else ablation.path):
            pretrained = load_pretrained(options.init_from) if options.init_from is not None else None
            found.append(data_folder(options, tokenizer_to_prepare(options, pretrained)).resolve())
    return found if ablation.splits else found * len(ablation.variants)


def identity_of(variant: PlannedVariant, splits: Sequence[FixedSplit]) -> dict[str, Any]:
    """Values other than options that identify the trainings of `mode: data`, which compares data by its content."""
    if not splits:
        return {}
    init_from = variant.setup.options.init_from
    initial = {} if init_from is None else {"initial": initial_weights(init_from)}
    return {"validation": {split.name: split.fingerprint for split in splits}, **initial}


def with_first_length(options: PretrainOptions, anneal: float | None) -> PretrainOptions:
    """Options of a variant; with annealing, the stage of `first_length` lasts until the annealing begins."""
    if anneal is None:
        return options
    return replace(options, stages=replace(options.stages, first_fraction=1 / (1 + anneal)))


def plan_variant(name: str, options: PretrainOptions) -> PlannedVariant:
    """Sets up a variant in the same way as its jobs."""
    setup = prepare_setup(options)
    replay, by_seed = setup.options.replay, False
    if OLD in setup.others:
        setup.options = replace(setup.options, replay=replace(replay, data=str(setup.others[OLD].folder.resolve())))
        source = options.init_from
        by_seed = options.replay.seed is None and (source is None or load_pretrained(source).seed is None)
    setup.batches()  # refuses a corpus of less than one batch
    objective = setup.objective()
    update = optimizer_flops(objective.named_parameters(), setup.options.optimizer)
    return PlannedVariant(
        name=name,
        setup=setup,
        parameters=objective.parameter_count(),
        checkpoint_bytes=checkpoint_size(objective),
        step_flops={shape: objective.flops(*shape) + update for shape in setup.shapes()},
        replays_by_seed=by_seed and replay.active,
    )


# --- pretraining


def pretrainings(ablation: Ablation, variant: PlannedVariant, seed: int) -> tuple[list[Job], list[MeasuredPoint]]:
    """Jobs that pretrain a variant with one seed (a trunk and its branches), and the points that they measure."""
    at = [max(1, round(point * variant.steps)) for point in ablation.points]
    if len(set(at)) < len(at):
        raise UserError(
            f"a budget of {variant.steps} steps is too short for the points {', '.join(map(str, ablation.points))}: "
            "two of them are the same step"
        )
    options = replace(variant.setup.options, seed=seed, steps=variant.steps)
    if variant.replays_by_seed:
        options = replace(options, replay=replace(options.replay, seed=seed))
    options = resolve_steps(replace(variant.setup, options=options))
    learning_rate_factor(options.schedule, 0, variant.steps)  # refuses a warm-up longer than the run
    if ablation.anneal is None:
        ends = [options] * len(at)
        jobs = [_pretraining(variant, seed, replace(options, milestones=_joined(at)))]
        trainings = jobs * len(at)
    elif options.stages.initial_batch_size:
        raise UserError(
            "with anneal the trainings of the points differ in length, so initial_batch_size would increase their "
            "batch sizes at different steps; drop initial_batch_size or anneal"
        )
    else:
        ends = [annealing_of(options, start, ablation.anneal) for start in at]
        trunk = _pretraining(variant, seed, replace(ends[-1], milestones=_joined(at[:-1])))
        branches = zip(ends[:-1], at[:-1], strict=True)
        jobs = [trunk, *(_pretraining(variant, seed, end, trunk, start) for end, start in branches)]
        trainings, at = [*jobs[1:], trunk], [end.steps for end in ends]
    points = zip(ablation.points, at, trainings, ends, strict=True)
    return jobs, [MeasuredPoint(point, steps, job.id, seed, end) for point, steps, job, end in points]


def lengths_at(variant: PlannedVariant, points: Sequence[MeasuredPoint]) -> tuple[int, ...]:
    """Length of the validation sequences, in tokens, at each point; equal for all seeds."""
    return tuple(variant.length_at(point) for point in points if point.seed == points[0].seed)


def annealing_of(options: PretrainOptions, start: int, fraction: float) -> PretrainOptions:
    """Options of a training whose learning rate is constant after the warm-up until step `start` and then falls to 0
    within `fraction * start` further steps. The stage of `first_length` also lasts until `start`, so that all such
    trainings are equal up to that step."""
    schedule = replace(options.schedule, name="constant", final=0.0)
    schedule = replace(schedule, warmup=float(warmup_steps(schedule, options.steps)))
    learning_rate_factor(schedule, 0, start)  # refuses a warm-up that ends after the point
    constant = replace(options, schedule=schedule)
    found = annealed(constant, start, max(1, round(fraction * start)))
    return replace(found, stages=replace(options.stages, first_fraction=start / found.steps))


def _joined(steps: Sequence[int]) -> str | None:
    return ",".join(map(str, steps)) or None


def _pretraining(
    variant: PlannedVariant, seed: int, options: PretrainOptions, trunk: Job | None = None, start: int = 0
) -> Job:
    machine = options.machine
    identity = science(options, variant.setup.fingerprint) | {
        "eval_sequences": options.eval_sequences,
        "threads": machine.threads,
        "precision": machine.precision,
        "milestones": options.milestones,
        "start": start,
        **variant.identity,
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
        memory=expected_memory(replace(variant.setup, options=options), variant.parameters),
        after=() if trunk is None else (trunk.id,),
    )


# --- fine-tuning and evaluation


def open_tasks(ablation: Ablation, glue_dir: str | None, variants: list[PlannedVariant]) -> dict[str, list[OpenedTask]]:
    """Opens every task as each variant's fine-tunings will, with an untrained encoder.

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
        names = [*EVALUATIONS.values(), *(task.name for task in found[variant.name])]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{ablation.path}: tasks: {name} occurs twice; give one of them a different name")
    return found


def finetunings(
    ablation: Ablation, variant: PlannedVariant, tasks: Sequence[OpenedTask], point: MeasuredPoint, out: Path
) -> list[Job]:
    """Fine-tunings of one checkpoint: every task, setting and trial, equal for all variants."""
    jobs = []
    for task in tasks:
        for tuning in task.tunings:
            model = checkpoint_at(point, out)
            tuning_of_checkpoint = replace(tuning, options=replace(tuning.options, model=model))
            # The model of `tuning` is the untrained encoder.
            described = {name: value for name, value in tuning.identity.items() if name != "model"}
            for trial in range(ablation.trials):
                seed = point.seed * ablation.trials + trial  # two seeds of a variant have different heads
                identity = described | {"seed": seed, "pretraining": point.job, "step": point.steps}
                setting = {**tuning.setting, "at": point.fraction, "trial": trial}
                job = tuning_of_checkpoint.job(variant.name, task.name, seed, identity)
                jobs.append(replace(job, seed=point.seed, setting=setting, after=(point.job,)))
    return jobs


def check_scores(ablation: Ablation, evaluation: PlannedEvaluation, variants: Sequence[PlannedVariant]) -> None:
    """Checks that the trained variants will be able to score all pairs.

    Raises:
        UserError: one of them will not.
    """
    checked, pairs = set(), evaluation.pairs
    for variant in variants:
        setup, config = variant.setup, variant.setup.config
        where = f"{ablation.path}: {variant.name}, evaluate: pairs"
        if setup.objective().word_network is None:
            raise UserError(f"{where}: {setup.options.objective} predicts no words, so it scores no sentences")
        longest = config.max_positions, POSITIONS[config.position].extrapolates, setup.vocabulary.fingerprint
        if longest in checked:
            continue
        checked.add(longest)
        tokenizer = setup.vocabulary.build()
        tokenizer.encode_special_tokens = True
        scorer = Scorer(
            source=variant.name,
            tokenizer=tokenizer,
            mask_id=setup.vocabulary.ids["[MASK]"],
            unk_id=setup.vocabulary.ids["[UNK]"],
            positions=config.max_positions,
            check_length=partial(check_length, config),
            device=setup.device,
            precision=setup.precision,
        )
        with prefixed(where):
            pairs = short_pairs(scorer, pairs, evaluation.options.length)  # reports once what it leaves out
            distinct_sentences(scorer, pairs)


def evaluation_of(variant: PlannedVariant, evaluation: PlannedEvaluation, point: MeasuredPoint, out: Path) -> Job:
    """Evaluation of one checkpoint."""
    return evaluation.job(
        variant.name,
        checkpoint_at(point, out),
        variant.setup.config,
        {"pretraining": point.job, "step": point.steps},
        seed=point.seed,
        setting={"at": point.fraction},
        after=(point.job,),
    )


def checkpoint_at(point: MeasuredPoint, out: Path) -> str:
    """Folder of the checkpoint of a point."""
    return str(out.resolve() / JOBS / point.job / RUN / "checkpoints" / f"step-{point.steps:08d}")
