"""What the operating system, memory and broken installations refuse: user errors with the right name and remedy."""

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastbert_kernels import configurations

from fastbert import cli
from fastbert.bench.contestants import Contestant, Runner
from fastbert.data.partial import partial_folder
from fastbert.errors import UserError
from fastbert.files import disk_errors, locked_folder
from fastbert.inputs import UnreadableError, input_errors
from fastbert.requirements import OLDEST, check_requirements, refuse_several_processes
from fastbert.studies.engine.jobs import run_job
from fastbert.studies.engine.outcomes import print_failures
from fastbert.studies.engine.ray_backend import outcome_of
from fastbert.system_errors import user_error

ROOT = Path(__file__).parents[1]
REFUSALS = {
    "ENOSPC": "the disk is full",
    "EDQUOT": "quota",
    "EFBIG": "ulimit -f",
    "EROFS": "read-only",
    "EACCES": "no permission",
    "EPERM": "no permission",
    "EMFILE": "ulimit -n",
    "ENFILE": "too many files are open on this machine",
    "ELOOP": "link",
    "ENAMETOOLONG": "too long",
    "EBUSY": "in use",
    "ETXTBSY": "a running program",
    "EIO": "disk",
    "ESTALE": "network file system",
    "ETIMEDOUT": "network file system",
}


def raised(number: int) -> OSError:
    return OSError(number, os.strerror(number), "a/file")


@pytest.mark.parametrize(("name", "message"), REFUSALS.items())
def test_refusals_are_user_errors(name: str, message: str) -> None:
    error = raised(getattr(errno, name))
    found = str(user_error(error))
    assert message in found and "a/file" in found and "; " in found
    with (
        pytest.raises(UserError, match=f"(?s)(the/output.*{message}|{message}.*the/output)"),
        disk_errors("the/output"),
    ):
        raise error
    with pytest.raises(UserError, match="the/input") as reading, input_errors("the/input"):
        raise error
    assert isinstance(reading.value, UnreadableError) == (name not in ("ELOOP", "ENAMETOOLONG", "EIO"))


@pytest.mark.parametrize(
    "error",
    [raised(errno.ENOENT), raised(errno.EINVAL), BrokenPipeError(errno.EPIPE, "x"), ValueError("out of memory"),
     RuntimeError("shape"), ImportError("no", name="fastbert.nothing"), OSError("odd")],
)  # fmt: skip
def test_internal_errors_are_none(error: Exception) -> None:
    assert user_error(error) is None


def throw(error: Exception) -> None:
    raise error


def too_much() -> Iterator[Callable[[], object]]:
    yield lambda: np.ones(2**50)
    yield lambda: torch.ones(2**50)
    yield lambda: bytearray(2**62)
    yield partial(throw, raised(errno.ENOMEM))
    yield partial(throw, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"))


@pytest.mark.parametrize("allocate", list(too_much()))
def test_too_little_memory(allocate: Callable[[], object], monkeypatch, capsys) -> None:
    monkeypatch.setitem(cli.JOBS, "pretrain", (lambda _: allocate(), ""))
    assert cli.main(["pretrain"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: out of memory") and "--machine.micro-batch-size" in printed
    assert printed.count("\n") == 1


def test_the_command_line_prints_refusals_and_raises_the_rest(monkeypatch, capsys) -> None:
    def job(error: Exception) -> int:
        def run(_: list[str]) -> int:
            raise error

        monkeypatch.setitem(cli.JOBS, "pretrain", (run, ""))
        return cli.main(["pretrain"])

    assert job(raised(errno.EACCES)) == 2
    assert capsys.readouterr().err == "error: no permission: a/file; change the permissions, or give another path\n"
    assert job(ModuleNotFoundError("No module named 'rich'", name="rich")) == 2
    assert "the package rich cannot be imported" in capsys.readouterr().err
    assert job(OSError("30 requested and 12 written")) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert job(RuntimeError("can't start new thread")) == 2
    assert "ulimit -u" in capsys.readouterr().err
    missing = ImportError("libgfortran.so: cannot open shared object file: Too many open files", name="scipy")
    for error in (Exception("Too many open files (os error 24)"), missing, raised(errno.EMFILE)):
        assert job(error) == 2
        assert re.fullmatch(
            r"error: too many files are open(: a/file)?; raise the limit \(ulimit -n\)\n", capsys.readouterr().err
        )
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    with pytest.raises(FileNotFoundError) as found:
        tempfile.gettempdir()
    assert job(found.value) == 2
    assert "set TMPDIR" in capsys.readouterr().err
    for error in (FileNotFoundError(2, "x", "y"), BrokenPipeError(32, "x"), ImportError("x", name="fastbert.cli")):
        with pytest.raises(type(error)):
            job(error)


def test_no_home_directory(monkeypatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    assert configurations.load_tuned("a GPU") is None
    with pytest.raises(RuntimeError) as found:
        configurations.file_of("a GPU")
    assert "set HOME, or XDG_CACHE_HOME" in str(user_error(found.value))


def test_a_library_that_does_not_load() -> None:
    """torch loads CUDA's by ctypes, and their absence has no error number."""
    code = "import ctypes; ctypes.CDLL('libnothing.so.9')"
    namespace = {"__name__": "torch._load"}
    with pytest.raises(OSError, match=r"libnothing\.so\.9") as found:
        exec(code, namespace)
    assert str(user_error(found.value)).startswith("the package torch cannot be imported (libnothing.so.9")


# --- locks


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: socket.socket(socket.AF_UNIX).bind(str(path))])
def test_a_lock_that_is_no_file(make: Callable[[Path], object], tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    make(Path(".lock"))
    with pytest.raises(UserError, match=r"the lock \.lock is not a file; remove it"), locked_folder("."):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EINVAL, errno.ENOSYS])
def test_file_systems_without_locks(number: int, tmp_path, monkeypatch) -> None:
    def flock(*_) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked_folder(tmp_path / "run"), partial_folder(tmp_path / "out", {}) as part:
        (part.folder / "a").write_text("x")
    assert (tmp_path / "out" / "a").read_text() == "x"


# --- jobs of a sweep, contestants


@pytest.mark.parametrize(
    ("error", "reason", "traceback"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "it ran out of memory", False),
        (raised(errno.ENOSPC), "the disk is full", False),
        (UserError("so"), "so", False),
        (ZeroDivisionError("x"), "ZeroDivisionError: x", True),
    ],
)
def test_a_failed_job_shows_a_traceback_only_of_internal_errors(
    error: Exception, reason: str, traceback: bool, tmp_path, monkeypatch
) -> None:
    def train(*_) -> None:
        raise error

    monkeypatch.setattr("fastbert.studies.engine.jobs._train", train)
    monkeypatch.setattr(sys, "stderr", open(2, "w", closefd=False))  # noqa: SIM115 (as in a worker)
    outcome = run_job({}, tmp_path)
    assert outcome["status"] == "failed" and outcome["reason"].startswith(reason)
    assert ("Traceback" in "".join(outcome["log"])) == traceback
    assert outcome["log"]


class RayError(Exception):
    """Stands for those of Ray."""

    cause: Exception | None = None


@pytest.mark.parametrize(
    ("cause", "reason"),
    [(raised(errno.ENOSPC), "the disk is full: a/file"), (None, "Ray could not run it (RayError: Traceback")],
)
def test_a_job_that_ray_could_not_run(cause: Exception | None, reason: str, tmp_path, capsys) -> None:
    def get(_: object) -> None:
        error = RayError("Traceback (most recent call last)")
        error.cause = cause
        raise error

    exceptions = SimpleNamespace(RayError=RayError, OutOfMemoryError=KeyError, WorkerCrashedError=KeyError)
    outcome = outcome_of(SimpleNamespace(get=get, exceptions=exceptions), None, tmp_path)
    assert outcome["status"] == "failed" and outcome["reason"].startswith(reason)
    assert print_failures([{"task": "t", "model": "m", "folder": "f", **outcome}], 1, lambda _: "") == 1
    printed = capsys.readouterr().err
    assert reason in printed and "the end of" not in printed


def test_a_contestant_that_was_killed() -> None:
    class Ended:
        exitcode = -9

        def join(self) -> None: ...

        def send(self, _: object) -> None:
            raise BrokenPipeError

        def recv(self) -> None:
            raise EOFError

    runner = Runner.__new__(Runner)
    runner.contestant, runner._process, runner._pipe = Contestant("peer", None), Ended(), Ended()
    with pytest.raises(UserError, match="the process of peer was killed, most likely out of memory"):
        runner.seconds(1)


# --- launchers and versions


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "job", "problem"),
    [
        (TORCHRUN, "prepare", "torchrun started 2 processes, but fastbert prepare runs in one"),
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"},
            "pretrain",
            "mpirun started 4 processes, which torchrun must start",
        ),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "finetune", "srun started 2 processes, which torchrun"),
    ],
)
def test_several_processes_are_refused(
    environment: dict[str, str], job: str, problem: str, monkeypatch, capsys
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main([job, "--out", "nowhere"]) == 2
    assert problem in capsys.readouterr().err
    refuse_several_processes({name: "1" if "0" not in value else "0" for name, value in environment.items()}, job)
    refuse_several_processes({"WORLD_SIZE": "2"}, job)  # of another program's
    refuse_several_processes(TORCHRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "pretrain")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["pretrain", "--help"], ["help", "finetune"]])
def test_one_of_several_processes_prints_the_help(arguments: list[str], monkeypatch, capsys) -> None:
    texts = {}
    for rank in ("0", "1"):
        for name, value in (TORCHRUN | {"RANK": rank, "LOCAL_RANK": rank}).items():
            monkeypatch.setenv(name, value)
        try:
            code = cli.main(arguments)
        except SystemExit as ended:
            code = ended.code
        assert code == (0 if arguments else 2)
        texts[rank] = capsys.readouterr().out
    assert "usage: fastbert" in texts["0"] and not texts["1"]


def test_old_packages_are_refused(monkeypatch, capsys) -> None:
    check_requirements()
    required = (ROOT / "setup.py").read_text()
    for package, oldest in OLDEST.items():
        assert f'"{package}>={oldest}"' in required
    monkeypatch.setattr("importlib.metadata.version", OLDEST.get)
    check_requirements()
    monkeypatch.setattr("importlib.metadata.version", lambda package: "2.9.1+cu126" if package == "torch" else "99")
    assert cli.main(["pretrain"]) == 2
    assert capsys.readouterr().err.startswith("error: torch 2.9.1+cu126 is too old: fastbert needs 2.11 or newer; pip")


def test_an_old_python_is_refused() -> None:
    code = "import sys; sys.version_info = (3, 10, 2, 'final', 0); import fastbert"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: fastbert needs Python 3.11 or newer, and this is 3.10\n")


def test_nobody_is_sent_to_another_project() -> None:
    """What is called fastbert on PyPI is not this."""
    names = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout
    wrong = re.compile(r"pip3? [^\n]*\binstall [^\n]*(?<![\w./-])fastbert(?![\w.-])|fastbert\[")
    for name in names.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".sh", ".txt", ".yaml") and path != Path(__file__):
            assert not wrong.search(path.read_text()), name
    assert 'name="fastbert-pretraining"' in (ROOT / "setup.py").read_text()
