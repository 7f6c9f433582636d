"""Fine-tunings as jobs of a study: tasks that are opened and checked before the first job, the runner, and its rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastbert.config import digest, from_dict, to_dict
from fastbert.errors import UserError
from fastbert.files import remove
from fastbert.finetuning.batches import subset
from fastbert.finetuning.dev_ensemble import Labels, ensemble_figures
from fastbert.finetuning.finetune import finetune
from fastbert.finetuning.loop import block_of
from fastbert.finetuning.options import FinetuneOptions, science
from fastbert.finetuning.results import check_best, read_results, seed_folder
from fastbert.finetuning.setup import check_schedule, describe_finetuning, expected_memory, prepare_finetuning
from fastbert.finetuning.slices import Masks
from fastbert.finetuning.tasks import Task
from fastbert.records import COUNT, check, read_json
from fastbert.studies.engine.jobs import Job
from fastbert.studies.engine.outcomes import RUN, ended, failure
from fastbert.studies.engine.store import ResultRow
from fastbert.studies.shared.grid import AXES, ModelEntry, StudyGrid, TaskEntry
from fastbert.studies.shared.trained import Columns, encoder_columns, task_columns

FINETUNE = "finetune"  # the kind of these jobs
MANIFEST = "manifest.json"  # in the folder of a run
_FIGURES = {"dev": {str: {str: (float, type(None))}}}
_TUNED = {
    **{"model": str, "task": str, "seed": int, "precision": str, "seconds": float, "metrics": [str]},
    **{"learning_rate": float, "batch_size": int, "epochs": int, "train_examples": COUNT},
    **{"best": _FIGURES, "last": _FIGURES},
}


@dataclass(frozen=True)
class PlannedTuning:
    """A checked fine-tuning of a model on a task with one setting; with a seed it becomes a job."""

    options: FinetuneOptions
    setting: dict[str, Any]
    """Learning rate, batch size and epochs, after defaults."""
    identity: dict[str, Any]
    """Everything that defines a result, without the seed."""
    cost: float
    """Approximate FLOPs."""
    memory: int
    """Expected bytes of main memory."""

    def job(self, model: str, task: str, seed: int, identity: dict[str, Any]) -> Job:
        """The job with a seed, which is also part of `identity`."""
        options = to_dict(replace(self.options, first_seed=seed))
        del options["out"]
        return Job(
            id=digest(identity),
            model=model,
            task=task,
            seed=seed,
            setting=self.setting,
            identity=identity,
            options=options,
            folder=str(Path.cwd()),
            cost=self.cost,
            memory=self.memory,
            runner="fastbert.studies.shared.finetune_jobs:finetune_job",
            kind=FINETUNE,
            device=self.options.machine.device,
        )


@dataclass(frozen=True)
class OpenedTask:
    """A task opened for one model."""

    name: str
    tunings: list[PlannedTuning]
    """One fine-tuning for each setting."""
    warnings: list[str]
    """Shown to the user before the first job."""
    encoder: Columns
    """Columns of the model in a table of encoders."""
    described: Columns
    """Columns of the task in a table of tasks."""
    task: Task
    labels: Labels
    """Labels of its dev splits."""
    slices: Masks
    """Slices of its dev splits."""


def plan_tunings(
    grid: StudyGrid, model: ModelEntry, entry: TaskEntry, glue_dir: str | None, on_nodes: bool = False
) -> OpenedTask:
    """Opens model and task in the same way as their jobs, and checks every setting.

    Args:
        on_nodes: the jobs run on the nodes of a cluster; this machine need not have their device.

    Raises:
        UserError: the model or the task cannot be opened, or a setting is invalid.
    """
    options = grid.options(model, entry, glue_dir, **entry.settings[0])
    if on_nodes:
        options = replace(options, machine=replace(options.machine, device="cpu", apex=False))
    setup = prepare_finetuning(options)
    described = describe_finetuning(setup)
    weights = setup.pretrained.weights
    parameters = sum(weights[key].numel() for key in weights if block_of(key) is not None)
    tunings = []
    for setting in entry.settings:
        options = grid.options(model, entry, glue_dir, **setting)
        resolved = options.resolved(setup.task, setup.pretrained.config.max_positions)
        (fraction,) = resolved.fractions()
        rows = subset(len(setup.train), fraction)
        at_setting = replace(setup, options=resolved)
        try:
            check_schedule([at_setting], fraction)
        except UserError as error:
            raise UserError(f"{setting}: {error}") from None
        characters = sum(len(setup.train[row].text) + len(setup.train[row].pair or "") for row in rows)
        identity = described | science(resolved) | {"task": setup.task.name, "fraction": fraction}
        identity |= {"threads": grid.threads, "precision": options.machine.precision}
        cost = 6.0 * parameters * characters / 4 * resolved.epochs
        values = {name: getattr(resolved, name) for name in AXES.values()}
        tunings.append(PlannedTuning(options, values, identity, cost, expected_memory(at_setting)))
    return OpenedTask(
        name=entry.name or setup.task.name,
        tunings=tunings,
        warnings=setup.warnings,
        encoder=encoder_columns(setup.pretrained),
        described=task_columns(setup),
        task=setup.task,
        labels=setup.labels,
        slices=setup.slices,
    )


def finetune_job(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """`JobRunner` of a fine-tuning: trains to the end, resuming an earlier attempt on the same model and data."""
    if not (out / MANIFEST).is_file() or changed_since(job, out):
        remove(out)
    code = finetune(from_dict(FinetuneOptions, job["options"] | {"out": str(out)}, where="the study's job"))
    if code:
        return ended(code)
    if changed := changed_since(job, out):
        return failure(f"the {changed} changed after the study had started", "run it again once nothing changes it")
    results = read_results(out)
    return {
        "status": "done",
        "precision": results["precision"],
        "metrics": results["metrics"],
        "result": results["fractions"][0]["seeds"][0],
    }


def changed_since(job: dict[str, Any], out: Path) -> str | None:
    """Name of the input (model, tokenizer or data) of the fine-tuning in `out` that differs from the plan, or None."""
    science = read_json(out / MANIFEST, "the job's manifest", {"science": dict})["science"]
    planned = job["identity"]  # of a job that depends on another, the model is not known
    names = (name for name in ("model", "tokenizer", "data") if name in planned)
    return next((name for name in names if science.get(name) != planned[name]), None)


def check_tuned(row: ResultRow, where: str) -> None:
    """`RowCheck` of fine-tunings."""
    check(row, _TUNED, where)
    check_best(row, row["metrics"], where)
    for split, figures in row["last"]["dev"].items():  # null: not finite
        check(figures, dict.fromkeys(row["metrics"], (float, type(None))), where, f"last.dev.{split}")


def folders_of(rows: Sequence[ResultRow]) -> list[Path]:
    """Folder of the seed of each job."""
    return [seed_folder(Path(row["folder"]) / RUN, row["configuration"]["fraction"], row["seed"]) for row in rows]


def ensemble_of(rows: Sequence[ResultRow], task: Task, labels: Labels) -> dict[str, dict[str, float]] | None:
    """`ensemble_figures` of the seeds of one model, task and setting, from the rows of their jobs."""
    return ensemble_figures(task, labels, folders_of(rows))
