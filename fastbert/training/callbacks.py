"""Functions that are called when a training starts, logs, validates, saves and ends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.training.training_progress import Column


@dataclass(frozen=True)
class TrainingStart:
    """A training that starts or resumes."""

    folder: Path
    """Folder of its files: that of the run, or of a seed of a fine-tuning."""
    step: int
    """Number of updates already done; above 0 if it resumes."""
    steps: int
    """Number of planned updates."""
    options: Mapping[str, Any]
    """Options that define the experiment, by name."""
    logged: Sequence[tuple[int, str, Mapping[str, Column]]] = ()
    """Step, split and columns of the rows that earlier calls have logged up to `step`."""


class Callback:
    """Base class for following a training; its methods do nothing.

    They are called in the first process only, between two steps, so the training waits for them. An error that one of
    them raises ends the training like any other; the run can be resumed from its newest checkpoint.
    """

    def on_start(self, training: TrainingStart) -> None:
        """Called before the first step, and again for each further seed of a fine-tuning."""

    def on_log(self, step: int, columns: Mapping[str, Column]) -> None:
        """Called for a logged row of the training after `step` updates: loss, lr, tokens, and so on."""

    def on_validation(self, step: int, split: str, columns: Mapping[str, Column]) -> None:
        """Called for the figures of a validation split after `step` updates."""

    def flush(self) -> None:
        """Called before a checkpoint is written, which must not be ahead of what has been logged."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Called when `folder` is a complete checkpoint of the state after `step` updates."""

    def on_end(self, step: int, finished: bool) -> None:
        """Called at the end: after the last step (`finished`), a signal or an error."""
