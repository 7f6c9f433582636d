"""A run that is killed at any moment and resumed equals the uninterrupted one in metrics and weights."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastbert.pretraining import loop
from fastbert.training.checkpoints import Checkpointer
from fastbert.training.logbook import Logbook
from tests.flags import last_given, main
from tests.processes import in_child
from tests.stand_ins import around_steps, stop_before, stopped_clock

TIMES = ("tokens_per_second", "mfu")


def run_and_die(where: str, name: object, arguments: list[str]) -> None:
    """Runs a job in a process that kills itself with SIGKILL: before the update of a step, or inside the save of a
    checkpoint or export, with all files written and the folder not yet renamed."""
    train_step, rename = loop.Trainer.train_step, os.rename

    def stepping(trainer: loop.Trainer, number: int) -> None:
        if number == name:
            os.kill(os.getpid(), signal.SIGKILL)
        train_step(trainer, number)

    def renaming(source: object, target: object, *rest: object, **more: object) -> None:
        if str(target).endswith(str(name)):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target, *rest, **more)

    def before() -> None:
        if where == "step":
            loop.Trainer.train_step = stepping
        else:
            os.rename = renaming

    assert in_child(lambda: main(arguments), before) == -signal.SIGKILL


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def times_of(run: Path) -> dict[Path, int]:
    """When the files of the exports were written."""
    return {path: path.stat().st_mtime_ns for path in run.glob("exports/chck_*/*")}


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    last = sorted(path.name for path in (a / "checkpoints").iterdir())[-1]
    for name in ("model", "optimizer"):
        ours, theirs = (load_file(run / "checkpoints" / last / f"{name}.safetensors") for run in (a, b))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), key
    exported = [load_file(run / "model" / "model.safetensors") for run in (a, b)]
    assert all(torch.equal(exported[0][key], exported[1][key]) for key in exported[0])


def test_killed_five_times(flags, tmp_path, capsys, monkeypatch) -> None:
    """The uninterrupted run reads its rows when they are needed, the other one ahead, as on a GPU."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = [*flags, "--checkpoint-words", "1.7k,2.1k"]  # after steps 14 and 17
    assert main(["pretrain", *flags, "--out", str(whole)]) == 0
    assert [row["step"] for row in metrics(whole) if row["split"] == "validation"] == [10, 20, 30]
    monkeypatch.setattr(loop, "ReadAhead", partial(loop.ReadAhead, threaded=True))
    run_and_die("step", 3, ["pretrain", *flags, "--out", str(broken)])  # before the first checkpoint
    first_written: dict[Path, int] = {}
    for where, name, written in (
        *(("save", "chck_1.7k", []), ("save", "step-00000014", ["chck_1.7k"])),
        *(("step", 18, ["chck_1.7k", "chck_2.1k"]), ("save", "step-00000028", ["chck_1.7k", "chck_2.1k"])),
    ):
        run_and_die(where, name, ["pretrain", "--resume", str(broken)])
        leftovers = [path.parent.name for path in broken.glob("*/.*.tmp")]
        assert leftovers == {"chck_1.7k": ["exports"], 18: []}.get(name, ["checkpoints"])
        assert sorted(path.name for path in broken.glob("exports/chck_*")) == written
        first_written = times_of(broken) | first_written
    assert main(["pretrain", "--resume", str(broken)]) == 0
    assert not list(broken.glob("*/.*.tmp"))
    assert_same_run(whole, broken)
    assert times_of(broken) == first_written
    for path in whole.glob("exports/*/*"):
        again = broken / path.relative_to(whole)
        assert path.name == "README.md" or path.read_bytes() == again.read_bytes()  # which has the time
    names = sorted(path.name for path in (broken / "checkpoints").iterdir())
    assert names[-2:] == ["step-00000028", "step-00000030"]


def test_killed_from_outside_and_by_signals(flags, tmp_path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = last_given([*flags, "--log-every", "1"])
    assert main(["pretrain", *flags, "--out", str(whole)]) == 0
    command = [sys.executable, "-m", "fastbert", "pretrain"]
    for number, code, arguments in (
        (signal.SIGTERM, 143, [*flags, "--out", str(broken)]),
        (signal.SIGINT, 130, ["--resume", str(broken)]),
    ):
        rows = len(metrics(broken)) if broken.exists() else 0
        process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)
        wait_for_rows(broken / "metrics.jsonl", rows + 3, process)
        process.send_signal(number)
        _, printed = process.communicate(timeout=120)
        assert process.returncode == code, printed
        assert f"--resume {broken}" in printed
        last = max((broken / "checkpoints").iterdir())
        # The checkpoint is of the very step that was reached.
        assert json.loads((last / "state.json").read_text())["progress"]["step"] == int(last.name.split("-")[1])
    assert main(["pretrain", "--resume", str(broken)]) == 0
    assert_same_run(whole, broken)


def wait_for_rows(path: Path, count: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.005)


def test_science_is_fixed_and_machine_options_may_change(flags, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    assert main(["pretrain", *flags, "--out", str(run), "--steps", "8"]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["pretrain", "--resume", str(run), "--seed", "3", "--dropout", "0.2"]) == 2
    printed = capsys.readouterr().err
    assert "another experiment" in printed and "seed: 0 -> 3" in printed and "dropout: 0.1 -> 0.2" in printed
    assert main(["pretrain", *flags, "--out", str(run), "--resume"]) == 2  # 30 steps asked, 8 stored
    printed = capsys.readouterr().err
    longer = f"To train longer, start a new run from its weights: --init-from {run} with another --out\n"
    assert "steps: 8 -> 30" in printed and printed.endswith(longer)
    assert main(["pretrain", "--resume", str(run), "--tokens", "999"]) == 2
    printed = capsys.readouterr().err
    assert "fixed when a run starts" in printed and printed.endswith(longer)
    assert {path: path.read_bytes() for path in before} == before  # nothing was touched
    assert main(["pretrain", "--resume", str(run), "--machine.micro-batch-size", "8", "--eval-every", "2"]) == 0
    printed = capsys.readouterr().err
    assert "machine.micro_batch_size: 4 -> 8" in printed and "eval_every: 10 -> 2" in printed


def test_a_damaged_checkpoint_is_skipped_and_reported(flags, tmp_path, capsys, monkeypatch) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    for out in (whole, run):
        assert main(["pretrain", *flags, "--out", str(out)]) == 0
    paths = sorted((run / "checkpoints").iterdir())
    weights = paths[-1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    capsys.readouterr()
    lines = []
    monkeypatch.setattr(Logbook, "_print_line", lambda book, last=False: lines.append(book._progress.text(0.0)))
    assert main(["pretrain", "--resume", str(run)]) == 0
    printed = capsys.readouterr().err
    assert str(weights) in printed and "step-00000028" in printed
    assert [line.split()[1] for line in lines] == ["29/30", "30/30", "30/30"]  # each step, and the logged row
    assert_same_run(whole, run)
    for path in (run / "checkpoints").iterdir():
        edited = path / "state.json"
        edited.write_text(edited.read_text().replace('"step": ', '"step": 1'))
    assert main(["pretrain", "--resume", str(run)]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_micro_batches_change_rounding_only(flags, tmp_path) -> None:
    finals = []
    for micro in ("8", "3"):
        run = tmp_path / micro
        machine = ["--machine.micro-batch-size", micro, "--machine.precision", "fp32"]
        assert main(["pretrain", *flags, "--out", str(run), *machine]) == 0
        finals.append(metrics(run)[-1]["loss"])
    assert finals[0] == pytest.approx(finals[1], abs=2e-5)


def test_two_processes_in_one_run(flags, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    long = last_given([*flags, "--steps", "5000", "--log-every", "1", "--out", str(run)])
    command = [sys.executable, "-m", "fastbert", "pretrain", *long]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_rows(run / "metrics.jsonl", 2, process)
        assert main(["pretrain", "--resume", str(run)]) == 2
        assert "another process is training" in capsys.readouterr().err
    finally:
        process.kill()
        process.communicate()


def test_minutes_count_all_sessions(flags, tmp_path, monkeypatch, capsys) -> None:
    """A step takes a minute by the test's clock. The first session is stopped by a signal, the second dies after steps
    that are in no checkpoint and are trained again, the third finishes; a fourth has nothing left to train."""
    now, stop = stopped_clock(monkeypatch), {}

    def stepping(trainer: loop.Trainer, step: int) -> None:
        if stop.get("die") == step:
            raise KeyboardInterrupt
        if stop.get("signal") == step:
            signal.raise_signal(signal.SIGTERM)
        now[0] += 60.0

    around_steps(monkeypatch, stepping)
    short = ["pretrain", *flags, "--layers", "1", "--steps", "12", "--checkpoint-every", "3", "--eval-every", "12"]
    run = tmp_path / "run"

    def found(folder: Path) -> tuple[float, int]:
        summary = json.loads((folder / "report" / "summary.json").read_text())
        return summary["seconds"], summary["sessions"]

    stop["signal"] = 4
    assert main([*short, "--out", str(run)]) == 143
    stop.clear()
    stop["die"] = 8
    now[0] += 5000.0  # the break does not count
    assert main(["pretrain", "--resume", str(run)]) == 130
    stop.clear()
    capsys.readouterr()
    assert main(["pretrain", "--resume", str(run)]) == 0
    assert "in 12.0 minutes over 3 sessions." in capsys.readouterr().out
    assert found(run) == (720.0, 3) and "| minutes | 12.0 |" in (run / "model" / "README.md").read_text()
    assert main(["pretrain", "--resume", str(run)]) == 0
    assert "in 12.0 minutes over 3 sessions." in capsys.readouterr().out and found(run) == (720.0, 3)
    sessions = json.loads((run / "manifest.json").read_text())["sessions"]
    assert [(one["from_step"], one["from_seconds"]) for one in sessions] == [
        *((0, 0.0), (5, 300.0), (6, 360.0), (12, 720.0))
    ]
    whole = tmp_path / "whole"
    assert main([*short, "--out", str(whole)]) == 0
    assert "in 12.0 minutes.\n" in capsys.readouterr().out and found(whole) == (720.0, 1)
    assert_same_run(whole, run)


def test_checkpoints_hold_the_options_of_the_start(flags, tmp_path, monkeypatch) -> None:
    """Also if a session had other machine options."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_before(patch, 3)
        short = ["--layers", "1", "--steps", "6", "--checkpoint-every", "2", "--eval-every", "6"]
        assert main(["pretrain", *flags, *short, "--out", str(run)]) == 130
    assert main(["pretrain", "--resume", str(run), "--machine.micro-batch-size", "8"]) == 0
    first, *others = (json.loads(path.read_text())["options"] for path in sorted(run.glob("checkpoints/*/state.json")))
    assert first["machine"]["micro_batch_size"] == 4 and others == [first] * len(others) != []


def test_not_a_run(tmp_path, capsys) -> None:
    assert main(["pretrain", "--resume", str(tmp_path / "none")]) == 2
    assert "no run to resume" in capsys.readouterr().err
    assert main(["pretrain", "--resume"]) == 2
    assert "needs the folder of the run" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_run_of_an_older_version_is_refused(tmp_path, capsys) -> None:
    """Its options had other names."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    state = {"options": {"data": "sotu", "batch_start": 4, "steps": 9}, "encoder": {}, "science": {}}
    Checkpointer(run / "checkpoints", 1, print).save(3, {"model": {"x": torch.zeros(1)}}, state)
    (run / "config.yaml").write_text("batch_start: 4\n")
    before = sorted(run.rglob("*"))
    assert main(["pretrain", "--resume", str(run)]) == 2
    assert (
        "older version of fastbert, whose options had other names; resume with that version" in capsys.readouterr().err
    )
    assert sorted(run.rglob("*")) == before
