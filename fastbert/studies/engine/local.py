"""Local back end: worker processes that each run many jobs, so that torch is imported once for each worker."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.processes import without_control_c
from fastbert.records import json_text
from fastbert.studies.engine.events import TICK, Event
from fastbert.studies.engine.job_queue import JobQueue
from fastbert.studies.engine.jobs import Job, thread_variables
from fastbert.studies.engine.outcomes import FAILED, LOG, explained_death


@dataclass
class _Worker:
    number: int
    """Smallest number that no other worker has; it determines the GPU and the cores."""
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
    cores: Sequence[Collection[int]]
    selector: selectors.BaseSelector
    workers: list[_Worker] = field(default_factory=list)

    def idle(self) -> _Worker:
        """A process without a job, a new one if all are busy; fewer than `most` must be busy."""
        return next((worker for worker in self.workers if worker.job is None), None) or self.start()

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
        if self.cores:  # before its first job, so that all threads of the job inherit it
            with contextlib.suppress(OSError):  # it has died; the next read of its standard output detects that
                os.sched_setaffinity(process.pid, self.cores[number])
        worker = _Worker(number, process)
        self.workers.append(worker)
        self.selector.register(process.stdout, selectors.EVENT_READ, worker)
        return worker

    def dismiss(self, worker: _Worker, patience: float) -> int:
        self.selector.unregister(worker.process.stdout)
        self.workers.remove(worker)
        return worker.end(patience)


def run_local(
    queue: JobQueue,
    workers: int,
    threads: int,
    folder: Path,
    gpus: Sequence[str] = (),
    cores: Sequence[Collection[int]] = (),
) -> Iterator[Event]:
    """Runs the jobs of the queue, `workers` at a time; closing the generator ends the processes at once.

    A process whose job failed, or that died, is replaced, so that no state after an error affects another job. If the
    queue has a limit of memory, every job has a new process.

    Args:
        folder: folder for the folders of the jobs, which are named by their ids.
        gpus: names of the GPUs for CUDA_VISIBLE_DEVICES, assigned to the workers in rotation; if empty, the variable
            is unchanged.
        cores: cores of each worker; if empty, the system chooses them.
    """
    with selectors.DefaultSelector() as selector:
        pool = _Pool(workers, threads, gpus, cores, selector)
        try:
            while True:
                while len(queue.running) < workers and (job := queue.next()):
                    pool.idle().send(job, folder)
                    yield job, None
                if not queue.running:
                    return
                ready = selector.select(TICK)
                for key, _ in ready:
                    worker = key.data
                    job, outcome = worker.job, _answer(worker.process.stdout.readline())
                    worker.job = None
                    # Where memory is short, also to free that of its job, which the process would hold to its end.
                    if outcome is None or outcome["status"] == FAILED or queue.memory is not None:
                        code = pool.dismiss(worker, patience=5.0 if outcome is None else 0.0)
                        if job and outcome is None:
                            outcome = explained_death(code, folder / job.id / LOG)
                    if job:
                        yield job, queue.end(job, outcome)
                if not ready:
                    yield None
        finally:
            for worker in pool.workers:
                worker.end()


def _answer(line: str) -> dict[str, Any] | None:
    """The outcome in a line; None if the process ended before the line was complete."""
    return json.loads(line) if line.endswith("\n") else None
