"""Several processes with the variables that torchrun sets, forked from a server that has imported torch: a launch takes
a fraction of a second."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

IMPORTED = (
    "tests.collector",
    "fastbert.objectives.electra",
    "fastbert.training.parallel",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "fastbert.objectives.mlm",
    "fastbert.objectives.multiple_choice",
    "fastbert.pretraining.pretrain",
    "fastbert.training.muon",
)


def run_ranks(
    function: Callable[..., Any], size: int, folder: Path, *arguments: Any, timeout: float = 300
) -> list[int]:
    """Calls a function of a module in `size` processes and returns their exit codes, -N after signal N.

    Args:
        folder: for the output of the ranks, rank-0.txt and so on.
        timeout: seconds after which they are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED, function.__module__])
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        context.Process(target=_rank, args=(function, rank, size, port, str(folder), arguments)) for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout)
        if rank.is_alive():
            rank.kill()
            rank.join()
    return [rank.exitcode for rank in ranks]


def output_of(folder: Path, rank: int = 0) -> str:
    return (folder / f"rank-{rank}.txt").read_text()


def _rank(function: Callable[..., Any], rank: int, size: int, port: int, folder: str, arguments: tuple) -> None:
    handle = os.open(f"{folder}/rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    import torch

    torch.set_num_threads(1)
    function(*arguments)
