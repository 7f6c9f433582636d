"""`fastbert pretrain --launch ray`: `pretrain` in the workers of Ray's TorchTrainer, which restarts them after a
failure.

The driver, the process of the command line, checks the options, chooses the folder and prepares the data. Then it
prints the output of the workers and forwards signals to them; both pass through a `Relay`, an actor on the driver's
node. Ray's own checkpoints are not used: restarted workers resume from the newest checkpoint of the run.
"""

import importlib.util
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any, TextIO

from fastbert import config as configuration
from fastbert.data.shards import open_dataset
from fastbert.errors import UserError
from fastbert.hub.load import load_pretrained
from fastbert.pretraining.budget import check_steps
from fastbert.pretraining.initial import tokenizer_to_prepare
from fastbert.pretraining.options import LAUNCH, PretrainOptions
from fastbert.pretraining.other_data import old_folder
from fastbert.pretraining.ray_worker import TICK, Relay, run_trainer
from fastbert.pretraining.run import new_folder
from fastbert.pretraining.setup import data_folder
from fastbert.ray_cluster import check_ray, connect
from fastbert.streams import echo
from fastbert.training.interrupts import NUMBERS
from fastbert.training.launch import launched

PACKAGES = ("fsspec", "pyarrow", "pydantic")
STARTUP = 60.0  # seconds without workers after which the driver prints that it waits


def pretrain_on_ray(given: PretrainOptions, name: str) -> int:
    """Starts or resumes a run in several processes on Ray; the arguments and the exit code are those of `pretrain`.

    Raises:
        UserError: any user error that can be found before the workers start; theirs are printed.
    """
    check_ray(given.ray_address, "--launch ray", "start the processes with torchrun")
    if missing := [package for package in PACKAGES if importlib.util.find_spec(package) is None]:
        packages = ", ".join(missing)
        raise UserError(f"--launch ray needs {packages}, which Ray Train imports: pip install 'ray[train]>=2.50'")
    if launched(os.environ) > 1:
        raise UserError("torchrun and --launch ray both start processes; leave out one of them")
    if given.machine.device.startswith("cuda:"):
        raise UserError(
            f"--machine.device {given.machine.device} is one GPU; leave it out, Ray gives each process its own"
        )
    if not given.resume:
        given = replace(given, out=str(new_folder(given.out, name).path))
        if given.branch is None:  # whose data is that of its run
            check_steps(given)
            prepare_data(given)
    stdout = sys.stdout
    ray = connect(given.processes * cpus_of(given), given.ray_address)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="fastbert-ray-") as storage,
            caught_signals() as received,
            redirect_stdout(sys.stderr),  # what Ray itself prints about dead workers
        ):
            return follow(ray, given, name, storage, {"stdout": stdout, "stderr": sys.stderr}, received)
    finally:
        ray.shutdown()


def prepare_data(options: PretrainOptions) -> None:
    """Prepares the data if --data or --replay.data is a source, while no worker waits for it."""
    pretrained = load_pretrained(options.init_from) if options.init_from is not None else None
    folder = data_folder(options, tokenizer_to_prepare(options, pretrained))
    if options.replay.data is not None:
        old_folder(options, pretrained.tokenizer if pretrained else open_dataset(folder).tokenizer)


def cpus_of(options: PretrainOptions) -> int:
    """CPUs of a worker."""
    return max(1, options.machine.threads)


def resources_of_worker(options: PretrainOptions, cluster: dict[str, float]) -> dict[str, int]:
    """Resources of each worker: a GPU if `cluster` has any, and CPUs.

    Raises:
        UserError: the cluster has too few, so that Ray would wait for them without an end.
    """
    found = {"CPU": cpus_of(options)}
    if options.machine.device == "cuda" or (options.machine.device == "auto" and cluster.get("GPU", 0) > 0):
        found["GPU"] = 1
    for resource, count in found.items():
        needed, available = count * options.processes, int(cluster.get(resource, 0))
        if needed > available:
            remedies = [f"at most --processes {available // count}"] if available >= count else []
            remedies += ["--machine.device cpu"] if resource == "GPU" else []
            advice = f"; give {' or '.join(remedies)}" if remedies else ""
            raise UserError(
                f"--processes {options.processes} needs {needed} {resource}s, and Ray has {available}{advice}"
            )
    return found


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """The signals of NUMBERS that arrive in the block. A second Ctrl-C raises KeyboardInterrupt."""
    received: list[int] = []

    def catch(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, catch) for number in NUMBERS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def follow(
    ray: Any, given: PretrainOptions, name: str, storage: str, streams: dict[str, TextIO], received: list[int]
) -> int:
    """Trains on Ray, printing the output of the workers; returns the exit code.

    Args:
        storage: an empty folder for Ray Train, which writes only markers there.
        streams: the streams of the driver, by name.
        received: signals of the driver.
    """
    resources = resources_of_worker(given, ray.cluster_resources())
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    relay = ray.remote(num_cpus=0, scheduling_strategy=here)(Relay).remote()
    task = {
        "options": configuration.to_dict(replace(given, **LAUNCH)),
        "name": name,
        "folder": os.getcwd(),
        "relay": relay,
    }
    train = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(run_trainer)
    ended = train.remote(task, given.processes, resources, storage, int(given.machine.timeout))
    passed, started, waited = False, False, 0.0
    while True:
        done, _ = ray.wait([ended], timeout=TICK)
        attempts, code, output = ray.get(relay.read.remote())
        for stream, text in output:
            print(text, end="", file=streams[stream], flush=True)
        if received and not attempts:
            return 128 + received[0]
        if received and not passed:
            ray.get(relay.stop.remote(received[0]))
            passed = True
        if code == 2:
            return code  # the other workers may wait for the one that has failed
        if done:
            return 1 if failed(ray, ended, given) or code is None else code
        started, waited = started or attempts > 0, waited + TICK
        if not started and waited - TICK < STARTUP <= waited:
            echo(f"waiting for {given.processes} workers: the CPUs or GPUs of the Ray cluster may be in use")


def failed(ray: Any, ended: Any, given: PretrainOptions) -> bool:
    """Returns whether the trainer has failed; prints how to resume then."""
    try:
        ray.get(ended)
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
        run = f"{shlex.quote(given.out)} --launch ray --processes {given.processes}"
        echo(
            f"error: training has failed and is not restarted again ({lines[-1][:300] if lines else error!r}); after "
            f"fixing the reason, resume from the newest checkpoint with: fastbert pretrain --resume {run}"
        )
        return True
    return False
