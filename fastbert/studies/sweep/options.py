"""What `fastbert sweep` takes: a YAML file of axes, read strictly, and a few flags that say where and how to run.

Axes are checked value by value through `FinetuneOptions`, so a sweep refuses what `fastbert finetune` would.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from fastbert.config import choice, from_dict, of_another_job, read_yaml, with_underscores
from fastbert.errors import UserError, brief, nearest
from fastbert.finetuning.glue import check_glue_folder
from fastbert.finetuning.options import MOST_TRAININGS, FinetuneOptions
from fastbert.finetuning.tasks import OwnTaskOptions, check_glue_options, check_task, is_glue
from fastbert.hub.folders import check_model_folder
from fastbert.ranges import Processes, Range, Seed, Workers, check_values, problem_of, text_problem

BACKENDS = ("local", "ray")

MOST_SETTINGS = 10_000  # of a task
Repeats = Annotated[int, Range(1, 10_000)]
"""Trainings of the same that differ by their seed."""

# Axis in the YAML -> the option of a job that it gives.
AXES = {"learning_rates": "learning_rate", "batch_sizes": "batch_size", "epochs": "epochs"}
# Options of a job that come from the axes or from the sweep itself.
_TAKEN = {
    "model": "give it under models",
    "init_from": "give it under models",
    "task": "give it under tasks",
    "own": "give the YAML file of an own task under tasks",
    "out": "a job's folder lies in the sweep's; give --out",
    "seeds": "give seeds next to tasks, for all jobs",
    "first_seed": "give seeds next to tasks, as a list",
    "learning_rate": "give learning_rates",
    "batch_size": "give batch_sizes",
    "glue_dir": "give glue_dir next to tasks, for all jobs",
}


@dataclass(frozen=True)
class SweepOptions:
    """Fine-tune checkpoints on tasks, over settings and seeds: `fastbert sweep configs/sweep/x.yaml [options]`.

    The YAML file names models (the first is what the others are compared with) and tasks, and may give learning_rates,
    batch_sizes, epochs (lists, or one value), seeds (how many, or a list), threads (of each job; 1), and under finetune
    any option of `fastbert finetune`; an entry of tasks may be a mapping {task: sst2, train_fraction: 0.1, epochs: 3}
    with axes and options of its own. The flags below may stand in it too. The same command continues a sweep that
    was stopped, and runs again what failed.
    """

    out: str | None = None
    """Folder for results.jsonl, report/ and jobs/ (default: runs/<name of the YAML file>)."""
    workers: Processes = 1
    """Jobs at a time, each a process with the YAML file's threads. Results do not depend on it."""
    backend: str = choice("local", BACKENDS, "back end")
    """local (processes of this machine) or ray."""
    ray_address: str | None = None
    """host:port of a Ray cluster that runs; without it a Ray is started here for this sweep. Its nodes need fastbert,
    and models, tasks and GLUE under the same paths; results come back and are written here."""
    glue_dir: str | None = None
    """Folder of the official GLUE archive, or of Parquet files (default: nyu-mll/glue through `datasets`)."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.ray_address is not None and self.backend != "ray":
            raise UserError("a Ray address is given, but the back end is local; add --backend ray or drop the address")


@dataclass(frozen=True)
class ModelEntry:
    """A checkpoint of the sweep, under the name it has in tables."""

    name: str
    path: str


@dataclass(frozen=True)
class TaskEntry:
    """A task of the sweep, under the name it has in tables."""

    name: str | None
    """None: the task's own, known once it is opened."""
    task: str
    settings: tuple[dict[str, Any], ...]
    """Every combination of the axes that the task is trained with: values of `AXES`; what is left out is the
    default."""
    overrides: dict[str, Any]
    """Further options of its jobs."""


@dataclass(frozen=True)
class Axes:
    """What a sweep's YAML file says."""

    models: tuple[ModelEntry, ...]
    tasks: tuple[TaskEntry, ...]
    seeds: tuple[int, ...]
    threads: int
    finetune: dict[str, Any]
    """Options of all jobs."""
    path: str
    """The file, for errors."""

    def options(self, model: ModelEntry, task: TaskEntry, glue_dir: str | None, **more: Any) -> FinetuneOptions:
        """Those of one job; `more` is its setting."""
        values = {
            "save_model": False,  # of hundreds of jobs only the figures are kept, unless the file says otherwise
            **merged(self.finetune, task.overrides),
            "model": model.path,
            "task": task.task,
            "glue_dir": glue_dir,
            "seeds": 1,
            **more,
        }
        if not is_glue(task.task):  # options of GLUE are for the other tasks of the sweep
            values |= {"glue_dir": None, "glue_subset": False}
        values["machine"] = {**values.get("machine", {}), "threads": self.threads}
        return from_dict(FinetuneOptions, values, f"{self.path}: {task.name or task.task}")

    def check_inputs(self, glue_dir: str | None) -> None:
        """Checks, before torch is imported, that models, tasks and the GLUE folder are there.

        Raises:
            UserError: one is not.
        """
        for model in self.models:
            with prefixed(f"{self.path}: models"):
                check_model_folder(model.path)
        for task in self.tasks:
            with prefixed(f"{self.path}: tasks"):
                check_task(task.task, OwnTaskOptions())
                check_glue_options([task.task], None, bool(task.overrides.get("glue_subset")), dashes="")
        check_glue_folder(glue_dir)
        with prefixed(self.path):
            tasks = [task.task for task in self.tasks]
            check_glue_options(tasks, glue_dir, bool(self.finetune.get("glue_subset")), dashes="")


@contextmanager
def prefixed(where: str) -> Iterator[None]:
    """UserErrors say where what they refuse comes from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def load_sweep(path: str | Path) -> tuple[Axes, SweepOptions]:
    """The axes in a YAML file, and the flags' defaults it gives.

    Raises:
        UserError: names the file, the key, and what was expected.
    """
    values = read_yaml(path)
    where = str(path)
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping with models and tasks, found {shown(values)}")
    values = with_underscores(values, where)
    flags = {f.name for f in fields(SweepOptions)}
    known = {"models", "tasks", "seeds", "threads", "finetune", *AXES, *flags}
    for key in values:
        if key not in known:
            under = "put it under finetune" if key in _finetune_names() - set(_TAKEN) else ""
            hint = under or of_another_job(values, known) or nearest(key, known)
            raise UserError(f"{where}: unknown option {brief(key)}; {_TAKEN.get(key, hint)}")
    options = from_dict(SweepOptions, {key: value for key, value in values.items() if key in flags}, where)
    fixed = read_finetune(values.get("finetune", {}), f"{where}: finetune")
    threads = read_count(values, "threads", where, Workers)
    common = {axis: read_axis(values[axis], axis, where) for axis in AXES if axis in values}
    axes = Axes(
        models=tuple(_model(entry, where) for entry in read_list(values, "models", where)),
        tasks=tuple(read_task(entry, common, fixed, where) for entry in read_list(values, "tasks", where)),
        seeds=read_seeds(values.get("seeds", 1), where),
        threads=threads,
        finetune=fixed,
        path=where,
    )
    settings = sum(len(task.settings) for task in axes.tasks)
    refuse_too_many(len(axes.models) * settings * len(axes.seeds), where)
    refuse_twice([model.name for model in axes.models], f"{where}: models", "; give one of them a name: of its own")
    refuse_twice([str(Path(model.path).resolve()) for model in axes.models], f"{where}: models", "")
    return axes, options


def read_list(values: dict[str, Any], axis: str, where: str) -> list[Any]:
    found = values.get(axis)
    if found is None and axis not in values:
        raise UserError(f"{where}: {axis} is missing; a sweep needs at least one entry there")
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list):
        raise UserError(f"{where}: {axis} must be a list, found {shown(found)}")
    if not found:
        raise UserError(f"{where}: {axis} is empty; a sweep needs at least one entry there")
    return found


def _model(entry: Any, where: str) -> ModelEntry:
    if isinstance(entry, str):
        _strings({"path": entry}, ("path",), f"{where}: models")
        return ModelEntry(Path(entry).resolve().name, entry)
    values = _strings(entry, ("name", "path"), f"{where}: models")
    if "path" not in values:
        raise UserError(f"{where}: models: {shown(entry)} has no path; give the folder of a checkpoint")
    return ModelEntry(values.get("name") or Path(values["path"]).resolve().name, values["path"])


def _strings(entry: Any, keys: Iterable[str], where: str) -> dict[str, str]:
    """A mapping with some of `keys`, all of them texts."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a text or a mapping, found {shown(entry)}")
    for key, value in entry.items():
        if key not in keys:
            raise UserError(f"{where}: unknown key {brief(key)}; {nearest(key, keys)}")
        if not isinstance(value, str):
            raise UserError(f"{where}: {key} must be a text, found {shown(value)}")
        if problem := text_problem(value):
            raise UserError(f"{where}: {key} {problem}")
    return entry


def read_task(entry: Any, common: dict[str, list[Any]], fixed: dict[str, Any], where: str) -> TaskEntry:
    """An entry of tasks with its settings: its own axes win over those of the sweep."""
    where = f"{where}: tasks"
    if isinstance(entry, str):
        entry = {"task": entry}
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a text or a mapping, found {shown(entry)}")
    named = _strings({key: entry[key] for key in ("task", "name") if key in entry}, ("task", "name"), where)
    if "task" not in named:
        raise UserError(f"{where}: {shown(entry)} has no task; give a GLUE task or the YAML file of an own one")
    where = f"{where}: {named.get('name', named['task'])}"
    own = {axis: read_axis(entry[axis], axis, where) for axis in AXES if axis in entry}
    rest = {key: value for key, value in entry.items() if key not in (*named, *own)}
    overrides = read_finetune(rest, where, ("task", "name", *AXES))
    axes = common | own
    if (count := math.prod(map(len, axes.values()))) > MOST_SETTINGS:
        raise UserError(f"{where}: the axes make {count:,} settings, more than {MOST_SETTINGS:,}; give fewer values")
    settings: list[dict[str, Any]] = [{}]
    for axis, values in axes.items():
        settings = [setting | {AXES[axis]: value} for setting in settings for value in values]
    # The options are made once here, for what they refuse: a value out of range, a mapping with an unknown key.
    from_dict(FinetuneOptions, merged(fixed, overrides), where)
    return TaskEntry(named.get("name"), named["task"], tuple(settings), overrides)


def merged(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`values` with those of `over` in their place, group by group."""
    both = [key for key in over if isinstance(over[key], dict) and isinstance(values.get(key), dict)]
    groups = {key: values[key] | over[key] for key in both}
    return values | over | groups


def read_axis(values: Any, axis: str, where: str) -> list[Any]:
    """The values of an axis, each as `FinetuneOptions` takes it."""
    where, name = f"{where}: {axis}", AXES[axis]
    values = values if isinstance(values, list) else [values]
    if not values:
        raise UserError(f"{where} is empty; give at least one value, or leave it out for the default")
    for value in values:
        if value is None:
            raise UserError(f"{where} has an empty value; give a number, or leave the axis out for the default")
    taken = [getattr(from_dict(FinetuneOptions, {name: value}, where), name) for value in values]
    refuse_twice(taken, where, "")
    return taken


def read_count(values: dict[str, Any], name: str, where: str, kind: Any) -> int:
    """The whole number from 1 called `name`, 1 if it is left out; `kind` declares how large it may be."""
    value = values.get(name, 1)
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: {name} must be a whole number from 1, found {shown(value)}")
    if problem := problem_of(value, kind):
        raise UserError(f"{where}: {name} {problem}")
    return value


def read_seeds(values: Any, where: str) -> tuple[int, ...]:
    where = f"{where}: seeds"
    if type(values) is int:
        if problem := problem_of(values, Repeats):
            raise UserError(f"{where} {problem}")
        return tuple(range(values))
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise UserError(f"{where} must be how many there are, or a list of whole numbers, found {shown(values)}")
    if not values:
        raise UserError(f"{where} is empty; give how many there are, or list them")
    for value in values:
        if problem := problem_of(value, Seed):
            raise UserError(f"{where}: each {problem}")
    refuse_twice(values, where, "")
    return tuple(values)


def read_finetune(values: Any, where: str, more: Iterable[str] = ()) -> dict[str, Any]:
    """Options for `fastbert finetune` that a sweep leaves free; `more` are further keys, for the hint."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping of options of fastbert finetune, found {shown(values)}")
    values = with_underscores(values, where)
    known = _finetune_names()
    free = (known - set(_TAKEN) - {"epochs"}) | set(more)
    for key in values:
        if key == "epochs":
            raise UserError(f"{where}: epochs is an axis; give it next to tasks, or in the entry of a task")
        if key in _TAKEN:
            raise UserError(f"{where}: {key} is not free here; {_TAKEN[key]}")
        if key not in known:
            raise UserError(f"{where}: unknown option {brief(key)}; {nearest(key, free)}")
    if isinstance(values.get("machine"), dict) and "threads" in values["machine"]:
        raise UserError(f"{where}: machine: threads is not free here; give threads next to tasks, for all jobs")
    if isinstance(values.get("train_fraction"), int | float):
        values["train_fraction"] = str(values["train_fraction"])
    if len(from_dict(FinetuneOptions, values, where).fractions()) > 1:
        raise UserError(
            f"{where}: train_fraction is {brief(values['train_fraction'])}; a job has one share: for several, list the "
            "task several times, each with a name"
        )
    return values


def _finetune_names() -> set[str]:
    return {f.name for f in fields(FinetuneOptions)}


def refuse_too_many(jobs: int, where: str) -> None:
    if jobs > MOST_TRAININGS:
        raise UserError(f"{where}: {jobs:,} jobs, and the most is {MOST_TRAININGS:,}; give fewer values or seeds")


def refuse_twice(values: Iterable[Any], where: str, hint: str) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise UserError(f"{where}: {brief(value, str)} is there twice{hint}")
        seen.add(value)


def shown(value: Any) -> str:
    return "nothing" if value is None else brief(value)
