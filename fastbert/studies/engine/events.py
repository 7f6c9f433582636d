"""Event loop of a study: runs the jobs in an order that their dependencies allow, until all have ended or a signal
stops the study."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from fastbert.studies.engine.jobs import Job
from fastbert.studies.engine.live_status import LiveStatus
from fastbert.studies.engine.store import ResultRow, ResultStore
from fastbert.training.interrupts import Interrupts

TICK = 0.5  # seconds
NO_MORE = object()  # sentinel: there is no next job

Event = tuple[Job, dict[str, Any] | None] | None
"""(job, None) when a job has begun, (job, outcome) when it has ended, None after a while without events."""


def startable(remaining: list[Job], rows: dict[str, ResultRow]) -> Iterator[Job | None]:
    """Yields the jobs in their order, each once the one it depends on is done; None while all remaining jobs must wait.
    Jobs that depend on a failed one are skipped."""
    waiting, lost = list(remaining), set()
    while waiting:
        for job in waiting:  # a job comes after the one it depends on
            if job.after in lost or (job.after in rows and rows[job.after]["status"] == "failed"):
                lost.add(job.id)
        waiting = [job for job in waiting if job.id not in lost]
        found = next((job for job in waiting if job.after is None or job.after in rows), None)
        if found:
            waiting.remove(found)
        if waiting or found:
            yield found


def run_events(events: Iterator[Event], store: ResultStore, live: LiveStatus) -> int:
    """Stores the outcome of each job that ends, and shows progress.

    Returns:
        0, or the exit code after a signal.
    """
    with Interrupts() as interrupts, closing(events), live:
        for event in events:
            job, outcome = event or (None, None)
            stopped = interrupts.caught is not None
            if outcome is not None and not (stopped and outcome["status"] == "failed"):
                # A signal to the process group also ends the running jobs; these have not failed.
                live.ended(job, store.add(job, outcome))
            elif job is not None and outcome is None:
                live.begun(job)
            else:
                live.tick()
            if stopped:
                break
    return interrupts.exit_code
