"""Ray back end: runs the jobs of a study on a connected cluster.

A job is a remote function. Where jobs continue from each other's checkpoints they run in the study's folder, so all
nodes need a common file system. Otherwise a job's small files are returned with its outcome.
"""

import os
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastbert.files import atomic_file, make_folder
from fastbert.ray_cluster import has_gpus
from fastbert.studies.engine.events import NO_MORE, TICK, Event
from fastbert.studies.engine.jobs import Job, run_job
from fastbert.studies.engine.outcomes import JOB_MEMORY_REMEDY, failure
from fastbert.system_errors import user_error

_RETURNED = (".txt", ".json", ".jsonl", ".yaml", "dev_scores.safetensors")
"""Ends of the names of files that are returned: not those of weights."""


def run_ray(
    ray: Any, jobs: Iterable[Job | None], workers: int, threads: int, folder: Path, in_place: bool
) -> Iterator[Event]:
    """Runs the jobs like `local.run_local`, on a connected Ray cluster; closing the generator cancels running jobs. A
    job gets a GPU if its device is cuda, or is auto and the cluster has GPUs.

    Args:
        in_place: run the jobs in `folder`, which all nodes must have; otherwise copy their small files there.
    """
    remote = ray.remote(num_cpus=threads, max_retries=0)(run_remotely)
    devices = ("auto", "cuda") if has_gpus(ray) else ("cuda",)  # of jobs that get a GPU
    waiting = iter(jobs)
    running: dict[Any, Job] = {}
    following = next(waiting, NO_MORE)
    try:
        while following is not NO_MORE or running:
            if following is None:
                following = next(waiting, NO_MORE)
            while isinstance(following, Job) and len(running) < workers:
                job, job_folder = following, folder.resolve() / following.id
                if in_place:
                    make_folder(job_folder)
                gpus = int(job.device.startswith(devices))
                running[remote.options(num_gpus=gpus).remote(job.to_dict(), str(job_folder) if in_place else None)] = (
                    job
                )
                following = next(waiting, NO_MORE)
                yield job, None
            ready = ray.wait(list(running), timeout=TICK)[0] if running else []
            for reference in ready:
                job = running.pop(reference)
                yield job, outcome_of(ray, reference, folder / job.id)
            if not ready:
                yield None
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        ray.shutdown()


def run_remotely(job: dict[str, Any], folder: str | None) -> dict[str, Any]:
    """Runs `run_job` in `folder`, which the driver has created; without one, in a temporary folder, whose small
    files are returned in the outcome under "files"."""
    if folder is not None:
        if not Path(folder).is_dir():
            return failure(
                f"the node {socket.gethostname()} has no folder {folder}: these jobs continue from each other's "
                "checkpoints, so all nodes need a common file system",
                "give --out on a file system that every node has under this path, or use --backend local",
            )
        outcome = run_job(job, Path(folder))
        os.chdir(job["folder"])
        return outcome
    with tempfile.TemporaryDirectory(prefix="fastbert-job-") as temporary:
        outcome = run_job(job, Path(temporary))
        files = {
            str(path.relative_to(temporary)): path.read_bytes()
            for path in sorted(Path(temporary).rglob("*"))
            if path.name.endswith(_RETURNED)
        }
        os.chdir(job["folder"])
    return outcome | {"files": files}


def outcome_of(ray: Any, reference: Any, folder: Path) -> dict[str, Any]:
    """The outcome of a remote job that has ended, also if Ray could not run it; writes its files to `folder`."""
    try:
        outcome = ray.get(reference)
    except ray.exceptions.RayError as error:
        known = user_error(cause) if (cause := getattr(error, "cause", None)) is not None else None
        if known is not None:  # without the traceback that Ray adds
            return failure(str(known), "")
        text = " ".join(str(error).split())
        killed = isinstance(error, ray.exceptions.OutOfMemoryError | ray.exceptions.WorkerCrashedError)
        why = "its process was killed, most likely out of memory" if killed else "Ray could not run it"
        return failure(f"{why} ({type(error).__name__}: {text[:300]})", JOB_MEMORY_REMEDY if killed else "run it again")
    for name, content in outcome.pop("files", {}).items():
        with atomic_file(folder / name) as file:
            file.write(content)
    return outcome
