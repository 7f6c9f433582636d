"""The ensemble of several seeds on dev: the mean of their scores, which each seed leaves in its folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.errors import UserError
from fastbert.files import atomic_file
from fastbert.finetuning.averages import mean_of_models
from fastbert.finetuning.tasks import Task
from fastbert.streams import echo
from fastbert.training.tensors import read_tensors, serialized

SCORES = "dev_scores.safetensors"
"""File in the folder of a seed: the scores of the best epoch, a float64 tensor [U, ...] for each dev split, with a hash
that reveals damage."""
Labels = Mapping[str, Sequence[Any]]
"""Dev split -> the label of each example."""


def write_dev_scores(folder: Path, scores: Mapping[str, np.ndarray]) -> None:
    """Writes the scores of a seed, [U, ...] for each dev split, to its folder."""
    tensors = {split: torch.from_numpy(np.ascontiguousarray(values)) for split, values in scores.items()}
    with atomic_file(folder / SCORES) as file:
        file.write(serialized(tensors, {}))


def ensemble_figures(task: Task, labels: Labels, folders: Sequence[Path]) -> dict[str, dict[str, float]] | None:
    """dev split -> metric -> value of the mean of the scores of several seeds, each at its best epoch; None for one
    seed, or if a seed has no scores, which is reported.

    Args:
        task: with the settings of the kind that the metrics of the seeds have.
        folders: of the seeds.

    Raises:
        UserError: the scores of a seed are damaged or do not fit the labels.
    """
    if len(folders) < 2:
        return None
    if missing := [folder for folder in folders if not (folder / SCORES).is_file()]:
        echo(f"{missing[0]} has no {SCORES}: without the ensemble of the {len(folders)} seeds")
        return None
    seeds = [read_dev_scores(folder / SCORES, task, labels) for folder in folders]
    return {split: task.measure(mean_of_models([seed[split] for seed in seeds]), labels[split]) for split in labels}


def read_dev_scores(path: Path, task: Task, labels: Labels) -> dict[str, np.ndarray]:
    """The scores of a seed by dev split, float64 [U, ...]; raises a UserError if they are damaged or do not fit
    `labels`."""
    fix = f"remove {path} to leave the ensemble of the seeds out, or {path.parent} to train the seed again"
    try:
        scores = {split: values.numpy() for split, values in read_tensors(path)[0].items()}
    except UserError as error:
        raise UserError(f"{error}; {fix}") from None
    shapes = {split: (len(task.kind.targets(its)), *task.kind.score_shape()) for split, its in labels.items()}
    if shapes != {split: values.shape for split, values in scores.items()}:
        raise UserError(f"{path} holds scores of other examples than those of {task.name}; {fix}")
    return scores
