"""Several processes of one training, with failures: started by torchrun (this file as its program), or much faster by a
fork server, which stands for torchrun: it has the store, and after a failure it ends the other processes.

A failure is (rank, function, call, action): before that call of the function, counted from 1, the rank does the action;
call 0 means every call. Actions: kill, stop, term, int, term launcher, user (a user error), crash (an internal error),
full (the disk is full), nan (the result is not finite), or seconds to sleep.
"""

import errno
import faulthandler
import importlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastbert.cli import main
from fastbert.errors import UserError
from tests.ranks import IMPORTED

Failure = tuple[int, str, int, str | float]
FAILURES = "TESTED_FAILURES"  # environment variable of the program: the failures of each attempt of torchrun, as JSON
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "int": signal.SIGINT}
TRAIN, SAVE = "fastbert.pretraining.loop:Trainer.train_step", "fastbert.training.checkpoints:_write_tensors"
LOSSES = "fastbert.training.step:counted_losses"
HANGS = 100.0  # seconds after which a process shows where it hangs, and ends


@dataclass(frozen=True)
class Ended:
    """The end of all processes of a launch."""

    codes: list[int]
    """Exit codes; -N after signal N."""
    messages: str
    """Standard error of all processes."""
    seconds: float

    @property
    def errors(self) -> list[str]:
        return [line for line in self.messages.splitlines() if line.startswith(("error:", "Traceback"))]


def inject(failure: Failure) -> None:
    """Replaces the function of a failure, in this process."""
    _, path, number, action = failure
    module, _, names = path.partition(":")
    owner, (*outer, name) = importlib.import_module(module), names.split(".")
    for part in outer:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), 0

    @wraps(function)
    def faulty(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        hit = number in (0, calls)
        if hit:
            act(action)
        result = function(*arguments, **options)
        return {key: value * torch.nan for key, value in result.items()} if hit and action == "nan" else result

    setattr(owner, name, faulty)


def act(action: str | float) -> None:
    if action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
    elif action == "term launcher":
        os.kill(os.getppid(), signal.SIGTERM)
    elif action == "user":
        raise UserError("a user error of the test")
    elif action == "crash":
        raise ValueError("an internal error of the test")
    elif action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif action != "nan":
        time.sleep(action)


def rank_main(rank: int, size: int, port: int, arguments: list[str], failures: Sequence[Failure], output: Path) -> None:
    """One process of a launch by the fork server."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    sys.exit(run(rank, arguments, failures))


def run(rank: int, arguments: list[str], failures: Sequence[Failure]) -> int:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(HANGS, exit=True)  # a hang is a failure, and shows where
    for failure in failures:
        if failure[0] == rank:
            inject(failure)
    return main(arguments)


def launch(
    size: int,
    arguments: list[str],
    folder: Path,
    failures: Sequence[Failure] = (),
    agent: bool = True,
    grace: float = 30.0,
) -> Ended:
    """Runs fastbert with `arguments` in `size` processes.

    Args:
        folder: for the output of the processes.
        agent: the launcher ends the others after a failure; False: nobody does, as on another machine.
        grace: seconds between SIGTERM and SIGKILL.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED, __name__])
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    outputs = [folder / f"rank-{rank}.txt" for rank in range(size)]
    for output in outputs:
        output.write_text("")
    begin, asked = time.monotonic(), math.inf
    ranks = [
        context.Process(target=rank_main, args=(rank, size, server.port, arguments, failures, outputs[rank]))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    while any(process.exitcode is None for process in ranks):
        now = time.monotonic()
        if agent and asked == math.inf and any(process.exitcode for process in ranks):
            asked = now
            for process in ranks:
                process.terminate()
        if now > asked + grace or now > begin + 1.5 * HANGS:
            for process in ranks:
                process.kill()
        time.sleep(0.05)
    messages = "".join(output.read_text() for output in outputs)
    return Ended([process.exitcode for process in ranks], messages, time.monotonic() - begin)


def torchrun(options: list[str], arguments: list[str], attempts: Sequence[Sequence[Failure]]) -> Ended:
    """Runs fastbert with `arguments` under torchrun with `options`, and with the failures of each attempt."""
    begin, folder = time.monotonic(), Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "tests.launch", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", FAILURES: json.dumps(attempts)}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(folder / "kernels")])
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3 * HANGS, check=False)
    return Ended([found.returncode], found.stderr, time.monotonic() - begin)


if __name__ == "__main__":
    number = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    sys.exit(
        run(int(os.environ["RANK"]), sys.argv[1:], dict(enumerate(json.loads(os.environ[FAILURES]))).get(number, ()))
    )
