"""W&B and Trackio, without a connection: a resumed training is one run with all steps."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from fastbert.errors import UserError
from fastbert.training.logbook import Logbook
from fastbert.training.trackers import RECORD, check_tracker, shown_name, trackers

ROW = {"loss": 2.0, "lr": 1e-3, "note": "text", "missing": None}


@pytest.fixture
def storage(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "storage"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(folder))
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", folder)
    return folder


def train(tracker: str, folder: Path, first: int, last: int) -> None:
    """Logs every tenth step; a checkpoint of step `first` is where it resumes."""
    with Logbook(folder, 60, start_step=first, options={"width": 32}, callbacks=trackers(tracker), quiet=True) as book:
        for step in range(first + 10, last + 1, 10):
            book.log(step, "train", ROW | {"loss": 100.0 / step})
            if step % 20 == 0:
                book.log(step, "validation", {"loss": math.nan if step == 40 else 90.0 / step})


def wandb_calls(folder: Path) -> list[tuple[str, str, dict[int, dict[str, float]], int]]:
    """Id, project, rows by step and exit code of each call, from its file, a log in the format of LevelDB. W&B's own
    process writes it and may not have ended."""
    end = time.monotonic() + 60
    while (found := read_calls(folder)) is None:
        assert time.monotonic() < end, "a file without an exit code"
        time.sleep(0.1)
    return found


def read_calls(folder: Path) -> list[tuple[str, str, dict[int, dict[str, float]], int]] | None:
    """The calls; None while a file lacks its exit code."""
    from wandb.proto import wandb_internal_pb2

    def records(data: bytes) -> Iterator:
        at, parts = 7, b""
        while at + 7 <= len(data):
            if (left := 2**15 - at % 2**15) < 7:
                at += left
                continue
            size = int.from_bytes(data[at + 4 : at + 6], "little")
            if at + 7 + size > len(data):
                return
            parts += data[at + 7 : at + 7 + size]
            if data[at + 6] in (1, 4):  # whole, or its last part
                yield wandb_internal_pb2.Record.FromString(parts)
                parts = b""
            at += 7 + size

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        rows, code, run = {}, None, None
        for record in records(path.read_bytes()):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run
            elif kind == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                rows[row["_step"]] = row
            elif kind == "exit":
                code = record.exit.exit_code
        if code is None:
            return None
        found.append((run.run_id, run.project, rows, code))
    return found


def test_wandb(storage, tmp_path, monkeypatch) -> None:
    """The second call continues from step 20, whose row of validation is also sent if the first was killed before."""
    folder = tmp_path / "mine" / "seed-0"
    folder.mkdir(parents=True)
    train("wandb", folder, 0, 40)
    monkeypatch.setenv("WANDB_PROJECT", "another")  # the project is that of the first call
    train("wandb", folder, 20, 60)
    identity = json.loads((folder / RECORD).read_text())["wandb"]
    (first, second) = wandb_calls(folder)
    assert first[:2] == second[:2] == (identity["id"], "fastbert") and (first[3], second[3]) == (1, 0)
    assert list(first[2]) == [10, 20, 30, 40] and list(second[2]) == [10, 20, 30, 40, 50, 60]
    row = second[2][60]
    assert row["loss/train"] == pytest.approx(100 / 60) and row["loss/validation"] == 1.5 and row["lr/train"] == 1e-3
    assert "note/train" not in row and "missing/train" not in row


def test_trackio(storage, tmp_path, monkeypatch) -> None:
    """Rows from before a kill are there once, except those of its last step."""
    from trackio.sqlite_storage import SQLiteStorage

    folder = tmp_path / "base"
    folder.mkdir()
    monkeypatch.setenv("TRACKIO_PROJECT", "tests")
    train("trackio", folder, 0, 40)
    train("trackio", folder, 20, 60)
    assert SQLiteStorage.get_runs("tests") == [f"base-{json.loads((folder / RECORD).read_text())['trackio']['id']}"]
    rows = SQLiteStorage.get_logs("tests", SQLiteStorage.get_runs("tests")[0])
    steps = {split: [row["step"] for row in rows if f"loss/{split}" in row] for split in ("train", "validation")}
    assert steps == {"train": [10, 20, 30, 40, 40, 50, 60], "validation": [20, 40, 40, 60]}
    assert rows[-1]["loss/validation"] == 1.5


def test_what_is_refused(tmp_path, monkeypatch) -> None:
    for name in ("wandb", "trackio"):
        monkeypatch.setattr("fastbert.training.trackers.find_spec", lambda name: None)
        with pytest.raises(UserError, match=rf"--track {name} needs .* pip install 'fastbert-pretraining\[{name}\]'"):
            check_tracker(name)
    check_tracker("none")
    monkeypatch.undo()
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def login() -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "login", login)
    with pytest.raises(UserError, match=r"^--track wandb: No API key .* to log in; or set WANDB_MODE=offline to log"):
        check_tracker("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracker("wandb")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    (tmp_path / RECORD).write_text('{"trackio": {"project": "x", "id": "../../x"}}')
    with pytest.raises(UserError, match=r"tracker\.json is damaged: '../../x' is no id of a run; remove the file"):
        train("trackio", tmp_path, 0, 10)
    (tmp_path / RECORD).unlink()
    monkeypatch.setenv("TRACKIO_PROJECT", "registry-x")
    with pytest.raises(UserError, match="--track trackio: Project name 'registry-x' is not allowed"):
        train("trackio", tmp_path, 0, 10)


def test_names() -> None:
    assert shown_name(Path("/a/base")) == "base"
    assert shown_name(Path("/a/mine/fraction-0.1/seed-3")) == "mine/fraction-0.1/seed-3"
