"""Jobs on this machine: processes that live over many jobs, so that only the first pays for importing torch."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.processes import without_control_c
from fastbert.records import json_text
from fastbert.studies.engine.jobs import LOG, Job, explained_death, thread_variables

TICK = 0.5  # seconds
_NO_MORE = object()

Event = tuple[Job, dict[str, Any] | None] | None
"""A job that has begun (None) or ended (its outcome); or None: nothing happened for a while."""


@dataclass
class _Worker:
    process: subprocess.Popen[str]
    job: Job | None = None

    def send(self, job: Job, folder: Path) -> None:
        self.job = job
        with contextlib.suppress(BrokenPipeError):  # it has died; its standard output says so at the next look
            self.process.stdin.write(json_text({"job": job.to_dict(), "folder": str(folder / job.id)}) + "\n")
            self.process.stdin.flush()

    def end(self, patience: float = 0.0) -> int:
        """Kills the process, unless it ends by itself in so many seconds, and returns its exit code."""
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        return code


def run_local(jobs: Iterable[Job | None], workers: int, threads: int, folder: Path) -> Iterator[Event]:
    """Runs the jobs in their order, `workers` at a time; closing the generator ends the processes at once.

    A process whose job failed, or that died, is replaced: what an error leaves behind does not reach another job.

    Args:
        jobs: asked for the next one whenever the one before has been sent; None: wait until a running job has ended.
        folder: gets a folder for each job, named by its id.
    """
    waiting = iter(jobs)
    following = next(waiting, _NO_MORE)
    crew: list[_Worker] = []
    with selectors.DefaultSelector() as selector:
        try:
            while following is not _NO_MORE or any(worker.job for worker in crew):
                if following is None:
                    following = next(waiting, _NO_MORE)
                while isinstance(following, Job) and (worker := _idle(crew, workers, threads, selector)):
                    worker.send(following, folder)
                    following = next(waiting, _NO_MORE)
                    yield worker.job, None
                ready = selector.select(TICK)
                for key, _ in ready:
                    worker = key.data
                    job, outcome = worker.job, _answer(worker.process.stdout.readline())
                    worker.job = None
                    if outcome is None or outcome["status"] == "failed":
                        selector.unregister(worker.process.stdout)
                        crew.remove(worker)
                        code = worker.end(patience=5.0 if outcome is None else 0.0)
                        if job and outcome is None:
                            outcome = explained_death(code, folder / job.id / LOG)
                    if job:
                        yield job, outcome
                if not ready:
                    yield None
        finally:
            for worker in crew:
                worker.end()


def _idle(crew: list[_Worker], workers: int, threads: int, selector: selectors.BaseSelector) -> _Worker | None:
    """A process without a job, started if there may be one more."""
    for worker in crew:
        if worker.job is None:
            return worker
    if len(crew) == workers:
        return None
    with without_control_c(spawned=False):  # the sweep ends its workers
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fastbert.studies.engine.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, **thread_variables(threads)},
        )
    worker = _Worker(process)
    crew.append(worker)
    selector.register(process.stdout, selectors.EVENT_READ, worker)
    return worker


def _answer(line: str) -> dict[str, Any] | None:
    """The outcome in a line; None if the process ended before it was whole."""
    return json.loads(line) if line.endswith("\n") else None
