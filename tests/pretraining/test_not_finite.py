"""Values that are not finite are never stored: no weight, moment or note in a checkpoint or an export, no loss as the
best, no NaN in a JSON file. The run stops, names the newest finite checkpoint, and resumes from it to the bit."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastbert.errors import UserError
from fastbert.hub.load import load_pretrained
from fastbert.pretraining import finish, loop, setup
from fastbert.training import checkpoints
from fastbert.training.checkpoints import Checkpointer, read_checkpoint
from tests.flags import main
from tests.pretraining.test_loop import poison
from tests.pretraining.test_resume import assert_same_run
from tests.stand_ins import around_steps

NAN, INF = math.nan, math.inf


@pytest.fixture
def short(flags) -> list[str]:
    return [*flags, "--layers", "1", "--steps", "16", "--eval-every", "16", "--eval-sequences", "4"]


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """No curves, and no waiting for the disk."""
    monkeypatch.setattr(finish, "plot_curves", lambda *arguments, **more: None)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Path]:
    """Uninterrupted runs by their flags."""
    return {}


def inject(monkeypatch, done: int, change: Callable[[loop.Trainer], None]) -> None:
    """Calls `change` with the trainer after this many steps."""

    def after(trainer: loop.Trainer, step: int) -> None:
        if step + 1 == done:
            with torch.no_grad():
                change(trainer)

    around_steps(monkeypatch, after=after)


def in_weight(value: float) -> Callable[[loop.Trainer], None]:
    return lambda trainer: trainer.objective.encoder.words.weight[7, :1].fill_(value)


def in_moment(name: str, value: float) -> Callable[[loop.Trainer], None]:
    return lambda trainer: trainer.optimizer.state[trainer.objective.encoder.words.weight][name][7, 0].fill_(value)


def in_note(trainer: loop.Trainer) -> None:
    trainer.objective.notes.table[-1, -1] = NAN


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_strict_json(folder: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {path}")

    for path in [*folder.rglob("*.json"), *folder.rglob("*.jsonl")]:
        text = path.read_text()
        for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(part, parse_constant=refuse)


def assert_stopped(run: Path, message: str, newest: str) -> None:
    assert "not finite" in message and f"newest finite checkpoint is {run}/checkpoints/{newest}" in message, message
    assert f"fastbert pretrain --resume {run}" in message and "--optimizer.learning-rate" in message
    assert names(run)[-1] == newest and not (run / "model").exists()
    for path in run.glob("checkpoints/*/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
    assert_strict_json(run)


NOTES = ["--notes.enabled", "--notes.half-window", "4", "--notes.fraction", "1"]
EVERY = ["--checkpoint-every", "1", "--keep-checkpoints", "2"]
FIVE = ["--checkpoint-every", "5"]
CASES = {
    "weight": (in_weight(NAN), FIVE, "step-00000010", "model encoder.words.weight"),
    "infinite weight": (in_weight(INF), EVERY, "step-00000011", "model encoder.words.weight"),
    "moment": (in_moment("exp_avg", NAN), FIVE, "step-00000010", "optimizer state."),
    "note": (in_note, [*FIVE, *NOTES], "step-00000010", "model notes.table"),
}


@pytest.mark.parametrize("case", CASES)
def test_stops_and_resumes_from_the_newest_finite_checkpoint(
    case: str, short, uninterrupted, tmp_path, capsys, monkeypatch
) -> None:
    change, more, newest, name = CASES[case]
    science = tuple(more[2:] if more[:2] == FIVE else ())
    whole, run = uninterrupted.setdefault(science, tmp_path / "whole"), tmp_path / "a run"
    command = ["pretrain", *short, "--log-every", "100", *more]
    with monkeypatch.context() as patch:
        inject(patch, 12, change)
        assert main([*command, "--out", str(run)]) == 2
    message = capsys.readouterr().err.replace(f"'{run}'", str(run))  # quoted for the shell
    assert_stopped(run, message, newest)
    assert name in message and "after step 1" in message
    assert main(["pretrain", "--resume", str(run)]) == 0
    if not whole.exists():
        assert main([*command, "--out", str(whole)]) == 0
    assert_same_run(whole, run)


@pytest.mark.parametrize(("more", "noticed"), [(["--log-every", "4"], 16), (["--eval-every", "14"], 14)])
def test_noticed_without_a_save(more, noticed: int, short, tmp_path, capsys, monkeypatch) -> None:
    """By the next logged row or validation, if the losses remain finite: notes that nothing reads."""
    inject(monkeypatch, 12, lambda trainer: trainer.objective.notes.table[-1].fill_(NAN))
    run = tmp_path / "run"
    rare = ["--checkpoint-every", "1000", "--log-every", "1000", "--eval-every", "1000", *NOTES, "--notes.mix", "0"]
    assert main(["pretrain", *short, "--steps", "400", *rare, *more, "--out", str(run)]) == 2
    message = capsys.readouterr().err
    assert f"after step {noticed} holds numbers that are not finite: model notes.table" in message
    assert "validation" not in message
    assert "there is no checkpoint before it" in message and names(run) == []


@pytest.mark.parametrize("done", [12, 16])
def test_stopped_by_a_signal_or_done(done: int, short, tmp_path, capsys, monkeypatch) -> None:
    """Neither the checkpoint of an interrupted run nor the export of a finished run is written."""

    def change(trainer: loop.Trainer) -> None:
        in_weight(NAN)(trainer)
        if done < 16:
            os.kill(os.getpid(), signal.SIGTERM)

    inject(monkeypatch, done, change)
    run = tmp_path / "run"
    assert main(["pretrain", *short, "--checkpoint-every", "7", "--out", str(run)]) == 2
    assert_stopped(run, capsys.readouterr().err, "step-00000007" if done < 16 else "step-00000014")


def test_checkpoints_from_before_skipped_updates_remain(short, tmp_path, capsys, monkeypatch) -> None:
    """Finite weights without a finite loss must not cause the removal of older checkpoints with one."""
    poison(monkeypatch, set(range(8, 16)))
    run = tmp_path / "run"
    assert main(["pretrain", *short, *EVERY, "--out", str(run)]) == 2
    assert "5 steps in a row" in capsys.readouterr().err
    assert [int(name[5:]) for name in names(run)] == [7, 8, 9, 10, 11, 12]
    monkeypatch.undo()
    assert main(["pretrain", "--resume", str(run)]) == 0
    assert names(run) == ["step-00000015", "step-00000016"]


def test_a_run_without_any_update(short, tmp_path, capsys, monkeypatch) -> None:
    poison(monkeypatch, {0, 1, 2})
    run = tmp_path / "run"
    assert main(["pretrain", *short, "--steps", "3", "--out", str(run)]) == 2
    assert "not finite in any of the 3 steps" in capsys.readouterr().err and not (run / "model").exists()


@pytest.mark.parametrize("bad", [{1}, {2, 3}])
def test_a_validation_loss_that_is_not_finite(bad: set[int], short, tmp_path, capsys, monkeypatch) -> None:
    real, calls = setup.evaluate, []

    def evaluating(*arguments, **more):
        calls.append(1)
        values = real(*arguments, **more)
        return values | {"loss": (-INF, NAN)[len(calls) % 2]} if len(calls) in bad else values

    monkeypatch.setattr(setup, "evaluate", evaluating)
    run = tmp_path / "run"
    more = ["--eval-every", "6", "--checkpoint-every", "6", "--keep-checkpoints", "9"]
    assert main(["pretrain", *short, *more, "--out", str(run)]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("validation loss is not finite") == len(bad)
    assert ("masked loss       not finite" in printed.out) == (3 in bad)
    assert_strict_json(run)
    for number, path in enumerate(map(read_checkpoint, sorted((run / "checkpoints").iterdir())), 1):
        assert (path.metric is None) == (number in bad)
        assert (path.state["progress"]["best"] is None) == (set(range(1, number + 1)) <= bad)
    assert (json.loads((run / "report" / "summary.json").read_text())["validation"]["loss"] is None) == (3 in bad)
    assert ("not finite" in (run / "model" / "README.md").read_text()) == (3 in bad)


def test_checkpoints_of_older_versions(short, tmp_path, capsys, monkeypatch) -> None:
    """They may contain NaN: skipped with a message if the newest is loaded, refused if one is given explicitly."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    for out in (run, whole):
        assert main(["pretrain", *short, *FIVE, "--keep-checkpoints", "3", "--out", str(out)]) == 0
    last = read_checkpoint(run / "checkpoints" / "step-00000016")
    last.tensors["optimizer"][next(name for name in last.tensors["optimizer"] if "exp_avg" in name)][0] = NAN
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "require_finite", lambda *arguments: None)
        Checkpointer(run / "checkpoints", 3, print).save(16, last.tensors, last.state, last.metric)
    with pytest.raises(UserError, match=r"step-00000016 holds numbers.* not finite: optimizer state.*earlier"):
        read_checkpoint(last.path)
    assert "step-00000015" in load_pretrained(run).source
    capsys.readouterr()
    for job in (["export", str(last.path)], ["pretrain", *short, "--init-from", str(last.path)]):
        assert main([*job, "--out", str(tmp_path / "new")]) == 2
        assert "not finite" in capsys.readouterr().err and not (tmp_path / "new").exists()
    with monkeypatch.context() as patch:
        inject(patch, 16, in_weight(NAN))
        assert main(["pretrain", "--resume", str(run)]) == 2
    assert f"newest finite checkpoint is {run}/checkpoints/step-00000015" in capsys.readouterr().err
    assert main(["pretrain", "--resume", str(run)]) == 0
    message = capsys.readouterr().err
    assert f"{last.path} holds numbers" in message and "step-00000015 is used" in message
    assert_same_run(whole, run)
