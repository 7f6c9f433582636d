"""Requirements checked before a job starts: recent packages, arguments that are text, and a launcher that it knows."""

import re
import sys
from collections.abc import Mapping, Sequence

from fastbert.errors import UserError

OLDEST = {"torch": "2.11", "transformers": "5.0", "tokenizers": "0.22", "numpy": "2.0"}
"""Minimum versions of packages, as in setup.py; older ones would fail during a job."""
_LAUNCHERS = (  # with the variables that they set: number of processes and rank
    ("torchrun", "WORLD_SIZE", "RANK"),  # first: one that srun or mpirun starts on each machine is fine
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)

_OF_SEVERAL = ("pretrain", "finetune")  # jobs that several processes can do together


def check_requirements() -> None:
    """Raises a UserError if a package is too old. A package without metadata (a build from source) is not checked."""
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


def check_text(arguments: Sequence[str]) -> None:
    """Raises a UserError if an argument is not text in this locale, because records cannot contain such names."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{argument!r} is not text in the encoding of this locale ({sys.getfilesystemencoding()}); rename the "
                "file, or set LC_ALL=C.UTF-8 if it is named in UTF-8"
            ) from None


def refuse_several_processes(environment: Mapping[str, str], job: str) -> None:
    """Raises a UserError if a launcher has started this process as one of several, and the job cannot use them."""
    for launcher, size, rank in _LAUNCHERS:
        processes = environment.get(size, "")
        if rank not in environment or not processes.isdecimal() or int(processes) < 2:
            continue
        if job not in _OF_SEVERAL:
            raise UserError(
                f"{launcher} started {processes} processes, but fastbert {job} runs in one; start it without a launcher"
            )
        if launcher == "torchrun":
            return
        raise UserError(
            f"{launcher} started {processes} processes, which torchrun must start: one torchrun on each machine "
            "(docs/gpus.md has the command)"
        )
