"""A fine-tuned model, or the seeds of one fine-tuning, whose scores are averaged."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fastbert.data.tokenizer import WordPiece
from fastbert.errors import UserError, brief
from fastbert.finetuning.results import read_results, seed_folder
from fastbert.finetuning.saved import TaskRecord, fine_tuned_folder, load_task_model, not_fine_tuned, read_task_record
from fastbert.finetuning.scoring import Inputs, check_finite, predict_scores
from fastbert.hub.folders import seed_folders


@dataclass(frozen=True)
class Ensemble:
    path: str
    """Folder given by the user."""
    folders: tuple[Path, ...]
    """Folder of each model."""
    seeds: tuple[int, ...]
    """The seeds that are averaged; empty if `path` is a single model."""
    record: TaskRecord
    """The record of the first model; its kind has the settings for the averaged scores."""
    vocabulary: WordPiece

    def scores(self, inputs: Inputs, device: torch.device, precision: str, batch_size: int, kernels: str) -> np.ndarray:
        """Scores float64 [U, ...], the mean over the models, which are loaded one after the other.

        Raises:
            UserError: a model is damaged, or its scores are not finite.
        """
        total = 0.0
        for folder in self.folders:
            model = load_task_model(folder, kernels).model.to(device)
            scores = predict_scores(model, self.record.task, inputs, precision=precision, batch_size=batch_size)
            check_finite(scores, folder, precision)
            total = total + scores
        return total / len(self.folders)


def open_ensemble(path: str) -> Ensemble:
    """Opens the model in the folder `path`, or all seeds if `path` is the --out of a fine-tuning.

    Raises:
        UserError: there is no such model, a seed has no model or a damaged one, or the seeds are not compatible.
    """
    folders = dict(models_of(Path(path)))
    members = [(folder, *read_task_record(folder)) for folder in folders]
    first, record, vocabulary = members[0]
    for folder, other, words in members:
        if folders[folder] not in (None, other.seed):
            raise UserError(f"{folder} holds the model of seed {other.seed}; restore that of seed {folders[folder]}")
        for what, expected, found in (
            ("the task", record.task, other.task),
            ("the kind", record.kind.name, other.kind.name),
            ("the labels", record.kind.labels, other.kind.labels),
            ("pairs:", record.is_pair, other.is_pair),
            ("both orders:", record.both_orders, other.both_orders),
            ("max_length", record.max_length, other.max_length),
            ("a tokenizer with the hash", vocabulary.fingerprint, words.fingerprint),
        ):
            if expected != found:
                raise UserError(
                    f"the models of {path} cannot be averaged: {folder} has {what} {brief(found, str)}, {first} "
                    f"{brief(expected, str)}; give one seed, such as --model {first.parent}"
                )
    kind = record.kind.ensemble([other.kind for _, other, _ in members])
    return Ensemble(
        path,
        tuple(folders),
        tuple(seed for seed in folders.values() if seed is not None),
        replace(record, kind=kind),
        vocabulary,
    )


def models_of(path: Path) -> Iterator[tuple[Path, int | None]]:
    """Yields the folder of each model, and its seed if `path` has several. Of several fractions of the training split,
    the largest is used."""
    folder = fine_tuned_folder(path)
    if folder is not None:
        yield folder, None
        return
    if not (path / "results.json").is_file():
        raise no_results(path)
    part = max(read_results(path)["fractions"], key=lambda part: part["fraction"])
    for result in part["seeds"]:
        seed = seed_folder(path, part["fraction"], result["seed"])
        folder = fine_tuned_folder(seed)
        if folder is None:
            raise UserError(
                f"{seed} has no model, so the seeds of {path} cannot be averaged; restore it, train it again without "
                "--no-save-model, or give --model the folder of another seed"
            )
        yield folder, result["seed"]


def no_results(path: Path) -> UserError:
    """Error for a folder that is neither a fine-tuned model nor the finished --out of one task."""
    seeds = seed_folders(path)
    if tasks := sorted({seed.parent for seed in seeds if (seed.parent / "results.json").is_file()}):
        return UserError(f"{path} holds the results of several tasks; give the folder of one, such as {tasks[0]}")
    if seeds:
        return UserError(
            f"{path} has no results.json, so not all of its seeds are trained; run fastbert finetune again with the "
            f"same --out, or give one of its seeds, such as {seeds[0]}"
        )
    return not_fine_tuned(path)
