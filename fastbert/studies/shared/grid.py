"""Measures of checkpoints in a study's YAML file, read strictly: fine-tunings (models x tasks x settings x seeds), and
zero-shot evaluations.

Axes are checked value by value by `FinetuneOptions`, so a study refuses the same values as `fastbert finetune`; the
options of evaluations likewise by `EvaluateOptions`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from fastbert.config import from_dict, other_job_hint, with_underscores
from fastbert.data.sources import check_source
from fastbert.downloads import FROM_HUB
from fastbert.errors import UserError, brief, nearest
from fastbert.finetuning.glue import check_glue_folder
from fastbert.finetuning.options import MOST_TRAININGS, FinetuneOptions
from fastbert.finetuning.tasks import CustomTaskOptions, check_glue_options, check_task, is_glue
from fastbert.hub.folders import check_model_folder
from fastbert.inheritance import merged
from fastbert.pretraining.evaluate_options import EvaluateOptions
from fastbert.pretraining.zero_shot.pair_files import pair_files
from fastbert.ranges import Range, Seed, Workers, problem_of, text_problem

MOST_SETTINGS = 10_000  # of a task
Repeats = Annotated[int, Range(1, 10_000)]
"""Number of trainings that differ only by their seed."""

# Axis in the YAML -> option of a job.
AXES = {"learning_rates": "learning_rate", "batch_sizes": "batch_size", "epochs": "epochs"}
# Options of a job that are given by the axes or by the study -> what to do instead.
RESERVED = {
    "model": "give it under models",
    "init_from": "give it under models",
    "task": "give it under tasks",
    "custom": "give the YAML file of a custom task under tasks",
    "out": "the folder of a job is inside that of the study; give --out",
    "seeds": "give seeds next to tasks, for all jobs",
    "first_seed": "give seeds next to tasks, as a list",
    "learning_rate": "give learning_rates",
    "batch_size": "give batch_sizes",
    "glue_dir": "give glue_dir next to tasks, for all jobs",
}

NAMES = ("variants", "validation")  # mappings whose keys are names, which are not spelled like options
_PLL_ONLY = ("sentences", "column")
_EVALUATE = ("pairs", "pll", "pll_form", "length", *_PLL_ONLY, "machine")


@dataclass(frozen=True)
class ModelEntry:
    """A checkpoint and its name in tables."""

    name: str
    path: str = field(metadata=FROM_HUB)


@dataclass(frozen=True)
class TaskEntry:
    """A task and its name in tables."""

    name: str | None
    """None: the task's own name, known when it is opened."""
    task: str
    settings: tuple[dict[str, Any], ...]
    """Combinations of the axes: option -> value, for the options of `AXES`; missing ones have their defaults."""
    overrides: dict[str, Any]
    """Further options of the task's jobs."""


@dataclass(frozen=True)
class StudyGrid:
    """Fine-tunings and evaluations in a YAML file; an ablation's grid has no models and no seeds."""

    models: tuple[ModelEntry, ...]
    tasks: tuple[TaskEntry, ...]
    seeds: tuple[int, ...]
    threads: int
    finetune: dict[str, Any]
    """Options for all fine-tunings."""
    evaluate: dict[str, EvaluateOptions]
    """Evaluations of each checkpoint: pairs, pll or both, with their options without a model."""
    path: str
    """Path of the file, for errors."""

    def options(self, model: ModelEntry, task: TaskEntry, glue_dir: str | None, **more: Any) -> FinetuneOptions:
        """Options of one job; `more` is its setting."""
        values = {
            "save_model": False,  # hundreds of jobs store only their figures, unless the file sets it
            **merged(self.finetune, task.overrides),
            "model": model.path,
            "task": task.task,
            "glue_dir": glue_dir,
            "seeds": 1,
            **more,
        }
        if not is_glue(task.task):  # options of GLUE do not apply
            values |= {"glue_dir": None, "glue_subset": False}
        values["machine"] = {**values.get("machine", {}), "threads": self.threads}
        return from_dict(FinetuneOptions, values, f"{self.path}: {task.name or task.task}")

    def check_inputs(self, glue_dir: str | None) -> None:
        """Checks, before torch is imported, that models, tasks, the GLUE folder, pairs and text exist.

        Raises:
            UserError: one of them does not.
        """
        for model in self.models:
            with prefixed(f"{self.path}: models"):
                check_model_folder(model.path)
        for task in self.tasks:
            with prefixed(f"{self.path}: tasks"):
                check_task(task.task, CustomTaskOptions())
                check_glue_options([task.task], None, bool(task.overrides.get("glue_subset")), dashes="")
        check_glue_folder(glue_dir)
        with prefixed(self.path):
            tasks = [task.task for task in self.tasks]
            check_glue_options(tasks, glue_dir, bool(self.finetune.get("glue_subset")), dashes="")
        for key, evaluation in self.evaluate.items():
            with prefixed(f"{self.path}: evaluate: {key}"):
                if key == "pairs":
                    pair_files(evaluation.pairs)
                else:
                    check_source(evaluation.pll, evaluation.column)


@contextmanager
def prefixed(where: str) -> Iterator[None]:
    """Prefixes UserErrors with the origin of the invalid value."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def read_mapping(values: Any, where: str, what: str) -> dict[str, Any]:
    """Checks that `values` is a mapping, and spells its keys, also in its groups, like the options."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping with {what}, found {format_option(values)}")
    return {
        key: with_underscores(value, f"{where}: {key}") if isinstance(value, dict) and key not in NAMES else value
        for key, value in with_underscores(values, where).items()
    }


def check_keys(
    values: dict[str, Any], known: set[str], where: str, group: str, inside: set[str], reserved: Mapping[str, str]
) -> None:
    """Refuses keys that are not allowed in a YAML file.

    Args:
        group: the key under which the keys `inside` belong, for a hint.
        reserved: option that cannot be given there -> what to do instead.
    """
    for key in values:
        if key not in known:
            under = f"put it under {group}" if key in inside else ""
            hint = under or other_job_hint(values, known) or nearest(key, known)
            raise UserError(f"{where}: unknown option {brief(key)}; {reserved.get(key, hint)}")


def read_grid(
    values: dict[str, Any], path: str, where: str, models: tuple[ModelEntry, ...] = (), seeds: tuple[int, ...] = ()
) -> StudyGrid:
    """Grid from `tasks`, `threads`, `finetune`, `evaluate` and the axes of a file."""
    fixed = read_finetune(values.get("finetune", {}), f"{where}: finetune")
    threads = read_count(values, "threads", where, Workers)
    common = {axis: read_axis(values[axis], axis, where) for axis in AXES if axis in values}
    entries = read_list(values, "tasks", where) if values.get("tasks") not in (None, []) else []
    idle = [key for key in ("finetune", *AXES) if key in values]
    if idle and not entries:
        raise UserError(f"{where}: {idle[0]} needs fine-tuning, but there are no tasks; add tasks, or leave it out")
    tasks = tuple(read_task(entry, common, fixed, where) for entry in entries)
    return StudyGrid(
        models=models,
        tasks=tasks,
        seeds=seeds,
        threads=threads,
        finetune=fixed,
        evaluate=read_evaluate(values["evaluate"], threads, f"{where}: evaluate") if "evaluate" in values else {},
        path=path,
    )


def read_list(values: dict[str, Any], axis: str, where: str) -> list[Any]:
    found = values.get(axis)
    if found is None and axis not in values:
        raise UserError(f"{where}: {axis} is missing; a sweep needs at least one entry there")
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list):
        raise UserError(f"{where}: {axis} must be a list, found {format_option(found)}")
    if not found:
        raise UserError(f"{where}: {axis} is empty; a sweep needs at least one entry there")
    return found


def read_model(entry: Any, where: str) -> ModelEntry:
    where = f"{where}: models"
    if isinstance(entry, str):
        _strings({"path": entry}, ("path",), where)
        return ModelEntry(Path(entry).resolve().name, entry)
    values = _strings(entry, ("name", "path"), where)
    if "path" not in values:
        raise UserError(f"{where}: {format_option(entry)} has no path; give the folder of a checkpoint")
    return ModelEntry(values.get("name") or Path(values["path"]).resolve().name, values["path"])


def _strings(entry: Any, keys: Iterable[str], where: str) -> dict[str, str]:
    """Checks that `entry` is a mapping with no other keys than `keys`, and with strings as values."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a string or a mapping, found {format_option(entry)}")
    for key, value in entry.items():
        if key not in keys:
            raise UserError(f"{where}: unknown key {brief(key)}; {nearest(key, keys)}")
        if not isinstance(value, str):
            raise UserError(f"{where}: {key} must be a string, found {format_option(value)}")
        if problem := text_problem(value):
            raise UserError(f"{where}: {key} {problem}")
    return entry


def read_task(entry: Any, common: dict[str, list[Any]], fixed: dict[str, Any], where: str) -> TaskEntry:
    """An entry of tasks with its settings; its axes override those of the study."""
    where = f"{where}: tasks"
    if isinstance(entry, str):
        entry = {"task": entry}
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a string or a mapping, found {format_option(entry)}")
    named = _strings({key: entry[key] for key in ("task", "name") if key in entry}, ("task", "name"), where)
    if "task" not in named:
        raise UserError(
            f"{where}: {format_option(entry)} has no task; give a GLUE task or the YAML file of a custom one"
        )
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
    # Options are made here for their checks: a value out of range, a mapping with an unknown key.
    from_dict(FinetuneOptions, merged(fixed, overrides), where)
    return TaskEntry(named.get("name"), named["task"], tuple(settings), overrides)


def read_axis(values: Any, axis: str, where: str) -> list[Any]:
    """Values of an axis, as `FinetuneOptions` converts them."""
    where, name = f"{where}: {axis}", AXES[axis]
    values = values if isinstance(values, list) else [values]
    if not values:
        raise UserError(f"{where} is empty; give at least one value, or leave it out for the default")
    for value in values:
        if value is None:
            raise UserError(f"{where} has an empty value; give a number, or leave the axis out for the default")
    converted = [getattr(from_dict(FinetuneOptions, {name: value}, where), name) for value in values]
    refuse_duplicates(converted, where, "")
    return converted


def read_count(values: dict[str, Any], name: str, where: str, kind: Any) -> int:
    """The whole number `name`, at least 1 and 1 by default; `kind` declares its range."""
    value = values.get(name, 1)
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: {name} must be a whole number from 1, found {format_option(value)}")
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
        raise UserError(
            f"{where} must be the number of seeds, or a list of whole numbers, found {format_option(values)}"
        )
    if not values:
        raise UserError(f"{where} is empty; give the number of seeds, or list them")
    for value in values:
        if problem := problem_of(value, Seed):
            raise UserError(f"{where}: each {problem}")
    refuse_duplicates(values, where, "")
    return tuple(values)


def read_finetune(values: Any, where: str, more: Iterable[str] = ()) -> dict[str, Any]:
    """Options of `fastbert finetune` that can be given in a study; `more` are further keys, for the hint."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping of options of fastbert finetune, found {format_option(values)}")
    values = with_underscores(values, where)
    known = {f.name for f in fields(FinetuneOptions)}
    free = (known - set(RESERVED) - {"epochs"}) | set(more)
    for key in values:
        if key == "epochs":
            raise UserError(f"{where}: epochs is an axis; give it next to tasks, or in the entry of a task")
        if key in RESERVED:
            raise UserError(f"{where}: {key} cannot be given here; {RESERVED[key]}")
        if key not in known:
            raise UserError(f"{where}: unknown option {brief(key)}; {nearest(key, free)}")
    if isinstance(values.get("machine"), dict) and "threads" in values["machine"]:
        raise UserError(f"{where}: machine: threads cannot be given here; give threads next to tasks, for all jobs")
    if isinstance(values.get("train_fraction"), int | float):
        values["train_fraction"] = str(values["train_fraction"])
    if len(from_dict(FinetuneOptions, values, where).fractions()) > 1:
        raise UserError(
            f"{where}: train_fraction is {brief(values['train_fraction'])}; a job has one fraction: for several, list "
            "the task several times, each with a name"
        )
    return values


def read_evaluate(values: Any, threads: int, where: str) -> dict[str, EvaluateOptions]:
    """Options of `fastbert evaluate` for pairs and pll, whichever the mapping has."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping with pairs, pll or both, found {format_option(values)}")
    values = with_underscores(values, where)
    for key in values:
        if key not in _EVALUATE:
            raise UserError(f"{where}: unknown option {brief(key)}; {nearest(key, _EVALUATE)}")
    given = [key for key in ("pairs", "pll") if values.get(key) is not None]
    if not given:
        raise UserError(f"{where}: give pairs (a folder of minimal pairs), pll (a text) or both")
    for key in _PLL_ONLY:
        if key in values and "pll" not in given:
            raise UserError(f"{where}: {key} has no effect without pll; give pll, or leave it out")
    machine = values.get("machine", {})
    if isinstance(machine, dict):
        if "threads" in machine:
            raise UserError(f"{where}: machine: threads cannot be given here; give threads next to evaluate")
        machine = {**machine, "threads": threads}
    found = {}
    for key in given:
        others = {"pll" if key == "pairs" else "pairs", *(_PLL_ONLY if key == "pairs" else ())}
        options = {name: value for name, value in values.items() if name not in others}
        found[key] = from_dict(EvaluateOptions, {"model": "a checkpoint", **options, "machine": machine}, where)
    return found


def refuse_too_many(jobs: int, where: str) -> None:
    if jobs > MOST_TRAININGS:
        raise UserError(f"{where}: {jobs:,} jobs, and the most is {MOST_TRAININGS:,}; give fewer values or seeds")


def refuse_duplicates(values: Iterable[Any], where: str, hint: str) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise UserError(f"{where}: {brief(value, str)} occurs twice{hint}")
        seen.add(value)


def format_option(value: Any) -> str:
    return "nothing" if value is None else brief(value)
