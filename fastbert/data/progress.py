"""How far a long job is, on standard error: a bar on a terminal, a plain line now and then otherwise."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastbert.streams import echo

SECONDS_BETWEEN_LINES = 15


Report = Callable[[int], None]
"""Takes how many bytes of all are done."""


@contextmanager
def progress(what: str, total: int) -> Iterator[Report]:
    """Shows `what`, the share of `total` bytes done, the rate and the time left; of a `total` of 0, which is unknown,
    the bytes done and the rate."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

        columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total or None)
            yield lambda done: bar.update(task, completed=done)
        return
    begin = last = time.monotonic()

    def line(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES or not done:
            return
        last = now
        rate = done / (now - begin)
        if not total:
            echo(f"{what}: {done / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s")
            return
        left = max(total - done, 0) / rate
        echo(f"{what}: {done / total:.0%}, {rate / 1e6:.1f} MB/s, {left:.0f} s left")

    yield line
    echo(f"{what}: done in {time.monotonic() - begin:.0f} s")
