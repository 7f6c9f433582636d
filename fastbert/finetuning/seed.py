"""Trains one seed in its folder: dev is scored after each epoch, the best epoch's model is saved, and a checkpoint lets
the same command continue after the last finished epoch."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.errors import UserError
from fastbert.files import disk_errors, remove, remove_leftovers
from fastbert.finetuning.batches import subset
from fastbert.finetuning.dev_ensemble import write_dev_scores
from fastbert.finetuning.dev_scores import dev_figures, selection_value, write_errors
from fastbert.finetuning.folder import write_options
from fastbert.finetuning.kinds.kind import TaskKind
from fastbert.finetuning.loop import ADVICE, STATE, Tuner, build_scaled_optimizer
from fastbert.finetuning.model import TaskModel, new_task_model
from fastbert.finetuning.options import science
from fastbert.finetuning.results import EPOCH
from fastbert.finetuning.saved import fine_tuned_folder, save_task_model
from fastbert.finetuning.scoring import BATCH, Inputs, encode_inputs, predict_scores
from fastbert.finetuning.setup import FinetuneSetup, task_record
from fastbert.finetuning.stream import SingleTaskStream
from fastbert.records import check, finite_or_none, write_sealed
from fastbert.streams import echo
from fastbert.training.checkpoints import Checkpoint, Checkpointer, check_space, on_all_ranks, read_newest
from fastbert.training.finite import NotFiniteError, all_finite
from fastbert.training.interrupts import Interrupts
from fastbert.training.logbook import Logbook, NoLogbook
from fastbert.training.step import Updater

CHECKPOINTS = "checkpoints"
"""Folder in the seed's folder, until the seed is finished."""
_STATE = STATE | {"best": (EPOCH, type(None)), "last": EPOCH}


def train_seed(
    setup: FinetuneSetup, folder: Path, fraction: float, seed: int, interrupts: Interrupts
) -> dict[str, Any] | None:
    """Trains one seed in its folder, from its newest checkpoint if there is one. Of several ranks, only the first
    reads and writes files.

    Returns:
        The result; None if a signal ended the training.

    Raises:
        UserError: training diverged; the disk is full; the checkpoints are damaged.
    """
    options, world = setup.options, setup.world
    found = checkpoint_of(folder, options.save_model) if world.first else None
    if world.first:
        open_seed_folder(folder, found is not None)
        this = replace(options, seeds=1, first_seed=seed, train_fraction=str(fraction), out=str(folder))
        write_options(folder, this)
    checkpoint = on_all_ranks(world, found)
    examples = [setup.train[row] for row in subset(len(setup.train), fraction)]
    data = encode_inputs(examples, setup.vocabulary, task_record(options, setup.task, seed, {}))
    updater = build_updater(setup, seed)
    if world.first:
        check_disk(folder, updater.module, options.save_model, checkpoint is not None)
    rows = len(data.orders[0])
    steps = options.steps(rows)
    windows = "" if rows == len(examples) else f" in {rows} windows"
    echo(f"{setup.task.name}, seed {seed}: {len(examples)} examples{windows}, {steps} steps; {setup.machine}")
    resumed = {"start_step": checkpoint.step, "expected": checkpoint.state["metrics"]} if checkpoint else {}
    experiment = science(options) | {"seed": seed, "train_fraction": fraction}
    with Logbook(folder, steps, options=experiment, **resumed) if world.first else NoLogbook() as logbook:
        stream = SingleTaskStream(setup.task.name, data.orders, options.batch_size, seed)
        tuner = Tuner(updater, stream, options, seed, logbook)
        checkpointer = Checkpointer(folder / CHECKPOINTS, 1, echo) if world.first else None
        epochs = Epochs(setup, tuner, checkpointer, folder, seed)
        if checkpoint is not None:
            epochs.restore(checkpoint)
            echo(f"continues after epoch {tuner.progress.epoch} of {options.epochs}")
        if not tuner.run(interrupts, epochs.end):
            return None
    if epochs.best is None:
        raise UserError(
            f"{setup.task.name}, seed {seed}: training diverged: weights or scores on dev were not finite in any of "
            f"the {options.epochs} epochs{ADVICE}"
        )
    return world.first_decides(lambda: epochs.finish(data))


def open_seed_folder(folder: Path, resumed: bool) -> None:
    """Creates the folder of a seed, or removes leftovers from it if the seed is `resumed`."""
    with disk_errors(folder):
        if resumed:
            remove_leftovers(folder)
        else:
            remove(folder)  # files of an attempt without a checkpoint
            folder.mkdir(parents=True)


def checkpoint_of(folder: Path, save_model: bool) -> Checkpoint | None:
    """The checkpoint from which a seed continues; None if there is none, or if the model of its best epoch is missing.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    checkpoint = read_newest(folder / CHECKPOINTS, echo)
    if checkpoint is None:
        return None
    state = check(checkpoint.state, _STATE, f"the checkpoint's state {checkpoint.path / 'state.json'}")
    if missing := {"model", "optimizer", "scores"} - checkpoint.tensors.keys():
        raise UserError(f"the checkpoint {checkpoint.path} is damaged: it has no {min(missing)}.safetensors")
    best = state["best"]
    if save_model and best and best["epoch"] < state["progress"]["epoch"] and fine_tuned_folder(folder) is None:
        echo(f"{folder} has no model of its best epoch, which was trained with --no-save-model: the seed starts again")
        return None
    return checkpoint


def build_updater(setup: FinetuneSetup, seed: int) -> Updater:
    """Builds the model of a seed, with a new head, and its optimizer."""
    options, task, world = setup.options, setup.task, setup.world
    model = new_task_model(
        setup.pretrained,
        {task.name: task.kind},
        seed,
        dropout=options.dropout,
        attention_dropout=options.attention_dropout,
        kernels=options.machine.kernels,
    ).to(setup.device)
    optimizer = build_scaled_optimizer(
        model.named_parameters(),
        model.encoder.config,
        options.optimizer(options.learning_rate),
        options.layer_decay,
        setup.device,
        options.machine.apex,
    )
    network = world.distributed(model, setup.device)
    return Updater(model, optimizer, options.clip_norm, setup.precision, world, network)


def check_disk(folder: Path, model: TaskModel, save_model: bool, resumed: bool) -> None:
    """Raises a UserError if the disk has no space for a seed: the files to be written and, unless it is `resumed`, the
    files that they replace."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    checkpoint = 3 * weights  # with AdamW's two moments
    needed = (checkpoint + save_model * weights) * (1 if resumed else 2)
    check_space(folder, needed, "the checkpoints and the model of a seed need", "fine-tune a smaller encoder")


@dataclass
class Epochs:
    """Work at the end of each epoch of a seed: scores dev, and saves checkpoint and model.

    Args:
        checkpointer: None on all ranks but the first.
    """

    setup: FinetuneSetup
    tuner: Tuner
    checkpointer: Checkpointer | None
    folder: Path
    seed: int
    best: dict[str, Any] | None = None
    """Number of the best epoch so far and its metrics on dev."""
    last: dict[str, Any] = field(default_factory=dict)
    best_scores: dict[str, np.ndarray] = field(default_factory=dict)

    def end(self) -> None:
        """Scores dev, writes a checkpoint, and saves the model if it is the best so far.

        The order matters: the weights of a best epoch are in its checkpoint until they are in the model.
        """
        self.measure()
        self.setup.world.first_decides(self.save)

    def save(self) -> None:
        """Writes the checkpoint, and the model of a best epoch."""
        try:
            scores = {split: torch.from_numpy(values) for split, values in self.best_scores.items()}
            self.checkpointer.save(
                self.tuner.progress.step,
                self.tuner.tensors() | {"scores": scores},
                self.tuner.state() | {"best": self.best, "last": self.last},
            )
        except NotFiniteError as error:  # training can be resumed from an earlier epoch, if any
            echo(f"{error}; there is no checkpoint of epoch {self.tuner.progress.epoch}")
        self.save_best()

    def measure(self) -> None:
        """Scores dev and logs the metrics. An epoch with weights, scores or metrics that are not finite does not count
        as best."""
        setup, task, progress, logbook = self.setup, self.setup.task, self.tuner.progress, self.tuner.logbook
        model, world, scores, figures = self.tuner.updater.module, setup.world, {}, {}
        finite = bool(all_finite(model.state_dict().values()))
        batch_size = setup.options.machine.micro_batch_size or BATCH
        for split, inputs in setup.dev.items():
            scores[split] = predict_scores(
                model, task.name, inputs, precision=setup.precision, batch_size=batch_size, world=world
            )
            figures[split] = world.first_decides(partial(dev_figures, task, scores[split], inputs.examples))
            finite = finite and None not in figures[split].values()
            logbook.log(progress.step, split, {**figures[split], "epoch": progress.epoch})
        self.last = {"epoch": progress.epoch, "dev": figures}
        if not finite:
            echo(f"epoch {progress.epoch}: weights or scores on dev are not finite; it does not count as best")
        elif self.best is None or selection_value(task, figures) > selection_value(task, self.best["dev"]):
            self.best, self.best_scores = self.last, scores

    def save_best(self) -> None:
        """Saves the model if the last epoch is the best."""
        if self.setup.options.save_model and self.best and self.best["epoch"] == self.tuner.progress.epoch:
            record = task_record(self.setup.options, self.setup.task, self.seed, self.best["dev"])
            record = replace(record, kind=self.fitted())
            save_task_model(self.tuner.updater.module, record, self.setup.pretrained.tokenizer, self.folder / "model")

    def fitted(self) -> TaskKind:
        """The kind with settings fitted to the scores of the best epoch on dev."""
        labels = [label for split in self.best_scores for label in self.setup.dev[split].labels]
        return self.setup.task.kind.fitted(np.concatenate([*self.best_scores.values()]), labels)

    def finish(self, train: Inputs) -> dict[str, Any]:
        """Writes the scores on dev, the examples with the highest loss, and the result, which is returned."""
        task, path = replace(self.setup.task, kind=self.fitted()), self.folder / "errors.jsonl"
        write_errors(path, task, self.setup.dev, self.best_scores, self.setup.options.worst)
        write_dev_scores(self.folder, self.best_scores)
        result = self.result(train)
        write_sealed(self.folder / "result.json", result)
        return result

    def result(self, train: Inputs) -> dict[str, Any]:
        """The result of the training; there must be a best epoch."""
        options, progress, count = self.setup.options, self.tuner.progress, len(train.examples)
        splits = {"train": train, **self.setup.dev}
        return {
            "seed": self.seed,
            "best": self.best,
            "last": self.last,
            **self.details(),
            "train_examples": count,
            "truncated": {split: inputs.truncated for split, inputs in splits.items()},
            "skipped_updates": progress.skipped,
            "examples_per_second": round(count * options.epochs / progress.seconds, 1),
            "model": str(self.folder / "model") if options.save_model else None,
        }

    def details(self) -> dict[str, Any]:
        """Figures of each label at the best epoch, and the metrics with settings fitted to the same dev splits."""
        task, kind, found = self.setup.task, self.fitted(), {}
        fitted = replace(task, kind=kind)
        for split, scores in self.best_scores.items():
            labels = self.setup.dev[split].labels
            if table := kind.by_label(scores, labels):
                found.setdefault("by_label", {})[split] = table
            if kind != task.kind:
                found.setdefault("fitted_to_dev", {})[split] = finite_or_none(fitted.measure(scores, labels))
        return found

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint."""
        self.tuner.restore(checkpoint)
        self.best, self.last = checkpoint.state["best"], checkpoint.state["last"]
        self.best_scores = {split: values.numpy() for split, values in checkpoint.tensors["scores"].items()}
        self.setup.world.first_decides(self.restore_model)

    def restore_model(self) -> None:
        """Saves the model of the checkpoint if its epoch is the best, which a killed process may not have done."""
        if not self.setup.options.save_model:
            remove(self.folder / "model")
        self.save_best()
