"""Ends before the end: signals, kill -9 of the whole sweep and of a worker, jobs that fail. Nothing is lost, and the
others continue."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastbert.cli import main
from tests.finetuning.conftest import tiny_model
from tests.studies.conftest import command_of, read_rows, without_times, workers_of, write_sweep


@pytest.fixture(scope="module", autouse=True)
def fast_workers() -> None:
    """The workers here are real ones: their processes are found and killed."""


def start(path: str, out: Path, *flags: str, job: str = "sweep") -> subprocess.Popen:
    """A sweep, or another job, in a process group of its own."""
    command = [sys.executable, "-m", "fastbert", job, path, "--out", str(out), *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(happens) -> None:
    end = time.monotonic() + 120
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.02)


def rows_so_far(out: Path) -> int:
    return len(read_rows(out)) if (out / "results.jsonl").is_file() else 0


def meanwhile(happens, act) -> threading.Thread:
    """Does something as soon as `happens`, in parallel to the test."""
    thread = threading.Thread(target=lambda: (wait_for(happens), act()), daemon=True)
    thread.start()
    return thread


def test_stopped_killed_and_continued_equals_uninterrupted(axes, finished, tmp_path, capsys) -> None:
    """A signal to the whole group, as terminals and batch systems send it; then kill -9 of the sweep alone."""
    path, out = write_sweep(tmp_path, axes), tmp_path / "out"
    process = start(path, out)
    wait_for(lambda: list(out.glob("jobs/*/log.txt")))
    (worker,) = workers_of(process.pid)
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 143, error
    assert "the same command continues" in error and "Traceback" not in error and "FAILED" not in error
    assert not command_of(worker)
    assert all(row["status"] == "done" for row in (read_rows(out) if rows_so_far(out) else []))

    before = rows_so_far(out)
    process = start(path, out)
    wait_for(lambda: rows_so_far(out) > before)
    (worker,) = workers_of(process.pid)
    assert main(["sweep", path, "--out", str(out)]) == 2
    assert "another process" in capsys.readouterr().err
    process.kill()
    process.communicate()
    wait_for(lambda: not command_of(worker))  # nobody trains on
    stamps = {row["id"]: (Path(row["folder"]) / "log.txt").stat().st_mtime_ns for row in read_rows(out)}

    assert main(["sweep", path, "--out", str(out)]) == 0
    assert f"{len(stamps)} done before" in capsys.readouterr().err
    assert without_times(read_rows(out)) == without_times(read_rows(finished))
    again = {row["id"]: (Path(row["folder"]) / "log.txt").stat().st_mtime_ns for row in read_rows(out)}
    assert {key: again[key] for key in stamps} == stamps


def test_control_c(axes, tmp_path, capsys) -> None:
    """In the middle of a long job: at once, and the job has not failed."""
    path, out = write_sweep(tmp_path, axes, epochs=5000), tmp_path / "out"
    stop = meanwhile(
        lambda: len(list(out.glob("jobs/*/run/seed-*/metrics.jsonl"))) == 1,
        lambda: [os.kill(pid, signal.SIGINT) for pid in (*workers_of(os.getpid()), os.getpid())],
    )
    assert main(["sweep", path, "--out", str(out)]) == 130
    stop.join()
    error = capsys.readouterr().err
    assert "stopped; 0 of 4 jobs have ended; the same command continues" in error
    assert not workers_of(os.getpid()) and rows_so_far(out) == 0


def test_failures_stay_alone_and_are_run_again(axes, finished, tmp_path, capsys) -> None:
    """One worker is killed, as by a system without memory; one job diverges; one ends well."""
    out = tmp_path / "out"
    # The jobs with more epochs come first.
    long = {"task": axes["tasks"][0], "name": "long", "epochs": 3000, "learning_rates": [3e-3, 1e18]}
    tasks = [long, axes["tasks"][0]]
    path = write_sweep(tmp_path, axes, models=axes["models"][1:], tasks=tasks, seeds=1, retries=0)
    logs = {}

    def kill() -> None:
        (log,) = out.glob("jobs/*/run/seed-0/metrics.jsonl")
        logs["killed"] = log.parents[2].name
        os.kill(workers_of(os.getpid())[0], signal.SIGKILL)

    thread = meanwhile(lambda: list(out.glob("jobs/*/run/seed-0/metrics.jsonl")), kill)
    assert main(["sweep", path, "--out", str(out)]) == 1
    thread.join()
    error = capsys.readouterr().err
    rows = {row["id"]: row for row in read_rows(out)}
    killed = rows[logs["killed"]]
    assert killed["status"] == "failed" and killed["task"] == "long" and killed["learning_rate"] == 3e-3
    assert "killed by SIGKILL" in killed["reason"] and "micro_batch_size" in killed["fix"]
    (diverged,) = [row for row in rows.values() if row["learning_rate"] == 1e18]
    assert "not finite" in diverged["reason"] and "not finite" in "".join(diverged["log"])
    (done,) = [row for row in rows.values() if row["status"] == "done"]
    same = [row for row in read_rows(finished) if row["id"] == done["id"]]
    assert without_times([done]) == without_times(same) != []
    assert "2 of 3 jobs failed; the same command runs them again" in error and "the system was out of memory" in error
    assert f"{logs['killed']}/log.txt" in error and "step " in error
    assert "1 of 3 jobs have finished, 2 failed" in (out / "report" / "report.md").read_text()

    long |= {"epochs": 2, "learning_rates": [3e-3], "train_fraction": 0.5}  # another job
    again = write_sweep(tmp_path, axes, models=axes["models"][1:], tasks=[long, axes["tasks"][0]], seeds=1)
    assert main(["sweep", again, "--out", str(out)]) == 0
    assert "2 jobs: 1 checkpoint x 2 tasks x 1 seed; 1 done before" in capsys.readouterr().err
    assert len(read_rows(out)) == 4


def test_a_job_that_runs_out_of_memory(axes, tmp_path, capsys) -> None:
    """2.5 GiB of addresses for a job whose activations take more; in smaller micro-batches the same job fits."""
    wide = str(tiny_model(tmp_path / "wide", ffn=2**18, layers=2, width=4, heads=1))
    one = {"models": [wide], "batch_sizes": [64], "seeds": 1, "epochs": 1, "retries": 0}
    path, out = write_sweep(tmp_path, axes, **one), tmp_path / "out"

    def limit() -> None:
        resource.prlimit(workers_of(os.getpid())[0], resource.RLIMIT_AS, (5 * 2**29, 5 * 2**29))

    thread = meanwhile(lambda: workers_of(os.getpid()), limit)
    assert main(["sweep", path, "--out", str(out)]) == 1
    thread.join()
    error = capsys.readouterr().err
    (row,) = read_rows(out)
    assert "it ran out of memory" in row["reason"] and "micro_batch_size" in row["fix"], row
    assert "Traceback" in "\n".join(row["log"]) or "allocate memory" in "\n".join(row["log"])
    assert "to fix it: use fewer --workers" in error
    assert "it ran out of memory" in (out / "report" / "report.html").read_text()
    machine = axes["finetune"]["machine"] | {"micro_batch_size": 1}  # what the message advises; the same job
    fixed = write_sweep(tmp_path, axes, **one, finetune={"machine": machine})
    thread = meanwhile(lambda: workers_of(os.getpid()), limit)
    assert main(["sweep", fixed, "--out", str(out)]) == 0
    thread.join()
    assert "1 failed before and run again" in capsys.readouterr().err
