"""Ray back end: runs the jobs of a study on a connected cluster.

A job is a remote function. Where jobs continue from each other's checkpoints they run in the study's folder, so all
nodes need a common file system. Otherwise a job's small files are returned with its outcome.
"""

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastbert.errors import UserError
from fastbert.files import atomic_file, make_folder
from fastbert.ray_cluster import ONLY_MISSING, ClusterLost, Connection, alive_nodes, has_gpus, on_node
from fastbert.studies.engine.events import TICK, Event
from fastbert.studies.engine.job_queue import JobQueue
from fastbert.studies.engine.jobs import Job, run_job
from fastbert.studies.engine.outcomes import JOB_MEMORY_REMEDY, failure
from fastbert.system_errors import user_error

_RETURNED = (".txt", ".json", ".jsonl", ".yaml", "dev_scores.safetensors")
"""Ends of the names of files that are returned: not those of weights."""
_KILLED = ("OutOfMemoryError", "WorkerCrashedError")
_LOST = (*_KILLED, "NodeDiedError", "OwnerDiedError", "ObjectLostError")
"""Names of Ray's errors for a job whose worker or node was lost; all others are not retried."""
_HERE = "LocalRayletDiedError"  # Ray's process on this machine was lost: no job can start any more
PROBE_SECONDS = 60.0  # within which a node answers that it has the study's folder
_COMMON = "these jobs continue from each other's checkpoints, so all nodes need a common file system"
_COMMON_REMEDY = "give --out on a file system that every node has under this path, or use --backend local"


def run_ray(
    ray: Any, queue: JobQueue, workers: int, threads: int, folder: Path, in_place: bool, address: str | None = None
) -> Iterator[Event]:
    """Runs the jobs like `local.run_local`, on a connected Ray cluster; closing the generator cancels running jobs. A
    job gets a GPU if its device is cuda, or is auto and the cluster has GPUs. Ray starts it on a node with enough free
    CPUs, GPUs and memory; if no node is that large, it needs the memory of the largest one.

    Args:
        in_place: run the jobs in `folder`, which all nodes must have; otherwise copy their small files there.
        address: host:port of the cluster, if one was given.

    Raises:
        ClusterLost: the head node does not answer any more, or Ray's process on this machine was lost.
    """
    remote = ray.remote(num_cpus=threads, max_retries=0)(run_remotely)
    devices = ("auto", "cuda") if has_gpus(ray) else ("cuda",)  # of jobs that get a GPU
    largest = int(max((node["Resources"].get("memory", 0) for node in alive_nodes(ray)), default=0))
    running: dict[Any, Job] = {}
    connected = True
    with Connection(ray, address) as connection:
        try:
            while True:
                while len(queue.running) < workers and (job := queue.next()):
                    job_folder = folder.resolve() / job.id
                    if in_place:
                        make_folder(job_folder)
                    needs = {"num_gpus": int(job.device.startswith(devices)), "memory": min(job.memory, largest)}
                    where = str(job_folder) if in_place else None
                    running[remote.options(**needs).remote(job.to_dict(), where)] = job
                    yield job, None
                if not queue.running:
                    return
                ready = ray.wait(list(running), timeout=TICK)[0]
                for reference in ready:
                    job = running.pop(reference)
                    outcome = outcome_of(ray, reference, folder / job.id)
                    if outcome.get("lost"):  # the jobs of a cluster that is lost have not failed
                        connection.check()
                    yield job, queue.end(job, outcome)
                if not ready:
                    connection.check(patient=True)
                    yield None
        except Exception as error:
            connected = False
            if not isinstance(error, ClusterLost):
                connection.check()  # Ray's functions raise errors of several classes when the head node is lost
            raise
        finally:
            if connected:
                for reference in running:
                    ray.cancel(reference, force=True)


def check_common_folder(ray: Any, out: Path) -> None:
    """Checks on every node of the cluster that a file which is written into `out` here is there; it is removed.

    Raises:
        UserError: a node does not have it, or does not answer.
    """
    with tempfile.NamedTemporaryFile(prefix=".on-all-nodes-", dir=out) as probe:
        path = str(Path(probe.name).resolve())
        remote = ray.remote(num_cpus=0, max_retries=1)(os.path.exists)
        nodes = {on_node(ray, remote, node).remote(path): node["NodeManagerHostname"] for node in alive_nodes(ray)}
        if not nodes:  # they start when jobs need them
            return
        answered, open_ones = ray.wait(list(nodes), num_returns=len(nodes), timeout=PROBE_SECONDS)
        without = sorted({nodes[reference] for reference in answered if not _there(ray, reference)})
        silent = sorted({nodes[reference] for reference in open_ones})
    if without:
        raise UserError(f"the folder {out.resolve()} is not on {_named(without)}: {_COMMON}; {_COMMON_REMEDY}")
    if silent:
        raise UserError(
            f"{_named(silent)} did not answer within {PROBE_SECONDS:g} s whether the folder {out.resolve()} is there; "
            "see `ray status`, and remove nodes that are overloaded or unreachable"
        )


def _there(ray: Any, reference: Any) -> bool:
    """Answer of a node; True for one that has been lost in the meantime, which gets no job."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        if type(error).__name__ in (*_LOST, _HERE, "TaskUnschedulableError"):
            return True
        raise UserError(f"the nodes of the Ray cluster cannot be asked for a file: {error}") from None


def _named(hosts: list[str]) -> str:
    return f"the node{'s' if len(hosts) > 1 else ''} {', '.join(hosts)} of the Ray cluster"


def run_remotely(job: dict[str, Any], folder: str | None) -> dict[str, Any]:
    """Runs `run_job` in `folder`, which the driver has created; without one, in a temporary folder, whose small
    files are returned in the outcome under "files"."""
    if folder is not None:
        if not Path(folder).is_dir():  # a node that has joined the cluster since the study began
            return failure(f"the node {socket.gethostname()} has no folder {folder}: {_COMMON}", _COMMON_REMEDY)
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
    """The outcome of a remote job that has ended, also if Ray could not run it; writes its files to `folder`.

    Raises:
        ClusterLost: Ray's process on this machine was lost.
    """
    try:
        outcome = ray.get(reference)
    except ray.exceptions.RayError as error:
        known = user_error(cause) if (cause := getattr(error, "cause", None)) is not None else None
        if known is not None:  # without the traceback that Ray adds
            return failure(str(known), "")
        text = " ".join(str(error).split())
        if type(error).__name__ == _HERE:
            raise ClusterLost(f"Ray's process on this machine (raylet) was lost. {ONLY_MISSING}") from None
        names = {base.__name__ for base in type(error).__mro__}
        killed, lost = not names.isdisjoint(_KILLED), not names.isdisjoint(_LOST)
        why = "its process was killed, most likely out of memory" if killed else "Ray could not run it"
        if lost and not killed:
            why = "its node was lost"
        fix = JOB_MEMORY_REMEDY if killed else "run it again"
        return failure(f"{why} ({type(error).__name__}: {text[:300]})", fix, lost)
    for name, content in outcome.pop("files", {}).items():
        with atomic_file(folder / name) as file:
            file.write(content)
    return outcome
