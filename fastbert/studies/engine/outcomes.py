"""Outcomes of jobs: the reason for a failure and how to fix it, from the error, the exit code or the log."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastbert.errors import message_of
from fastbert.streams import echo
from fastbert.system_errors import NO_MEMORY, out_of_memory, user_error

LOG, RUN = "log.txt", "run"  # in the folder of a job
TAIL = 15  # lines of a log that are shown after a failure
JOB_MEMORY_REMEDY = (
    "use fewer --workers, or reduce the memory of a job: lower machine: micro_batch_size (the results stay the same), "
    "or for fine-tuning max_length"
)


def failure(reason: str, fix: str) -> dict[str, Any]:
    return {"status": "failed", "reason": reason, "fix": fix, "log": []}


def ended(code: int) -> dict[str, Any]:
    """The outcome of a training that returned an exit code other than 0."""
    return failure(f"it was ended by {_signal(code - 128) if code > 128 else f'exit code {code}'}", "run it again")


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
        return failure(reason, JOB_MEMORY_REMEDY) | {"log": lines}
    if NO_MEMORY.search("\n".join(lines)):
        reason = f"its process ran out of memory and ended by {ending}"
        return failure(reason, JOB_MEMORY_REMEDY) | {"log": lines}
    return failure(f"its process was ended by {ending}", "see its log; run it again") | {"log": lines}


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
    """Prints the reasons of failures; returns the exit code.

    Args:
        failed: their rows in results.jsonl.
        total: number of jobs of the study.
        shown: row -> text that distinguishes a job from others of its model and task.
    """
    for row in failed:
        log = "".join(f"\n    {line}" for line in row["log"])
        fix = f"\n  to fix it: {row['fix']}" if row["fix"] else ""
        echo(f"\nFAILED {row['task']}, {row['model']}, {shown(row)}\n  {row['reason']}{fix}")
        if log:
            echo(f"  the end of {Path(row['folder']) / LOG}:{log}")
    if failed:
        echo(f"\n{len(failed)} of {total} jobs failed; the same command runs them again")
    return 1 if failed else 0
