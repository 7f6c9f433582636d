"""Ray back end: a running cluster, given by its address, or a local one that starts and ends with the study.

A job is a remote function. Where jobs continue from each other's checkpoints they run in the study's folder, so all
nodes need a common file system. Otherwise a job's text files are returned with its outcome.
"""

import importlib.util
import os
import signal
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastbert.errors import UserError
from fastbert.files import atomic_file, make_folder
from fastbert.studies.engine.events import NO_MORE, TICK, Event
from fastbert.studies.engine.jobs import Job, run_job
from fastbert.studies.engine.outcomes import JOB_MEMORY_REMEDY, failure
from fastbert.system_errors import user_error

OBJECT_STORE = 100 * 2**20  # bytes; by default Ray reserves 30 % of the memory
ANSWER_TIMEOUT = 5.0  # seconds for an address to answer
_TEXTS = (".txt", ".json", ".jsonl", ".yaml")
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)  # a client's preface and empty SETTINGS


def check_ray(address: str | None) -> None:
    """Raises a UserError if Ray is not installed, or nothing that could be Ray answers at `address`."""
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            "--backend ray needs Ray, which is not installed: pip install 'ray>=2.50', or use --backend local"
        )
    if address is not None:
        check_answers(address)


def connect(workers: int, threads: int, address: str | None) -> Any:
    """Starts Ray, or connects to the cluster at `address`; returns the module.

    Raises:
        UserError: the cluster refuses this process.
    """
    import ray

    how: dict[str, Any] = {"address": address}
    if address is None:  # "local": without it Ray joins a cluster that happens to run on this machine
        how = {"address": "local", "num_cpus": workers * threads, "object_store_memory": OBJECT_STORE}
        how |= {"include_dashboard": False}
    before = signal.getsignal(signal.SIGTERM)
    try:
        # Ray itself sets a task's OMP_NUM_THREADS to its num_cpus.
        ray.init(log_to_driver=False, logging_level="ERROR", **how)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        token = (
            ". If it asks for a token, as Ray does by default from 2.59 on, set RAY_AUTH_MODE=token and give this "
            "process the cluster's token: https://docs.ray.io/en/latest/ray-security/token-auth.html"
        )
        where = f"at {address}" if address else "on this machine"
        raise UserError(f"Ray {where} cannot be used: {error}{token if address else ''}") from None
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray has replaced the handler
    return ray


def check_answers(address: str) -> None:
    """Checks that a gRPC server listens at `address`, host:port; ray.init alone would try for minutes.

    Raises:
        UserError: it is not a valid address, or nothing answers.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"the Ray address {address!r} is not of the form host:port, such as 10.0.0.1:6379")
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT) as connection:
            connection.settimeout(ANSWER_TIMEOUT)
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return  # it would answer only after a handshake
            connection.sendall(_HTTP2)
            settings = connection.recv(4)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"no Ray answers at {address} ({error}); see `ray status` on its head node, or leave the address out to "
            "start one here"
        ) from None
    if settings[3:] != b"\x04":
        raise UserError(f"the server at {address} is not Ray; give host:port of the head node, by default port 6379")


def run_ray(
    ray: Any, jobs: Iterable[Job | None], workers: int, threads: int, folder: Path, in_place: bool
) -> Iterator[Event]:
    """Runs the jobs like `local.run_local`, on a connected Ray cluster; closing the generator cancels running jobs. A
    job gets a GPU if its device is cuda, or is auto and the cluster has GPUs.

    Args:
        in_place: run the jobs in `folder`, which all nodes must have; otherwise copy their text files there.
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


def has_gpus(ray: Any) -> bool:
    return ray.cluster_resources().get("GPU", 0) > 0


def run_remotely(job: dict[str, Any], folder: str | None) -> dict[str, Any]:
    """Runs `run_job` in `folder`, which the driver has created; without one, in a temporary folder, whose text files
    are returned in the outcome under "files"."""
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
            str(path.relative_to(temporary)): path.read_text(encoding="utf-8", errors="replace")
            for path in sorted(Path(temporary).rglob("*"))
            if path.suffix in _TEXTS
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
        with atomic_file(folder / name, "w") as file:
            file.write(content)
    return outcome
