"""Event files for TensorBoard."""

from collections.abc import Mapping
from typing import Any

from fastbert.files import disk_errors
from fastbert.records import json_text
from fastbert.streams import echo
from fastbert.training.callbacks import Callback, TrainingStart
from fastbert.training.training_progress import Column


class TensorBoard(Callback):
    """Writes event files into the folder of a training. They are in the folder itself, since TensorBoard names a run by
    the path of its folder below --logdir: `base`, not `base/tensorboard`."""

    def __init__(self) -> None:
        self._board = None

    def on_start(self, training: TrainingStart) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams
        except ImportError:
            echo("tensorboard is not installed: the curves are only in metrics.jsonl")
            return
        with disk_errors(training.folder):
            # At 0 nothing is purged, or the run was killed before its first checkpoint.
            self._board = SummaryWriter(str(training.folder), purge_step=training.step + (training.step > 0))
        # Not add_hparams, which adds a run with another name and gives all runs the columns of the first. The metrics
        # of the table are the last values of the scalars.
        options = {name: _hparam(value) for name, value in training.options.items()}
        _, start, self._session_end = hparams(options, {})
        self._board.file_writer.add_summary(start)

    def on_log(self, step: int, columns: Mapping[str, Column]) -> None:
        self.on_validation(step, "train", columns)

    def on_validation(self, step: int, split: str, columns: Mapping[str, Column]) -> None:
        if self._board is not None:
            for name, value in scalars(split, columns).items():
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        if self._board is not None:
            self._board.flush()

    def on_end(self, step: int, finished: bool) -> None:
        if self._board is not None:
            if finished:
                self._board.file_writer.add_summary(self._session_end)
            self._board.close()


def scalars(split: str, columns: Mapping[str, Column]) -> dict[str, float]:
    """The numbers of a row, such as loss/validation."""
    return {
        f"{name}/{split}": value
        for name, value in columns.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _hparam(value: Any) -> float | str:
    """An option for TensorBoard: numbers remain numbers, so that they can be filtered and plotted."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else json_text(value).strip('"')
