"""One job of a sweep or an ablation: a training of one seed, run to its end or to a failure that is explained.

`run_job` is a plain function of plain values, so that a process of this machine and a node of a cluster run the same.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from fastbert.errors import UserError, message_of
from fastbert.files import disk_errors, make_folder, no_link, remove
from fastbert.records import read_json
from fastbert.streams import say
from fastbert.system_errors import NO_MEMORY, out_of_memory, user_error

LOG, RUN = "log.txt", "run"
TAIL = 15  # lines of a log that a failure shows
JOB_MEMORY_REMEDY = (
    "run fewer --workers, or give less to a job: a smaller machine: micro_batch_size (the results stay the same), for "
    "fine-tuning a shorter max_length"
)


@dataclass(frozen=True)
class Job:
    """A training of one seed and where it stands in the sweep. All values are JSON."""

    id: str
    """Hash of `identity`: eight hexadecimal digits."""
    model: str
    """Its name in tables."""
    task: str
    """Its name in tables."""
    seed: int
    setting: dict[str, float | int]
    """Learning rate, batch size and epochs."""
    identity: dict[str, Any]
    """All that defines the result: the active options, the fingerprints of weights, tokenizer and examples."""
    options: dict[str, Any]
    """Of `fastbert finetune`, or of `fastbert pretrain`, but for `out`."""
    folder: str
    """Where paths in `options` start from."""
    cost: float
    """Expected work, in a unit of its own."""
    kind: str = "finetune"
    """finetune, pretrain, or branch (a pretraining that starts from the checkpoint of another one)."""
    after: str | None = None
    """Id of the job that must be done before it, if there is one."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def title(job: Job) -> str:
    setting = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in job.setting.items())
    return f"{job.task}, {job.model}, {setting}, seed {job.seed}"


def thread_variables(threads: int) -> dict[str, str]:
    """The environment of a process that runs jobs: what a result may depend on besides its options."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    return {**dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false"}


def run_job(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains; a failure is an outcome too, and what was written before it stays in `folder`.

    Args:
        job: of `Job.to_dict`.
        folder: gets log.txt (all that the job says) and run/ (what `fastbert finetune` writes).

    Returns:
        status "done" with `result` (the seed's result.json), precision and seconds (those of interrupted attempts that
        it continued too), or "failed" with `reason`, `fix` and `log` (the last lines).
    """
    start = time.perf_counter()
    folder = folder.resolve()
    try:
        make_folder(folder)
        with disk_errors(folder):
            log = open(folder / LOG, "w", encoding="utf-8", opener=no_link)  # noqa: SIM115 (closed below)
    except UserError as error:
        return failure(str(error), "") | {"seconds": 0.0}
    with _said_in(log):
        try:
            outcome = _train(job, folder / RUN)
        except Exception as error:  # whatever it is, it ends this job only, and is reported
            outcome = _explained(error)
            _put_down(f"error: {outcome['reason']}" if user_error(error) else traceback.format_exc())
    if outcome["status"] == "failed":
        outcome["log"] = tail(folder / LOG)
    return outcome | {"seconds": round(outcome.get("seconds", 0.0) + time.perf_counter() - start, 2)}


def _put_down(text: str) -> None:
    """Writes to the log."""
    with suppress(OSError):  # a full disk; the outcome names it too
        say(text)


def _train(job: dict[str, Any], out: Path) -> dict[str, Any]:
    if not Path(job["folder"]).is_dir():
        raise UserError(f"the folder {job['folder']} of the sweep is not there; every node needs the same paths")
    os.chdir(job["folder"])
    if job["kind"] == "finetune":
        return _finetune(job, out)
    from fastbert.experiments.ablate_jobs import pretrain_job

    return pretrain_job(job, out)


def _finetune(job: dict[str, Any], out: Path) -> dict[str, Any]:
    from fastbert.config import from_dict
    from fastbert.finetuning.finetune import finetune
    from fastbert.finetuning.options import FinetuneOptions
    from fastbert.finetuning.results import read_results

    remove(out)  # what an unfinished attempt left
    code = finetune(from_dict(FinetuneOptions, job["options"] | {"out": str(out)}, where="the sweep's job"))
    if code:
        return ended(code)
    science = read_json(out / "manifest.json", "the job's manifest")["science"]
    for name in ("model", "tokenizer", "data"):
        if science[name] != job["identity"].get(name, science[name]):
            return failure(f"the {name} changed after the sweep had started", "run it again when nothing writes there")
    results = read_results(out)
    return {
        "status": "done",
        "precision": results["precision"],
        "metrics": results["metrics"],
        "result": results["fractions"][0]["seeds"][0],
    }


@contextmanager
def _said_in(file: IO[str]) -> Iterator[None]:
    """All that this process writes to standard output and error goes to the file, also from C++."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        with suppress(OSError):  # a full disk: what the log lacks goes to standard error with the next flush
            sys.stdout.flush()
            sys.stderr.flush()
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)


# --- failures


def failure(reason: str, fix: str) -> dict[str, Any]:
    return {"status": "failed", "reason": reason, "fix": fix, "log": []}


def ended(code: int) -> dict[str, Any]:
    """The outcome of a training that returned with an exit code other than 0."""
    return failure(f"it was ended by {_signal(code - 128) if code > 128 else f'exit code {code}'}", "run it again")


def _explained(error: Exception) -> dict[str, Any]:
    said = (str(error).strip().splitlines() or [""])[0]
    if out_of_memory(error):
        return failure(f"it ran out of memory ({type(error).__name__}: {said})", JOB_MEMORY_REMEDY)
    if known := user_error(error):
        return failure(message_of(known), "")
    return failure(f"{type(error).__name__}: {said}", "the traceback is in its log")


def explained_death(code: int, log: Path) -> dict[str, Any]:
    """The outcome of a job whose process ended under it.

    Args:
        code: of the process; -N where signal N ended it.
        log: the job's log, if it wrote one.
    """
    lines = tail(log)
    if code == -signal.SIGKILL:
        reason = "its process was killed by SIGKILL, most likely by the system for want of memory"
        return failure(reason, JOB_MEMORY_REMEDY) | {"log": lines}
    if NO_MEMORY.search("\n".join(lines)):
        return failure(f"its process ran out of memory and ended by {_ending(code)}", JOB_MEMORY_REMEDY) | {
            "log": lines
        }
    return failure(f"its process was ended by {_ending(code)}", "see its log; run it again") | {"log": lines}


def _ending(code: int) -> str:
    return _signal(-code) if code < 0 else f"exit code {code}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def tail(path: Path) -> list[str]:
    """The last lines of a log; none if there is no log, or why it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"({path} cannot be read: {error.strerror})"]
