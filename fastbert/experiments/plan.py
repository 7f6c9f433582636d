"""From the axes of a sweep to its jobs: everything is opened and checked once, before the first job starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbert.config import digest, to_dict
from fastbert.errors import UserError
from fastbert.experiments.jobs import Job, title
from fastbert.experiments.options import Axes, ModelEntry, SweepOptions, TaskEntry
from fastbert.finetuning.batches import subset
from fastbert.finetuning.options import science
from fastbert.finetuning.setup import FinetuneSetup, describe_experiment, prepare_setup
from fastbert.streams import say
from fastbert.training.schedules import learning_rate_factor


def plan(axes: Axes, options: SweepOptions) -> list[Job]:
    """All jobs, model by model and task by task, settings and seeds within.

    Raises:
        UserError: a model, a task or a setting that no job could be trained with, or two jobs that are the same.
    """
    jobs: dict[str, Job] = {}
    names: dict[str, TaskEntry] = {}
    said: set[str] = set()
    for model in axes.models:
        for task in axes.tasks:
            setup = _open(axes, options, model, task)
            name = task.name or setup.task.name
            if names.setdefault(name, task) is not task:
                raise UserError(f"{axes.path}: tasks: {name} is there twice; give one of them a name: of its own")
            for warning in setup.warnings:
                if warning not in said:
                    say(warning)
                    said.add(warning)
            for job in _jobs(axes, options, model, task, name, setup):
                if job.id in jobs:
                    raise UserError(
                        f"{axes.path}: two jobs are the same training: {title(jobs[job.id])}, and {title(job)}. "
                        "Leave one of the models, tasks or values out"
                    )
                jobs[job.id] = job
    return list(jobs.values())


def _open(axes: Axes, options: SweepOptions, model: ModelEntry, task: TaskEntry) -> FinetuneSetup:
    """Model and task as a job opens them. On a cluster it is the nodes that must have the device."""
    asked = axes.options(model, task, options.glue_dir, **task.settings[0])
    if options.backend == "ray":
        asked = replace(asked, machine=replace(asked.machine, device="cpu", apex=False))
    try:
        return prepare_setup(asked)
    except UserError as error:
        raise UserError(f"{axes.path}: {model.name}, {task.name or task.task}: {error}") from None


def _jobs(
    axes: Axes, options: SweepOptions, model: ModelEntry, task: TaskEntry, name: str, setup: FinetuneSetup
) -> list[Job]:
    described = describe_experiment(setup)
    weights = setup.pretrained.weights
    parameters = sum(weights[key].numel() for key in weights if key.startswith("encoder.blocks."))
    jobs = []
    for setting in task.settings:
        asked = axes.options(model, task, options.glue_dir, **setting)
        resolved = asked.resolved(setup.task, setup.pretrained.config.max_positions)
        (fraction,) = resolved.fractions()
        rows = subset(len(setup.train), fraction)
        try:
            learning_rate_factor(resolved.schedule, 0, resolved.steps(len(rows)))
        except UserError as error:
            raise UserError(f"{axes.path}: {name}, {setting}: {error}") from None
        characters = sum(len(setup.train[row].text) + len(setup.train[row].pair or "") for row in rows)
        for seed in axes.seeds:
            identity = described | science(resolved) | {"task": setup.task.name, "seed": seed, "fraction": fraction}
            identity |= {"threads": axes.threads, "precision": asked.machine.precision}
            jobs.append(
                Job(
                    id=digest(identity),
                    model=model.name,
                    task=name,
                    seed=seed,
                    setting={key: getattr(resolved, key) for key in ("learning_rate", "batch_size", "epochs")},
                    identity=identity,
                    options=_plain(to_dict(replace(asked, first_seed=seed))),
                    folder=str(Path.cwd()),
                    cost=float(parameters * characters * resolved.epochs),
                )
            )
    return jobs


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "out"}
