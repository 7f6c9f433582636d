"""Experiment trackers next to TensorBoard (--track): each training is a run of W&B or Trackio, which is
resumed with it."""

import os
import re
import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastbert.errors import UserError, brief
from fastbert.records import read_json, write_json
from fastbert.training.callbacks import Callback, TrainingStart
from fastbert.training.tensorboard import scalars
from fastbert.training.training_progress import Column

TRACKERS = ("none", "wandb", "trackio")
RECORD = "tracker.json"  # in the folder of a training: project and id of its run at each tracker
PROJECT = "fastbert"
_ID = re.compile(r"[0-9a-f]{12}")


def check_tracker(name: str) -> None:
    """Raises a UserError, before anything is written, if the package of a tracker is not installed, or if W&B has no
    key and there is no terminal to ask for one."""
    if name != "none" and find_spec(name) is None:
        raise UserError(f"--track {name} needs the package {name}: pip install 'fastbert-pretraining[{name}]'")
    if name == "wandb" and os.environ.get("WANDB_MODE", "online") == "online" and os.environ.get("RANK", "0") == "0":
        import wandb

        try:
            wandb.login()
        except wandb.errors.UsageError as error:
            raise UserError(f"--track wandb: {brief(error, str).rstrip('.')}{Wandb.hint}") from None


def trackers(name: str) -> list[Callback]:
    """The callback of --track; none without a tracker."""
    return [] if name == "none" else [_CLASSES[name]()]


class Tracker(Callback, ABC):
    """A run of a tracker, which has the values and the steps of TensorBoard's event files.

    A killed process may have lost rows that it had not sent yet, and a resumed run repeats the steps after its
    checkpoint exactly. So when it resumes, rows that the tracker lacks are sent again, and those that it has are not.
    """

    name: str
    hint = ""
    """End of the message if it cannot be opened."""
    _run: Any = None
    _first_step = 0  # earlier rows are there

    def on_start(self, training: TrainingStart) -> None:
        check_tracker(self.name)
        project, own = registered(training.folder, self.name)
        with redirect_stdout(sys.stderr):
            try:
                self._open(project, own, training)
            except (TypeError, AttributeError):  # ours, or another version of the library
                raise
            except Exception as error:  # each library has errors of its own for accounts, names and connections
                raise UserError(f"--track {self.name}: {brief(error, str).rstrip('.')}{self.hint}") from error
        for step, split, columns in training.logged:
            self.on_validation(step, split, columns)

    @abstractmethod
    def _open(self, project: str, own: str, training: TrainingStart) -> None:
        """Sets `_run` and `_first_step`."""

    def on_log(self, step: int, columns: Mapping[str, Column]) -> None:
        self.on_validation(step, "train", columns)

    def on_validation(self, step: int, split: str, columns: Mapping[str, Column]) -> None:
        if step >= self._first_step:
            self._run.log(scalars(split, columns), step=step)

    def on_end(self, step: int, finished: bool) -> None:
        with redirect_stdout(sys.stderr):
            self._finish(finished)

    def _finish(self, finished: bool) -> None:
        self._run.finish()


class Wandb(Tracker):
    """A run of Weights & Biases. Its environment variables decide account, project (WANDB_PROJECT) and mode
    (WANDB_MODE=offline)."""

    name = "wandb"
    hint = "; or set WANDB_MODE=offline to log into the run's folder"

    def _open(self, project: str, own: str, training: TrainingStart) -> None:
        import wandb

        self._run = wandb.init(
            project=project,
            id=own,
            name=shown_name(training.folder),
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(training.folder)),
            config=dict(training.options),
            reinit="create_new",  # leaves a run of the user's script alone
            settings=wandb.Settings(console="off"),  # does not replace standard error, where the progress is shown
        )
        # Offline it is 0, nothing being known of earlier calls: `wandb sync` leaves steps out that the server has.
        self._first_step = self._run.step

    def _finish(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class Trackio(Tracker):
    """A run of Trackio. Its environment variables decide where it is stored (TRACKIO_DIR, TRACKIO_SPACE_ID)."""

    name = "trackio"

    def _open(self, project: str, own: str, training: TrainingStart) -> None:
        import trackio

        self._run = trackio.init(
            project=project,
            name=f"{shown_name(training.folder).replace('/', '-')}-{own}",
            resume="allow",
            config=dict(training.options),
            embed=False,
        )
        # The row of the last step may be there for one split only, and is sent again.
        self._first_step = self._run._next_step - 1


_CLASSES = {one.name: one for one in (Wandb, Trackio)}


def registered(folder: Path, tracker: str) -> tuple[str, str]:
    """Project and id of a training's run at a tracker: those of an earlier call, or new ones, which are written.

    Raises:
        UserError: the record is damaged.
    """
    path = folder / RECORD
    record: dict[str, dict[str, str]] = {}
    if os.path.lexists(path):
        record = read_json(path, "record of trackers", {str: {"project": str, "id": str}})
    if tracker not in record:
        project = os.environ.get(f"{tracker.upper()}_PROJECT") or PROJECT
        record[tracker] = {"project": project, "id": secrets.token_hex(6)}
        write_json(path, record)
    found = record[tracker]
    if not _ID.fullmatch(found["id"]):
        raise UserError(
            f"{path} is damaged: {brief(found['id'])} is no id of a run; remove the file to begin a new one"
        )
    return found["project"], found["id"]


def shown_name(folder: Path) -> str:
    """Name of a training: that of its folder, after those of a fine-tuning and a fraction for a seed."""
    folder = folder.resolve()
    name = folder.name
    while re.fullmatch(r"(seed|fraction)-[0-9.]+", name.partition("/")[0]):
        folder = folder.parent
        name = f"{folder.name}/{name}"
    return name
