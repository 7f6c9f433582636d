"""From the grid of a sweep to its jobs: everything is opened and checked once, before the first job starts."""

from fastbert.errors import UserError
from fastbert.streams import echo
from fastbert.studies.engine.jobs import Job, title
from fastbert.studies.shared.finetune_jobs import plan_tunings
from fastbert.studies.shared.grid import FinetuneGrid, TaskEntry, prefixed
from fastbert.studies.sweep.options import SweepOptions


def sweep_jobs(grid: FinetuneGrid, options: SweepOptions) -> list[Job]:
    """All jobs, model by model and task by task, settings and seeds within.

    Raises:
        UserError: a model, a task or a setting that no job could be trained with, or two jobs that are the same.
    """
    jobs: dict[str, Job] = {}
    names: dict[str, TaskEntry] = {}
    warned: set[str] = set()
    for model in grid.models:
        for entry in grid.tasks:
            with prefixed(f"{grid.path}: {model.name}, {entry.name or entry.task}"):
                task = plan_tunings(grid, model, entry, options.glue_dir, on_nodes=options.backend == "ray")
            if names.setdefault(task.name, entry) is not entry:
                raise UserError(f"{grid.path}: tasks: {task.name} is there twice; give one of them a name: of its own")
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
    return list(jobs.values())
