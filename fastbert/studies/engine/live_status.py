"""Live status of a study on standard error: a table on a terminal, else a line for each job that ends."""

import statistics
import time
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from fastbert.errors import plural, visible
from fastbert.progress import on_terminal
from fastbert.streams import echo
from fastbert.studies.engine.jobs import Job, title
from fastbert.studies.engine.store import ResultRow, is_done


class LiveStatus:
    """Shows counts, rate and remaining time; used in a `with` block.

    Args:
        jobs: all jobs of the study.
        rows: rows by job id, including those of an earlier call.
        measured: row of a finished job -> name and value of its measure.
        without_values: (model, task) of the cells that show no value, because it would not be comparable.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        rows: Mapping[str, ResultRow],
        measured: Callable[[ResultRow], tuple[str, float]],
        without_values: Container[tuple[str, str]] = (),
    ) -> None:
        self.jobs, self.measured, self.without_values = jobs, measured, without_values
        self.done: dict[str, ResultRow] = {job.id: rows[job.id] for job in jobs if is_done(rows.get(job.id))}
        self.failed: dict[str, Job] = {}
        self.not_run: dict[str, Job] = {}
        self.running: dict[str, tuple[Job, float]] = {}
        self._cells: dict[tuple[str, str], list[Job]] = {}  # (model, task) -> its jobs
        for job in jobs:
            self._cells.setdefault((job.model, job.task), []).append(job)
        self._start = time.monotonic()
        self._work = 0.0  # cost of the jobs that have ended in this call
        self._ended = 0
        self._live = None
        if on_terminal():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False)

    def __enter__(self) -> "LiveStatus":
        if self._live:
            self._live.start()
            self._live.console.show_cursor()  # rich hides it, and a process that is killed cannot show it again
            self.tick()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self.running.clear()
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def begun(self, job: Job) -> None:
        self.running[job.id] = (job, time.monotonic())
        self.tick()

    def ended(self, job: Job, row: ResultRow) -> None:
        self.running.pop(job.id, None)
        self._work += job.cost
        self._ended += 1
        if row["status"] == "done":
            self.done[job.id] = row
            name, value = self.measured(row)
            what = f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
            what += f", {row['seconds']:.0f} s"
        else:
            self.failed[job.id] = job
            what = f"FAILED: {row['reason']}"
        if self._live is None or row["status"] != "done":
            self._print(f"{title(job)}: {what}")
        if self._live is None:
            echo(f"  {self.status()}")
        self.tick()

    def restarts(self, job: Job, outcome: Mapping[str, Any]) -> None:
        """Reports that a job starts again because its worker was lost."""
        self._print(f"{title(job)}: {outcome['reason']}; it starts again from its last files ({outcome['retry']})")
        self.tick()

    def skipped(self, failed: Job, jobs: Sequence[Job]) -> None:
        """Counts the jobs that do not run because `failed` did."""
        if jobs:
            self.not_run |= {job.id: job for job in jobs}
            self._print(f"{plural(len(jobs), 'job')} did not run: {title(failed)} failed")
            self.tick()

    def tick(self) -> None:
        """Refreshes the table, if there is one."""
        if self._live:
            self._live.update(self._table(), refresh=True)

    def _print(self, text: str) -> None:
        if self._live:
            self._live.console.print(visible(text), markup=False, highlight=False, soft_wrap=True)
        else:
            echo(text)

    def status(self) -> str:
        left = len(self.jobs) - sum(map(len, (self.done, self.failed, self.not_run, self.running)))
        words = [f"{len(self.done)} of {len(self.jobs)} done", f"{len(self.running)} running"]
        words += [f"{len(self.failed)} failed", *([f"{len(self.not_run)} not run"] if self.not_run else [])]
        words.append(f"{left} left")
        elapsed = time.monotonic() - self._start
        if self._ended:
            words.append(f"{60 * self._ended / elapsed:.3g} jobs/min")
            out = self.failed.keys() | self.not_run.keys() | self.done.keys()
            work = sum(job.cost for job in self.jobs if job.id not in out)
            if work and self._work:
                words.append(f"{_clock(elapsed * work / self._work)} left")
        return ", ".join(words)

    def _table(self) -> Any:
        """The jobs of each model and task, as far as they fit the terminal, then what runs, then the counts."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        now = time.monotonic()
        lines = [Text(f"running  {title(job)}  {_clock(now - since)}") for job, since in self.running.values()]
        lines.append(Text(self.status()))
        console = self._live.console
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
        for row in self._fitting(console.width, console.height - len(lines) - 1):
            table.add_row(*map(Text, row))
        return Group(*([table] if table.row_count else []), *lines)

    def _fitting(self, width: int, height: int) -> list[list[str]]:
        """The first of these tables with at most `width` characters and `height` lines: models x tasks, tasks x models,
        and a line for each model; empty if none fits."""
        from rich.cells import cell_len

        models, tasks = (list(dict.fromkeys(key[part] for key in self._cells)) for part in (0, 1))
        shown = {key: self._cell(key, jobs) for key, jobs in self._cells.items()}
        of_model: dict[str, list[Job]] = {model: [] for model in models}
        for job in self.jobs:
            of_model[job.model].append(job)
        tables = (
            [["", *tasks], *([model, *(shown.get((model, task), "") for task in tasks)] for model in models)],
            [["", *models], *([task, *(shown.get((model, task), "") for model in models)] for task in tasks)],
            [[model, self._counts(jobs)] for model, jobs in of_model.items()],
        )
        for table in tables:
            columns = zip(*table, strict=True)
            if len(table) <= height and sum(max(map(cell_len, column)) + 2 for column in columns) <= width:
                return table
        return []

    def _cell(self, key: tuple[str, str], jobs: Sequence[Job]) -> str:
        """Numbers of jobs, and the median of the measure so far."""
        done = [self.measured(self.done[job.id])[1] for job in jobs if job.id in self.done]
        shown = done and key not in self.without_values
        return self._counts(jobs) + (f"  {statistics.median(done):.4f}" if shown else "")

    def _counts(self, jobs: Sequence[Job]) -> str:
        done, failed, not_run = (
            sum(job.id in ended for job in jobs) for ended in (self.done, self.failed, self.not_run)
        )
        return (
            f"{done}/{len(jobs)}" + (f" {failed} failed" if failed else "") + (f" {not_run} not run" if not_run else "")
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
