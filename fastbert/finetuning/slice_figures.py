"""Metrics of a fine-tuning on the slices of dev, with intervals, from the scores that its seeds left."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.errors import UserError
from fastbert.finetuning.dev_ensemble import SCORES, Labels, read_dev_scores
from fastbert.finetuning.slices import ALL, Masks
from fastbert.finetuning.tasks import Task
from fastbert.randomness import row_keys
from fastbert.streams import echo

RESAMPLES = 300
CONFIDENCE = 0.95
_Z = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


def slice_figures(
    task: Task, masks: Masks, labels: Labels, folders: Sequence[Path], intervals: bool = True
) -> dict[str, dict[str, dict[str, Any]]] | None:
    """dev split -> slice -> number of examples and, for each metric, the mean over the seeds, the value of each seed,
    and a 95 % interval for the choice of the examples. None if a seed has no scores, which is reported.

    For accuracy it is Wilson's score interval, otherwise the percentiles of `RESAMPLES` samples of the examples with
    replacement (bootstrap). A metric that is undefined on a slice, such as AUC for a single label, is None.

    Args:
        folders: of the seeds.
        intervals: False leaves them out, which saves time.

    Raises:
        UserError: the scores of a seed are damaged or do not fit the labels.
    """
    if missing := [folder for folder in folders if not (folder / SCORES).is_file()]:
        echo(f"{missing[0]} has no {SCORES}: without metrics on the slices")
        return None
    seeds = [read_dev_scores(folder / SCORES, task, labels) for folder in folders]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for split, members in masks.items():
        every = {ALL: np.ones(len(labels[split]), bool), **members}
        found[split] = {
            name: _figures(task, [seed[split] for seed in seeds], labels[split], np.flatnonzero(mask), intervals)
            for name, mask in every.items()
        }
    return found


def _figures(
    task: Task, seeds: Sequence[np.ndarray], labels: Sequence[Any], rows: np.ndarray, intervals: bool
) -> dict[str, Any]:
    units = unit_ranges(task, labels)
    one_each = all(len(each) == 1 for each in units)
    metrics: dict[str, Any] = {}
    for name in task.metrics:
        values = [_measured(task, name, scores, labels, units, rows) for scores in seeds]
        if None in values:
            metrics[name] = None
            continue
        mean = statistics.fmean(values)
        if not intervals:
            low = high = None
        elif name == "accuracy" and one_each:
            low, high = wilson(mean, len(rows))
        else:
            low, high = _bootstrap(task, name, seeds, labels, units, rows)
        metrics[name] = {"mean": mean, "low": low, "high": high, "seeds": values}
    return {"examples": len(rows), "metrics": metrics}


def unit_ranges(task: Task, labels: Sequence[Any]) -> list[np.ndarray]:
    """Indices of the units of each example."""
    sizes = [len(task.kind.targets([label])) for label in labels]
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def _measured(
    task: Task,
    metric: str,
    scores: np.ndarray,
    labels: Sequence[Any],
    units: Sequence[np.ndarray],
    rows: np.ndarray,
) -> float | None:
    """A metric on the examples `rows`, which may repeat; None if it is undefined."""
    mine = np.concatenate([units[row] for row in rows])
    try:
        return task.measured(metric, scores[mine], [labels[row] for row in rows])
    except UserError:  # the metric needs other labels than these
        return None


def _bootstrap(
    task: Task,
    metric: str,
    seeds: Sequence[np.ndarray],
    labels: Sequence[Any],
    units: Sequence[np.ndarray],
    rows: np.ndarray,
) -> tuple[float | None, float | None]:
    """Percentiles of the mean over the seeds on samples of `rows` with replacement; None where the metric is undefined
    on more than half of them."""
    found = []
    for number in range(RESAMPLES):
        keys = row_keys(0, "sample", number, torch.arange(len(rows))).numpy().astype(np.int64) + 2**31
        sample = rows[keys * len(rows) >> 32]
        values = [_measured(task, metric, scores, labels, units, sample) for scores in seeds]
        if None not in values:
            found.append(statistics.fmean(values))
    if 2 * len(found) < RESAMPLES:
        return None, None
    low, high = np.quantile(found, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return float(low), float(high)


def wilson(fraction: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of a fraction of `count` examples (Wilson 1927)."""
    middle = (fraction + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * (fraction * (1 - fraction) / count + _Z**2 / (4 * count**2)) ** 0.5
    return middle - half, middle + half


def slice_lines(figures: dict[str, dict[str, dict[str, Any]]], metric: str) -> list[str]:
    """Printed lines of the first metric on each slice."""
    width = max(14, *(len(name) for slices in figures.values() for name in slices))
    lines = []
    for split, slices in figures.items():
        lines.append(f"  {f'slices of {split}':<{width}} {'examples':>8} {metric:>10}   95 % interval")
        for name, one in slices.items():
            value = one["metrics"][metric]
            text = "undefined" if value is None else f"{value['mean']:.4f}"
            lines.append(f"  {name:<{width}} {one['examples']:>8} {text:>10}   {interval(value)}".rstrip())
    return lines


def interval(value: dict[str, Any] | None) -> str:
    """The interval of a metric as text; empty if there is none."""
    if value is None or value["low"] is None:
        return ""
    return f"{value['low']:.4f} to {value['high']:.4f}"
