"""A fine-tuning that is killed continues after its last finished epoch and gives the same bytes."""

import json
from pathlib import Path

import pytest
import torch

from fastbert.errors import UserError
from fastbert.finetuning import task_epochs
from fastbert.finetuning.loop import Tuner
from fastbert.finetuning.seed import check_disk
from tests.finetuning.conftest import finetune, make_task

STEPS = 3  # of an epoch
MORE = (
    *("--epochs", "4", "--symmetric", "--log-every", "4", "--worst", "5", "--layer-decay", "0.9"),
    *("--learning-rate", "5e-3", "--custom.metrics", "auc"),
)


class Killed(BaseException):
    """Simulated kill: no handler of fastbert catches it."""


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    return make_task(tmp_path_factory.mktemp("small"), "pairs", train=16 * STEPS - 2, dev=12)


@pytest.fixture(scope="module")
def whole(bert, small, tmp_path_factory) -> Path:
    """Uninterrupted; its best epoch is the second."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert finetune(bert, small, out, *MORE) == 0
    assert json.loads((out / "seed-0" / "result.json").read_text())["best"]["epoch"] == 2
    return out


def killed(monkeypatch, owner, name: str, call: int):
    """Context manager: the call with this number, from 0, is a kill; `done` counts the calls before."""
    done, real = [], getattr(owner, name)

    def counted(*arguments):
        if len(done) == call:
            raise Killed
        done.append(1)
        return real(*arguments)

    monkeypatch.setattr(owner, name, counted)
    return done


def bytes_of(out: Path) -> dict[str, bytes]:
    """All files of a seed, without the times, the names of folders and the binary copy of metrics.jsonl."""
    seed = out / "seed-0"
    assert not (seed / "checkpoints").exists()
    found = {str(path.relative_to(seed)): path.read_bytes() for path in seed.rglob("*") if path.is_file()}
    result = json.loads(found.pop("result.json"))
    for name in ("examples_per_second", "seal", "model"):
        del result[name]
    found = {name: content for name, content in found.items() if not name.startswith(("events.out", "config.yaml"))}
    return found | {"result.json": json.dumps(result).encode()}


@pytest.mark.parametrize(
    ("owner", "name", "call", "epochs"),
    [
        (Tuner, "train_step", STEPS, 1),  # after epoch 1
        (Tuner, "train_step", STEPS + 2, 1),  # in the middle of epoch 2
        (Tuner, "train_step", 3 * STEPS + 1, 3),  # the best epoch lies before the last that was finished
        (task_epochs, "save_task_model", 1, 2),  # between a checkpoint and the model of that epoch
        (task_epochs, "write_errors", 0, 4),  # when all is trained
    ],
)
def test_killed_and_continued_equals_uninterrupted(
    bert, small, whole, tmp_path, monkeypatch, owner, name, call, epochs
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        killed(patch, owner, name, call)
        with pytest.raises(Killed):
            finetune(bert, small, out, *MORE)
    assert [path.name for path in (out / "seed-0" / "checkpoints").iterdir()] == [f"step-{epochs * STEPS:08d}"]
    (out / "seed-0" / ".model.1a2b.tmp").mkdir()  # as a kill within a save leaves it
    (out / "seed-0" / ".model.1a2b.tmp" / "config.json").touch()
    again = killed(monkeypatch, Tuner, "train_step", -1)
    assert finetune(bert, small, out, *MORE) == 0
    assert len(again) == (4 - epochs) * STEPS
    assert bytes_of(out) == bytes_of(whole)


def test_other_options_and_damage_are_refused_or_reported(bert, small, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        killed(patch, Tuner, "train_step", STEPS)
        with pytest.raises(Killed):
            finetune(bert, small, out, *MORE)
    capsys.readouterr()
    assert finetune(bert, small, out, *MORE, "--layer-decay", "0.8") == 2
    assert "layer_decay: 0.9 -> 0.8" in capsys.readouterr().err
    state = out / "seed-0" / "checkpoints" / f"step-{STEPS:08d}" / "state.json"
    whole = state.read_text()
    state.write_text(whole.replace('"epoch": 1', '"epoch": 3'))
    assert finetune(bert, small, out, *MORE) == 2
    printed = capsys.readouterr().err
    assert (
        f"no checkpoint in {out / 'seed-0' / 'checkpoints'} is whole" in printed and "move the folder away" in printed
    )
    state.write_text(whole)
    metrics = out / "seed-0" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"auc"', '"acu"'))
    assert (out / "seed-0" / "model").is_dir()
    assert finetune(bert, small, out, *MORE, "--no-save-model") == 0 and not (out / "seed-0" / "model").exists()
    assert f"{metrics} was changed after it was logged up to step {STEPS}" in capsys.readouterr().err


def test_a_missing_model_makes_the_seed_start_again(bert, small, whole, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        killed(patch, Tuner, "train_step", 3 * STEPS)
        with pytest.raises(Killed):
            finetune(bert, small, out, *MORE, "--no-save-model")
    assert finetune(bert, small, out, *MORE) == 0
    assert "has no model of its best epoch" in capsys.readouterr().err
    assert bytes_of(out) == bytes_of(whole)


def test_the_disk_must_have_room_for_checkpoints_and_model(tmp_path) -> None:
    model = torch.nn.Linear(2**22, 2**22, bias=False, device="meta")  # 70,369 GB
    for save_model, resumed, size in ((True, False, 8), (False, False, 6), (True, True, 4), (False, True, 3)):
        with pytest.raises(UserError, match=f"the checkpoints and the model .* {size * 2**46 / 1e9:.1f} GB"):
            check_disk(tmp_path, model, save_model, resumed)
    check_disk(tmp_path, torch.nn.Linear(2, 2), True, False)
