"""Queue of a study's jobs: the one that starts next, within the memory, and those that start again because their worker
was lost."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from fastbert.studies.engine.jobs import Job
from fastbert.studies.engine.outcomes import AGAIN, FAILED

OVERTAKING = 10  # at most this many jobs start before one that waits for memory


class JobQueue:
    """Jobs that wait, and jobs that run.

    Args:
        jobs: next jobs as yielded by `startable`; None: all others must wait until a running job has ended.
        retries: number of times that a job is started again if its worker was lost.
        memory: bytes for all running jobs together; None: no limit.

    Attributes:
        running: running jobs by id.
    """

    def __init__(self, jobs: Iterable[Job | None], retries: int = 0, memory: int | None = None) -> None:
        self.retries, self.memory = retries, memory
        self.running: dict[str, Job] = {}
        self._jobs = iter(jobs)
        self._waiting: list[Job] = []  # could start but for the memory; the first one in front
        self._lost: Counter[str] = Counter()
        self._overtaken: Counter[str] = Counter()

    def next(self) -> Job | None:
        """The next job that can start, which counts as running from now on; None if there is none at the moment. When
        no job is running, None means that all have ended."""
        for job in self._waiting:
            if self._fits(job):
                return self._begin(job)
            if self._overtaken[job.id] >= OVERTAKING:
                return None
        while (job := next(self._jobs, None)) is not None:
            self._waiting.append(job)
            if self._fits(job):
                return self._begin(job)
        return None

    def _begin(self, job: Job) -> Job:
        number = self._waiting.index(job)
        self._overtaken.update(before.id for before in self._waiting[:number])
        del self._waiting[number]
        self.running[job.id] = job
        return job

    def _fits(self, job: Job) -> bool:
        """True if the memory is enough for the job and the running ones, or if nothing is running."""
        if self.memory is None or not self.running:
            return True
        return sum(other.memory for other in self.running.values()) + job.memory <= self.memory

    def end(self, job: Job, outcome: dict[str, Any]) -> dict[str, Any]:
        """Counts a job as no longer running.

        Returns:
            `outcome`, or one with the status `AGAIN` if the job's worker was lost and it will start again.
        """
        del self.running[job.id]
        if outcome["status"] != FAILED or not outcome.get("lost"):
            return outcome
        self._lost[job.id] += 1
        if self._lost[job.id] <= self.retries:
            self._waiting.insert(0, job)
            return outcome | {"status": AGAIN, "retry": f"retry {self._lost[job.id]} of {self.retries}"}
        return outcome
