"""Processes that a command of a pipeline starts."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastbert.studies.pipelines.load import load_pipeline
from fastbert.studies.pipelines.runners import command_job


def test_processes_of_a_command_end_with_it(tmp_path) -> None:
    """Its standard input is empty, not the one through which the worker receives jobs."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "of-a-stopped-attempt").touch()
    line = "cat > {out}/input; sleep 1000 & echo $! > {out}/background; exit 3"
    reading, writing = os.pipe()
    job = {"options": {"run": line, "folders": {}, "resumes": False}}
    with running(lambda: command_job(job, out), stdin=reading) as process:
        wait_for(lambda: os.waitpid(process, os.WNOHANG) == (process, 0))
    os.close(writing)
    os.close(reading)
    assert (out / "input").read_text() == "" and not (out / "of-a-stopped-attempt").exists()
    wait_for(lambda: not Path("/proc", (out / "background").read_text().strip()).exists())


def test_a_command_of_several_long_lines(tmp_path) -> None:
    lines = f"for x in 1 2; do\n  echo $x {'long ' * 2000}>> {{out}}/file\ndone\n"
    (tmp_path / "x.yaml").write_text(
        json.dumps({"models": [{"name": "m", "path": str(tmp_path)}], "commands": [{"name": "c", "run": lines}]})
    )
    command = load_pipeline(tmp_path / "x.yaml")[0].commands["c"]
    assert command.run == lines.strip()
    (out := tmp_path / "run").mkdir()
    command_job({"options": {"run": command.run, "folders": {}, "resumes": False}}, out)
    assert (out / "file").read_text().count("long") == 4000


def test_processes_of_a_command_end_with_its_worker(tmp_path) -> None:
    line = "sh -c 'echo $$ > {out}/inner; sleep 1000; true' | cat; true"
    inner = tmp_path / "run" / "inner"
    with running(lambda: command_job({"options": {"run": line, "folders": {}, "resumes": False}}, tmp_path / "run")):
        wait_for(lambda: inner.is_file() and inner.read_text().strip())
    wait_for(lambda: not Path("/proc", inner.read_text().strip()).exists())


@contextmanager
def running(function: Callable[[], object], stdin: int | None = None) -> Iterator[int]:
    """A copy of this process that calls a function, and is killed in the end."""
    process = os.fork()
    if process == 0:
        try:
            if stdin is not None:
                os.dup2(stdin, 0)
            function()
        finally:
            os._exit(0)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
