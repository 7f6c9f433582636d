"""Worker processes of studies that are forked from a server which has imported torch: a start takes a fraction of a
second. tests/studies/test_ends.py starts real ones."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tests.ranks import IMPORTED

MODULE = "fastbert.studies.engine.worker"
IMPORTED_BY_WORKERS = (
    *(*IMPORTED, MODULE),
    "fastbert.finetuning.seed",
    "fastbert.studies.ablate.pretrain_jobs",
    "fastbert.studies.active.round_job",
    "fastbert.studies.shared.evaluate_jobs",
    "fastbert.studies.shared.finetune_jobs",
)


class ForkedWorker:
    """Stands for `subprocess.Popen` of a worker."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], **options: Any) -> None:
        assert command[-1] == MODULE
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED_BY_WORKERS))
        requests, ours = context.Pipe(duplex=False)
        outcomes, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(requests, theirs, dict(env), os.getcwd()), daemon=True)
        self._process.start()
        self.stdin, self.stdout = (
            os.fdopen(os.dup(end.fileno()), mode, encoding="utf-8") for end, mode in ((ours, "w"), (outcomes, "r"))
        )
        for end in (requests, ours, outcomes, theirs):
            end.close()

    def wait(self, timeout: float | None = None) -> int:
        """As `Popen.wait`."""
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired(MODULE, timeout)
        return self._process.exitcode

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()


class Subprocess:
    """Stands for the module `subprocess` where workers are started."""

    Popen, PIPE, TimeoutExpired = ForkedWorker, subprocess.PIPE, subprocess.TimeoutExpired


def _work(requests: Any, outcomes: Any, variables: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Control-C ends the study, which ends its workers
    os.dup2(requests.fileno(), 0)
    os.dup2(outcomes.fileno(), 1)
    # They are open as long as the process lives.
    sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")  # noqa: SIM115
    import torch

    from fastbert.studies.engine.worker import main

    torch.set_num_threads(int(variables.get("OMP_NUM_THREADS", "1")))
    main()
