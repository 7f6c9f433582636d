"""Records and progress of a run: metrics.jsonl for programs, a progress bar, and callbacks such as TensorBoard's.

The loop calls `advance` and `log`; neither reads a tensor on a GPU. `plot_curves` plots metrics.jsonl.
"""

import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastbert.errors import UserError
from fastbert.figures import panels_below_each_other
from fastbert.files import atomic_file, disk_errors, no_link
from fastbert.inputs import open_input
from fastbert.progress import on_terminal, shown
from fastbert.records import json_text
from fastbert.streams import echo
from fastbert.training.callbacks import Callback, TrainingStart
from fastbert.training.splits import named_splits, record_split
from fastbert.training.tensorboard import TensorBoard
from fastbert.training.training_progress import Column, TrainingProgress

SECONDS_BETWEEN_LINES = 5.0  # without a terminal


class Logbook:
    """Records and progress of a run. Only one process of a run has a logbook.

    Args:
        folder: the run's folder, for `metrics.jsonl` and TensorBoard's event files.
        total_steps: number of planned updates.
        start_step: number of updates already done. In a resumed run, records of later steps and a line cut off by a
            crash are dropped; at 0 the records start empty.
        expected: `tally()` of the records up to `start_step`, from the checkpoint. If the file differs, the line
            numbers are reported.
        options: options that define the experiment, by name, for TensorBoard's table of hyperparameters.
        callbacks: called besides TensorBoard's.
        quiet: show no progress; warnings are still printed.

    Raises:
        UserError: `folder` cannot be written.
    """

    def __init__(
        self,
        folder: Path | str,
        total_steps: int,
        *,
        start_step: int = 0,
        expected: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        quiet: bool = False,
    ):
        self.path = Path(folder) / "metrics.jsonl"
        self.total_steps = total_steps
        self._step = start_step
        intact, problems = _intact(self.path, start_step, expected) if start_step else ([], [])
        with atomic_file(self.path) as file:
            file.writelines(intact)
        self._records, self._sha = len(intact), hashlib.sha256(b"".join(intact))
        with disk_errors(self.path):
            self._file = open(self.path, "a", encoding="utf-8", opener=no_link)  # noqa: SIM115
        start = TrainingStart(Path(folder), start_step, total_steps, options or {}, _rows(intact))
        self._callbacks: list[Callback] = []  # those that have started
        try:
            for one in (TensorBoard(), *callbacks):
                one.on_start(start)
                self._callbacks.append(one)
        except BaseException:
            self._end()
            raise
        self._last_line = -math.inf
        self._shown = ExitStack()
        self._progress, self._bar = None, on_terminal()
        if not quiet:
            self._progress = TrainingProgress(total_steps, start_step)
            self._shown.enter_context(shown(self._progress, delay=0.0, lines=False))
        if problems:
            found = "; ".join(problems)
            echo(
                f"{self.path} was changed after it was logged up to step {start_step}: {found}. "
                "Training is not affected; the curves show the remaining records"
            )

    def log(self, step: int, split: str, columns: Mapping[str, Column]) -> None:
        """Records `columns` of `split` ("train", "validation", ...) after `step` updates, and shows them.

        For the split "train" the progress shows the columns that `TrainingProgress` knows, for other splits all
        columns. NaN and infinities become null in metrics.jsonl, since JSON has neither.

        Raises:
            UserError: the disk is full.
        """
        line = json_text({"step": step, "split": split, **columns}) + "\n"
        with disk_errors(self.path):
            self._file.write(line)
            self._file.flush()
        self._step = step
        self._records += 1
        self._sha.update(line.encode())
        for one in self._callbacks:
            if split == "train":
                one.on_log(step, columns)
            else:
                one.on_validation(step, split, columns)
        if self._progress is None:
            return
        if split == "train":
            self._progress.log(step, columns)
            self._print_line(last=step >= self.total_steps)
        else:
            figures = "  ".join(f"{name} {_short(value)}" for name, value in columns.items())
            echo(f"step {step}/{self.total_steps}  {split}  {figures}")

    def advance(self, step: int, **columns: Column) -> None:
        """Counts the steps up to `step` without a record; `columns` are shown until a record contains them. Called
        after every step: a thread updates the terminal."""
        if self._progress is not None:
            self._progress.advance(step, columns)
            self._print_line()

    def _print_line(self, last: bool = False) -> None:
        """Prints the progress if there is no bar, at most every five seconds; the `last` line is always printed."""
        now = time.monotonic()
        if not self._bar and (last or now - self._last_line >= SECONDS_BETWEEN_LINES):
            self._last_line = now
            echo(self._progress.text(now))

    def tally(self) -> dict[str, Any]:
        """Number and SHA-256 of all records so far, with which a resumed run verifies them."""
        return {"records": self._records, "sha256": self._sha.hexdigest()}

    def sync(self) -> None:
        """Flushes all records to the disk; called before a checkpoint, which must not be ahead of them."""
        with disk_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        for one in self._callbacks:
            one.flush()

    def saved(self, step: int, folder: Path) -> None:
        """Reports a checkpoint to the callbacks."""
        for one in self._callbacks:
            one.on_checkpoint(step, folder)

    def close(self) -> None:
        """Ends the progress and closes all files; may be called twice."""
        if self._file.closed:
            return
        self._shown.close()
        self.sync()
        self._end()

    def _end(self) -> None:
        self._file.close()
        while self._callbacks:
            self._callbacks.pop().on_end(self._step, self._step >= self.total_steps)

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(path: Path | str) -> list[dict]:
    """The records in a metrics.jsonl, in order; damaged lines are skipped, and a missing file has no records."""
    return read_records(path)[0]


def read_records(path: Path | str) -> tuple[list[dict], list[int]]:
    """The records in a metrics.jsonl, in order, and the numbers of its damaged lines."""
    records, damaged = [], []
    for number, line in enumerate(_lines(Path(path)), 1):
        if (record := _record(line)) is None:
            damaged.append(number)
        else:
            records.append(record)
    return records, damaged


def _lines(path: Path) -> list[bytes]:
    if not path.is_file():  # writing the records refuses a folder of this name
        return []
    with open_input(path, "records") as file:
        content = file.read()
    return [line + b"\n" for line in content.removesuffix(b"\n").split(b"\n")] if content else []


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if the line is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and type(record.get("step")) is int and isinstance(record.get("split"), str)
    return record if whole else None


def _rows(lines: list[bytes]) -> list[tuple[int, str, dict[str, Column]]]:
    """Step, split and columns of records."""
    records = [record for line in lines if (record := _record(line)) is not None]
    return [(record.pop("step"), record.pop("split"), record) for record in records]


def _intact(path: Path, step: int, expected: Mapping[str, Any] | None) -> tuple[list[bytes], list[str]]:
    """The lines of the records up to `step`, each once, and a list of problems."""
    lines = _lines(path)
    if expected is not None:
        logged = lines[: expected["records"]]
        if hashlib.sha256(b"".join(logged)).hexdigest() == expected["sha256"]:
            return logged, []
    intact: list[tuple[int, dict[str, Any]]] = []
    damaged, repeated, seen = [], [], set()
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is None:
            damaged.append(number)
        elif record["step"] <= step:
            key = record["step"], record["split"]
            (repeated if key in seen else intact).append((number, record))
            seen.add(key)
    # Damaged lines after the last valid record were being written when the run was killed.
    last = max([0 if expected is None else expected["records"], *(number for number, _ in intact + repeated)])
    problems = []
    if damaged := [number for number in damaged if number <= last]:
        problems.append(f"damaged: {_numbered(damaged)}")
    if repeated:
        problems.append(f"repeated: {_numbered([number for number, _ in repeated])}")
    if expected is not None and (missing := expected["records"] - len(intact)) > 0:
        problems.append(f"missing: {missing} of {expected['records']} records{_gaps(intact, step)}")
    if expected is not None and not problems:
        problems.append(f"changed: lines among 1 to {last}")
    return [lines[number - 1] for number, _ in intact], problems


def _numbered(numbers: list[int]) -> str:
    more = f" and {len(numbers) - 10} more" if numbers[10:] else ""
    return f"line{'s' if numbers[1:] else ''} {', '.join(map(str, numbers[:10]))}{more}"


def _gaps(intact: list[tuple[int, dict[str, Any]]], step: int) -> str:
    """Description of where records are missing: the steps of a split are further apart there than usual."""
    found = []
    for split in dict.fromkeys(record["split"] for _, record in intact):
        rows = [(number, record["step"]) for number, record in intact if record["split"] == split]
        rows = [(0, 0), *rows, (len(intact), step)]
        usual = Counter(b - a for (_, a), (_, b) in pairwise(rows[:-1])).most_common(1)[0][0]
        found += [f"{split} after line {n} (step {a})" for (n, a), (_, b) in pairwise(rows) if b - a > usual]
    return f", by the steps: {', '.join(found[:5])}" if found else ""


def _short(value: Column) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class NoLogbook:
    """Stands for the logbook in the processes of a run that have none."""

    def log(self, step: int, split: str, columns: Mapping[str, Column]) -> None:
        pass

    def advance(self, step: int, **columns: Column) -> None:
        pass

    def saved(self, step: int, folder: Path) -> None:
        pass

    def __enter__(self) -> "NoLogbook":
        return self

    def __exit__(self, *error: object) -> None:
        pass


_OTHERS = ("tab:purple", "tab:green", "tab:red", "tab:brown")  # colors of further validation splits


class NothingToPlotError(UserError):
    """The records have no loss."""


def plot_curves(metrics_path: Path | str, out_png: Path | str, *, title: str, baseline: float | None = None) -> None:
    """Plots training and validation loss against steps, and validation accuracy below if there is one.

    Args:
        baseline: the loss of guessing words by their frequency (unigram entropy, nats), plotted as a dotted line.

    Raises:
        NothingToPlotError: `metrics_path` has no loss.
        UserError: `out_png` cannot be written.
    """
    records = read_metrics(metrics_path)
    train = _series(records, "train", "loss")
    validation = _series(records, "validation", "loss")
    accuracy = _series(records, "validation", "accuracy")
    if not train and not validation:
        raise NothingToPlotError(f"there is no loss to plot in {metrics_path}; give the metrics.jsonl of a run")

    height, ratios = (6.4, (2, 1)) if accuracy else (4.5, (1,))
    figure, panels = panels_below_each_other(8, height, ratios, top=0.4, dpi=150)
    panels[0].set_title(title, loc="left", fontsize=12, fontweight="bold")
    if train:
        steps, losses = zip(*train, strict=True)
        panels[0].plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        panels[0].plot(steps, smoothed(losses), color="tab:blue", linewidth=1.6, label="training (smoothed)")
    others = {name: record_split(name) for name in named_splits(records)}
    for number, (name, split) in enumerate(others.items()):
        if series := _series(records, split, "loss"):
            label = f"validation of {name}"
            panels[0].plot(*zip(*series, strict=True), "s--", color=_OTHERS[number % 4], markersize=3.5, label=label)
    if validation:
        label = "validation of new" if others else "validation"
        panels[0].plot(*zip(*validation, strict=True), "o-", color="tab:orange", markersize=3.5, label=label)
    if baseline is not None:
        panels[0].axhline(baseline, color="0.35", linestyle=":", label=f"unigram entropy {baseline:.2f}")
    panels[0].set_ylabel("loss (nats)")
    panels[0].legend(frameon=False)
    if accuracy:
        steps, values = zip(*accuracy, strict=True)
        color = "tab:orange" if others else "tab:green"
        panels[1].plot(steps, [100 * value for value in values], "o-", color=color, markersize=3.5)
        for number, split in enumerate(others.values()):
            if series := _series(records, split, "accuracy"):
                steps, values = zip(*series, strict=True)
                percent = [100 * value for value in values]
                panels[1].plot(steps, percent, "s--", color=_OTHERS[number % 4], markersize=3.5)
        panels[1].set_ylabel("masked accuracy (%)")
        panels[1].set_ylim(bottom=0)
    panels[-1].set_xlabel("step")
    for panel in panels:
        panel.grid(color="0.9", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    with atomic_file(out_png) as file:
        figure.savefig(file, format="png")


def _series(records: list[dict], split: str, column: str) -> list[tuple[int, float]]:
    """Pairs (step, value) of the records that have a value."""
    return [(r["step"], r[column]) for r in records if r.get("split") == split and r.get(column) is not None]


def smoothed(values: tuple[float, ...]) -> list[float]:
    """Centered moving average, which unlike an exponential one does not lag behind a steep start."""
    half = len(values) // 60
    windows = (values[index - min(half, index) : index + min(half, index) + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]
