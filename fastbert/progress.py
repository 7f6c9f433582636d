"""Progress of long work on standard error: a bar with rate and time left on a terminal, a plain line every few seconds
elsewhere. Work that takes less than a second shows nothing.

A thread does the printing, so that an update costs no more than storing a number, and work without updates also shows
that it is running.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

from fastbert.streams import echo, is_muted

if TYPE_CHECKING:
    import rich.progress

DELAY = 1.0  # seconds; shorter work shows nothing
SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_FRAMES = 0.5
MARGIN = 3  # columns
SAMPLES, SECONDS_BETWEEN_SAMPLES = 32, 0.5  # the rate is an average over the last 16 seconds or 32 updates

Report = Callable[[int], None]
"""Function that receives the amount done."""
Work = TypeVar("Work", bound="Progress")


class Progress:
    """Amount of work done, its rate and the time left. Created by `progress`.

    Attributes:
        paused: seconds spent in nested work. The rate excludes them; the time left includes them, in proportion to
            the remaining amount.
        notice: text at the front of the line.
    """

    def __init__(self, label: str, total: int, unit: str, done: int) -> None:
        self.label, self.total, self.unit, self.done, self.status = label, total, unit, done, ""
        self.start, self.paused, self.notice = done, 0.0, ""
        self.begin = self._updated = time.monotonic()
        self._samples = deque([(self.begin, done)], maxlen=SAMPLES)

    def update(self, done: int, status: str | None = None) -> None:
        """Sets the amount done, and with `status` the text at the end of the line."""
        now = time.monotonic() - self.paused
        self.done, self._updated = done, now
        if status is not None:
            self.status = status
        if now - self._samples[-1][0] >= SECONDS_BETWEEN_SAMPLES:
            self._samples.append((now, done))

    def rate(self) -> float | None:
        """Amount per second; None before the first update."""
        then, before = self._samples[0]
        known = self._updated > then and self.done > before
        return (self.done - before) / (self._updated - then) if known else None

    def seconds_left(self, now: float) -> float | None:
        """The time left for a known total; None before the first update."""
        rate = self.rate()
        if rate is None:
            return None
        seconds = (self.total - self.done) * (1 / rate + self.paused / (self.done - self.start))
        return max(0.0, seconds - (now - self.paused - self._updated))

    def text(self, now: float) -> str:
        """The line, such as "45% of 1.2 GB, 15.3 MB/s, 0:43 left"; with an unknown total "540.0 MB, 15.3 MB/s"."""
        parts = []
        if self.total:
            parts.append(f"{min(self.done / self.total, 1):.0%} of {amount(self.total, self.unit)}")
        elif self.done:
            parts.append(amount(self.done, self.unit))
        if rate := self.rate():
            parts.append(_rate(rate, self.unit))
            if self.total > self.done:
                parts.append(f"{duration(self.seconds_left(now))} left")
        elif not self.done:
            parts.append(duration(now - self.begin))
        return "  ".join(part for part in (self.notice, ", ".join(parts), self.status) if part)


@contextmanager
def progress(label: str, total: int = 0, unit: str = "B", done: int = 0) -> Iterator[Progress]:
    """Shows the progress of the block, which calls `update` on the yielded object. Blocks may be nested: a terminal
    then shows one bar below the other.

    Args:
        label: a few words such as "tokenizing".
        total: the amount of work; 0 if it is unknown.
        unit: of `total`: "B" (bytes) or a plural such as "steps".
        done: the amount that an interrupted process has already done, which does not count in the rate.
    """
    with shown(Progress(label, total, unit, done), DELAY) as work:
        yield work


@contextmanager
def shown(work: Work, delay: float, lines: bool = True) -> Iterator[Work]:
    """Shows `work` while the block runs, as `progress` does.

    Args:
        delay: seconds before a bar appears.
        lines: print plain lines if there is no terminal.
    """
    bar, ended, outer = on_terminal() and not is_muted(), threading.Event(), _nested[-1] if _nested else None
    thread = None
    if bar or (lines and not is_muted()):
        target, arguments = (_show_bar, (work, ended, delay)) if bar else (_print_lines, (work, ended))
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        thread.start()
    _nested.append(work)
    finished = False
    try:
        yield work
        finished = True
    finally:
        _nested.remove(work)
        ended.set()
        if thread is not None:
            thread.join()
        seconds = time.monotonic() - work.begin
        if outer is not None:
            outer.paused += seconds
        if finished and lines and not bar and seconds >= SECONDS_BETWEEN_LINES:
            echo(f"{work.label}: done in {duration(seconds)}")


def notify(text: str) -> None:
    """Shows `text` at the front of the current progress, if there is any. Safe in a signal handler: it prints
    nothing."""
    if _nested:
        _nested[0].notice = text


def on_terminal() -> bool:
    """True if standard error is a terminal on which a line can be redrawn, and rich is installed."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and find_spec("rich") is not None


def _print_lines(work: Progress, ended: threading.Event) -> None:
    while not ended.wait(SECONDS_BETWEEN_LINES):
        echo(f"{work.label}: {work.text(time.monotonic())}")


_nested: list[Progress] = []  # current work, from the outermost to the innermost
_display: "rich.progress.Progress | None" = None  # the bars that the terminal currently shows
_lock = threading.Lock()


def _show_bar(work: Progress, ended: threading.Event, delay: float) -> None:
    global _display
    if ended.wait(delay):
        return
    with _lock:
        if _display is None:
            _display = _new_display()
            _display.start()
            _display.console.show_cursor()  # rich hides it, and a process that is killed cannot show it again
        task = _display.add_task(work.label, total=work.total or None, completed=work.done, text="")
    waiting = True
    while waiting:
        _display.update(task, completed=work.done, text=work.text(time.monotonic()), refresh=True)
        waiting = not ended.wait(SECONDS_BETWEEN_FRAMES)
    with _lock:
        _display.update(task, completed=work.done, text=work.text(time.monotonic()), refresh=True)
        if len(_display.task_ids) > 1:
            _display.remove_task(task)
        else:
            _display.live.transient = not work.total  # its bar is useless once the work is done
            _display.stop()
            _display = None


def _new_display() -> "rich.progress.Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, Task, TextColumn
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True)  # long messages are not wrapped
    bar_width = 24 if console.width >= 80 else 4

    class Ending(TextColumn):
        """Text that is cut off if the terminal is narrow. A margin leaves room for the ^C that a terminal prints, which
        would otherwise start another line."""

        def render(self, task: Task) -> Text:
            text = super().render(task)
            label = max(len(shown.description) for shown in display.tasks)
            text.truncate(max(1, console.width - label - bar_width - 2 - MARGIN), overflow="ellipsis")
            return text

    # While bars are shown, output to either stream appears above them, unless it is redirected to a file.
    display = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=bar_width),
        Ending("{task.fields[text]}", markup=False),
        console=console,
        auto_refresh=False,
        redirect_stdout=sys.stdout.isatty(),
    )
    return display


def amount(number: int, unit: str) -> str:
    """An amount, such as "1.2 GB" or "1,000 steps"."""
    if unit != "B":
        return f"{_scaled(number)} {unit}"
    for size, name in ((10**9, "GB"), (10**6, "MB")):
        if number >= size:
            return f"{number / size:.1f} {name}"
    return f"{number / 1000:.1f} kB"


def duration(seconds: float) -> str:
    """A duration, such as "0:05" or "1:02:30"."""
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
