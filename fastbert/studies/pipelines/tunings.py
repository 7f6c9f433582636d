"""Fine-tunings of a pipeline as jobs: every stage with every model, and the ensembles of their seeds."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastbert.config import digest, to_dict
from fastbert.errors import UserError
from fastbert.finetuning.glue import plain
from fastbert.finetuning.results import seed_folder
from fastbert.finetuning.setup import FinetuneSetup, describe_finetuning
from fastbert.finetuning.tasks import Task, is_yaml
from fastbert.finetuning.together import prepare_together
from fastbert.hub.load import load_pretrained
from fastbert.studies.engine.jobs import Job
from fastbert.studies.engine.outcomes import RUN
from fastbert.studies.engine.store import JOBS
from fastbert.studies.pipelines.options import RunOptions, Stage
from fastbert.studies.pipelines.pipeline import Pipeline
from fastbert.studies.pipelines.planned import PlannedModel, tuning_memory
from fastbert.studies.pipelines.stand_in import block_parameters, write_stand_in
from fastbert.studies.shared.finetune_jobs import PlannedTuning, plan_tunings
from fastbert.studies.shared.grid import AXES, ModelEntry, TaskEntry, prefixed
from fastbert.training.world import ONE_PROCESS

TOGETHER, ENSEMBLE = "finetune-together", "ensemble"  # the kinds of these jobs
RUNNERS = "fastbert.studies.pipelines.runners"
MOST_TRIALS = 10_000  # of `Repeats`: the seeds of fine-tunings do not depend on their number
_UNTRAINED = ("model", "tokenizer")  # in the identity of a stand-in


@dataclass(frozen=True)
class Column:
    """A task of a stage."""

    label: str
    """Name in tables: that of the task, with the stage if another one has the same task."""
    stage: str
    task: Task
    metric: str


@dataclass(frozen=True)
class Trial:
    """A fine-tuning of one model and seed, with everything that a later job needs of it."""

    job: str
    folders: Mapping[str, str]
    """Label of a column -> folder of the seed."""
    encoder: str
    """Folder of a fine-tuned model, from whose encoder a later stage starts."""


class Tunings:
    """Plans the fine-tunings of all stages.

    Args:
        models: the models of the pipeline by name.
        scratch: folder for stand-ins of models that are not trained yet.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        options: RunOptions,
        out: Path,
        models: Mapping[str, PlannedModel],
        scratch: Path,
    ) -> None:
        self.pipeline, self.options, self.out, self.models, self.scratch = pipeline, options, out, models, scratch
        self.columns: dict[str, Column] = {}
        self.warnings: list[str] = []
        self._stand_ins: dict[tuple[Any, ...], str] = {}
        self._opened: dict[tuple[Any, ...], Any] = {}
        self._trials: dict[tuple[str, str, int | None, int], Trial] = {}
        """(stage, model, seed of the pretraining, trial) -> its fine-tuning."""
        followed = {stage.after for stage in pipeline.stages.values()}
        self.saved = {name: options.keep != "none" or name in followed for name in pipeline.stages}

    def jobs(self) -> Iterator[tuple[str, Job]]:
        """(name of the stage, job) for all stages."""
        for stage in self.pipeline.stages.values():
            names = self._labels(stage)
            for model in self.models.values():
                if stage.models is not None and model.entry.name not in stage.models:
                    continue
                with prefixed(f"stages: {stage.name}: {model.entry.name}"):
                    for seed in model.checkpoints:
                        for job in self._of_model(stage, model, seed, names):
                            yield stage.name, job

    def _labels(self, stage: Stage) -> list[str]:
        """Names of the tasks of a stage as given; those that another stage has too get the name of the stage."""
        given = [entry.name or task_name(entry) for entry in stage.tasks]
        others = [
            entry.name or task_name(entry)
            for other in self.pipeline.stages.values()
            if other is not stage
            for entry in other.tasks
        ]
        labels = [f"{name} ({stage.name})" if name in others else name for name in given]
        for label in labels:
            if labels.count(label) > 1:
                raise UserError(f"stages: {stage.name}: {label} occurs twice; give one of them another name")
            if (other := self.columns.get(label)) is not None and other.stage != stage.name:
                raise UserError(f"stages: {stage.name}: {label} is in stage {other.stage} too; give it another name")
        return labels

    # --- one model and seed

    def _of_model(self, stage: Stage, model: PlannedModel, seed: int | None, labels: list[str]) -> Iterator[Job]:
        if stage.together:
            plans = [([*labels], self._together(stage, model, labels, setting)) for setting in stage.tasks[0].settings]
        else:
            plans = [
                ([label], tuning)
                for label, entry in zip(labels, stage.tasks, strict=True)
                for tuning in self._alone(stage, model, entry, label)
            ]
        for columns, tuning in plans:
            jobs = []
            for trial in range(stage.trials):
                job, found = self._trial(stage, model, seed, trial, columns, tuning)
                self._trials[stage.name, model.entry.name, seed, trial] = found
                jobs.append((job, found))
                yield job
            if len(jobs) > 1:
                for column in columns:
                    yield self._ensemble(column, jobs, tuning)

    def _trial(
        self,
        stage: Stage,
        model: PlannedModel,
        seed: int | None,
        trial: int,
        columns: list[str],
        tuning: PlannedTuning,
    ) -> tuple[Job, Trial]:
        checkpoint = model.checkpoints[seed]
        number = (seed or 0) * MOST_TRIALS + trial  # no two fine-tunings of a model have the same head
        identity = dict(tuning.identity)
        if stage.after is None:
            options = replace(tuning.options, model=checkpoint.path, init_from=None)
            identity |= {"pretraining": checkpoint.mark} if checkpoint.job else model.encoder
            after = checkpoint.after
        else:
            before = self.pipeline.stages[stage.after]
            parent = self._trials[before.name, model.entry.name, seed, trial if before.trials > 1 else 0]
            options = replace(tuning.options, model=None, init_from=parent.encoder)
            identity["after"] = parent.job
            after = (parent.job,)
        name = columns[0] if len(columns) == 1 and not stage.together else stage.name
        job = replace(tuning, options=options).job(model.entry.name, name, number, identity | {"seed": number})
        kind, runner = (TOGETHER, f"{RUNNERS}:together_job") if stage.together else (job.kind, job.runner)
        setting = {**tuning.setting, **({"trial": trial} if stage.trials > 1 else {})}
        cost = tuning.cost * block_parameters(model.config)
        memory = tuning_memory(options, model.config)
        job = replace(job, seed=seed, setting=setting, after=after, kind=kind, runner=runner, cost=cost, memory=memory)
        out = self.out.resolve() / JOBS / job.id / RUN
        if stage.together:
            tasks = {column: out / self.columns[column].task.name for column in columns}
            job = replace(job, options=job.options | {"columns": {c: self.columns[c].task.name for c in columns}})
        else:
            tasks = {columns[0]: out}
        folders = {column: str(seed_folder(folder, 1.0, number)) for column, folder in tasks.items()}
        if not stage.together:
            folders = {columns[0]: str(seed_folder(out, identity["fraction"], number))}
        return job, Trial(job.id, folders, next(iter(folders.values())))

    def _ensemble(self, column: str, jobs: list[tuple[Job, Trial]], tuning: PlannedTuning) -> Job:
        """The mean of the predictions of the seeds on dev."""
        first = jobs[0][0]
        after = tuple(job.id for job, _ in jobs)
        identity = {"ensemble": list(after), "task": column}
        options = to_dict(replace(tuning.options, task=self._task_of(column), mixture=type(tuning.options.mixture)()))
        return Job(
            id=digest(identity),
            model=first.model,
            task=column,
            seed=first.seed,
            setting={name: value for name, value in first.setting.items() if name != "trial"},
            identity=identity,
            options={"finetune": options, "folders": [trial.folders[column] for _, trial in jobs]},
            folder=first.folder,
            cost=0.0,
            runner=f"{RUNNERS}:ensemble_job",
            kind=ENSEMBLE,
            device="cpu",
            after=after,
        )

    def _task_of(self, column: str) -> str:
        stage = self.pipeline.stages[self.columns[column].stage]
        return next(
            entry.task for entry, label in zip(stage.tasks, self._labels(stage), strict=True) if label == column
        )

    # --- opened tasks

    def _stand_in(self, model: PlannedModel) -> str:
        """Path of the model, or of its stand-in if it is not trained yet."""
        (checkpoint, *_) = model.checkpoints.values()
        if checkpoint.job is None:
            return checkpoint.path
        key = (model.config.position, model.config.max_positions, model.config.type_vocab_size)
        if key not in self._stand_ins:
            folder = self.scratch / f"{len(self._stand_ins)}"
            folder.mkdir()
            self._stand_ins[key] = write_stand_in(model.config, folder)
        return self._stand_ins[key]

    def _grid(self, stage: Stage) -> Any:
        return replace(stage.grid, finetune={**stage.grid.finetune, "save_model": self.saved[stage.name]})

    def _alone(self, stage: Stage, model: PlannedModel, entry: TaskEntry, label: str) -> list[PlannedTuning]:
        """The fine-tunings of a model on a task: one for each setting, checked with the model or its stand-in."""
        path = self._stand_in(model)
        key = (stage.name, label, path)
        if key not in self._opened:
            on_nodes = self.options.backend == "ray"
            with named_model(model.entry.name, path):
                opened = plan_tunings(self._grid(stage), ModelEntry("", path), entry, self.options.glue_dir, on_nodes)
            self.columns.setdefault(label, Column(label, stage.name, opened.task, opened.task.metrics[0]))
            self._warn(opened.warnings)
            self._opened[key] = [self._without_stand_in(tuning, path) for tuning in opened.tunings]
        return self._opened[key]

    def _together(
        self, stage: Stage, model: PlannedModel, labels: list[str], setting: Mapping[str, Any]
    ) -> PlannedTuning:
        """The fine-tuning of a model on all tasks of a stage together."""
        path = self._stand_in(model)
        key = (stage.name, *setting.items(), path)
        if key not in self._opened:
            grid, names = self._grid(stage), [entry.task for entry in stage.tasks]
            joined = TaskEntry(None, ",".join(names), (), {})
            mixture = {**stage.mixture, "together": True}
            grid = replace(grid, finetune={**grid.finetune, **mixture})
            options = grid.options(ModelEntry("", path), joined, self.options.glue_dir, **setting)
            with named_model(model.entry.name, path):
                tasks = prepare_together(replace(options, out=str(self.scratch / "together")), ONE_PROCESS)
            by_name = {setup.task.name: setup for setup in tasks.setups}
            for label, entry in zip(labels, stage.tasks, strict=True):
                task = by_name[task_name(entry)].task
                self.columns.setdefault(label, Column(label, stage.name, task, task.metrics[0]))
            self._warn([warning for setup in tasks.setups for warning in setup.warnings])
            first = tasks.setups[0].options
            identity = {
                "together": {setup.task.name: _described(setup) for setup in tasks.setups},
                **{name: getattr(first, name) for name in AXES.values()},
                "weights": tasks.weights,
                "temperature": options.mixture.temperature,
                "target": options.mixture.target,
                "threads": self.pipeline.threads,
                "precision": options.machine.precision,
            }
            self._opened[key] = PlannedTuning(
                options=options,
                setting={name: getattr(first, name) for name in AXES.values()},
                identity=identity,
                cost=sum(_characters(setup) for setup in tasks.setups) * 6.0 / 4 * first.epochs,
                memory=0,
            )
        return self._opened[key]

    def _without_stand_in(self, tuning: PlannedTuning, path: str) -> PlannedTuning:
        """A tuning whose identity has no weights, and whose cost is that of one parameter."""
        weights = load_pretrained(path).weights
        parameters = sum(weights[key].numel() for key in weights if key.startswith("encoder.blocks."))
        identity = {name: value for name, value in tuning.identity.items() if name not in _UNTRAINED}
        return replace(tuning, identity=identity, cost=tuning.cost / parameters)

    def _warn(self, warnings: list[str]) -> None:
        self.warnings += [warning for warning in warnings if warning not in self.warnings]


@contextmanager
def named_model(name: str, path: str) -> Iterator[None]:
    """Names the model instead of the folder of its stand-in in errors."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(path, name)) from None


def _described(setup: FinetuneSetup) -> dict[str, Any]:
    return {name: value for name, value in describe_finetuning(setup).items() if name not in _UNTRAINED}


def _characters(setup: FinetuneSetup) -> int:
    return sum(len(example.text) + len(example.pair or "") for example in setup.train)


def task_name(entry: TaskEntry) -> str:
    """Name of a task, before it is opened."""
    return Path(entry.task).stem if is_yaml(entry.task) else plain(entry.task)
