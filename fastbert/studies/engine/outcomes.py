"""Outcomes of jobs: the reason for a failure and how to fix it, from the error, the exit code or the log.

A failure is `lost` if the job itself raised no error: its process was killed, or its node was lost. The queue starts
such a job again.
"""

import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastbert.errors import message_of, plural
from fastbert.streams import echo
from fastbert.system_errors import NO_MEMORY, out_of_memory, user_error

LOG, RUN = "log.txt", "run"  # in the folder of a job
TAIL = 15  # lines of a log that are shown after a failure
LISTED = 3  # jobs that are listed one by one if they did not run because of the same failure
# Statuses, next to "done": it failed; it did not start because a job that it depends on failed; it will start again.
FAILED, NOT_RUN, AGAIN = "failed", "not run", "started again"
JOB_MEMORY_REMEDY = (
    "use fewer --workers, or reduce the memory of a job: lower machine: micro_batch_size (the results stay the same), "
    "or for fine-tuning max_length"
)


def failure(reason: str, fix: str, lost: bool = False) -> dict[str, Any]:
    """The outcome of a job that failed; `lost`: its worker was killed or lost."""
    return {"status": FAILED, "reason": reason, "fix": fix, "log": [], **({"lost": True} if lost else {})}


def ended(code: int) -> dict[str, Any]:
    """The outcome of a training that returned an exit code other than 0; above 128 a signal stopped it."""
    if code > 128:
        return failure(f"it was ended by {_signal(code - 128)}", "run it again", lost=True)
    return failure(f"it was ended by exit code {code}", "run it again")


def explained(error: Exception) -> dict[str, Any]:
    """The outcome of a job that raised `error`."""
    text = (str(error).strip().splitlines() or [""])[0]
    if out_of_memory(error):
        return failure(f"it ran out of memory ({type(error).__name__}: {text})", JOB_MEMORY_REMEDY)
    if known := user_error(error):
        return failure(message_of(known), "")
    return failure(f"{type(error).__name__}: {text}", "the traceback is in its log")


def explained_death(code: int, log: Path) -> dict[str, Any]:
    """The outcome of a job whose process ended unexpectedly.

    Args:
        code: exit code of the process; -N if signal N ended it.
        log: the job's log, if it wrote one.
    """
    lines = tail(log)
    ending = _signal(-code) if code < 0 else f"exit code {code}"
    if code == -signal.SIGKILL:
        reason = "its process was killed by SIGKILL, most likely because the system was out of memory"
        return failure(reason, JOB_MEMORY_REMEDY, lost=True) | {"log": lines}
    if NO_MEMORY.search("\n".join(lines)):
        reason = f"its process ran out of memory and ended by {ending}"
        return failure(reason, JOB_MEMORY_REMEDY, lost=True) | {"log": lines}
    return failure(f"its process was ended by {ending}", "see its log; run it again", lost=True) | {"log": lines}


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def tail(path: Path) -> list[str]:
    """The last lines of a log; empty without a log, and the reason if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"({path} cannot be read: {error.strerror})"]


def print_failures(failed: list[dict[str, Any]], total: int, shown: Callable[[dict[str, Any]], str]) -> int:
    """Prints the reasons of failures, and the jobs that did not run because of them; returns the exit code.

    Args:
        failed: rows in results.jsonl of the jobs that failed or did not run.
        total: number of jobs of the study.
        shown: row -> text that distinguishes a job from others of its model and task.
    """
    failed, not_run = parted(failed)
    for row in failed:
        log = "".join(f"\n    {line}" for line in row["log"])
        fix = f"\n  to fix it: {row['fix']}" if row["fix"] else ""
        echo(f"\nFAILED {row['task']}, {row['model']}, {shown(row)}\n  {row['reason']}{fix}")
        if log:
            echo(f"  the end of {Path(row['folder']) / LOG}:{log}")
    if not_run:
        echo("")
    for rows in by_reason(not_run):
        if len(rows) > LISTED:
            echo(sentence_not_run(rows))
            continue
        for row in rows:
            echo(f"NOT RUN {row['task']}, {row['model']}, {shown(row)}: {row['reason'].removeprefix(f'{NOT_RUN}: ')}")
    if failed or not_run:
        more = f", {len(not_run)} did not run" if not_run else ""
        echo(f"\n{len(failed)} of {total} jobs failed{more}; the same command runs them again")
    return 1 if failed or not_run else 0


def parted(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of jobs that are not done: those that failed, and those that did not run because another one failed."""
    rows = list(rows)
    not_run = [row for row in rows if row["status"] == NOT_RUN]
    return [row for row in rows if row["status"] == FAILED], not_run


def by_reason(rows: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Groups of the rows of jobs that did not run because of the same failed job, in their order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["reason"], []).append(row)
    return list(found.values())


def sentence_not_run(rows: Sequence[dict[str, Any]]) -> str:
    """Sentence with the number of jobs of a group of `by_reason`, and the failed job."""
    return f"{plural(len(rows), 'job')} did {rows[0]['reason']}"
