"""Plan of a sweep, from its grid: everything is opened and checked once, before the first job starts."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

from fastbert.errors import UserError
from fastbert.hub.foreign import load_any
from fastbert.pretraining.zero_shot.pairs import distinct_sentences, short_pairs
from fastbert.pretraining.zero_shot.scorer import open_scorer
from fastbert.report.page import Table
from fastbert.streams import echo
from fastbert.studies.engine.jobs import Job, title
from fastbert.studies.shared.evaluate_jobs import PlannedEvaluation, evaluated_table, fingerprints, plan_evaluations
from fastbert.studies.shared.finetune_jobs import FINETUNE, OpenedTask, plan_tunings
from fastbert.studies.shared.grid import StudyGrid, TaskEntry, prefixed
from fastbert.studies.shared.trained import Columns, columns_table, encoder_columns, tuning_table
from fastbert.studies.sweep.options import SweepOptions


@dataclass
class SweepPlan:
    """The jobs of a sweep, with descriptions of models and tasks."""

    jobs: list[Job] = field(default_factory=list)
    """Fine-tunings ordered by model, task, setting and seed, then evaluations ordered by model."""
    encoders: dict[str, Columns] = field(default_factory=dict)
    """Checkpoint -> its columns in a table of encoders."""
    tasks: dict[str, Columns] = field(default_factory=dict)
    """Task -> its columns in a table of tasks."""
    opened: dict[str, OpenedTask] = field(default_factory=dict)
    """Task -> the task and the labels on dev, the same for all checkpoints."""
    evaluations: list[PlannedEvaluation] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Reasons why checkpoints have no pseudo-log-likelihood, a line each."""

    def tables(self) -> list[Table]:
        """Tables of the checkpoints, tasks, options and evaluations."""
        found = [columns_table("checkpoint", self.encoders)]
        if self.tasks:
            found += [columns_table("task", self.tasks)]
            found += [tuning_table([job for job in self.jobs if job.kind == FINETUNE])]
        return [*found, *([evaluated_table(self.evaluations)] if self.evaluations else [])]


def plan_sweep(grid: StudyGrid, options: SweepOptions) -> SweepPlan:
    """Plans all jobs of a sweep.

    Raises:
        UserError: a model, a task, a setting or an evaluation is invalid, or two jobs are equal.
    """
    plan, jobs = SweepPlan(evaluations=plan_evaluations(grid)), {}
    for job in chain(plan_finetunings(plan, grid, options), plan_evaluated(plan, grid, options.backend)):
        if (other := jobs.setdefault(job.id, job)) is not job:
            raise UserError(
                f"{grid.path}: two jobs are the same: {title(other)}, and {title(job)}. Leave one of the models, tasks "
                "or values out"
            )
    plan.jobs = list(jobs.values())
    return plan


def plan_finetunings(plan: SweepPlan, grid: StudyGrid, options: SweepOptions) -> Iterator[Job]:
    """The fine-tunings of a sweep; adds models and tasks to the plan."""
    names: dict[str, TaskEntry] = {}
    warned: set[str] = set()
    for model in grid.models:
        for entry in grid.tasks:
            with prefixed(f"{grid.path}: {model.name}, {entry.name or entry.task}"):
                task = plan_tunings(grid, model, entry, options.glue_dir, on_nodes=options.backend == "ray")
            if names.setdefault(task.name, entry) is not entry:
                raise UserError(f"{grid.path}: tasks: {task.name} occurs twice; give one of them a different name")
            plan.encoders[model.name], plan.tasks[task.name] = task.encoder, task.described
            plan.opened.setdefault(task.name, task)
            for warning in task.warnings:
                if warning not in warned:
                    echo(warning)
                    warned.add(warning)
            for tuning in task.tunings:
                for seed in grid.seeds:
                    yield tuning.job(model.name, task.name, seed, tuning.identity | {"seed": seed})


def plan_evaluated(plan: SweepPlan, grid: StudyGrid, backend: str) -> Iterator[Job]:
    """The evaluations of a sweep, one of each checkpoint; adds models to the plan."""
    for model in grid.models if plan.evaluations else ():
        with prefixed(f"{grid.path}: {model.name}"):
            pretrained = load_any(model.path)
            identity = fingerprints(pretrained)
        plan.encoders[model.name] = encoder_columns(pretrained)
        for evaluation in plan.evaluations:
            if evaluation.key == "pll" and not pretrained.has_head:
                plan.left_out.append(f"{model.name} has no pseudo-log-likelihood: its encoder predicts no masked words")
                continue
            if evaluation.key == "pairs":
                with prefixed(f"{grid.path}: {model.name}, evaluate: pairs"):
                    check_scores(evaluation, model.path, on_nodes=backend == "ray")
            yield evaluation.job(model.name, model.path, pretrained.config, identity, seed=None, setting={})


def check_scores(evaluation: PlannedEvaluation, model: str, on_nodes: bool) -> None:
    """Checks that the model can score all pairs.

    Args:
        on_nodes: the jobs run on the nodes of a cluster; this machine need not have their device.

    Raises:
        UserError: it cannot.
    """
    machine = evaluation.options.machine
    if on_nodes:
        machine = replace(machine, device="cpu")
    scorer = open_scorer(replace(evaluation.options, model=model, machine=machine))
    distinct_sentences(scorer, short_pairs(scorer, evaluation.pairs, evaluation.options.length))
