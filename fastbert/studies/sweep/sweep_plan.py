"""Plan of a sweep, from its grid: everything is opened and checked once, before the first job starts."""

from dataclasses import dataclass, field

from fastbert.errors import UserError
from fastbert.report.page import Table
from fastbert.streams import echo
from fastbert.studies.engine.jobs import Job, title
from fastbert.studies.shared.finetune_jobs import plan_tunings
from fastbert.studies.shared.grid import FinetuneGrid, TaskEntry, prefixed
from fastbert.studies.shared.trained import Columns, columns_table, tuning_table
from fastbert.studies.sweep.options import SweepOptions


@dataclass
class SweepPlan:
    """The jobs of a sweep, with descriptions of models and tasks."""

    jobs: list[Job] = field(default_factory=list)
    """Ordered by model, task, setting and seed."""
    encoders: dict[str, Columns] = field(default_factory=dict)
    """Checkpoint -> its columns in a table of encoders."""
    tasks: dict[str, Columns] = field(default_factory=dict)
    """Task -> its columns in a table of tasks."""

    def tables(self) -> list[Table]:
        """Tables of the checkpoints, tasks and options."""
        return [
            columns_table("checkpoint", self.encoders),
            columns_table("task", self.tasks),
            tuning_table(self.jobs),
        ]


def plan_sweep(grid: FinetuneGrid, options: SweepOptions) -> SweepPlan:
    """Plans all jobs of a sweep.

    Raises:
        UserError: a model, a task or a setting is invalid, or two jobs are equal.
    """
    plan, jobs = SweepPlan(), {}
    names: dict[str, TaskEntry] = {}
    warned: set[str] = set()
    for model in grid.models:
        for entry in grid.tasks:
            with prefixed(f"{grid.path}: {model.name}, {entry.name or entry.task}"):
                task = plan_tunings(grid, model, entry, options.glue_dir, on_nodes=options.backend == "ray")
            if names.setdefault(task.name, entry) is not entry:
                raise UserError(f"{grid.path}: tasks: {task.name} occurs twice; give one of them a different name")
            plan.encoders[model.name], plan.tasks[task.name] = task.encoder, task.described
            for warning in task.warnings:
                if warning not in warned:
                    echo(warning)
                    warned.add(warning)
            for tuning in task.tunings:
                for seed in grid.seeds:
                    job = tuning.job(model.name, task.name, seed, tuning.identity | {"seed": seed})
                    if job.id in jobs:
                        raise UserError(
                            f"{grid.path}: two jobs are the same training: {title(jobs[job.id])}, and {title(job)}. "
                            "Leave one of the models, tasks or values out"
                        )
                    jobs[job.id] = job
    plan.jobs = list(jobs.values())
    return plan
