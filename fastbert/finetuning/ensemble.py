"""An ensemble: fine-tuned models whose scores are averaged, such as the seeds of a fine-tuning, several fine-tunings of
one encoder, or of different encoders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastbert.data.foreign_tokenizer import AnyTokenizer
from fastbert.errors import LINE, UserError, brief
from fastbert.finetuning.kinds.kind import TaskKind
from fastbert.finetuning.results import read_results, seed_folder
from fastbert.finetuning.rows import Example
from fastbert.finetuning.saved import TaskRecord, fine_tuned_folder, load_task_model, not_fine_tuned, read_task_record
from fastbert.finetuning.scoring import Inputs, check_finite, encode_inputs, predict_scores
from fastbert.hub.folders import seed_folders
from fastbert.streams import echo
from fastbert.training.tensors import HASH, read_metadata


@dataclass(frozen=True)
class Member:
    """One model of an ensemble. It has an encoder, a tokenizer and a length of its own."""

    folder: Path
    record: TaskRecord
    vocabulary: AnyTokenizer

    @property
    def name(self) -> str:
        """The folder of the seed, or of the model if it is elsewhere."""
        return str(self.folder.parent if self.folder.name == "model" else self.folder)

    @property
    def encoding(self) -> tuple[str, int, bool]:
        """Everything that the inputs depend on: members with equal values read the same ones."""
        return self.vocabulary.fingerprint, self.record.max_length, self.record.both_orders


@dataclass(frozen=True)
class Ensemble:
    """Models with equal weights in the mean. All have the same kind of task, the same labels, and read pairs or do
    not."""

    members: tuple[Member, ...]
    kind: TaskKind
    """The kind with the settings for the averaged scores."""
    title: str
    """The members in one line or several, for the user."""

    @property
    def task(self) -> str:
        """Names of the tasks on which the members were trained, usually one."""
        return " and ".join(dict.fromkeys(member.record.task for member in self.members))

    @property
    def is_pair(self) -> bool:
        return self.members[0].record.is_pair

    def encode(self, examples: Sequence[Example]) -> list[Inputs]:
        """The examples as each member reads them."""
        found: dict[tuple[str, int, bool], Inputs] = {}
        for member in self.members:
            if member.encoding not in found:
                found[member.encoding] = encode_inputs(examples, member.vocabulary, member.record)
        return [found[member.encoding] for member in self.members]

    def scores(
        self, inputs: Sequence[Inputs], device: torch.device, precision: str, batch_size: int, kernels: str
    ) -> list[np.ndarray]:
        """Scores of each member, float64 [U, ...]. The models are loaded one after the other.

        Args:
            inputs: from `encode`.

        Raises:
            UserError: a model is damaged, or its scores are not finite.
        """
        found = []
        for member, encoded in zip(self.members, inputs, strict=True):
            model = load_task_model(member.folder, kernels).model.to(device)
            scores = predict_scores(model, member.record.task, encoded, precision=precision, batch_size=batch_size)
            check_finite(scores, member.folder, precision)
            found.append(scores)
        return found

    def cut(self, inputs: Sequence[Inputs]) -> list[str]:
        """A line for each length at which inputs were truncated."""
        what = "inputs with words" if self.kind.labels_words else "inputs"
        read = {member.encoding: encoded for member, encoded in zip(self.members, inputs, strict=True)}
        lines = []
        for encoding, encoded in read.items():
            readers = [member.name for member in self.members if member.encoding == encoding]
            by = f" for {', '.join(readers)}" if len(read) > 1 else ""
            if encoded.truncated:
                lines.append(f"{encoded.truncated} {what} were cut to {encoding[1]} tokens{by}")
        return lines


def open_ensemble(paths: Sequence[str]) -> Ensemble:
    """Opens the models in the folders `paths`; the --out of a fine-tuning stands for all its seeds.

    Raises:
        UserError: there is no such model, a seed has no model or a damaged one, a model is given twice, or the models
            cannot be averaged.
    """
    members: list[Member] = []
    titles = []
    for path in paths:
        folders, fraction = models_of(Path(path))
        for folder, seed in folders.items():
            member = Member(folder, *read_task_record(folder))
            if seed not in (None, member.record.seed):
                raise UserError(f"{folder} holds the model of seed {member.record.seed}; restore that of seed {seed}")
            members.append(member)
        seeds = [str(seed) for seed in folders.values() if seed is not None]
        if seeds:
            averaged = "the mean over the seeds" if len(seeds) > 1 else "the model of seed"
            largest = "" if fraction is None else f" of its largest fraction of train, {fraction:g}"
            titles.append(f"{path}: {averaged} {', '.join(seeds)}{largest}")
    if len(paths) > 1:
        titles = [f"the mean over {len(members)} models: {', '.join(member.name for member in members)}"]
    check_members(members)
    kind = members[0].record.kind.ensemble([member.record.kind for member in members])
    return Ensemble(tuple(members), kind, "\n".join(titles))


def check_members(members: Sequence[Member]) -> None:
    """Checks that models can be averaged, and warns if they were trained on different tasks.

    Raises:
        UserError: they differ in what they predict, or a model is given twice.
    """
    check_distinct(members)
    first = members[0]
    for member in members:
        its, expected = member.record, first.record
        compared = [
            ("the kind", expected.kind.name, its.kind.name),
            ("the labels", expected.kind.labels, its.kind.labels),
            ("pairs:", expected.is_pair, its.is_pair),
        ]
        if not its.kind.labels:  # numbers of another task have another scale
            compared.append(("the task", expected.task, its.task))
        for what, wanted, found in compared:
            if wanted != found:
                raise UserError(
                    f"these models cannot be averaged: {member.folder} has {what} {brief(found, str)}, {first.folder} "
                    f"{brief(wanted, str)}; give models of one task"
                )
    by_task: dict[str, list[str]] = {}
    for member in members:
        by_task.setdefault(member.record.task, []).append(member.name)
    if len(by_task) > 1:
        lines = LINE.join(f"{task}: {', '.join(names)}" for task, names in by_task.items())
        echo(f"the models have the same labels, but were trained on different tasks:{LINE}{lines}")


def check_distinct(members: Sequence[Member]) -> None:
    """Raises a UserError if a model is given twice, also if one is a copy of another."""
    seen: dict[str, Member] = {}
    for member in members:
        weights = member.folder / "model.safetensors"
        seal = read_metadata(weights).get(HASH) if weights.is_file() else None
        for key in (str(member.folder.resolve()), *([seal] if seal else [])):
            other = seen.setdefault(key, member)
            if other is not member:
                same = "" if other.folder == member.folder else f", a copy of {other.folder}"
                raise UserError(
                    f"the model {member.folder} is given twice{same}; give each model once, an --out of a fine-tuning "
                    "stands for all its seeds"
                )


def models_of(path: Path) -> tuple[dict[Path, int | None], float | None]:
    """The folder of each model with its seed, None if `path` is a single model; and, if `path` has several fractions of
    the training split, the largest, whose models these are."""
    folder = fine_tuned_folder(path)
    if folder is not None:
        return {folder: None}, None
    if not (path / "results.json").is_file():
        raise no_results(path)
    fractions = read_results(path)["fractions"]
    part = max(fractions, key=lambda part: part["fraction"])
    found: dict[Path, int | None] = {}
    for result in part["seeds"]:
        seed = seed_folder(path, part["fraction"], result["seed"])
        folder = fine_tuned_folder(seed)
        if folder is None:
            raise UserError(
                f"{seed} has no model, so the seeds of {path} cannot be averaged; restore it, train it again without "
                "--no-save-model, or give --model the folder of another seed"
            )
        found[folder] = result["seed"]
    return found, part["fraction"] if len(fractions) > 1 else None


def no_results(path: Path) -> UserError:
    """Error for a folder that is neither a fine-tuned model nor the finished --out of one task."""
    seeds = seed_folders(path)
    if tasks := sorted({seed.parent for seed in seeds if (seed.parent / "results.json").is_file()}):
        return UserError(f"{path} holds the results of several tasks; give the folder of one, such as {tasks[0]}")
    if seeds and (path.parent / "results.json").is_file():
        return UserError(
            f"{path} holds the seeds of one fraction of the training split; give them one by one: --model "
            f"{','.join(map(str, seeds))}"
        )
    if seeds:
        return UserError(
            f"{path} has no results.json, so not all of its seeds are trained; run fastbert finetune again with the "
            f"same --out, or give one of its seeds, such as {seeds[0]}"
        )
    return not_fine_tuned(path)
