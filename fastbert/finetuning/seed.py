"""Trains one seed in its folder: dev is scored after each epoch, the best epoch's model is saved, and a checkpoint lets
the same command continue after the last finished epoch. Several tasks that train together have all in common but
their heads, scores and results."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastbert.errors import UserError
from fastbert.files import disk_errors, remove, remove_leftovers
from fastbert.finetuning.batches import subset
from fastbert.finetuning.build import build_updater
from fastbert.finetuning.folder import write_options
from fastbert.finetuning.kinds.kind import TaskKind
from fastbert.finetuning.loop import ADVICE, STATE, Tuner
from fastbert.finetuning.mixture import MixedStream
from fastbert.finetuning.model import TaskModel
from fastbert.finetuning.options import science
from fastbert.finetuning.results import EPOCH
from fastbert.finetuning.saved import fine_tuned_folder
from fastbert.finetuning.scoring import encode_inputs
from fastbert.finetuning.setup import FinetuneSetup, task_record
from fastbert.finetuning.slices import masks, slice_head
from fastbert.finetuning.stream import SingleTaskStream
from fastbert.finetuning.task_epochs import TaskEpochs
from fastbert.records import check
from fastbert.streams import echo
from fastbert.training.callbacks import Callback
from fastbert.training.checkpoints import Checkpoint, Checkpointer, check_space, on_all_ranks, read_newest
from fastbert.training.finite import NotFiniteError, all_finite
from fastbert.training.interrupts import Interrupts
from fastbert.training.logbook import Logbook, NoLogbook
from fastbert.training.trackers import trackers
from fastbert.training.world import World

CHECKPOINTS = "checkpoints"
"""Folder in the seed's folder, until the seed is finished."""
_STATE = STATE | {"best": {str: (EPOCH, type(None))}, "last": {str: EPOCH}}


@dataclass(frozen=True)
class Part:
    """A task of a training."""

    setup: FinetuneSetup
    folder: Path
    """Folder for its results: that of the training if it is the only task."""
    fraction: float = 1.0
    """Fraction of its training split."""
    weight: float = 1.0
    """Weight of its mean loss; with 0 it has no batches, and its head stays as it was initialized."""

    @property
    def name(self) -> str:
        return self.setup.task.name


@dataclass(frozen=True)
class Training:
    """The tasks of a training, of which the first has the common options, and how they are mixed."""

    parts: Sequence[Part]
    """Tasks in alphabetical order."""
    temperature: float = 1.0
    """See `MixedStream`."""
    target: str | None = None
    """Task whose best epoch is that of all; without one, each task has its own."""

    @property
    def setup(self) -> FinetuneSetup:
        return self.parts[0].setup

    def heads(self) -> dict[str, TaskKind]:
        """The kind of each head: those of the tasks and, if they are trained, of their slices."""
        found = {part.name: part.setup.task.kind for part in self.parts}
        for part in self.parts:
            if part.setup.options.slice_heads:
                task = part.setup.task
                found |= {slice_head(part.name, one.name): task.kind for one in task.slices}
        return found


def train_seed(
    training: Training, folder: Path, seed: int, interrupts: Interrupts, callbacks: Sequence[Callback] = ()
) -> list[dict[str, Any]] | None:
    """Trains one seed in its folder, from its newest checkpoint if there is one. Of several ranks, only the first
    reads and writes files and has callbacks.

    Returns:
        The result of each task; None if a signal ended the training.

    Raises:
        UserError: training diverged; the disk is full; the checkpoints are damaged.
    """
    setup, parts = training.setup, training.parts
    options, world = setup.options, setup.world
    found = checkpoint_of(folder, parts) if world.first else None
    if world.first:
        for each in dict.fromkeys([folder, *(part.folder for part in parts)]):
            open_seed_folder(each, found is not None)
        for part in parts:
            this = {"seeds": 1, "first_seed": seed, "train_fraction": str(part.fraction), "out": str(part.folder)}
            write_options(part.folder, replace(part.setup.options, **this))
    checkpoint = on_all_ranks(world, found)
    tasks, slices = [], {}
    for part in parts:
        train = part.setup.train
        examples = [train[row] for row in subset(len(train), part.fraction)]
        record = task_record(part.setup.options, part.setup.task, seed, {})
        data = encode_inputs(examples, setup.vocabulary, record)
        if part.setup.options.slice_heads:
            found = masks(part.setup.task.slices, examples, f"train of {part.name}")
            slices[part.name] = {slice_head(part.name, name): mask for name, mask in found.items()}
        tasks.append(TaskEpochs(part.setup, data, part.folder, seed, alone=len(parts) == 1))
    of_model = (options, setup.pretrained, training.heads(), seed, setup.device, setup.precision)
    updater = build_updater(*of_model, world)
    if world.first:
        check_disk(folder, updater.module, options.save_model * len(parts), checkpoint is not None)
    trained = [task for part, task in zip(parts, tasks, strict=True) if part.weight]
    streams = {
        part.name: SingleTaskStream(part.name, task.train.orders, options.batch_size, seed, slices.get(part.name))
        for part, task in zip(parts, tasks, strict=True)
        if part.weight
    }
    stream = MixedStream(streams, {part.name: part.weight for part in parts}, training.temperature, seed)
    steps = options.epochs * stream.batches
    names = " and ".join(filter(None, [", ".join(part.name for part in parts[:-1]), parts[-1].name]))
    echo(f"{names}, seed {seed}: {described(trained)}, {steps} steps; {setup.machine}")
    resumed = {"start_step": checkpoint.step, "expected": checkpoint.state["metrics"]} if checkpoint else {}
    experiment = science(options) | {"seed": seed, "train_fraction": parts[0].fraction}
    if world.first:
        followers = [*trackers(options.track), *callbacks]
        logbook = Logbook(folder, steps, options=experiment, callbacks=followers, **resumed)
    else:
        logbook = NoLogbook()
    with logbook:
        tuner = Tuner(updater, stream, options, seed, logbook)
        checkpointer = Checkpointer(folder / CHECKPOINTS, 1, echo) if world.first else None
        epochs = Epochs(tasks, tuner, checkpointer, world, training.target)
        if checkpoint is not None:
            epochs.restore(checkpoint)
            echo(f"continues after epoch {tuner.progress.epoch} of {options.epochs}")
        if not tuner.run(interrupts, epochs.end):
            return None
    for task in tasks:
        if task.best is None:
            raise UserError(
                f"{task.name}, seed {seed}: training diverged: weights or scores on dev were not finite in any of "
                f"the {options.epochs} epochs{ADVICE}"
            )
    return world.first_decides(lambda: [task.finish(tuner.progress, folder, examples_of(trained)) for task in tasks])


def examples_of(tasks: Sequence[TaskEpochs]) -> int:
    """Number of training examples of all tasks."""
    return sum(len(task.train.examples) for task in tasks)


def described(tasks: Sequence[TaskEpochs]) -> str:
    """The size of the training splits, in words."""
    rows, examples = sum(len(task.train.orders[0]) for task in tasks), examples_of(tasks)
    return f"{examples} examples" + ("" if rows == examples else f" in {rows} windows")


def open_seed_folder(folder: Path, resumed: bool) -> None:
    """Creates the folder of a seed, or removes leftovers from it if the seed is `resumed`."""
    with disk_errors(folder):
        if resumed:
            remove_leftovers(folder)
        else:
            remove(folder)  # files of an attempt without a checkpoint
        folder.mkdir(parents=True, exist_ok=True)


def checkpoint_of(folder: Path, parts: Sequence[Part]) -> Checkpoint | None:
    """The checkpoint from which a seed continues; None if there is none, or if the model of a best epoch is missing.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    checkpoint = read_newest(folder / CHECKPOINTS, echo)
    if checkpoint is None:
        return None
    state = check(checkpoint.state, _STATE, f"the checkpoint's state {checkpoint.path / 'state.json'}")
    if missing := {"model", "optimizer", "scores"} - checkpoint.tensors.keys():
        raise UserError(f"the checkpoint {checkpoint.path} is damaged: it has no {min(missing)}.safetensors")
    for part in parts:
        best = state["best"].get(part.name)
        if not (part.setup.options.save_model and best and best["epoch"] < state["progress"]["epoch"]):
            continue
        if fine_tuned_folder(part.folder) is None:
            echo(
                f"{part.folder} has no model of its best epoch, which was trained with --no-save-model: the seed "
                "starts again"
            )
            return None
    return checkpoint


def check_disk(folder: Path, model: TaskModel, models: int, resumed: bool) -> None:
    """Raises a UserError if the disk has no space for a seed: the files to be written and, unless it is `resumed`, the
    files that they replace.

    Args:
        models: number of models to save.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    checkpoint = 3 * weights  # with AdamW's two moments
    needed = (checkpoint + models * weights) * (1 if resumed else 2)
    check_space(folder, needed, "the checkpoints and the model of a seed need", "fine-tune a smaller encoder")


@dataclass
class Epochs:
    """Work at the end of each epoch of a seed: scores dev, and saves checkpoint and models.

    Args:
        checkpointer: None on all ranks but the first.
        target: see `Training`.
    """

    tasks: Sequence[TaskEpochs]
    tuner: Tuner
    checkpointer: Checkpointer | None
    world: World
    target: str | None = None

    def end(self) -> None:
        """Scores dev, writes a checkpoint, and saves the model of each task that is at its best so far.

        The order matters: the weights of a best epoch are in its checkpoint until they are in the model.
        """
        self.measure()
        self.world.first_decides(self.save)

    def measure(self) -> None:
        """Scores dev and logs the metrics."""
        tuner = self.tuner
        finite = bool(all_finite(tuner.updater.module.state_dict().values()))
        better = {task.name: task.measure(tuner, finite) for task in self.tasks}
        if self.target is not None:
            better = dict.fromkeys(better, better[self.target] and None not in better.values())
        for task in self.tasks:
            if better[task.name]:
                task.keep()

    def save(self) -> None:
        """Writes the checkpoint, and the models of best epochs."""
        scores = {
            f"{split}/{task.name}": torch.from_numpy(values)
            for task in self.tasks
            for split, values in task.best_scores.items()
        }
        best, last = ({task.name: getattr(task, name) for task in self.tasks} for name in ("best", "last"))
        try:
            saved = self.checkpointer.save(
                self.tuner.progress.step,
                self.tuner.tensors() | {"scores": scores},
                self.tuner.state() | {"best": best, "last": last},
            )
        except NotFiniteError as error:  # training can be resumed from an earlier epoch, if any
            echo(f"{error}; there is no checkpoint of epoch {self.tuner.progress.epoch}")
            saved = None
        self.save_best()
        if saved is not None:
            self.tuner.logbook.saved(self.tuner.progress.step, saved)

    def save_best(self) -> None:
        """Saves the model of each task whose last epoch is the best."""
        for task in self.tasks:
            task.save_best(self.tuner.updater.module, self.tuner.progress.epoch)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint."""
        self.tuner.restore(checkpoint)
        for task in self.tasks:
            task.restore(checkpoint)
        self.world.first_decides(partial(self.restore_models))

    def restore_models(self) -> None:
        """Saves the models of the checkpoint whose epoch is the best, which a killed process may not have done."""
        for task in self.tasks:
            if not task.setup.options.save_model:
                remove(task.folder / "model")
        self.save_best()
