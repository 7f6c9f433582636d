"""Processes of `fastbert pretrain --launch ray` other than the driver: the relay, the trainer and its workers. Imports
what they need only there, because each is a Python process of its own."""

import io
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastbert.errors import UserError, message_of
from fastbert.streams import echo
from fastbert.system_errors import user_error

RESTARTS = 3  # stated in the help of --launch
TICK = 0.2  # seconds between two looks at the relay
SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also how late the end of the workers is noticed
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise the workers' output is written twice
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",  # after a failure, which leaves a rank waiting for the others
}
"""Environment variables of Ray Train."""


class Relay:
    """Actor that passes output and exit code from the workers to the driver, and a signal from the driver to them."""

    def __init__(self) -> None:
        self._attempts, self._code = 0, None
        self._signal: int | None = None
        self._output: list[tuple[str, str]] = []

    def begin(self) -> int:
        """Number of the attempt that begins, from 0."""
        self._attempts += 1
        return self._attempts - 1

    def write(self, stream: str, text: str) -> None:
        self._output.append((stream, text))

    def end(self, code: int) -> None:
        """Sets the exit code of the command."""
        self._code = code

    def stop(self, number: int) -> None:
        self._signal = number

    def signal(self) -> int | None:
        return self._signal

    def read(self) -> tuple[int, int | None, list[tuple[str, str]]]:
        """Attempts so far, the exit code if there is one, and the output since the last call."""
        output, self._output = self._output, []
        return self._attempts, self._code, output


def run_trainer(task: dict[str, Any], processes: int, resources: dict[str, int], storage: str, timeout: int) -> None:
    """Runs `work` in the workers; a task of Ray, because the driver must not block.

    Raises:
        TrainingFailedError: a worker has failed too often.
    """
    os.environ.update(SETTINGS)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        work,
        train_loop_config=task,
        torch_config=TorchConfig(timeout_s=timeout),
        scaling_config=ScalingConfig(num_workers=processes, use_gpu="GPU" in resources, resources_per_worker=resources),
        run_config=RunConfig(
            name="fastbert", storage_path=storage, failure_config=FailureConfig(max_failures=RESTARTS)
        ),
    ).fit()


def work(task: dict[str, Any]) -> None:
    """Trains in one of the workers.

    Raises:
        RuntimeError: it has failed for a reason that a restart may remove.
    """
    import ray
    import ray.train

    relay, first = task["relay"], ray.train.get_context().get_world_rank() == 0
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Forwarded(relay, stream) for stream in ("stdout", "stderr"))
    ended = threading.Event()
    if first:
        attempt = ray.get(relay.begin.remote())
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)  # as torchrun does
        if attempt:
            echo(f"a process was killed or has failed; all are started again ({attempt} of {RESTARTS} times)")

        def poll() -> int | None:
            return ray.get(relay.signal.remote())

        threading.Thread(target=pass_signal, args=(poll, ended), daemon=True).start()
    try:
        code = exit_code_of(lambda: train_here(task))
        if code is not None and (first or code == 2):
            ray.get(relay.end.remote(code))
    finally:
        ended.set()
        sys.stdout, sys.stderr = before  # of Ray, which prints the error again


def train_here(task: dict[str, Any]) -> int:
    """Trains in the folder of the driver; returns the exit code."""
    folder = Path(task["folder"])
    if not folder.is_dir():
        raise UserError(
            f"the node {socket.gethostname()} has no folder {folder}, in which the command was started; all nodes need "
            "a common file system"
        )
    os.chdir(folder)
    from fastbert import config as configuration
    from fastbert.pretraining.options import PretrainOptions
    from fastbert.pretraining.pretrain import pretrain

    return pretrain(configuration.from_dict(PretrainOptions, task["options"], "the driver's options"), task["name"])


def exit_code_of(function: Callable[[], int]) -> int | None:
    """Exit code of the command after `function`, the exit code of this worker; prints its error. None if another worker
    reports it.

    Raises:
        RuntimeError: an internal error or a lost connection.
    """
    from fastbert.training.parallel import OtherRankEndedError, exit_code

    try:
        return function()
    except OtherRankEndedError as error:
        if error.code == 2:
            return None
        raise RuntimeError("another worker has failed") from None
    except BaseException as error:
        found = user_error(error) if isinstance(error, Exception) else None
        if found is not None:
            echo(f"error: {message_of(found)}")
            return 2
        if (code := exit_code(error)) != 1:  # printed before
            return code
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        raise RuntimeError("the worker has failed") from None


def pass_signal(poll: Callable[[], int | None], ended: threading.Event) -> None:
    """Stops the training like the signal that the driver has received. Runs in a thread, as `work` does: neither can
    install handlers."""
    from fastbert.training.interrupts import receive

    while not ended.wait(TICK):
        number = poll()
        if number is not None and receive(number):
            return


class Forwarded(io.TextIOBase):
    """Output stream of a worker that the driver prints, in whole lines."""

    def __init__(self, relay: Any, name: str) -> None:
        self._relay, self._name, self._line = relay, name, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        lines, newline, rest = (self._line + text).rpartition("\n")
        self._line = rest
        if newline:
            self._relay.write.remote(self._name, lines + newline)
        return len(text)

    def flush(self) -> None:
        """Has no effect on the line that is being written, so that lines of several workers do not mix."""
