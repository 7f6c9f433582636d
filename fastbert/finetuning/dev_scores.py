"""Scores on the dev splits: metrics, the choice of the best epoch, and the examples with the highest loss."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastbert.files import atomic_file
from fastbert.finetuning.results import Figures
from fastbert.finetuning.rows import Example
from fastbert.finetuning.scoring import Inputs
from fastbert.finetuning.tasks import Task
from fastbert.records import finite_or_none, json_text


def dev_figures(task: Task, scores: np.ndarray, examples: Sequence[Example]) -> dict[str, float | None]:
    """The task's metrics and the mean loss; None for values that are not finite, and for all if a score is not."""
    if not np.isfinite(scores).all():
        return dict.fromkeys((*task.metrics, "loss"))
    labels = [example.label for example in examples]
    loss = float(task.kind.score_losses(scores, labels).mean())
    return finite_or_none({**task.measure(scores, labels), "loss": loss})


def selection_value(task: Task, figures: Figures) -> float:
    """The first metric, averaged over the dev splits; the epoch with the highest value is the best."""
    return statistics.fmean(split[task.metrics[0]] for split in figures.values())


def write_errors(path: Path, task: Task, dev: dict[str, Inputs], scores: dict[str, np.ndarray], worst: int) -> None:
    """Writes the `worst` dev examples with the highest loss (its sum if words have labels), in descending order."""
    rows = []
    for split, values in scores.items():
        inputs = dev[split]
        lost = inputs.orders[0].by_example(task.kind.score_losses(values, inputs.labels))
        rows += [
            (float(np.sum(loss)), split, example, value)
            for loss, (example, value) in zip(lost, inputs.scored(values), strict=True)
        ]
    rows.sort(key=lambda row: -row[0])
    with atomic_file(path, "w") as file:
        for loss, split, example, value in rows[:worst]:
            row = {"split": split, "index": example.index, "loss": round(loss, 4)}
            row |= {
                "expected": task.kind.file_label(example),
                **task.kind.prediction_row(example, value),
                "text": example.text,
            }
            row |= {} if (errors := task.kind.errors(example, value)) is None else {"errors": errors}
            row |= {} if example.pair is None else {"pair": example.pair}
            file.write(json_text(row, ensure_ascii=False) + "\n")
