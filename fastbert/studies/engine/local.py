"""Local back end: worker processes that each run many jobs, so that torch is imported once for each worker."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.processes import without_control_c
from fastbert.records import json_text
from fastbert.studies.engine.events import NO_MORE, TICK, Event
from fastbert.studies.engine.jobs import Job, thread_variables
from fastbert.studies.engine.outcomes import LOG, explained_death


@dataclass
class _Worker:
    number: int
    """Smallest number that no other worker has; it determines the GPU."""
    process: subprocess.Popen[str]
    job: Job | None = None

    def send(self, job: Job, folder: Path) -> None:
        self.job = job
        with contextlib.suppress(BrokenPipeError):  # it has died; the next read of its standard output detects that
            self.process.stdin.write(json_text({"job": job.to_dict(), "folder": str(folder / job.id)}) + "\n")
            self.process.stdin.flush()

    def end(self, patience: float = 0.0) -> int:
        """Kills the process, unless it ends by itself within `patience` seconds, and returns its exit code."""
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        return code


@dataclass
class _Pool:
    """Pool of at most `most` worker processes, with a selector that waits for their outcomes."""

    most: int
    threads: int
    gpus: Sequence[str]
    selector: selectors.BaseSelector
    workers: list[_Worker] = field(default_factory=list)

    def idle(self) -> _Worker | None:
        """A process without a job, a new one if fewer than `most` run; None if all are busy."""
        found = next((worker for worker in self.workers if worker.job is None), None)
        return found or (self.start() if len(self.workers) < self.most else None)

    def start(self) -> _Worker:
        number = min(set(range(self.most)) - {worker.number for worker in self.workers})
        variables = thread_variables(self.threads)
        if self.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = self.gpus[number % len(self.gpus)]
        with without_control_c(spawned=False):  # Control-C ends the study, which ends its workers
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fastbert.studies.engine.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                env={**os.environ, **variables},
            )
        worker = _Worker(number, process)
        self.workers.append(worker)
        self.selector.register(process.stdout, selectors.EVENT_READ, worker)
        return worker

    def dismiss(self, worker: _Worker, patience: float) -> int:
        self.selector.unregister(worker.process.stdout)
        self.workers.remove(worker)
        return worker.end(patience)


def run_local(
    jobs: Iterable[Job | None], workers: int, threads: int, folder: Path, gpus: Sequence[str] = ()
) -> Iterator[Event]:
    """Runs the jobs in their order, `workers` at a time; closing the generator ends the processes at once.

    A process whose job failed, or that died, is replaced, so that no state after an error affects another job.

    Args:
        jobs: the next one is requested once a job has been sent; None means: wait until a running job has ended.
        folder: folder for the folders of the jobs, which are named by their ids.
        gpus: names of the GPUs for CUDA_VISIBLE_DEVICES, assigned to the workers in rotation; if empty, the variable
            is unchanged.
    """
    waiting = iter(jobs)
    following = next(waiting, NO_MORE)
    with selectors.DefaultSelector() as selector:
        pool = _Pool(workers, threads, gpus, selector)
        try:
            while following is not NO_MORE or any(worker.job for worker in pool.workers):
                if following is None:
                    following = next(waiting, NO_MORE)
                while isinstance(following, Job) and (worker := pool.idle()):
                    worker.send(following, folder)
                    following = next(waiting, NO_MORE)
                    yield worker.job, None
                ready = selector.select(TICK)
                for key, _ in ready:
                    worker = key.data
                    job, outcome = worker.job, _answer(worker.process.stdout.readline())
                    worker.job = None
                    if outcome is None or outcome["status"] == "failed":
                        code = pool.dismiss(worker, patience=5.0 if outcome is None else 0.0)
                        if job and outcome is None:
                            outcome = explained_death(code, folder / job.id / LOG)
                    if job:
                        yield job, outcome
                if not ready:
                    yield None
        finally:
            for worker in pool.workers:
                worker.end()


def _answer(line: str) -> dict[str, Any] | None:
    """The outcome in a line; None if the process ended before the line was complete."""
    return json.loads(line) if line.endswith("\n") else None
