"""Job of a study: a training with one seed or an evaluation, which ends as done or as failed with a reason.

A job names the function that runs it, so that the engine does not depend on the kinds of jobs. `run_job` takes and
returns JSON values, so that it can run in a process on this machine or on a node of a cluster.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from fastbert.errors import UserError
from fastbert.files import disk_errors, make_folder, no_link
from fastbert.registry import imported
from fastbert.streams import echo
from fastbert.studies.engine.outcomes import LOG, RUN, explained, failure, tail
from fastbert.system_errors import user_error

JobRunner = Callable[[dict[str, Any], Path], dict[str, Any]]
"""(Job as given by `Job.to_dict`, folder of its run) -> outcome, see `run_job`."""


@dataclass(frozen=True)
class Job:
    """A training with one seed, or an evaluation, and its position in the study. All values are JSON."""

    id: str
    """Hash of `identity`: eight hexadecimal digits."""
    model: str
    """Name of the model in tables."""
    task: str
    """Name of the task in tables."""
    seed: int | None
    """None: the job uses no random numbers."""
    setting: dict[str, float | int]
    """Options that distinguish it from others of the same model, task and seed, such as learning rate and epochs."""
    identity: dict[str, Any]
    """Everything that defines the result: active options, fingerprints of weights, tokenizer and examples."""
    options: dict[str, Any]
    """Options for its runner, without `out`."""
    folder: str
    """Folder to which paths in `options` are relative."""
    cost: float
    """Expected work, in the same arbitrary unit for all jobs of the study."""
    runner: str
    """`JobRunner`, as "module:function"."""
    kind: str
    """Kind of the job in results.jsonl."""
    device: str = "auto"
    """Option machine.device of the job: auto, cpu, cuda or cuda:N."""
    memory: int = 0
    """Bytes of main memory that it is expected to need; 0: unknown."""
    after: tuple[str, ...] = ()
    """Ids of the jobs that it depends on: it starts once all of them are done."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"after": list(self.after)}


def title(job: Job) -> str:
    parts = [f"{name.replace('_', ' ')} {value:g}" for name, value in job.setting.items()]
    return ", ".join([job.task, job.model, *parts, *([] if job.seed is None else [f"seed {job.seed}"])])


def thread_variables(threads: int) -> dict[str, str]:
    """Environment variables of a process that runs jobs; results may depend on them."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return {**dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false"}


def run_job(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs a job; a failure is returned as an outcome, and the files written before it stay in `folder`.

    Args:
        job: result of `Job.to_dict`.
        folder: folder for log.txt (standard output and error of the job) and run/ (the files of its runner).

    Returns:
        status "done" with the runner's outcome (`result`, `precision`, seconds of interrupted attempts that it
        continued) and seconds, or "failed" with `reason`, `fix` and `log` (the last lines).
    """
    start = time.perf_counter()
    folder = folder.resolve()
    try:
        make_folder(folder)
        with disk_errors(folder):
            log = open(folder / LOG, "w", encoding="utf-8", opener=no_link)  # noqa: SIM115 (closed below)
    except UserError as error:
        return failure(str(error), "") | {"seconds": 0.0}
    with _printed_to(log):
        try:
            outcome = _train(job, folder / RUN)
        except Exception as error:  # any error ends this job only, and is reported
            outcome = explained(error)
            with suppress(OSError):  # a full disk; the outcome names it too
                echo(f"error: {outcome['reason']}" if user_error(error) else traceback.format_exc())
    if outcome["status"] == "failed":
        outcome["log"] = tail(folder / LOG)
    return outcome | {"seconds": round(outcome.get("seconds", 0.0) + time.perf_counter() - start, 2)}


def _train(job: dict[str, Any], out: Path) -> dict[str, Any]:
    if not Path(job["folder"]).is_dir():
        raise UserError(
            f"the folder {job['folder']} of the study does not exist; it must have the same path on every node"
        )
    os.chdir(job["folder"])
    runner: JobRunner = imported(job["runner"])
    return runner(job, out)


@contextmanager
def _printed_to(file: IO[str]) -> Iterator[None]:
    """Redirects standard output and error of this process to the file, including output from C++."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(1), os.dup(2)]
    with file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        with suppress(OSError):  # a full disk: the rest of the log goes to standard error with the next flush
            sys.stdout.flush()
            sys.stderr.flush()
        for number, copy in enumerate(before, 1):
            os.dup2(copy, number)
            os.close(copy)
