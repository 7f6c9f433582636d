"""The variables by which a launcher (torchrun, Ray) informs a process that it is one of several. Only then the code for
several is imported, which takes 0.6 s."""

import os
import shlex
from collections.abc import Mapping

from fastbert.training.world import ONE_PROCESS, World


def launched(environment: Mapping[str, str]) -> int:
    """Number of processes that were started together; 1 without a launcher."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return int(environment["WORLD_SIZE"]) if all(name in environment for name in names) else 1


def restarts(environment: Mapping[str, str]) -> bool:
    """Returns whether torchrun restarts the processes after a failure."""
    return launched(environment) > 1 and environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def resume_command(environment: Mapping[str, str], run: str) -> str:
    """Command that resumes a run in the same number of processes, for a message."""
    resume = f"pretrain --resume {shlex.quote(run)}"
    if launched(environment) == 1:
        return f"fastbert {resume}"
    if "TORCHELASTIC_USE_AGENT_STORE" in environment:
        return f"torchrun ... -m fastbert {resume}"
    return f"fastbert {resume} --launch ray --processes {launched(environment)}"


def join(timeout: float, shard: str = "none") -> World:
    """The processes that were started together, or one process; arguments as for `parallel.start`."""
    if launched(os.environ) == 1:
        return ONE_PROCESS
    from fastbert.training.parallel import start

    return start(timeout, shard)
