"""What fastbert needs of the machine before a job starts: packages that are not too old, and a process of its own."""

import re
from collections.abc import Mapping

from fastbert.errors import UserError

OLDEST = {"torch": "2.11", "transformers": "5.0", "tokenizers": "0.22", "numpy": "2.0", "tyro": "1.0"}
"""The packages whose older versions fail in the midst of a job; as in setup.py."""
_LAUNCHERS = (  # what they set in each process: the number of processes
    ("torchrun", "WORLD_SIZE", "RANK"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


def check_requirements() -> None:
    """Raises a UserError if a package is too old. One without metadata (a build from source) is taken as it is."""
    import importlib.metadata  # not for a help screen

    for package, oldest in OLDEST.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if _numbers(found) < _numbers(oldest):
            raise UserError(
                f"{package} {found} is too old: fastbert needs {oldest} or newer; pip install '{package}>={oldest}'"
            )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def refuse_several_processes(environment: Mapping[str, str]) -> None:
    """Raises a UserError if a launcher has started this process as one of several."""
    for launcher, size, rank in _LAUNCHERS:
        processes = environment.get(size, "")
        if rank in environment and processes.isdecimal() and int(processes) > 1:
            raise UserError(
                f"{launcher} started {processes} processes, and fastbert trains in one process, on one GPU; start it "
                "without a launcher (or as one process), and choose the GPU with --machine.device cuda:N"
            )
