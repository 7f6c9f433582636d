"""Choice of the back end that runs a study's jobs, and of the GPUs of its workers."""

import os
from collections.abc import Iterator
from itertools import takewhile

from fastbert.errors import UserError
from fastbert.ray_cluster import connect, has_gpus
from fastbert.studies.engine.events import Event, check_order, startable
from fastbert.studies.engine.jobs import Job
from fastbert.studies.engine.local import run_local
from fastbert.studies.engine.options import EngineOptions
from fastbert.studies.engine.store import JOBS, ResultStore


def start(
    options: EngineOptions,
    jobs: list[Job],
    store: ResultStore,
    threads: int,
    in_place: bool = False,
    timed_on: str | None = None,
) -> Iterator[Event]:
    """Starts the back end on `jobs`, which are ordered so that each comes after all that it depends on.

    Args:
        threads: CPU threads of each job.
        in_place: see `run_ray`: jobs continue from each other's checkpoints.
        timed_on: type of the device on which the steps were timed, if they were.

    Raises:
        UserError: Ray cannot be used, or its jobs would run on another type of device.
        ValueError: the jobs are in another order.
    """
    check_order(jobs, store.rows)
    order = startable(jobs, store.rows)
    if options.backend == "local":
        gpus = visible_gpus() if may_use_gpus(jobs) else []
        return run_local(order, options.workers, threads, store.out / JOBS, gpus)
    from fastbert.studies.engine.ray_backend import run_ray

    ray = connect(options.workers * threads, options.ray_address)
    if timed_on == "cpu" and has_gpus(ray) and any(job.device == "auto" for job in jobs):
        ray.shutdown()
        raise UserError(
            "the steps were timed on this machine, which has no GPU, but the jobs would run on the GPUs of the Ray "
            "cluster; start it on a node with a GPU, or give machine: device: cpu"
        )
    return run_ray(ray, order, options.workers, threads, store.out / JOBS, in_place)


def may_use_gpus(jobs: list[Job]) -> bool:
    """True if GPUs are assigned to the workers: a job may use one, and no job requests a particular one."""
    devices = {job.device for job in jobs}
    return bool(devices & {"auto", "cuda"}) and not any(device.startswith("cuda:") for device in devices)


def visible_gpus() -> list[str]:
    """GPUs of this process, by CUDA_VISIBLE_DEVICES; imports torch only if that is not set."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:  # CUDA ignores what follows an entry that is no GPU
        return list(takewhile(lambda entry: entry not in ("", "-1"), (entry.strip() for entry in named.split(","))))
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
