"""What a run says while it trains: metrics.jsonl for programs, TensorBoard for browsers, a progress bar for people.

The loop calls `log`; nothing here touches a GPU tensor. `plot_curves` draws metrics.jsonl.
"""

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fastbert.errors import UserError
from fastbert.files import atomic_file, disk_errors, no_link

if TYPE_CHECKING:
    from rich.console import Console

Column = float | int | str | bool | None

SECONDS_BETWEEN_LINES = 5.0  # of plain progress, where there is no terminal


def say(text: str) -> None:
    """A message for people where no logbook is open: a line on standard error."""
    print(text, file=sys.stderr, flush=True)


class Logbook:
    """The records and the progress of one run. Only one process of a run has one.

    Args:
        folder: the run's folder; gets `metrics.jsonl` and `tensorboard/`.
        total_steps: updates planned.
        start_step: updates already done. Records of later steps, left by the run that is resumed, are dropped, and so
            is a line cut off by a crash; at 0 the records start empty.
        quiet: no progress; messages by `say` still come out.
        console: the rich console to draw the bar on; by default standard error, if that is a terminal.

    Raises:
        UserError: `folder` cannot be written.
    """

    def __init__(
        self,
        folder: Path | str,
        total_steps: int,
        *,
        start_step: int = 0,
        quiet: bool = False,
        console: "Console | None" = None,
    ):
        self.path = Path(folder) / "metrics.jsonl"
        self.total_steps = total_steps
        self.quiet = quiet
        _keep_until(self.path, start_step)
        with disk_errors(self.path):
            self._file = open(self.path, "a", encoding="utf-8", opener=no_link)  # noqa: SIM115
        self._clock: deque[tuple[int, float]] = deque([(start_step, time.monotonic())], maxlen=20)
        self._last_line = -math.inf
        self._bar = None if quiet else _progress_bar(console, total_steps, start_step)
        self._board = self._tensorboard(Path(folder) / "tensorboard", start_step)

    def _tensorboard(self, folder: Path, start_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say("tensorboard is not installed: the curves are only in metrics.jsonl")
            return None
        with disk_errors(folder):
            return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)

    def log(self, step: int, split: str, columns: Mapping[str, Column]) -> None:
        """Records `columns` of `split` ("train", "validation", ...) after `step` updates, and shows them.

        Of the columns, the progress knows loss, lr, tokens_per_second and mfu (a share) in the split "train"; of other
        splits it shows all. NaN and infinities become null in metrics.jsonl: JSON has no word for them.

        Raises:
            UserError: the disk is full.
        """
        record = {"step": step, "split": split}
        for name, value in columns.items():
            record[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        with disk_errors(self.path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in columns.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(f"{name}/{split}", value, step)
        if self.quiet:
            return
        if split == "train":
            self._show_progress(step, columns)
        else:
            shown = "  ".join(f"{name} {_short(value)}" for name, value in columns.items())
            self.say(f"step {step}/{self.total_steps}  {split}  {shown}")

    def _show_progress(self, step: int, columns: Mapping[str, Column]) -> None:
        now = time.monotonic()
        first_step, then = self._clock[0]
        self._clock.append((step, now))
        left = (now - then) / (step - first_step) * (self.total_steps - step) if step > first_step else math.nan
        status = "  ".join(_status(columns, left))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, status=status)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or step >= self.total_steps:
            self._last_line = now
            print(f"step {step}/{self.total_steps}  {status}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A message for people: above the bar if there is one, else a line on standard error."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            say(text)

    def sync(self) -> None:
        """Puts all records on the disk; to be called before a checkpoint, which must not be ahead of them."""
        with disk_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Ends the progress and closes all files; may be called twice."""
        if self._file.closed:
            return
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self.sync()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(path: Path | str) -> list[dict]:
    """The records in a metrics.jsonl, in order; lines cut off by a crash are left out. No file: no records."""
    records = []
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return records
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _keep_until(path: Path, step: int) -> None:
    """Rewrites the records at once, with those up to `step` only; none at all for a run that starts at 0."""
    records = [record for record in read_metrics(path) if record["step"] <= step] if step else []
    with atomic_file(path, "w") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def _progress_bar(console: "Console | None", total_steps: int, start_step: int):
    """A running rich progress bar, or None without a terminal (or without rich)."""
    if console is None and not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        return None
    console = console or Console(stderr=True)
    if not console.is_terminal:
        return None
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[status]}", markup=False))
    bar = Progress(*columns, console=console, refresh_per_second=2)
    bar.add_task("", total=total_steps, completed=start_step, status="")
    bar.start()
    return bar


def _status(columns: Mapping[str, Column], seconds_left: float) -> list[str]:
    """`columns` of a training step for people, in a fixed order."""
    words = []
    if "loss" in columns:
        words.append(f"loss {_number(columns['loss']):.3f}")
    if "lr" in columns:
        words.append(f"lr {_number(columns['lr']):.1e}")
    if "tokens_per_second" in columns:
        words.append(f"{_thousands(_number(columns['tokens_per_second']))} tokens/s")
    if columns.get("mfu") is not None:
        words.append(f"MFU {100 * columns['mfu']:.0f} %")
    if math.isfinite(seconds_left):
        minutes, seconds = divmod(round(seconds_left), 60)
        hours, minutes = divmod(minutes, 60)
        words.append(f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left")
    return words


def _number(value: Column) -> float:
    return math.nan if value is None else float(value)


def _short(value: Column) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _thousands(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"


def plot_curves(metrics_path: Path | str, out_png: Path | str, *, title: str, baseline: float | None = None) -> None:
    """Draws training and validation loss against steps and, if validation has an `accuracy`, that below.

    Args:
        baseline: the loss of guessing words by their frequency (unigram entropy, nats), drawn as a dotted line.

    Raises:
        UserError: there is no loss in `metrics_path`, or `out_png` cannot be written.
    """
    from matplotlib.figure import Figure

    records = read_metrics(metrics_path)
    train = _series(records, "train", "loss")
    validation = _series(records, "validation", "loss")
    accuracy = _series(records, "validation", "accuracy")
    if not train and not validation:
        raise UserError(f"there is no loss to draw in {metrics_path}; give the metrics.jsonl of a run")

    # A Figure of its own, without pyplot: no display is needed and no global state is left. PNG is drawn by Agg.
    figure = Figure(figsize=(8, 6.4 if accuracy else 4.5), layout="constrained", dpi=150)
    panels = figure.subplots(
        2 if accuracy else 1, sharex=True, squeeze=False, height_ratios=(2, 1) if accuracy else (1,)
    )[:, 0]
    panels[0].set_title(title, loc="left", fontsize=12, fontweight="bold")
    if train:
        steps, losses = zip(*train, strict=True)
        panels[0].plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        panels[0].plot(steps, _smoothed(losses), color="tab:blue", linewidth=1.6, label="training (smoothed)")
    if validation:
        panels[0].plot(*zip(*validation, strict=True), "o-", color="tab:orange", markersize=3.5, label="validation")
    if baseline is not None:
        panels[0].axhline(baseline, color="0.35", linestyle=":", label=f"unigram entropy {baseline:.2f}")
    panels[0].set_ylabel("loss (nats)")
    panels[0].legend(frameon=False)
    if accuracy:
        steps, shares = zip(*accuracy, strict=True)
        panels[1].plot(steps, [100 * share for share in shares], "o-", color="tab:green", markersize=3.5)
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
    """(step, value) of the records that have a value."""
    return [(r["step"], r[column]) for r in records if r.get("split") == split and r.get(column) is not None]


def _smoothed(values: tuple[float, ...]) -> list[float]:
    """A centred moving mean: unlike an exponential one it does not lag behind a steep start."""
    half = len(values) // 60
    windows = (values[place - min(half, place) : place + min(half, place) + 1] for place in range(len(values)))
    return [sum(window) / len(window) for window in windows]
