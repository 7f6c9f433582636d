"""Comparison of fine-tuned checkpoints, from rows of results: scores, best settings, differences from the first one.

A row's score is the task's first metric on dev, the mean of its dev splits. A checkpoint's setting (learning rate,
batch size, epochs) is the one with the highest median over seeds; two checkpoints are compared at one setting, seed by
seed.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fastbert.studies.engine.store import ResultRow
from fastbert.studies.shared.evaluate_jobs import EVALUATE, evaluated
from fastbert.studies.shared.statistics import LEVEL, Paired, holm, paired

Setting = tuple[float, int, int]
"""Learning rate, batch size, epochs."""
SETTING = "learning rate, batch, epochs"  # head of its column


def score(row: ResultRow, epoch: str = "best") -> float | None:
    """The task's first metric at the best or the last epoch, the mean over its dev splits; None if it is not finite,
    which is possible at the last epoch only."""
    return mean_of_splits(row[epoch]["dev"], row["metrics"][0])


def mean_of_splits(dev: Mapping[str, Mapping[str, float | None]], metric: str) -> float | None:
    """The mean of a metric over the dev splits; None if it is not finite on one."""
    values = [metrics[metric] for metrics in dev.values()]
    return None if None in values else statistics.fmean(values)


def scored(row: ResultRow) -> tuple[str, float]:
    """Name and value of a finished job's score: the task's first metric, or the main figure of an evaluation."""
    return evaluated(row) if row["kind"] == EVALUATE else (row["metrics"][0], score(row))


def setting_of(row: ResultRow) -> Setting:
    return row["learning_rate"], row["batch_size"], row["epochs"]


@dataclass(frozen=True)
class Trials:
    """The finished jobs of one checkpoint on one task."""

    model: str
    task: str
    settings: dict[Setting, list[ResultRow]]
    """Setting -> rows in the order of their seeds; settings in the order of the sweep."""

    def scores(self, setting: Setting, epoch: str = "best") -> list[float]:
        return [score(row, epoch) for row in self.settings[setting]]

    @cached_property
    def best(self) -> Setting:
        """The setting with the highest median over seeds, among those with the most finished seeds."""
        most = max(len(rows) for rows in self.settings.values())
        full = [setting for setting, rows in self.settings.items() if len(rows) == most]
        return max(full, key=lambda setting: statistics.median(self.scores(setting)))


@dataclass(frozen=True)
class ModelComparison:
    """A checkpoint compared with the first of the sweep."""

    first: str
    other: str
    result: Paired
    p_t: float | None
    """p-value of the t-test, adjusted by Holm's method; `p_flip` likewise."""
    p_flip: float

    @property
    def verdict(self) -> str:
        """Undecided, or the better checkpoint by the adjusted t-test, marked where the sign-flip test disagrees."""
        if self.p_t is None or self.p_t >= LEVEL:
            return "undecided"
        higher = self.other if self.result.mean > 0 else self.first
        return f"{higher} higher" + ("" if self.p_flip < LEVEL else ", by the t-test alone")


@dataclass(frozen=True)
class TaskComparison(ModelComparison):
    """A checkpoint compared with the first of the sweep, on one task; adjusted over the tasks."""

    task: str
    setting: Setting


def adjusted(results: Mapping[str, Paired]) -> dict[str, tuple[float | None, float]]:
    """The p-values of the t-test and of the sign-flip test by name, each adjusted by Holm's method."""
    p_t = holm({name: result.p_t for name, result in results.items() if result.p_t is not None})
    p_flip = holm({name: result.p_flip for name, result in results.items()})
    return {name: (p_t.get(name), p_flip[name]) for name in results}


class Comparison:
    """Scores from the rows of finished jobs; the models are compared with the first of them."""

    def __init__(self, rows: Iterable[ResultRow], models: Sequence[str], tasks: Sequence[str]) -> None:
        self.models, self.tasks = list(models), list(tasks)
        found: dict[tuple[str, str], dict[Setting, list[ResultRow]]] = {}
        for row in rows:
            found.setdefault((row["model"], row["task"]), {}).setdefault(setting_of(row), []).append(row)
        self.trials = {
            (model, task): Trials(model, task, found[model, task])
            for task in tasks
            for model in models
            if (model, task) in found
        }

    def of_task(self, task: str) -> list[Trials]:
        return [self.trials[model, task] for model in self.models if (model, task) in self.trials]

    def metrics(self, task: str) -> tuple[str, ...]:
        """The task's metrics; the first is the score."""
        return tuple(next(iter(self.of_task(task)[0].settings.values()))[0]["metrics"])

    def common_setting(self, first: Trials, other: Trials) -> Setting | None:
        """The setting at which two checkpoints are compared: the one with the highest mean of their two medians,
        among those with the most seeds that both have finished. None if there is no such seed."""
        pairs = {
            setting: len(_by_seed(first, setting).keys() & _by_seed(other, setting).keys())
            for setting in first.settings
            if setting in other.settings
        }
        most = max(pairs.values(), default=0)
        if most == 0:
            return None
        means = {
            setting: statistics.median(first.scores(setting)) + statistics.median(other.scores(setting))
            for setting, count in pairs.items()
            if count == most
        }
        return max(means, key=means.__getitem__)

    def compared(self, other: str) -> list[TaskComparison]:
        """Compares `other` with the first checkpoint, on every task that both have finished with a common seed."""
        first = self.models[0]
        found: dict[str, tuple[Setting, Paired]] = {}
        for task in self.tasks:
            a, b = self.trials.get((first, task)), self.trials.get((other, task))
            setting = self.common_setting(a, b) if a and b else None
            if setting is None:
                continue
            left, right = _by_seed(a, setting), _by_seed(b, setting)
            seeds = sorted(left.keys() & right.keys())
            found[task] = (setting, paired([left[seed] for seed in seeds], [right[seed] for seed in seeds]))
        p = adjusted({task: result for task, (_, result) in found.items()})
        return [
            TaskComparison(first, other, result, *p[task], task, setting) for task, (setting, result) in found.items()
        ]


def _by_seed(trials: Trials, setting: Setting) -> dict[int, float]:
    return {row["seed"]: score(row) for row in trials.settings[setting]}


def format_setting(setting: Setting) -> str:
    learning_rate, batch_size, epochs = setting
    return f"{learning_rate:g}, {batch_size}, {epochs}"
