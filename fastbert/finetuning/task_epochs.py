"""A task in the epochs of a training: its scores on dev, its best epoch and the model of that, and its result."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbert.files import atomic_file
from fastbert.finetuning.dev_ensemble import write_dev_scores
from fastbert.finetuning.dev_scores import dev_figures, selection_value, write_errors
from fastbert.finetuning.kinds.kind import TaskKind
from fastbert.finetuning.saved import save_task_model
from fastbert.finetuning.scoring import BATCH, Inputs, predict_scores
from fastbert.finetuning.setup import FinetuneSetup, task_record
from fastbert.records import finite_or_none, json_text, write_sealed
from fastbert.streams import echo
from fastbert.training.logbook import read_metrics

if TYPE_CHECKING:
    from fastbert.finetuning.loop import Tuner, TuningProgress
    from fastbert.finetuning.model import TaskModel
    from fastbert.training.checkpoints import Checkpoint

METRICS = "metrics.jsonl"


@dataclass
class TaskEpochs:
    """State of a task, of which there may be several in one training."""

    setup: FinetuneSetup
    train: Inputs
    folder: Path
    """Folder for the model and the result."""
    seed: int
    alone: bool = True
    """True for the only task, whose name the rows of the metrics do not need."""
    best: dict[str, Any] | None = None
    """Number of the best epoch so far and its metrics on dev."""
    last: dict[str, Any] = field(default_factory=dict)
    best_scores: dict[str, np.ndarray] = field(default_factory=dict)
    _scores: dict[str, np.ndarray] = field(default_factory=dict)
    """Scores of the last epoch."""

    @property
    def name(self) -> str:
        return self.setup.task.name

    def measure(self, tuner: "Tuner", finite: bool) -> bool | None:
        """Scores dev and logs the metrics. Returns whether the epoch is better than the best so far; None if weights,
        scores or metrics are not finite.

        Args:
            finite: whether the weights are.
        """
        setup, task, progress = self.setup, self.setup.task, tuner.progress
        figures, self._scores = {}, {}
        batch_size = setup.options.machine.micro_batch_size or BATCH
        for split, inputs in setup.dev.items():
            scores = predict_scores(
                tuner.updater.module,
                task.name,
                inputs,
                precision=setup.precision,
                batch_size=batch_size,
                world=setup.world,
            )
            self._scores[split] = scores
            figures[split] = setup.world.first_decides(partial(dev_figures, task, scores, inputs.examples))
            finite = finite and None not in figures[split].values()
            tuner.logbook.log(progress.step, self.logged(split), {**figures[split], "epoch": progress.epoch})
        self.last = {"epoch": progress.epoch, "dev": figures}
        if not finite:
            which = "" if self.alone else f" of {self.name}"
            echo(f"epoch {progress.epoch}: weights or scores on dev{which} are not finite; it does not count as best")
            return None
        return self.best is None or selection_value(task, figures) > selection_value(task, self.best["dev"])

    def logged(self, split: str) -> str:
        """Name of a dev split in the metrics of the training."""
        return split if self.alone else f"{self.name}/{split}"

    def keep(self) -> None:
        """Makes the last epoch the best."""
        self.best, self.best_scores = self.last, self._scores

    def save_best(self, model: "TaskModel", epoch: int) -> None:
        """Saves the model if `epoch`, which it is of, is the best."""
        if self.setup.options.save_model and self.best and self.best["epoch"] == epoch:
            record = task_record(self.setup.options, self.setup.task, self.seed, self.best["dev"])
            record = replace(record, kind=self.fitted())
            save_task_model(model, record, self.setup.pretrained.tokenizer, self.folder / "model")

    def fitted(self) -> TaskKind:
        """The kind with settings fitted to the scores of the best epoch on dev."""
        labels = [label for split in self.best_scores for label in self.setup.dev[split].labels]
        return self.setup.task.kind.fitted(np.concatenate([*self.best_scores.values()]), labels)

    def finish(self, progress: "TuningProgress", training: Path, examples: int) -> dict[str, Any]:
        """Writes the scores on dev, the examples with the highest loss, and the result, which is returned.

        Args:
            training: folder of the training, with its metrics.
            examples: number of training examples of all tasks.
        """
        task, path = replace(self.setup.task, kind=self.fitted()), self.folder / "errors.jsonl"
        write_errors(path, task, self.setup.dev, self.best_scores, self.setup.options.worst)
        write_dev_scores(self.folder, self.best_scores)
        if self.folder != training:
            self.write_metrics(training / METRICS)
        result = self.result(progress, examples)
        write_sealed(self.folder / "result.json", result)
        return result

    def write_metrics(self, shared: Path) -> None:
        """Writes the metrics of this task and of the training, from those of all tasks in the file `shared`."""
        names = {self.logged(split): split for split in self.setup.dev} | {"train": "train"}
        with atomic_file(self.folder / METRICS, "w") as file:
            for row in read_metrics(shared):
                if row["split"] in names:
                    file.write(json_text(row | {"split": names[row["split"]]}) + "\n")

    def result(self, progress: "TuningProgress", examples: int) -> dict[str, Any]:
        """The result of the training; there must be a best epoch."""
        options, count = self.setup.options, len(self.train.examples)
        splits = {"train": self.train, **self.setup.dev}
        return {
            "seed": self.seed,
            "best": self.best,
            "last": self.last,
            **self.details(),
            "train_examples": count,
            "truncated": {split: inputs.truncated for split, inputs in splits.items()},
            "skipped_updates": progress.skipped,
            "examples_per_second": round(examples * options.epochs / progress.seconds, 1),
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

    def restore(self, checkpoint: "Checkpoint") -> None:
        """Continues from a checkpoint of the training."""
        self.best, self.last = (checkpoint.state[name][self.name] for name in ("best", "last"))
        for key, values in checkpoint.tensors["scores"].items():
            split, _, name = key.partition("/")
            if name == self.name:
                self.best_scores[split] = values.numpy()
