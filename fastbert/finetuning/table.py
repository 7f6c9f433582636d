"""The GLUE table: as Markdown with a row for each model, as in papers, and as text with a line for each task."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastbert.finetuning.glue import GLUE

Summary = Mapping[str, Mapping[str, Mapping[str, float | None]]]
"""dev split -> metric -> median, mean, std and max: `fractions[...].summary.best` of results.json."""

COLUMNS = {
    "mnli": "MNLI-m/mm",
    "qqp": "QQP",
    "qnli": "QNLI",
    "sst2": "SST-2",
    "cola": "CoLA",
    "stsb": "STS-B",
    "mrpc": "MRPC",
    "rte": "RTE",
}
"""Task -> heading, in the order of the papers. The mean is over these tasks, without WNLI and AX."""
_FIGURES = {
    "qqp": ("f1", "accuracy"),
    "mrpc": ("f1", "accuracy"),
}  # the order in papers, the reverse of that in the registry
_MEANINGS = {
    "mnli": "matched/mismatched accuracy",
    "qqp": "F1/accuracy",
    "cola": "Matthews",
    "stsb": "Pearson/Spearman",
    "mrpc": "F1/accuracy",
}
NOTHING = "–"


def glue_table(rows: Mapping[str, Mapping[str, Summary]], seeds: int | None = None) -> str:
    """The table of `glue_cells` as Markdown, with its legend below."""
    head, lines, legend = glue_cells(rows, seeds)
    return "\n".join([*_markdown(head, lines), "", *legend]) + "\n"


def glue_lines(rows: Mapping[str, Mapping[str, Summary]], seeds: int | None = None) -> str:
    """The table of `glue_cells` as plain text for a terminal, with a line for each task and a column for each model,
    and its legend below."""
    head, lines, legend = glue_cells(rows, seeds)
    widths = [max(map(len, column)) for column in (head, *lines)]
    table = [
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])
        for cells in zip(head, *lines, strict=True)
    ]
    return "\n".join(["", table[0], "-" * len(table[0]), *table[1:], "", *legend])


def glue_cells(
    rows: Mapping[str, Mapping[str, Summary]], seeds: int | None = None
) -> tuple[list[str], list[list[str]], list[str]]:
    """Column headings, rows with the figures on dev x 100, and the lines of the legend.

    A cell is the median over the seeds ± the standard deviation, both figures of a task next to each other. The mean is
    over the tasks that every row has, since means over different tasks cannot be compared; a task with two figures
    contributes their mean. Tasks that are not GLUE's (and WNLI) come after the mean, with all their metrics.

    Args:
        rows: name of the model -> task -> its summary.
        seeds: number of seeds, for the legend.
    """
    found = list(dict.fromkeys(task for tasks in rows.values() for task in tasks))
    columns = [task for task in COLUMNS if task in found and is_of_glue(task, rows)]
    others = [task for task in found if task not in columns]
    shared = [task for task in columns if all(task in tasks for tasks in rows.values())]
    over = f" of {len(shared)}" if 0 < len(shared) < len(COLUMNS) else ""
    mean_head = [f"Mean{over}"] if columns else []
    head = ["Model", *(COLUMNS[task] for task in columns), *mean_head, *(_heading(task, rows) for task in others)]
    lines = []
    for model, tasks in rows.items():
        means = [statistics.fmean(median for median, _ in _figures(task, tasks[task])) for task in shared]
        mean = f"{100 * statistics.fmean(means):.1f}" if means else NOTHING
        cells = {task: _cell(_figures(task, summary)) for task, summary in tasks.items()}
        lines.append(
            [
                model,
                *(cells.get(task, NOTHING) for task in columns),
                *([mean] if columns else []),
                *(cells.get(task, NOTHING) for task in others),
            ]
        )
    return head, lines, _legend(columns, shared, others, seeds)


def with_ensembles(
    rows: Mapping[str, Mapping[str, Summary]], ensembles: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Summary]]:
    """Rows of `glue_cells` with one more below each model: the ensemble of its seeds, where every task has one.

    Args:
        ensembles: name of a model in `rows` -> task -> dev split -> metrics of the ensemble; None for a task without.
    """
    found: dict[str, Mapping[str, Summary]] = {}
    for model, tasks in rows.items():
        found[model] = tasks
        its = {task: dev for task, dev in ensembles[model].items() if dev is not None}
        if its.keys() == tasks.keys():
            found[f"{model}, ensemble of the seeds"] = {
                task: {
                    split: {name: {"median": value, "std": None} for name, value in metrics.items()}
                    for split, metrics in dev.items()
                }
                for task, dev in its.items()
            }
    return found


def _figures(task: str, summary: Summary) -> list[tuple[float, float | None]]:
    """(median, standard deviation) of each figure of a task, in the order in which they are printed."""
    return [
        (metrics[name]["median"], metrics[name]["std"])
        for metrics in summary.values()
        for name in _names(task, metrics)
    ]


def is_of_glue(task: str, rows: Mapping[str, Mapping[str, Summary]]) -> bool:
    """True if a task has the name and the metrics of one of GLUE's; a custom task may have the same name."""
    splits = (metrics for tasks in rows.values() if task in tasks for metrics in tasks[task].values())
    return task in GLUE and all(set(GLUE[task].metrics) == metrics.keys() - {"loss"} for metrics in splits)


def _names(task: str, metrics: Mapping[str, object]) -> Sequence[str]:
    if task in GLUE and set(GLUE[task].metrics) <= metrics.keys():
        return _FIGURES.get(task) or GLUE[task].metrics
    return [name for name in metrics if name != "loss"]


def _cell(figures: list[tuple[float, float | None]]) -> str:
    values = "/".join(f"{100 * median:.1f}" for median, _ in figures)
    spreads = "/".join(f"{100 * std:.1f}" for _, std in figures if std is not None)
    return f"{values} ± {spreads}" if spreads else values


def _heading(task: str, rows: Mapping[str, Mapping[str, Summary]]) -> str:
    """Heading of a task after the mean, with the names of its metrics."""
    summary = next(tasks[task] for tasks in rows.values() if task in tasks)
    names = "/".join(_names(task, next(iter(summary.values()))))
    return f"{GLUE[task].title if is_of_glue(task, rows) else task} ({names})"


def _markdown(head: list[str], lines: list[list[str]]) -> list[str]:
    head, *lines = ([cell.replace("|", "\\|") for cell in row] for row in (head, *lines))
    widths = [max(len(row[column]) for row in (head, *lines)) for column in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    rows = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in (head, rule, *lines)
    ]
    return [f"| {' | '.join(row)} |" for row in rows]


def _legend(columns: list[str], shared: list[str], others: list[str], seeds: int | None) -> list[str]:
    over = "the seeds" if seeds is None else f"{seeds} seeds"
    what = "the one seed" if seeds == 1 else f"the median over {over} ± the standard deviation"
    meanings = [f"{GLUE[task].title}: {_MEANINGS[task]}" for task in columns if task in _MEANINGS]
    if len(meanings) < len(columns):
        meanings.append("the others: accuracy" if meanings else "All tasks: accuracy")
    lines = [f"Dev at the best epoch, x 100; {what}."]
    if not columns:
        return lines
    lines.append(f"{'; '.join(meanings)}.")
    titles = ", ".join(GLUE[task].title for task in shared)
    if not shared:
        lines.append("There is no mean: no task is common to all models.")
    elif len(shared) < len(COLUMNS):
        why = "" if len(shared) == len(columns) else ", since not every model has the others"
        lines.append(f"The mean is over {len(shared)} of GLUE's {len(COLUMNS)} tasks: {titles}{why}.")
    else:
        lines.append(f"The mean is over GLUE's {len(COLUMNS)} tasks.")
    if others:
        lines.append("Tasks after the mean do not count in it.")
    return lines
