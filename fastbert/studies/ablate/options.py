"""Options of `fastbert ablate`: a YAML file with a baseline, its variants and their budget, read strictly, and flags
for where and how to run.

A variant changes options of the base, which are those of `fastbert pretrain`. It cannot change what must be equal in an
ablation: the data, its vocabulary, the order and shape of the batches, and the rows of the validation. With
`mode: data` the data may differ, and the validation splits are those of the file (`data_mode`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastbert.config import from_dict, to_dict
from fastbert.errors import UserError, brief, choose, nearest
from fastbert.inheritance import merged, read_yaml
from fastbert.pretraining.options import BUDGETS, LAUNCH, PretrainOptions
from fastbert.ranges import Count, Minutes, Positive, Tokens, check_values, text_problem
from fastbert.studies.ablate import data_mode
from fastbert.studies.engine.options import EngineOptions
from fastbert.studies.shared.grid import (
    AXES,
    Repeats,
    StudyGrid,
    check_keys,
    format_option,
    prefixed,
    read_count,
    read_grid,
    read_mapping,
    read_seeds,
    refuse_too_many,
)

UNITS = ("steps", "flops", "minutes")

_AT = ("tasks_at", "evaluate_at")
POINTS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)

_DATA = (
    "an ablation compares variants on the same data; give it under base, for all of them, or compare data with "
    "mode: data and fixed validation splits"
)
_BATCHES = "an ablation compares variants on the same batches in the same order; give it under base, for all of them"
_FIXED = {
    **dict.fromkeys(data_mode.FREE, _DATA),
    **dict.fromkeys(("length", "batch_size"), _BATCHES),
    "eval_sequences": "an ablation compares variants on the same validation set; give it under base, for all of them",
    "machine": "give it under base, for all variants: their times are compared",
}
_RESERVED = {
    **dict.fromkeys(BUDGETS, "give it under budget"),
    "seed": "give seeds next to variants",
    "out": "the folder of a job is inside that of the ablation; give --out",
    "resume": "the same command resumes a stopped ablation",
    **dict.fromkeys(LAUNCH, "a job of an ablation is one process; give backend and workers next to variants"),
    "milestones": "give checkpoints next to variants, as fractions of the budget",
    "checkpoint_words": "the models of an ablation are those at its checkpoints; give checkpoints next to variants",
}


@dataclass(frozen=True)
class AblateOptions(EngineOptions):
    """Compare variants with a baseline at equal cost: `fastbert ablate configs/ablate/x.yaml [options]`.

    The YAML file has base (options of `fastbert pretrain`; inherits: those of a YAML file) and variants (changes of
    the base; the first is the baseline, or the one given by baseline:). It may have mode: data with validation
    (variants differ in data, replay or initial weights and are compared on these splits), budget, seeds, threads (of
    each job; 1), checkpoints or anneal (when to measure), tasks (fine-tuning as the measure, as in a sweep) with
    tasks_at (at which of the points), evaluate (minimal pairs and pseudo-log-likelihood as measures) with evaluate_at,
    and the flags below. The same command resumes a stopped ablation, and runs failed jobs again. Jobs continue from
    each other's checkpoints: on Ray all nodes need the folder of `out` on one file system. Steps are timed on this
    machine, which must have the device of the jobs.
    """

    dry_run: bool = False
    """Check everything, print the steps, FLOPs and minutes of each variant and the number of jobs, and stop."""


@dataclass(frozen=True)
class Budget:
    """Unit in which all variants cost the same, and size of the baseline's budget in one of four units."""

    equal: str = "steps"
    """Unit in which all variants cost the same: steps, flops or minutes."""
    steps: Count | None = None
    tokens: Tokens | None = None
    flops: Positive | None = None
    minutes: Minutes | None = None

    def __post_init__(self) -> None:
        check_values(self)
        choose("budget unit", self.equal, UNITS)
        given = [name for name in BUDGET_SIZES if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"give the size of the baseline's budget once, not as {' and as '.join(given)}")


BUDGET_SIZES = tuple(field.name for field in fields(Budget) if field.name != "equal")


@dataclass(frozen=True)
class AblationVariant:
    """Options of `fastbert pretrain` without budget, seed and folder, and their name in tables."""

    name: str
    options: PretrainOptions


@dataclass(frozen=True)
class Ablation:
    """Contents of an ablation's YAML file."""

    variants: tuple[AblationVariant, ...]
    """The baseline first."""
    seeds: tuple[int, ...]
    threads: int
    budget: Budget
    points: tuple[float, ...]
    """Fractions of the budget at which the variants are measured, ascending, the last 1."""
    anneal: float | None
    """None: every training has its own schedule and is measured along it. Else the learning rate is constant after the
    warm-up, and at every point it falls to 0 within this fraction of the steps before, in a branch of the training."""
    grid: StudyGrid
    """Tasks of fine-tuning and zero-shot evaluations, without models."""
    tasks_at: tuple[float, ...]
    """Points at which the tasks are measured, a subset of `points`."""
    evaluate_at: tuple[float, ...]
    """Points at which the checkpoints are evaluated, a subset of `points`."""
    trials: int
    """Fine-tunings of a checkpoint on each task with each setting."""
    path: str
    """Path of the file, for errors."""
    splits: Mapping[str, str]
    """Name -> prepared folder of each fixed validation split of `mode: data`; empty without that mode."""

    def check_inputs(self, glue_dir: str | None) -> None:
        """Checks, before torch is imported, that data, weights, tasks, the GLUE folder, pairs and text exist.

        Raises:
            UserError: one of them does not.
        """
        data_mode.check_splits(self.splits, self.path)
        for variant in self.variants:
            with prefixed(f"{self.path}: {variant.name}"):
                variant.options.check_sources()
        self.grid.check_inputs(glue_dir)

    @property
    def baseline(self) -> str:
        return self.variants[0].name


def load_ablation(path: str | Path) -> tuple[Ablation, AblateOptions]:
    """Reads a YAML file: the ablation, and the values of flags that the file sets.

    Raises:
        UserError: states the file, the key, and the expected value.
    """
    values, where = read_yaml(path)
    values = read_mapping(values, where, "base and variants")
    flags = {f.name for f in fields(AblateOptions)}
    tasks = {"tasks", "tasks_at", "finetune", "trials", *AXES, "evaluate", "evaluate_at"}
    known = {"base", "variants", "baseline", "budget", "seeds", "threads", "checkpoints", "anneal", *tasks, *flags}
    known |= {"mode", "validation"}
    check_keys(values, known, where, "base", set(to_dict(PretrainOptions())), _RESERVED)
    options = from_dict(AblateOptions, {key: value for key, value in values.items() if key in flags}, where)
    trials = read_count(values, "trials", where, Repeats)
    points, anneal = _points(values, where)
    splits = data_mode.read_splits(values, where)
    base = _base(values.get("base", {}), splits, where)
    grid = read_grid(values, str(path), where)
    for key in ("tasks_at", "trials"):
        if not grid.tasks and key in values:
            raise UserError(f"{where}: {key} needs fine-tuning, but there are no tasks; add tasks, or leave it out")
    if not grid.evaluate and "evaluate_at" in values:
        raise UserError(f"{where}: evaluate_at needs evaluate, which is missing; add it, or leave evaluate_at out")
    at = {key: _subset_of_points(values.get(key, list(points)), points, f"{where}: {key}") for key in _AT}
    variants = _variants(values, base, grid.threads, anneal is not None, splits, where)
    seeds = read_seeds(values.get("seeds", 1), where)
    # Fine-tunings of a variant and seed: one for each point, setting and trial.
    tunings = len(at["tasks_at"]) * trials * sum(len(task.settings) for task in grid.tasks)
    evaluations = len(at["evaluate_at"]) * len(grid.evaluate)
    refuse_too_many(len(variants) * len(seeds) * (tunings + evaluations + len(points)), where)
    return (
        Ablation(
            variants=variants,
            seeds=seeds,
            threads=grid.threads,
            budget=_budget(values.get("budget", {}), base, where),
            points=points,
            anneal=anneal,
            grid=grid,
            **at,
            trials=trials,
            path=str(path),
            splits=splits,
        ),
        options,
    )


def _points(values: dict[str, Any], where: str) -> tuple[tuple[float, ...], float | None]:
    """Points of measurement, and the length of the annealings."""
    if "anneal" not in values:
        return _fractions(values.get("checkpoints", list(POINTS)), f"{where}: checkpoints"), None
    if "checkpoints" in values:
        raise UserError(f"{where}: give checkpoints or anneal, not both: anneal has its own points")
    where = f"{where}: anneal"
    given = read_mapping(values["anneal"], where, "points and fraction")
    for key in given:
        if key not in ("points", "fraction"):
            raise UserError(f"{where}: unknown key {brief(key)}; {nearest(key, ('points', 'fraction'))}")
    fraction = given.get("fraction", 0.1)
    if type(fraction) not in (int, float) or not 0 < fraction <= 1:
        raise UserError(f"{where}: fraction must be a number in (0, 1], such as 0.1, found {format_option(fraction)}")
    return _fractions(given.get("points", [0.2, 0.4, 0.6, 0.8, 1.0]), f"{where}: points"), float(fraction)


def _fractions(values: Any, where: str) -> tuple[float, ...]:
    numbers = values if isinstance(values, list) else [values]
    if not numbers or any(type(value) not in (int, float) or not 0 < value <= 1 for value in numbers):
        raise UserError(
            f"{where} must be fractions of the budget in (0, 1], such as 0.4, found {format_option(values)}"
        )
    if any(b <= a for a, b in pairwise(numbers)) or numbers[-1] != 1:
        raise UserError(
            f"{where} must ascend and end with 1.0, where the final quality is measured; found {format_option(values)}"
        )
    return tuple(float(value) for value in numbers)


def _subset_of_points(values: Any, points: tuple[float, ...], where: str) -> tuple[float, ...]:
    found = _fractions(values, where)
    if further := sorted(set(found) - set(points)):
        raise UserError(f"{where}: {further[0]} is not one of the points, {', '.join(map(str, points))}")
    return found


# --- the base and its variants


def _base(given: Any, splits: Mapping[str, str], where: str) -> dict[str, Any]:
    """Options of the base, checked; with `splits`, all trainings are validated on them."""
    where = f"{where}: base"
    if isinstance(given, str):
        given = {"file": given}
    given = read_mapping(given, where, "options of fastbert pretrain")
    if "file" in given:
        raise UserError(
            f"{where}: file is called inherits now; write base: {{inherits: {format_option(given['file'])}}}"
        )
    reserved = _RESERVED | (data_mode.RESERVED if splits else {})
    for key in given:
        if key in reserved and key not in BUDGETS:
            raise UserError(f"{where}: {key} cannot be given here; {reserved[key]}")
    if "threads" in _group(given, "machine"):
        raise UserError(f"{where}: machine: threads cannot be given here; give threads next to base, for all jobs")
    from_dict(PretrainOptions, given, where)
    return given | ({"eval_data": data_mode.eval_data(splits)} if splits else {})


def _variants(
    values: dict[str, Any],
    base: dict[str, Any],
    threads: int,
    annealed: bool,
    splits: Mapping[str, str],
    where: str,
) -> tuple[AblationVariant, ...]:
    """The variants, the baseline first."""
    refused = _FIXED | _RESERVED
    if splits:
        refused = {key: why for key, why in refused.items() if key not in data_mode.FREE} | data_mode.RESERVED
    given = values.get("variants")
    if not isinstance(given, dict) or not given:
        raise UserError(
            f"{where}: variants must be a mapping of names to changes of the base, found {format_option(given)}"
        )
    machine = {"machine": {**_group(base, "machine"), "threads": threads}}
    common = {key: value for key, value in base.items() if key not in BUDGETS} | machine
    found: dict[str, AblationVariant] = {}
    for name, changes in given.items():
        here = f"{where}: variants: {brief(name, str)}"
        if not isinstance(name, str) or not name:
            raise UserError(f"{here}: the name of a variant must be a text; put it in quotes")
        if problem := text_problem(name):
            raise UserError(f"{where}: variants: the name of one {problem}")
        changes = read_mapping({} if changes is None else changes, here, "options of fastbert pretrain")
        for key in changes:
            if reason := refused.get(key):
                raise UserError(f"{here}: {key} cannot be given here: {reason}")
        if annealed and (idle := _group(changes, "schedule").keys() - {"warmup"}):
            raise UserError(
                f"{here}: schedule: {min(idle)} has no effect with anneal, which sets the schedule; only warmup has one"
            )
        found[name] = AblationVariant(name, from_dict(PretrainOptions, merged(common, changes), here))
    first = values.get("baseline", next(iter(found)))
    if not isinstance(first, str):
        wanted = "baseline must be the name of a variant"
        raise UserError(f"{where}: {wanted}, found {format_option(first)}; give options of all variants under base")
    if first not in found:
        raise UserError(f"{where}: baseline: there is no variant {brief(first)}; {nearest(first, found)}")
    variants = [found.pop(first), *found.values()]
    for number, variant in enumerate(variants):
        for other in variants[:number]:
            if other.options == variant.options:
                raise UserError(f"{where}: variants: {variant.name} and {other.name} have the same options")
    return tuple(variants)


def _group(values: dict[str, Any], name: str) -> dict[str, Any]:
    return values[name] if isinstance(values.get(name), dict) else {}


def _budget(given: Any, base: dict[str, Any], where: str) -> Budget:
    """The budget; its size defaults to the budget of the base."""
    where = f"{where}: budget"
    budget = from_dict(Budget, given, where)
    if any(getattr(budget, name) is not None for name in BUDGET_SIZES):
        return budget
    sizes = {name: base[name] for name in BUDGETS if base.get(name) is not None}
    if not sizes:
        raise UserError(
            f"{where}: give the size of the baseline's budget: {', '.join(BUDGET_SIZES[:-1])} or {BUDGET_SIZES[-1]}"
        )
    return from_dict(Budget, {"equal": budget.equal, **sizes}, where)
