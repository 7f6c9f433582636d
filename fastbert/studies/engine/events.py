"""Event loop of a study: runs the jobs in an order that their dependencies allow, until all have ended or a signal
stops the study."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from fastbert.ray_cluster import ClusterLost
from fastbert.streams import echo
from fastbert.studies.engine.jobs import Job, title
from fastbert.studies.engine.live_status import LiveStatus
from fastbert.studies.engine.outcomes import AGAIN, FAILED
from fastbert.studies.engine.store import ResultRow, ResultStore, is_done
from fastbert.training.interrupts import Interrupts

TICK = 0.5  # seconds

Event = tuple[Job, dict[str, Any] | None] | None
"""(job, None) when a job has begun, (job, outcome) when it has ended or, with the status `AGAIN`, will begin again;
None after a while without events."""


def check_order(jobs: Sequence[Job], rows: Mapping[str, ResultRow]) -> None:
    """Checks that each job comes after all jobs that it depends on, so that none waits forever.

    Raises:
        ValueError: one of them comes later, is missing, or ended before without being done.
    """
    known = {key for key, row in rows.items() if is_done(row)}
    for job in jobs:
        if missing := [key for key in job.after if key not in known]:
            raise ValueError(f"{title(job)} depends on {', '.join(missing)}, which is no earlier job of the study")
        known.add(job.id)


def startable(remaining: Sequence[Job], rows: Mapping[str, ResultRow]) -> Iterator[Job | None]:
    """Yields the jobs in their order, each once all that it depends on are done; None while all remaining jobs must
    wait. Jobs that depend on one that failed, directly or through others, are skipped.

    Args:
        remaining: jobs, each after those that it depends on.
        rows: rows by job id; read again whenever a job is requested.
    """
    waiting, lost = list(remaining), set()
    while waiting:
        for job in waiting:
            if any(key in lost or (key in rows and not is_done(rows[key])) for key in job.after):
                lost.add(job.id)
        waiting = [job for job in waiting if job.id not in lost]
        found = next((job for job in waiting if all(key in rows for key in job.after)), None)
        if found:
            waiting.remove(found)
        if waiting or found:
            yield found


def run_events(events: Iterator[Event], store: ResultStore, live: LiveStatus) -> int:
    """Stores the outcome of each job that ends, and shows progress. The jobs that depend on one that failed, directly
    or through others, end with it as not run.

    Returns:
        0; 1 if the connection to the cluster was lost, which is printed; or the exit code after a signal.
    """
    try:
        return _run_events(events, store, live)
    except ClusterLost as error:
        echo(f"error: {error}")
        return 1


def _run_events(events: Iterator[Event], store: ResultStore, live: LiveStatus) -> int:
    with Interrupts() as interrupts, closing(events), live:
        for event in events:
            job, outcome = event or (None, None)
            stopped = interrupts.caught is not None
            if job is not None and outcome is None:
                live.begun(job)
            elif outcome is None or (stopped and outcome["status"] != "done"):
                # A signal to the process group also ends the running jobs; these have not failed.
                live.tick()
            elif outcome["status"] == AGAIN:
                live.restarts(job, outcome)
            else:
                live.ended(job, store.add(job, outcome))
                if outcome["status"] == FAILED:
                    live.skipped(job, store.skip(job))
            if stopped:
                break
    return interrupts.exit_code
