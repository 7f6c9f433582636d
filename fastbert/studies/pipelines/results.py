"""Results of a pipeline from the rows of its finished jobs: figures of models over seeds, and fine-tunings in the form
in which a sweep compares them."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastbert.studies.engine.jobs import Job
from fastbert.studies.engine.store import ResultRow, ResultStore, is_done
from fastbert.studies.pipelines.graph import Graph
from fastbert.studies.pipelines.tunings import ENSEMBLE, TOGETHER
from fastbert.studies.shared.comparison import Comparison, ModelComparison, adjusted, setting_of
from fastbert.studies.shared.evaluate_jobs import EVALUATE
from fastbert.studies.shared.finetune_jobs import FINETUNE
from fastbert.studies.shared.pretrain_jobs import BRANCH, PRETRAIN
from fastbert.studies.shared.statistics import paired
from fastbert.studies.shared.tuning_report import Ensembles

LOSS, ACCURACY, BITS = "validation loss", "minimal pairs", "bits per byte"


@dataclass(frozen=True)
class Figure:
    """A figure of each model and seed of the pretraining."""

    name: str
    values: Mapping[str, Mapping[int, float]]
    """Model -> seed -> value."""
    scale: float = 1.0

    def of(self, model: str) -> list[float]:
        return [self.scale * value for value in self.values.get(model, {}).values()]

    def compared(self, first: str) -> list[ModelComparison]:
        """Every other model compared with `first` over the seeds that both have; adjusted over the models."""
        found = {}
        for other in self.values:
            seeds = sorted(self.values[other].keys() & self.values.get(first, {}).keys())
            if other != first and seeds:
                pairs = [[self.values[model][seed] for seed in seeds] for model in (first, other)]
                found[other] = paired(*pairs)
        return [ModelComparison(first, other, found[other], *p) for other, p in adjusted(found).items()]


@dataclass(frozen=True)
class Results:
    """Everything that the report shows."""

    models: Sequence[str]
    """The baseline first."""
    figures: Sequence[Figure]
    comparison: Comparison
    ensembles: Ensembles
    several_pretrainings: bool
    """True if the unit of the comparison is a pretraining, with the mean over its fine-tunings; else it is a
    fine-tuning."""

    @property
    def unit(self) -> str:
        return "seed of the pretraining" if self.several_pretrainings else "seed of the fine-tuning"


def results_of(graph: Graph, store: ResultStore) -> Results:
    """The results of the jobs that are done."""
    done = [(job, store.rows[job.id]) for job in graph.jobs if is_done(store.rows.get(job.id))]
    baseline = graph.pipeline.baseline
    models = [baseline, *(name for name in graph.models if name != baseline)]
    several = any(len(model.checkpoints) > 1 for model in graph.models.values())
    comparison = Comparison(tuning_rows(done, several), models, list(graph.tunings.columns))
    return Results(models, figures_of(done, models), comparison, ensembles_of(done, comparison), several)


def figures_of(done: Iterable[tuple[Job, ResultRow]], models: Sequence[str]) -> list[Figure]:
    """Validation loss, accuracy on minimal pairs and bits per byte, as far as jobs measured them."""
    found: dict[str, dict[str, dict[int, float]]] = {LOSS: {}, ACCURACY: {}, BITS: {}}
    for job, row in done:
        value = {}
        if job.kind in (PRETRAIN, BRANCH):
            value = {LOSS: row["validations"][-1]["loss"]}
        elif job.kind == EVALUATE and "pairs" in row:
            value = {ACCURACY: row["pairs"]["accuracy"]}
        elif job.kind == EVALUATE:
            value = {BITS: row["pll"]["bits_per_byte"]}
        for name, number in value.items():
            found[name].setdefault(job.model, {})[job.seed or 0] = number
    order = {name: {model: values[model] for model in models if model in values} for name, values in found.items()}
    return [Figure(name, values, 100.0 if name == ACCURACY else 1.0) for name, values in order.items() if values]


def tuning_rows(done: Iterable[tuple[Job, ResultRow]], several_pretrainings: bool) -> list[ResultRow]:
    """Rows of fine-tunings for `Comparison`, whose seed is that of the pretraining, with the mean over the fine-tunings
    of that model, or else that of the fine-tuning."""
    single: list[ResultRow] = []
    for job, row in done:
        if job.kind == FINETUNE:
            single.append(row)
        elif job.kind == TOGETHER:
            single += [{**row, **task, "task": column} for column, task in row["tasks"].items()]
    if not several_pretrainings:
        return [row | {"seed": row.get("trial", 0)} for row in single]
    groups: dict[tuple[Any, ...], list[ResultRow]] = {}
    for row in single:
        groups.setdefault((row["model"], row["task"], setting_of(row), row["seed"] or 0), []).append(row)
    return [mean_row(rows) | {"seed": key[-1]} for key, rows in groups.items()]


def mean_row(rows: Sequence[ResultRow]) -> ResultRow:
    """A row with the mean of the figures of several fine-tunings."""
    return rows[0] | {epoch: {"dev": mean_figures([row[epoch]["dev"] for row in rows])} for epoch in ("best", "last")}


def mean_figures(figures: Sequence[Mapping[str, Mapping[str, float | None]]]) -> dict[str, dict[str, float | None]]:
    """The mean of each metric on each dev split; None if one of the values is."""
    return {
        split: {
            name: None if None in (values := [one[split][name] for one in figures]) else statistics.fmean(values)
            for name in metrics
        }
        for split, metrics in figures[0].items()
    }


def ensembles_of(done: Iterable[tuple[Job, ResultRow]], comparison: Comparison) -> Ensembles:
    """The ensembles of the fine-tunings of a model on a task at its best setting, the mean over its pretrainings."""
    found: dict[tuple[str, str], list[Any]] = {}
    for job, row in done:
        trials = comparison.trials.get((job.model, job.task))
        if job.kind == ENSEMBLE and trials is not None and setting_of(row) == trials.best:
            found.setdefault((job.model, job.task), []).append(row["ensemble"])
    return {key: mean_figures(values) for key, values in found.items()}
