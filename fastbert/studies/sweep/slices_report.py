"""Slices in the report of a sweep: the first metric of each checkpoint on each slice, compared with the first one."""

from collections.abc import Mapping
from typing import Any

from fastbert.finetuning.slice_figures import slice_figures
from fastbert.finetuning.table import NOTHING
from fastbert.report.page import Table
from fastbert.report.report_page import ReportPage
from fastbert.studies.shared.comparison import Comparison, Trials
from fastbert.studies.shared.finetune_jobs import OpenedTask, folders_of
from fastbert.studies.shared.report import difference, interval, p_value, percent
from fastbert.studies.shared.statistics import paired

NOTE = (
    "Means over the seeds at each checkpoint's best setting, x 100. Difference from the first checkpoint, interval and "
    "p come from the paired t-test over their common seeds, not adjusted for the number of slices: they show where a "
    "difference comes from, and do not decide whether there is one."
)


def slices_table(comparison: Comparison, opened: Mapping[str, OpenedTask]) -> Table | None:
    """A row for each slice of dev and checkpoint; None if no task has slices.

    Raises:
        UserError: the scores of a job on dev are damaged.
    """
    rows: list[list[str]] = []
    for name in comparison.tasks:
        task, trials = opened[name], comparison.of_task(name)
        if not task.task.slices or not trials:
            continue
        figures = {one.model: _figures(one, task) for one in trials}
        seeds = {one.model: [row["seed"] for row in one.settings[one.best]] for one in trials}
        metric = task.task.metrics[0]
        for split, slices in next((found for found in figures.values() if found), {}).items():
            for each, facts in slices.items():
                values = {
                    model: dict(zip(seeds[model], found[split][each]["metrics"][metric]["seeds"], strict=True))
                    for model, found in figures.items()
                    if found and found[split][each]["metrics"][metric]
                }
                label = each if len(task.slices) == 1 else f"{each}, {split}"
                rows += _rows([name, label, str(facts["examples"])], values)
    head = ["task", "slice", "examples", "checkpoint", "mean", "seeds", "difference", "95 % interval", "p (t)"]
    return Table(head, rows) if rows else None


def _figures(trials: Trials, task: OpenedTask) -> dict[str, Any] | None:
    folders = folders_of(trials.settings[trials.best])
    return slice_figures(task.task, task.slices, task.labels, folders, intervals=False)


def _rows(start: list[str], values: Mapping[str, Mapping[int, float]]) -> list[list[str]]:
    """A row for each checkpoint. `values`: checkpoint -> seed -> the metric."""
    rows, first = [], next(iter(values.values()), {})
    for model, by_seed in values.items():
        cells = [*start, model, percent(sum(by_seed.values()) / len(by_seed)), str(len(by_seed))]
        both = sorted(by_seed.keys() & first.keys())
        if by_seed is first or not both:
            rows.append([*cells, NOTHING, NOTHING, NOTHING])
            continue
        result = paired([first[seed] for seed in both], [by_seed[seed] for seed in both])
        rows.append([*cells, difference(result), interval(result), p_value(result.p_t)])
    return rows


def write_slices(report: ReportPage, table: Table | None) -> None:
    """Adds the section."""
    if table is not None:
        report.heading("Slices")
        report.table(table)
        report.text(NOTE)
