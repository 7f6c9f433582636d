"""Choice of the back end that runs a study's jobs, and of the GPUs of its workers."""

import os
from collections.abc import Iterator, Sequence
from itertools import takewhile

import torch

from fastbert.errors import UserError, plural
from fastbert.progress import amount
from fastbert.ray_cluster import connect, has_gpus
from fastbert.streams import echo
from fastbert.studies.engine.events import Event, check_order, startable
from fastbert.studies.engine.job_queue import JobQueue
from fastbert.studies.engine.jobs import Job, title
from fastbert.studies.engine.local import run_local
from fastbert.studies.engine.options import EngineOptions
from fastbert.studies.engine.store import JOBS, ResultStore
from fastbert.training.hardware import memory


def start(
    options: EngineOptions,
    jobs: list[Job],
    store: ResultStore,
    threads: int,
    in_place: bool = False,
    timed_on: str | None = None,
) -> Iterator[Event]:
    """Starts the back end on `jobs`, which are not done and come after all jobs that they depend on.

    Args:
        threads: CPU threads of each job.
        in_place: see `run_ray`: jobs continue from each other's checkpoints.
        timed_on: type of the device on which the steps were timed, if they were.

    Raises:
        UserError: Ray cannot be used, or its jobs would run on another type of device.
        ValueError: the jobs are in another order.
    """
    check_order(jobs, store.rows)
    if any(job.after for job in jobs):
        for job in jobs:  # what an earlier call left of them: the jobs that depend on them wait for them again
            store.rows.pop(job.id, None)
    order, folder = startable(jobs, store.rows), store.out / JOBS
    if options.backend == "local":
        queue = JobQueue(order, options.retries, memory_limit(jobs, options.workers))
        gpus = visible_gpus() if may_use_gpus(jobs) else []
        return run_local(queue, options.workers, threads, folder, gpus, cores_of_workers(options.workers, threads))
    from fastbert.studies.engine.ray_backend import check_common_folder, run_ray

    ray = connect(options.workers * threads, options.ray_address)
    if timed_on == "cpu" and has_gpus(ray) and any(job.device == "auto" for job in jobs):
        ray.shutdown()
        raise UserError(
            "the steps were timed on this machine, which has no GPU, but the jobs would run on the GPUs of the Ray "
            "cluster; start it on a node with a GPU, or give machine: device: cpu"
        )
    if in_place:
        try:
            check_common_folder(ray, store.out)
        except BaseException:
            ray.shutdown()
            raise
    queue = JobQueue(order, options.retries)
    return run_ray(ray, queue, options.workers, threads, folder, in_place, options.ray_address)


def memory_limit(jobs: Sequence[Job], workers: int) -> int | None:
    """Bytes of main memory that are free; None if they are enough for all jobs that may run at a time, as far as their
    memory is known. Prints which jobs need more: each of them runs alone."""
    free, _ = memory(torch.device("cpu"))
    if sum(sorted((job.memory for job in jobs), reverse=True)[:workers]) <= free:
        return None
    if large := [job for job in jobs if job.memory > free]:
        most = max(large, key=lambda job: job.memory)
        echo(
            f"{plural(len(large), 'job')} may need more than the {amount(free, 'B')} of free memory, and will run "
            f"alone: {title(most)} needs about {amount(most.memory, 'B')}"
        )
    return free


def cores_of_workers(workers: int, threads: int) -> list[list[int]]:
    """Cores of each worker, if the workers need exactly the cores that this process may use; else an empty list, and
    the system chooses them. Prints if there are more threads than cores.

    With fewer threads than cores no worker is bound: another study of this machine would be bound to the same cores,
    while others are idle.
    """
    cores = usable_cores()
    if cores and workers * threads > len(cores):
        each = plural(threads, "thread")
        echo(f"{plural(workers, 'worker')} with {each} each compete for {plural(len(cores), 'core')}")
    if workers * threads != len(cores):
        return []
    return [cores[threads * number : threads * (number + 1)] for number in range(workers)]


def usable_cores() -> list[int]:
    """Cores that this process may use; empty if the system does not report them."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def may_use_gpus(jobs: list[Job]) -> bool:
    """True if GPUs are assigned to the workers: a job may use one, and no job requests a particular one."""
    devices = {job.device for job in jobs}
    return bool(devices & {"auto", "cuda"}) and not any(device.startswith("cuda:") for device in devices)


def visible_gpus() -> list[str]:
    """GPUs of this process, by CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:  # CUDA ignores what follows an entry that is no GPU
        return list(takewhile(lambda entry: entry not in ("", "-1"), (entry.strip() for entry in named.split(","))))
    return [str(number) for number in range(torch.cuda.device_count())]
