"""Scores and states of texts by one model or several, in one forward pass each.

Shapes: n texts, U units (texts, or words if words have labels), D width, M models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastbert.finetuning.averages import mean_of_models
from fastbert.finetuning.batches import EncodedSplit, reading_order
from fastbert.finetuning.ensemble import Ensemble, Member, open_ensemble
from fastbert.finetuning.kinds.kind import TaskKind
from fastbert.finetuning.model import TaskModel
from fastbert.finetuning.predict import check_fits
from fastbert.finetuning.rows import Example
from fastbert.finetuning.saved import load_task_model
from fastbert.finetuning.scoring import BATCH, Inputs, check_finite
from fastbert.finetuning.tasks import Task
from fastbert.streams import echo
from fastbert.training.hardware import autocast, resolve_device, resolve_precision, setup_machine
from fastbert.training.options import MachineOptions

Report = Callable[[float], None]
"""Function that receives the fraction of a chunk that is done."""


@dataclass(frozen=True)
class Read:
    """A chunk of texts as the models read it."""

    inputs: Inputs
    """The texts and their ids in the first model."""
    scores: np.ndarray
    """float64 [U, ...], the mean over the models."""
    states: np.ndarray | None
    """float32 [n, D]: the input of the classifier, of words the mean over the text; of several models all of theirs
    behind each other, divided by sqrt(M), so that a squared distance is the mean of theirs. None if not requested."""
    truncated: int
    """Number of texts that were truncated, by the model that truncated most."""

    def parts(self) -> list[np.ndarray]:
        """The scores of each text."""
        return self.inputs.orders[0].by_example(self.scores)

    def by_text(self, values: np.ndarray) -> np.ndarray:
        """Mean over the units of each text, float64 [n].

        Args:
            values: [U].
        """
        texts = texts_of(self.inputs.orders[0], np.arange(len(values)))
        return np.bincount(texts, values) / np.bincount(texts)


class Reader:
    """Models in memory, which read chunks of texts."""

    def __init__(self, ensemble: Ensemble, machine: MachineOptions) -> None:
        """Raises a UserError if a model is damaged."""
        self.ensemble = ensemble
        self._device = resolve_device(machine.device)
        self._precision, _ = resolve_precision(machine.precision, self._device)
        self._batch_size = machine.micro_batch_size or BATCH
        self._models = [
            load_task_model(member.folder, machine.kernels).model.to(self._device) for member in ensemble.members
        ]

    @property
    def kind(self) -> TaskKind:
        return self.ensemble.kind

    def read(self, examples: Sequence[Example], states: bool, report: Report) -> Read:
        """Scores of the texts, and their states if requested.

        Raises:
            UserError: scores are not finite.
        """
        inputs = self.ensemble.encode(examples)
        scores, found = [], []
        for index, (member, model, encoded) in enumerate(zip(self.ensemble.members, self._models, inputs, strict=True)):

            def report_model(part: float, index: int = index) -> None:
                report((index + part) / len(self._models))

            values, vectors = self._read(member, model, encoded, states, report_model)
            check_finite(values, member.folder, self._precision)
            scores.append(values)
            found.append(vectors)
        return Read(
            inputs[0],
            mean_of_models(scores),
            np.concatenate(found, axis=1) / np.float32(len(found) ** 0.5) if states else None,
            max(one.truncated for one in inputs),
        )

    @torch.no_grad()
    def _read(
        self, member: Member, model: TaskModel, inputs: Inputs, states: bool, report: Report
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Scores float64 [U, ...] and states float32 [n, D] of one model, the mean over the orders of the pairs."""
        head, kind = model.head(member.record.task), member.record.kind
        first = inputs.orders[0]
        out = np.zeros((len(first.units_in(np.arange(len(first)))), *kind.score_shape()))
        summed = np.zeros((len(inputs.examples), model.encoder.config.width if states else 0), np.float32)
        done, total = 0, sum(map(len, inputs.orders))
        for encoded in inputs.orders:
            for rows in reading_order(encoded.lengths, self._batch_size):
                batch = encoded.batch(rows, self._device)
                with autocast(self._device, self._precision):
                    hidden = model.hidden(batch, head.reads)
                    logits = head(hidden, None)
                    features = head.features(hidden) if states else None
                scored = batch.scored
                scores = kind.scores(logits if scored is None else logits[scored])
                units = encoded.units_in(rows)
                out[units] += scores.cpu().numpy() / len(inputs.orders)
                if states:
                    features = features if scored is None else features[scored]
                    np.add.at(summed, texts_of(encoded, units), features.float().cpu().numpy())
                done += len(rows)
                report(done / total)
        if not states:
            return out, None
        counts = np.bincount(texts_of(first, np.arange(len(out))), minlength=len(summed))
        return out, summed / np.float32(len(inputs.orders)) / counts[:, None].astype(np.float32)


def texts_of(encoded: EncodedSplit, units: np.ndarray) -> np.ndarray:
    """The text of each unit, int64."""
    return units if encoded.units is None else np.searchsorted(encoded.units, units, side="right") - 1


def open_reader(models: Sequence[str], task: Task, machine: MachineOptions, names: str) -> Reader:
    """Opens the models.

    Args:
        names: the option with the models, for messages.

    Raises:
        UserError: there is no such model, or it does not fit the task.
    """
    ensemble = open_ensemble(models)
    check_fits(task, ensemble, names)
    if ensemble.title:
        echo(ensemble.title)
    return Reader(ensemble, machine)


def prepare_machine(machine: MachineOptions) -> None:
    """Sets the number of threads and the device, with a warning if the precision is not available."""
    device = resolve_device(machine.device)
    _, warning = resolve_precision(machine.precision, device)
    if warning:
        echo(warning)
    setup_machine(machine, device)
