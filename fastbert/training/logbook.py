"""What a run says while it trains: metrics.jsonl for programs, TensorBoard for browsers, a progress bar for people.

The loop calls `log`; nothing here touches a GPU tensor. `plot_curves` draws metrics.jsonl.
"""

import hashlib
import json
import math
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert.errors import UserError, visible
from fastbert.files import atomic_file, disk_errors, make_inner_folder, no_link
from fastbert.inputs import open_input
from fastbert.records import json_text
from fastbert.streams import echo

if TYPE_CHECKING:
    from rich.console import Console

Column = float | int | str | bool | None

SECONDS_BETWEEN_LINES = 5.0  # of plain progress, where there is no terminal


class Logbook:
    """The records and the progress of one run. Only one process of a run has one.

    Args:
        folder: the run's folder; gets `metrics.jsonl` and `tensorboard/`.
        total_steps: updates planned.
        start_step: updates already done. Records of later steps, left by the run that is resumed, are dropped, and so
            is a line cut off by a crash; at 0 the records start empty.
        expected: `tally()` of the records up to `start_step`, from the checkpoint. Where the file differs, that is
            reported with the numbers of the lines.
        quiet: no progress; messages by `echo` still come out.
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
        expected: Mapping[str, Any] | None = None,
        quiet: bool = False,
        console: "Console | None" = None,
    ):
        self.path = Path(folder) / "metrics.jsonl"
        self.total_steps = total_steps
        self.quiet = quiet
        kept, problems = _intact(self.path, start_step, expected) if start_step else ([], [])
        with atomic_file(self.path) as file:
            file.writelines(kept)
        self._records, self._sha = len(kept), hashlib.sha256(b"".join(kept))
        with disk_errors(self.path):
            self._file = open(self.path, "a", encoding="utf-8", opener=no_link)  # noqa: SIM115
        self._clock: deque[tuple[int, float]] = deque([(start_step, time.monotonic())], maxlen=20)
        self._last_line = -math.inf
        self._bar = None if quiet else _progress_bar(console, total_steps, start_step)
        self._board = self._tensorboard(Path(folder) / "tensorboard", start_step)
        if problems:
            found = "; ".join(problems)
            self.echo(
                f"{self.path} is not as it was logged up to step {start_step}: {found}. "
                "Training is not affected; the curves show what is left"
            )

    def _tensorboard(self, folder: Path, start_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.echo("tensorboard is not installed: the curves are only in metrics.jsonl")
            return None
        make_inner_folder(folder)
        with disk_errors(folder):
            return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)

    def log(self, step: int, split: str, columns: Mapping[str, Column]) -> None:
        """Records `columns` of `split` ("train", "validation", ...) after `step` updates, and shows them.

        Of the columns, the progress knows loss, lr, tokens_per_second and mfu (a share) in the split "train"; of other
        splits it shows all. NaN and infinities become null in metrics.jsonl: JSON has no word for them.

        Raises:
            UserError: the disk is full.
        """
        line = json_text({"step": step, "split": split, **columns}) + "\n"
        with disk_errors(self.path):
            self._file.write(line)
            self._file.flush()
        self._records += 1
        self._sha.update(line.encode())
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
            self.echo(f"step {step}/{self.total_steps}  {split}  {shown}")

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
            echo(f"step {step}/{self.total_steps}  {status}")

    def echo(self, text: str) -> None:
        """A message for people: above the bar if there is one, else a line on standard error."""
        if self._bar is not None:
            self._bar.console.print(visible(text), markup=False, highlight=False, soft_wrap=True)
        else:
            echo(text)

    def tally(self) -> dict[str, Any]:
        """Number and SHA-256 of all records so far, by which a resumed run knows them again."""
        return {"records": self._records, "sha256": self._sha.hexdigest()}

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
    """The records in a metrics.jsonl, in order; damaged lines are left out. No file: no records."""
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
    if not path.is_file():  # a folder is refused when the records are to be written
        return []
    with open_input(path, "records") as file:
        content = file.read()
    return [line + b"\n" for line in content.removesuffix(b"\n").split(b"\n")] if content else []


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and type(record.get("step")) is int and isinstance(record.get("split"), str)
    return record if whole else None


def _intact(path: Path, step: int, expected: Mapping[str, Any] | None) -> tuple[list[bytes], list[str]]:
    """The lines of the records up to `step`, each once, and what is wrong with them."""
    lines = _lines(path)
    if expected is not None:
        logged = lines[: expected["records"]]
        if hashlib.sha256(b"".join(logged)).hexdigest() == expected["sha256"]:
            return logged, []
    kept: list[tuple[int, dict[str, Any]]] = []
    damaged, repeated, seen = [], [], set()
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is None:
            damaged.append(number)
        elif record["step"] <= step:
            key = record["step"], record["split"]
            (repeated if key in seen else kept).append((number, record))
            seen.add(key)
    # What is damaged after the last record that counts was being written when the run was killed.
    last = max([0 if expected is None else expected["records"], *(number for number, _ in kept + repeated)])
    problems = []
    if damaged := [number for number in damaged if number <= last]:
        problems.append(f"damaged: {_numbered(damaged)}")
    if repeated:
        problems.append(f"repeated: {_numbered([number for number, _ in repeated])}")
    if expected is not None and (missing := expected["records"] - len(kept)) > 0:
        problems.append(f"missing: {missing} of {expected['records']} records{_gaps(kept, step)}")
    if expected is not None and not problems:
        problems.append(f"changed: some of the lines 1 to {last}")
    return [lines[number - 1] for number, _ in kept], problems


def _numbered(numbers: list[int]) -> str:
    more = f" and {len(numbers) - 10} more" if numbers[10:] else ""
    return f"line{'s' if numbers[1:] else ''} {', '.join(map(str, numbers[:10]))}{more}"


def _gaps(kept: list[tuple[int, dict[str, Any]]], step: int) -> str:
    """Where records may be missing: where a split's steps are further apart than usual."""
    found = []
    for split in dict.fromkeys(record["split"] for _, record in kept):
        rows = [(number, record["step"]) for number, record in kept if record["split"] == split]
        rows = [(0, 0), *rows, (len(kept), step)]
        usual = Counter(b - a for (_, a), (_, b) in pairwise(rows[:-1])).most_common(1)[0][0]
        found += [f"{split} after line {n} (step {a})" for (n, a), (_, b) in pairwise(rows) if b - a > usual]
    return f", by the steps: {', '.join(found[:5])}" if found else ""


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


class NothingToPlotError(UserError):
    """Records without a loss."""


def plot_curves(metrics_path: Path | str, out_png: Path | str, *, title: str, baseline: float | None = None) -> None:
    """Draws training and validation loss against steps and, if validation has an `accuracy`, that below.

    Args:
        baseline: the loss of guessing words by their frequency (unigram entropy, nats), drawn as a dotted line.

    Raises:
        NothingToPlotError: there is no loss in `metrics_path`.
        UserError: `out_png` cannot be written.
    """
    from matplotlib.figure import Figure

    records = read_metrics(metrics_path)
    train = _series(records, "train", "loss")
    validation = _series(records, "validation", "loss")
    accuracy = _series(records, "validation", "accuracy")
    if not train and not validation:
        raise NothingToPlotError(f"there is no loss to draw in {metrics_path}; give the metrics.jsonl of a run")

    # A Figure of its own, without pyplot: no display is needed and no global state is left. PNG is drawn by Agg.
    figure = Figure(figsize=(8, 6.4 if accuracy else 4.5), layout="constrained", dpi=150)
    panels = figure.subplots(
        2 if accuracy else 1, sharex=True, squeeze=False, height_ratios=(2, 1) if accuracy else (1,)
    )[:, 0]
    panels[0].set_title(title, loc="left", fontsize=12, fontweight="bold")
    if train:
        steps, losses = zip(*train, strict=True)
        panels[0].plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        panels[0].plot(steps, smoothed(losses), color="tab:blue", linewidth=1.6, label="training (smoothed)")
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


def smoothed(values: tuple[float, ...]) -> list[float]:
    """A centred moving mean: unlike an exponential one it does not lag behind a steep start."""
    half = len(values) // 60
    windows = (values[place - min(half, place) : place + min(half, place) + 1] for place in range(len(values)))
    return [sum(window) / len(window) for window in windows]
