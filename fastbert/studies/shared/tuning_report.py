"""Sections of a report on fine-tunings: scores with their spread, checkpoints compared with the first one, and all
settings."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from fastbert.errors import plural
from fastbert.finetuning import results
from fastbert.finetuning.glue import GLUE
from fastbert.finetuning.table import COLUMNS, NOTHING, glue_cells, with_ensembles
from fastbert.report.page import Table
from fastbert.report.report_page import ReportPage
from fastbert.studies.shared import plots
from fastbert.studies.shared.comparison import (
    SETTING,
    Comparison,
    TaskComparison,
    Trials,
    format_setting,
    mean_of_splits,
)
from fastbert.studies.shared.report import WIDTH, difference, interval, p_value, percent
from fastbert.studies.shared.statistics import flip_limits

Ensembles = Mapping[tuple[str, str], Mapping[str, Mapping[str, float]] | None]
"""(Checkpoint, task) -> dev split -> metrics of the ensemble of its seeds at the best setting; None without one."""


def printed_scores(comparison: Comparison, ensembles: Ensembles) -> str:
    """Scores and differences for a terminal."""
    full = scores_table(comparison, ensembles)
    shown = [column for column, name in enumerate(full.head) if name not in ("train", "tried", "last epoch")]
    short = Table([full.head[column] for column in shown], [[row[column] for column in shown] for row in full.rows])
    lines = ["Dev, x 100, at the best setting and epoch, over the seeds", short.plain()]
    for other in comparison.models[1:]:
        found = comparison.compared(other)
        lines += ["", f"{other} minus {comparison.models[0]}, pairs of the same seed"]
        rows = [
            [line.task, str(line.result.n), difference(line.result), interval(line.result), line.verdict]
            for line in found
        ]
        lines.append(Table(["task", "seeds", "difference", "95 % interval", "verdict"], rows).plain())
        lines += [
            line for text in (_limits(found), _not_compared(comparison, found)) for line in textwrap.wrap(text, WIDTH)
        ]
    return "\n".join([*lines, ""])


def scores_table(comparison: Comparison, ensembles: Ensembles) -> Table:
    """Tasks x checkpoints, each at its best setting."""
    head = ["task", "metric", "checkpoint", "train", SETTING, "tried", "seeds"]
    head += ["median", "mean", "std", "max", "ensemble", "last epoch"]
    rows = []
    for task in comparison.tasks:
        for trials in comparison.of_task(task):
            figures = results.score_summary(trials.scores(trials.best))
            last = trials.scores(trials.best, "last")
            ensemble = ensembles.get((trials.model, task))
            rows.append(
                [
                    task,
                    comparison.metrics(task)[0],
                    trials.model,
                    f"{trials.settings[trials.best][0]['train_examples']}",
                    format_setting(trials.best),
                    f"{len(trials.settings)}",
                    f"{len(trials.settings[trials.best])}",
                    *(percent(figures[name]) for name in results.STATISTICS),
                    percent(ensemble and mean_of_splits(ensemble, comparison.metrics(task)[0])),
                    percent(
                        None if None in last else results.score_summary(last)["median"]
                    ),  # None: a seed diverged after its best
                ]
            )
    return Table(head, rows)


def compared_table(comparison: Comparison, other: str) -> Table:
    """One checkpoint compared with the first, task by task."""
    head = ["task", "verdict", SETTING, "seeds", "difference", "95 % interval"]
    head += ["p (t)", "Holm", "p (sign flips)", "Holm"]
    rows = []
    for line in comparison.compared(other):
        result = line.result
        rows.append(
            [
                line.task,
                line.verdict,
                format_setting(line.setting),
                str(result.n),
                difference(result),
                interval(result),
                p_value(result.p_t),
                p_value(line.p_t),
                p_value(result.p_flip),
                p_value(line.p_flip),
            ]
        )
    return Table(head, rows)


def settings_table(comparison: Comparison, task: str) -> Table:
    """All settings of a task: the median and the spread of each checkpoint."""
    trials = comparison.of_task(task)
    head = [SETTING, *(one.model for one in trials)]
    rows = []
    for setting in dict.fromkeys(setting for one in trials for setting in one.settings):
        cells = [_setting_cell(one, setting) for one in trials]
        rows.append([format_setting(setting), *cells])
    return Table(head, rows)


def _setting_cell(trials: Trials, setting: tuple[float, int, int]) -> str:
    if setting not in trials.settings:
        return NOTHING
    figures = results.score_summary(trials.scores(setting))
    spread = "" if figures["std"] is None else f" ± {percent(figures['std'])}"
    best = ", best" if setting == trials.best and len(trials.settings) > 1 else ""
    return f"{percent(figures['median'])}{spread}{best}"


def glue_rows(comparison: Comparison, ensembles: Ensembles) -> dict[str, dict[str, Any]]:
    """Rows of `glue_cells`: checkpoint -> GLUE task -> its metrics at the best setting; and a row for the ensembles of
    a checkpoint that has them on all of these tasks."""
    rows: dict[str, dict[str, Any]] = {}
    averaged: dict[str, dict[str, Any]] = {}
    for (model, task), trials in comparison.trials.items():
        if task in COLUMNS and comparison.metrics(task) == GLUE[task].metrics:  # a custom task may have the same name
            seeds = [row["best"]["dev"] for row in trials.settings[trials.best]]
            rows.setdefault(model, {})[task] = results.summary(seeds)
            averaged.setdefault(model, {})[task] = ensembles.get((model, task))
    return with_ensembles(rows, averaged)


def write_scores(report: ReportPage, comparison: Comparison, ensembles: Ensembles) -> None:
    report.heading("Scores")
    report.table(scores_table(comparison, ensembles))
    one = all(len(trials.settings) == 1 for trials in comparison.trials.values())
    setting = "" if one else "The setting is the one with the highest median over the seeds. "
    if _equal_trials(comparison):
        trials = "Trials are equal: the same settings and seeds for every checkpoint of a task."
    else:
        trials = "Trials are NOT equal: a checkpoint has fewer settings or seeds than another."
    report.text(
        f"{setting}{trials} The epoch of each seed{' is' if one else ' and the setting are'} selected on the dev split "
        "that is reported, which biases all figures upwards equally; `last epoch` is the median without epoch "
        "selection. A score is the task's first metric, averaged over its dev splits; std is the sample standard "
        "deviation; `ensemble` is the score of the mean prediction of all seeds, each at its best epoch."
    )
    if rows := glue_rows(comparison, ensembles):
        head, lines, legend = glue_cells(rows)
        report.text("GLUE table:")
        report.table(Table(head, lines))
        report.text(" ".join(legend))
    panels = {
        task: {one.model: [100 * value for value in one.scores(one.best)] for one in comparison.of_task(task)}
        for task in comparison.tasks
        if comparison.of_task(task)
    }
    labels = {task: comparison.metrics(task)[0] for task in panels}
    report.plot(
        "scores.svg", "Scores of every seed at the best setting, and their median.", plots.plot_scores, panels, labels
    )


def _equal_trials(comparison: Comparison) -> bool:
    for task in comparison.tasks:
        shapes = [
            {setting: sorted(row["seed"] for row in rows) for setting, rows in trials.settings.items()}
            for trials in comparison.of_task(task)
        ]
        if len(shapes) < len(comparison.models) or any(shape != shapes[0] for shape in shapes):
            return False
    return True


def write_compared(report: ReportPage, comparison: Comparison) -> None:
    first = comparison.models[0]
    lines = []
    for other in comparison.models[1:]:
        found = comparison.compared(other)
        report.heading(f"{other} compared with {first}")
        if not found:
            report.text("They have no task with a common seed and setting.")
            continue
        report.table(compared_table(comparison, other))
        report.text(
            f"The difference is the mean of {other} minus {first} over pairs of the same seed, at the same setting: "
            "the one with the highest mean of the two medians. p (t) and the interval come from the paired t-test, "
            "which assumes normally distributed differences; p (sign flips) comes from the exact permutation test over "
            f"their signs, which does not. {_limits(found)}Holm: adjusted over {plural(len(found), 'task')}. A "
            f"difference is undecided unless the adjusted p (t) is below 0.05.{_not_compared(comparison, found)}"
        )
        for line in found:
            result = line.result
            interval = (None if end is None else 100 * end for end in (result.low, result.high))
            lines.append((f"{line.task}: {other}", 100 * result.mean, *interval))
    label = f"difference from {first} (x 100), mean over seeds, 95 % interval"
    if lines:
        caption = "Mean differences over seeds with 95 % intervals."
        report.plot("differences.svg", caption, plots.plot_differences, lines, label)


def _limits(found: Sequence[TaskComparison]) -> str:
    """`flip_limits` of a comparison, followed by a space."""
    limit = flip_limits((line.result.n for line in found), len(found))
    return limit and f"{limit} "


def _not_compared(comparison: Comparison, found: Sequence[TaskComparison]) -> str:
    """A sentence on the tasks that are missing in `found`, preceded by a space."""
    missing = [task for task in comparison.tasks if task not in {line.task for line in found}]
    return f" Not compared, without a common seed and setting: {', '.join(missing)}." if missing else ""


def write_tried(report: ReportPage, comparison: Comparison) -> None:
    several = [task for task in comparison.tasks if any(len(one.settings) > 1 for one in comparison.of_task(task))]
    if not several:
        return
    report.heading("All settings")
    report.text("The median over the seeds ± the standard deviation.")
    panels: dict[str, dict[str, dict[str, list[float]]]] = {}
    for task in several:
        report.text(f"{task}, {comparison.metrics(task)[0]}")
        report.table(settings_table(comparison, task))
        panels[task] = {}
        for one in comparison.of_task(task):
            for setting in one.settings:
                values = [100 * value for value in one.scores(setting)]
                panels[task].setdefault(format_setting(setting), {})[one.model] = values
    labels = {task: comparison.metrics(task)[0] for task in several}
    report.plot("settings.svg", "Scores at every setting.", plots.plot_settings, panels, labels)
