"""Progress of long work on standard error: a bar with rate and time left on a terminal, a plain line every few seconds
elsewhere. Work that takes less than a second shows nothing.

A thread does the printing, so that an update costs no more than storing a number, and work without updates is shown to
be alive.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastbert.streams import echo

if TYPE_CHECKING:
    import rich.progress

DELAY = 1.0  # seconds; shorter work shows nothing
SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_FRAMES = 0.25
SAMPLES, SECONDS_BETWEEN_SAMPLES = 32, 0.5  # the rate is an average over the last 16 seconds or 32 updates

Report = Callable[[int], None]
"""Receives the amount that is done."""


class Progress:
    """Amount of work done, its rate and the time left. Created by `progress`."""

    def __init__(self, label: str, total: int, unit: str, done: int) -> None:
        self.label, self.total, self.unit, self.done, self.status = label, total, unit, done, ""
        self.begin = self._updated = time.monotonic()
        self._samples = deque([(self.begin, done)], maxlen=SAMPLES)

    def update(self, done: int, status: str | None = None) -> None:
        """Sets the amount done, and with `status` the text at the end of the line."""
        now = time.monotonic()
        self.done, self._updated = done, now
        if status is not None:
            self.status = status
        if now - self._samples[-1][0] >= SECONDS_BETWEEN_SAMPLES:
            self._samples.append((now, done))

    def text(self, now: float) -> str:
        """Text such as "45% of 1.2 GB, 15.3 MB/s, 0:43 left"; with an unknown total "540.0 MB, 15.3 MB/s"."""
        parts = []
        if self.total:
            parts.append(f"{min(self.done / self.total, 1):.0%} of {amount(self.total, self.unit)}")
        elif self.done:
            parts.append(amount(self.done, self.unit))
        then, before = self._samples[0]
        if self._updated > then and self.done > before:
            rate = (self.done - before) / (self._updated - then)
            parts.append(_rate(rate, self.unit))
            if self.total > self.done:
                left = (self.total - self.done) / rate - (now - self._updated)
                parts.append(f"{duration(max(left, 0))} left")
        elif not self.done:
            parts.append(duration(now - self.begin))
        return ", ".join(parts) + (f"  {self.status}" if self.status else "")


@contextmanager
def progress(label: str, total: int = 0, unit: str = "B", done: int = 0) -> Iterator[Progress]:
    """Shows the progress of the block, which calls `update` on what this yields. Blocks may be nested: a terminal then
    shows one bar below the other.

    Args:
        label: a few words such as "tokenizing".
        total: the amount of work; 0 if it is unknown.
        unit: of `total`: "B" (bytes) or a plural such as "steps".
        done: the amount that an interrupted process has already done. The rate does not include it.
    """
    work, ended = Progress(label, total, unit, done), threading.Event()
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    thread = threading.Thread(target=_show_bar if terminal else _print_lines, args=(work, ended), daemon=True)
    thread.start()
    try:
        yield work
        finished = True
    except BaseException:
        finished = False
        raise
    finally:
        ended.set()
        thread.join()
        if finished and not terminal and time.monotonic() - work.begin >= DELAY:
            echo(f"{label}: done in {duration(time.monotonic() - work.begin)}")


def _print_lines(work: Progress, ended: threading.Event) -> None:
    while not ended.wait(SECONDS_BETWEEN_LINES):
        echo(f"{work.label}: {work.text(time.monotonic())}")


_display: "rich.progress.Progress | None" = None  # the bars that the terminal shows now
_lock = threading.Lock()


def _show_bar(work: Progress, ended: threading.Event) -> None:
    global _display
    if ended.wait(DELAY):
        return
    with _lock:
        if _display is None:
            _display = _new_display()
            _display.start()
        task = _display.add_task(work.label, total=work.total or None, text="")
    waiting = True
    while waiting:
        waiting = not ended.wait(SECONDS_BETWEEN_FRAMES)
        _display.update(task, completed=work.done, text=work.text(time.monotonic()), refresh=True)
    with _lock:
        if len(_display.task_ids) > 1:
            _display.remove_task(task)
        else:
            _display.stop()
            _display = None


def _new_display() -> "rich.progress.Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    texts = (TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[text]"))
    console = Console(stderr=True)
    # While bars are shown, what is printed to either stream appears above them, unless it goes to a file.
    return Progress(
        next(texts),
        BarColumn(bar_width=24),
        next(texts),
        console=console,
        auto_refresh=False,
        redirect_stdout=sys.stdout.isatty(),
    )


def amount(number: int, unit: str) -> str:
    """Text such as "1.2 GB" or "1,000 steps"."""
    if unit != "B":
        return f"{_scaled(number)} {unit}"
    for size, name in ((10**9, "GB"), (10**6, "MB")):
        if number >= size:
            return f"{number / size:.1f} {name}"
    return f"{number / 1000:.1f} kB"


def duration(seconds: float) -> str:
    """Text such as "0:05" or "1:02:30"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _rate(rate: float, unit: str) -> str:
    if unit == "B":
        return f"{amount(round(rate), unit)}/s"
    return f"{_scaled(rate)} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{unit.removesuffix('s')}"


def _scaled(number: float) -> str:
    if number >= 10**6:
        return f"{number / 10**6:.1f}M"
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.1f}"
